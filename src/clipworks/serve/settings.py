"""What the service allows: sizes, times and numbers beyond which it refuses instead of suffering."""

from __future__ import annotations

from dataclasses import dataclass, fields

from clipworks.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Limits of one service; what is beyond them is refused before it costs anything.

    Attributes:
        batch: inputs that go through a tower at once.
        wait: seconds that an input waits for company while the model is idle.
        queue: inputs that are being read, waiting or computed; beyond it 429.
        requests: requests at once; beyond it 503.
        memory: bytes of all request bodies at once; beyond it 503.
        body: bytes of one body; beyond it 413.
        seconds: for a body to arrive; beyond it 408.
        pixels: of one picture, by its header, before anything is decoded; beyond it 400.
        inputs: texts, pictures or labels in one request; beyond it 400.
        characters: of one text; beyond it 400.
        hits: of one search.
        classifiers: fitted classifiers that are kept; the one unused for longest goes first.
        grace: seconds after SIGTERM in which new requests are told 503 before the port is closed.
        patience: seconds after SIGTERM in which accepted requests may finish.
    """

    batch: int = 32
    wait: float = 0.002
    queue: int = 2048
    requests: int = 512
    memory: int = 512 << 20
    body: int = 16 << 20
    seconds: float = 30.0
    pixels: int = 50_000_000
    inputs: int = 1024
    characters: int = 16_384
    hits: int = 10_000
    classifiers: int = 32
    grace: float = 1.0
    patience: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("wait", "grace") else 1e-9
            if not least <= value < float("inf"):
                raise ConfigError(f"{field.name} must be a number above 0, not {value}")
        if self.inputs > self.queue:
            raise ConfigError(
                f"a request of {self.inputs} inputs never fits a queue of {self.queue}: raise queue"
            )
        if self.body > self.memory:
            raise ConfigError(
                f"a body of {self.body} bytes never fits {self.memory} bytes for all of them: raise memory"
            )


USUAL = Limits()
"""What holds where nothing else is said."""
