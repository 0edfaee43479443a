"""Keep the weights of the best evaluation, and end a training that has stopped getting better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clipworks.engine.callbacks import Evaluate, State
from clipworks.engine.checkpoints import tensors_once


class KeepBest(Evaluate):
    """Evaluate before the first step and after every epoch; keep the best trained weights in a file.

    After `patience` evaluations without a better one the training ends, as if its last step were done; a
    training that is started again knows this from its table. For trainings in one process: callbacks run in
    the first one only.

    Args:
        function: `clip -> {name: number}`.
        by: the name whose number shall be large; of equal ones the first counts.
        kept: the file, safetensors.
        patience: None never ends.
    """

    def __init__(
        self,
        function: Callable[[Any], Mapping[str, float]],
        by: str,
        kept: Path,
        patience: int | None = None,
    ):
        super().__init__(function)
        self.by, self.kept, self.patience = by, kept, patience

    def on_start(self, state: State) -> None:
        super().on_start(state)
        if self.last < 0:
            self._evaluate(state)
        self._end_if_idle(state)

    def _evaluate(self, state: State) -> None:
        before = self.last
        super()._evaluate(state)
        if self.last == before or state.step == 0:
            return
        if self._behind() == 0:
            weights = {name: tensor.cpu().contiguous() for name, tensor in tensors_once(state.clip).items()}
            temporary = self.kept.with_suffix(".writing")
            save_file(weights, temporary)
            temporary.replace(self.kept)
        self._end_if_idle(state)

    def _behind(self) -> int:
        """How many evaluations of trained weights there were since the best one; -1 without any."""
        numbers = [row[self.by] for row in self.table.read() if row["step"] > 0]
        return len(numbers) - 1 - numbers.index(max(numbers)) if numbers else -1

    def _end_if_idle(self, state: State) -> None:
        if self.patience is not None and self._behind() >= self.patience:
            state.steps = state.step
