"""A CSV file that a crash cannot spoil."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path


class Table:
    """A CSV file that grows by rows with increasing `step`, whole after any crash.

    A column that appears later (a new term) rewrites the file with it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.columns: list[str] = []

    def open(self, step: int) -> None:
        """Keep rows up to `step` only: later ones are repeated by the resumed training."""
        rows = [row for row in self.read() if row["step"] <= step]
        self.columns = list(rows[0]) if rows else []
        if self.path.exists():
            self._rewrite(rows)

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row; it is handed to the system at once."""
        new = [name for name in row if name not in self.columns]
        if new:
            rows = self.read()
            self.columns += new
            self._rewrite([*rows, dict(row)])
            return
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(self._format(row))

    def read(self) -> list[dict[str, float]]:
        """All whole rows, empty cells as NaN; a row that a crash cut short is left out."""
        if not self.path.exists():
            return []
        whole, newline, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        rows = []
        for row in csv.DictReader(io.StringIO(whole + newline)):
            try:
                rows.append({name: float(value) if value else math.nan for name, value in row.items()})
            except (TypeError, ValueError):
                continue
        return [row for row in rows if not math.isnan(row.get("step", math.nan))]

    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        temporary = self.path.with_suffix(".writing")
        header = ",".join(self.columns) + "\n" if self.columns else ""
        temporary.write_text(header + "".join(self._format(row) for row in rows), encoding="utf-8")
        temporary.replace(self.path)

    def _format(self, row: Mapping[str, float]) -> str:
        return ",".join(_cell(row.get(name, math.nan)) for name in self.columns) + "\n"


def _cell(value: float) -> str:
    if isinstance(value, float) and math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.8g}"
