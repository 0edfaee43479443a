"""An index of pictures that answers words and pictures: what stands where, by content, on LanceDB."""

from __future__ import annotations

from clipworks.search.build import Report
from clipworks.search.index import Hit, Index

__all__ = ["Hit", "Index", "Report"]
