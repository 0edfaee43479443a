"""The HTTP service: embeddings, zero-shot and few-shot classification, search, and a page for people."""

from __future__ import annotations

from clipworks.serve.app import create_app
from clipworks.serve.settings import Limits

__all__ = ["Limits", "create_app"]
