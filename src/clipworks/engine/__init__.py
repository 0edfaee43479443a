"""Training at any scale: `fit`, and the recipe, callbacks and checkpoints that go with it."""

from clipworks.engine.callbacks import Callback, CsvLog, Evaluate, LossPlot, State
from clipworks.engine.checkpoints import Saving
from clipworks.engine.recipe import Recipe
from clipworks.engine.training import Diverged, Interrupted, Result, fit

__all__ = [
    "Callback",
    "CsvLog",
    "Diverged",
    "Evaluate",
    "Interrupted",
    "LossPlot",
    "Recipe",
    "Result",
    "Saving",
    "State",
    "fit",
]
