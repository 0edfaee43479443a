"""Training at any scale: `fit`, and the recipe, callbacks and checkpoints that go with it."""

from clipworks.engine.callbacks import Callback, Evaluate, State
from clipworks.engine.checkpoints import Saving
from clipworks.engine.recipe import Recipe
from clipworks.engine.reports import CsvLog, LossPlot
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
