"""What the service tells Prometheus, and the log."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from clipworks.errors import require

LOGGER = logging.getLogger("clipworks.serve")
_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Measures:
    """Counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        prometheus = require("prometheus_client", extra="serve", purpose="the service")
        self.registry = prometheus.CollectorRegistry()
        self.content_type: str = prometheus.CONTENT_TYPE_LATEST
        self._render = prometheus.generate_latest
        make = {"registry": self.registry}
        self.requests = prometheus.Counter(
            "clipworks_requests", "Requests answered.", ("method", "path", "status"), **make
        )
        self.seconds = prometheus.Histogram(
            "clipworks_request_seconds", "From headers to answer.", ("path",), buckets=_SECONDS, **make
        )
        self.active = prometheus.Gauge("clipworks_requests_active", "Requests being answered.", **make)
        self.held = prometheus.Gauge("clipworks_inputs_held", "Inputs read, waiting or computed.", **make)
        self.inputs = prometheus.Counter("clipworks_inputs", "Inputs computed.", ("kind",), **make)
        self.sizes = prometheus.Histogram(
            "clipworks_batch_size", "Inputs of a batch.", ("kind",), buckets=_SIZES, **make
        )
        self.busy = prometheus.Counter(
            "clipworks_batch_seconds", "Seconds that batches took.", ("kind",), **make
        )
        prometheus.ProcessCollector(**make)

    def batch(self, kind: str, size: int, seconds: float) -> None:
        """Count one batch."""
        self.inputs.labels(kind).inc(size)
        self.sizes.labels(kind).observe(size)
        self.busy.labels(kind).inc(seconds)

    def request(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count one request by the pattern of its path."""
        self.requests.labels(method, path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return bytes(self._render(self.registry))


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and whatever a record holds under `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send what the service and its server say to stderr, as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in (LOGGER.name, "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level if name == LOGGER.name else logging.WARNING)
