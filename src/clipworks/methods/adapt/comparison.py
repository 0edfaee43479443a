"""Methods of the family side by side: same shots, same seeds, same features, one table and one plot.

Every run (a method, a number of shots, a seed) is a line of `runs.jsonl` in a folder as soon as it is done,
so an interrupted comparison goes on where it was, and methods or shots that are added later are all that is
computed. Features are kept in a store beside it: a picture is encoded once for all methods, shots and seeds.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipworks.core.clip import Clip
from clipworks.data.captions import ClassTexts
from clipworks.data.source import Selected
from clipworks.data.splits import Splits, examples_of
from clipworks.errors import ConfigError, DataError, require
from clipworks.evaluate.fewshot import base_new, calibration_error, few_shot, harmonic_mean, places_in, take
from clipworks.methods.adapt.base import Adapter, method_named, print_of
from clipworks.parts.features import FeatureStore, Views, fingerprint

Settings = Mapping[str, Mapping[str, Any]]
Advance = Callable[[int, int], None]
RUNS = "runs.jsonl"
WITHOUT_SHOTS = 0  # stands for methods that need no labeled example


@dataclass(frozen=True)
class Data:
    """Pictures in memory or as paths, with labels that count `classes`."""

    name: str
    train: tuple[list[Any], NDArray[np.int64]]
    validation: tuple[list[Any], NDArray[np.int64]]
    test: tuple[list[Any], NDArray[np.int64]]
    classes: ClassTexts


def gather(name: str, splits: Splits, most: int | None = None) -> Data:
    """The pictures of a data set.

    Args:
        name: what runs are filed under.
        splits: its parts.
        most: test pictures that are measured on, always the same draw; None takes all.

    Raises:
        DataError: if its test part is empty.
    """
    if not len(splits.test):
        raise DataError(f"{name}: has no test part to compare methods on")
    held = examples_of(splits.validation) if len(splits.validation) else ([], np.empty(0, np.int64))
    test = splits.test
    if most is not None and most < len(test):
        name = f"{name}, {most} test pictures"
        test = Selected(test, np.sort(np.random.default_rng(0).permutation(len(test))[:most]))
    return Data(name, examples_of(splits.train), held, examples_of(test), splits.classes)


def compare(
    clip: Clip,
    data: Data,
    methods: Sequence[str],
    shots: Sequence[int],
    seeds: Sequence[int],
    folder: Path,
    *,
    settings: Settings | None = None,
    halves: bool = False,
    left_out: dict[str, str] | None = None,
    advance: Advance | None = None,
) -> list[dict[str, Any]]:
    """Fit and measure every method at every number of shots under every seed.

    Args:
        clip: the model.
        data: what it is adapted to.
        methods: names, see `method_named`.
        shots: examples a class. Methods that need no label are run once.
        seeds: each draws its own shots.
        folder: of the runs and the features.
        settings: by method, in place of its defaults.
        halves: fit to the base classes, measure on base and new ones (see `evaluate/fewshot`); methods whose
            learned part belongs to its classes are left out.
        left_out: gets the methods that cannot be fitted with these settings, and why, in place of an error.
        advance: told how many runs are done, of how many.

    Returns:
        A record a run: `method`, `shots`, `seed`, `accuracy`, `calibration_error`, `parameters`,
        `encode_seconds`, `fit_seconds`, `predict_seconds`; with halves `base`, `new`, `harmonic`.

    Raises:
        ConfigError: for an unknown method, no shots, or a method that lacks a setting.
        EstimatorInputError: for more shots than a class has pictures.
    """
    if not methods or not shots or not seeds:
        raise ConfigError("a comparison needs at least one method, one number of shots and one seed")
    settings = settings or {}
    classes = {name: method_named(name) for name in methods}
    unknown = set(settings) - set(methods)
    if unknown:
        raise ConfigError(f"settings are given for {sorted(unknown)[0]!r}, which is not compared")
    folder.mkdir(parents=True, exist_ok=True)
    store = FeatureStore(folder / "features")
    about: dict[str, Any] = {
        "model": fingerprint(clip),
        "data": data.name,
        "halves": halves,
        "train": len(data.train[1]),
    }
    plan: list[dict[str, Any]] = [
        {**about, "method": name, "settings": _told(settings.get(name, {})), "shots": count, "seed": seed}
        for count in [WITHOUT_SHOTS, *shots]
        for name, method in classes.items()
        if (count == WITHOUT_SHOTS) == (method.labels_needed is not True)
        if method.retargets or not halves
        for seed in (seeds if count != WITHOUT_SHOTS else seeds[:1])
    ]
    known = {_key(run): run for run in _read(folder / RUNS)}
    found, impossible = [], set[tuple[str, int]]()
    for done, wanted in enumerate(plan):
        if advance is not None:
            advance(done, len(plan))
        run = known.get(_key(wanted))
        if (wanted["method"], wanted["shots"]) in impossible:
            continue
        if run is None:
            estimator = classes[wanted["method"]](
                clip,
                **{
                    "store": store,
                    "progress": False,
                    "seed": wanted["seed"],
                    **settings.get(wanted["method"], {}),
                },
            )
            try:
                measured = _measure(estimator, data, wanted["shots"], wanted["seed"], halves)
            except ConfigError as error:
                if left_out is None:
                    raise
                impossible.add((wanted["method"], wanted["shots"]))
                left_out[wanted["method"]] = str(error)
                continue
            run = {**wanted, **measured}
            _append(folder / RUNS, run)
        found.append(run)
    if advance is not None:
        advance(len(plan), len(plan))
    return found


def beside(runs: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """All runs of a folder that can stand in one table with some of it.

    Those of the same model, data and halves; of a method that was run with several settings, those of `runs`
    or else of the newest run.

    Args:
        runs: what `compare` returned.
        folder: where it left them.
    """
    about = {_about(run) for run in runs}
    there = [run for run in _read(folder / RUNS) if _about(run) in about]
    settings = {run["method"]: run["settings"] for run in [*there, *runs]}
    chosen = {_key(run): run for run in there if run["settings"] == settings[run["method"]]}
    return list(chosen.values())


def _measure(estimator: Adapter, data: Data, shots: int, seed: int, halves: bool) -> dict[str, Any]:
    X, y = data.train
    X_test, y_test = data.test
    held = data.validation if len(data.validation[1]) else None
    names = data.classes
    if shots == WITHOUT_SHOTS:
        drawn, validation = np.arange(len(y)), None
    else:
        draw = few_shot(y, shots, seed, None if held is None else held[1])
        drawn = draw.train
        validation = None if held is None else (take(held[0], draw.validation), held[1][draw.validation])
    base, new = base_new(y)
    place = np.arange(len(names))
    if halves:
        names = data.classes.select([int(label) for label in base])
        place = np.searchsorted(base, place)
        drawn = drawn[np.isin(y[drawn], base)]
        if validation is not None:
            kept = np.flatnonzero(np.isin(validation[1], base))
            validation = take(validation[0], kept), place[validation[1][kept]]
    estimator.set_params(class_names=names)

    started = time.perf_counter()
    pictures = take(X, drawn)
    if estimator.image_tower == "frozen" and shots != WITHOUT_SHOTS:
        # So that the time of a fit is that of the method: its features are in the store from here on.
        estimator._encoded(pictures, Views(estimator.views, estimator.crop, seed=estimator.seed))
        if validation is not None:
            estimator._encoded(list(validation[0]), Views())
    encoded = time.perf_counter()
    if shots == WITHOUT_SHOTS:
        estimator.fit(pictures)
    else:
        estimator.fit(pictures, place[y[drawn]], validation=validation)
    fitted = time.perf_counter()
    times = {"encode_seconds": encoded - started, "fit_seconds": fitted - encoded}
    if halves:
        on_base = _accuracy(estimator, X_test, y_test, base, names)
        new_names = data.classes.select([int(label) for label in new])
        on_new = _accuracy(estimator.for_classes(new_names), X_test, y_test, new, new_names)
        results = {"base": on_base, "new": on_new, "harmonic": harmonic_mean(on_base, on_new)}
    else:
        likely = estimator.predict_proba(X_test)
        right = places_in(names, estimator)[y_test]
        results = {
            "accuracy": float((likely.argmax(axis=1) == right).mean()),
            "calibration_error": calibration_error(likely, right),
        }
    times["predict_seconds"] = time.perf_counter() - fitted
    return {**results, "parameters": estimator.trainable_parameters, **times}


def _accuracy(
    estimator: Adapter, X: list[Any], y: NDArray[np.int64], half: NDArray[np.int64], names: ClassTexts
) -> float:
    rows = np.flatnonzero(np.isin(y, half))
    right = places_in(names, estimator)[np.searchsorted(half, y[rows])]
    return float((estimator.predict_proba(take(X, rows)).argmax(axis=1) == right).mean())


def summarize(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record a method and number of shots: means over seeds, and the population deviation of accuracy."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["method"], run["shots"]), []).append(run)
    rows = []
    for (method, shots), group in groups.items():
        row: dict[str, Any] = {"method": method, "shots": shots, "seeds": len(group)}
        for name in ("accuracy", "base", "new", "harmonic", "calibration_error"):
            if name in group[0]:
                values = [run[name] for run in group]
                row |= {name: float(np.mean(values)), f"{name}_deviation": float(np.std(values))}
        if "base" in row:
            # Papers report this one: the harmonic mean of the means.
            row["harmonic_of_means"] = harmonic_mean(row["base"], row["new"])
        row["parameters"] = group[0]["parameters"]
        for name in ("encode_seconds", "fit_seconds", "predict_seconds"):
            row[name] = float(np.mean([run[name] for run in group]))
        rows.append(row)
    return rows


def write(rows: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write `comparison.json` (means and runs), `comparison.csv` (means), and `comparison.png`."""
    json_path, csv_path, plot_path = (folder / f"comparison.{suffix}" for suffix in ("json", "csv", "png"))
    content = json.dumps({"means": list(rows), "runs": list(runs)}, indent=1)
    json_path.write_text(content + "\n", encoding="utf-8")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with csv_path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, plot_path)
    return [json_path, csv_path, plot_path]


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy (or the harmonic mean) in percent, with its deviation over seeds.

    On the left against the number of shots, a line a method, for methods that were run with several; on the
    right all methods at the most shots each was run with, the best on top.

    Raises:
        MissingExtra: without matplotlib.
    """
    require("matplotlib", extra="evaluate", purpose="the plot of a comparison")
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    measure = "accuracy" if "accuracy" in rows[0] else "harmonic"
    named = "accuracy, %" if measure == "accuracy" else "harmonic mean of base and new accuracy, %"
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["shots"]):
        by_method.setdefault(row["method"], []).append(row)
    order = sorted(by_method, key=lambda method: by_method[method][-1][measure])
    lines = [method for method in reversed(order) if len(by_method[method]) > 1]
    palette = colormaps["tab20"]
    color = {method: palette(place % 20) for place, method in enumerate(lines)}
    reference = by_method.get("zero-shot")

    height = max(3.5, 0.8 + 0.23 * len(order))
    figure = Figure(figsize=(11 if lines else 6.5, height), layout="constrained")
    panels = figure.subplots(1, 2 if lines else 1, squeeze=False)[0]
    for place, method in enumerate(lines):
        own = by_method[method]
        panels[0].errorbar(
            [row["shots"] for row in own],
            [100 * row[measure] for row in own],
            [100 * row[f"{measure}_deviation"] for row in own],
            marker="osv^D"[place % 5],
            markersize=4,
            capsize=3,
            color=color[method],
            label=method,
        )
    if lines:
        ticks = sorted({row["shots"] for method in lines for row in by_method[method]})
        panels[0].set_xscale("log", base=2)
        panels[0].set_xticks(ticks, [str(tick) for tick in ticks])
        panels[0].set_xlabel("labeled pictures a class")
        panels[0].set_ylabel(named)
        panels[0].grid(alpha=0.3)
        panels[0].legend(fontsize="x-small", ncols=1 + len(lines) // 9)
        if reference:
            panels[0].axhline(100 * reference[0][measure], linestyle="--", color="gray")
    for place, method in enumerate(order):
        last = by_method[method][-1]
        panels[-1].errorbar(
            100 * last[measure],
            place,
            xerr=100 * last[f"{measure}_deviation"],
            marker="o",
            capsize=3,
            color=color.get(method, "black"),
        )
    ends = [by_method[method][-1] for method in order]
    panels[-1].set_yticks(range(len(order)), [_ending(row) for row in ends], fontsize="small")
    panels[-1].set_xlabel(named)
    panels[-1].grid(alpha=0.3)
    if reference:
        panels[-1].axvline(100 * reference[0][measure], linestyle="--", color="gray")
    figure.savefig(path, dpi=150)


def _ending(row: Mapping[str, Any]) -> str:
    draws = "1 draw" if row["seeds"] == 1 else f"{row['seeds']} draws"
    told = "no labels" if row["shots"] == WITHOUT_SHOTS else f"{row['shots']} shots, {draws}"
    return f"{row['method']} ({told})"


def _told(settings: Mapping[str, Any]) -> dict[str, Any]:
    def told(value: Any) -> Any:
        if isinstance(value, (Clip, Adapter)):
            return print_of(value)
        return value if isinstance(value, (bool, int, float, str)) else repr(value)

    return {name: told(value) for name, value in settings.items()}


def _about(run: Mapping[str, Any]) -> str:
    return json.dumps([run.get(name) for name in ("model", "data", "train", "halves")])


def _key(run: Mapping[str, Any]) -> str:
    own = [run.get(name) for name in ("method", "settings", "shots", "seed")]
    return _about(run) + json.dumps(own, sort_keys=True)


def _append(path: Path, run: Mapping[str, Any]) -> None:
    """Add a line; one that an interruption has cut off is ended first."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(run).encode() + b"\n")


def _read(path: Path) -> list[dict[str, Any]]:
    """The runs that are there; a line that was cut off by an interruption is left out."""
    if not path.is_file():
        return []
    runs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            runs.append(json.loads(line))
        except ValueError:
            continue
    return runs
