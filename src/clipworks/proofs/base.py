"""What a proof is: a claim, a baseline, and an experiment that compares a method with it under one seed.

A proof is a file `proofs/<slug>.py` that defines `PROOF`. Seeds 0 to 99 are for development; those from
1000 on are for evaluation and must never be looked at while a method or its proof is being made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from clipworks.errors import ConfigError
from clipworks.papers import paper, register

Budget = Literal["small", "full"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
DEVELOPMENT_SEEDS = range(100)
FIRST_EVALUATION_SEED = 1000


@dataclass(frozen=True)
class Outcome:
    """What one seed gave.

    Attributes:
        baseline, method: the metric of both, from the same data in the same run.
        details: whatever else was measured, ready for JSON.
    """

    baseline: float
    method: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Proof:
    """An experiment that can fail.

    Attributes:
        slug: of the paper.
        claim: what is tested, in one sentence.
        baseline, method: what is compared.
        metric: what is measured.
        run: the experiment; the same seed, budget and data give the same outcome. `data` is the folder
            given as `--data`, or None.
        direction: 1 if more of the metric is better, -1 if less is.
        margin: by how much the method must be better for the claim to hold.
        controls: entries of an outcome's details, by path (`mean_field.both`), with what each lacks of the
            mechanism. A control that does as well as the method says that the mechanism is not the cause.
    """

    slug: str
    claim: str
    baseline: str
    method: str
    metric: str
    run: Callable[[int, Budget, Path | None], Outcome]
    direction: Literal[1, -1] = 1
    margin: float = 0.0
    controls: Mapping[str, str] = field(default_factory=dict)


def proof_of(slug: str) -> Proof:
    """The proof of a paper.

    Raises:
        ConfigError: if there is no such paper, or it has no proof yet.
    """
    entry = paper(slug)
    if slug not in proven():
        raise ConfigError(f"{entry.slug} has no proof yet; there are proofs of {', '.join(proven())}")
    found: Proof = importlib.import_module(f"clipworks.proofs.{module_name(slug)}").PROOF
    return found


def proven() -> list[str]:
    """Slugs of all papers that have a proof."""
    folder = Path(__file__).parent
    return [entry.slug for entry in register() if (folder / f"{module_name(entry.slug)}.py").is_file()]


def module_name(slug: str) -> str:
    """A slug as the name of a module."""
    return slug.replace("-", "_")


def detail(outcome: Mapping[str, Any], path: str) -> float:
    """A number among an outcome's details, by its path.

    Raises:
        ConfigError: if there is none.
    """
    found: Any = outcome["details"]
    for name in path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            raise ConfigError(f"the experiment has no detail {path!r}")
        found = found[name]
    return float(found)
