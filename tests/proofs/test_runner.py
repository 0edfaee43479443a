"""The runner: what it computes, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clipworks.cli import app
from clipworks.errors import ConfigError, DataError
from clipworks.papers import Paper, Places, paper
from clipworks.proofs import base, runner
from clipworks.proofs.base import Outcome, Proof, proof_of, proven
from clipworks.proofs.runner import check_seeds, prove

SEEDS = range(1000, 1005)
KEYS = {"slug", "baseline", "method", "difference", "interval", "seeds", "verdict"}


class Experiment:
    """A method that is `gain` better than a baseline of 0.5, give or take a little by seed."""

    def __init__(self, gain: float) -> None:
        self.gain = gain
        self.ran: list[tuple[int, str]] = []

    def __call__(self, seed: int, budget: str, data: Path | None) -> Outcome:
        self.ran.append((seed, budget))
        return Outcome(0.5, 0.5 + self.gain + 0.001 * (seed % 3), {"by": seed})

    def proof(self, **changes: Any) -> Proof:
        proof = Proof("clip", "It is better.", "old", "new", "accuracy", self)
        return replace(proof, **changes)


def stored(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "clip.json").read_text())
    return result


def published(folder: Path) -> Paper:
    places = paper("clip").places
    return paper("clip", Places(places.package, places.papers, places.evidence, folder))


def test_the_file_has_the_figures_and_the_register_reads_it(tmp_path: Path) -> None:
    experiment = Experiment(0.2)
    result = prove(experiment.proof(), SEEDS, out=tmp_path)
    differences = [0.2 + 0.001 * (seed % 3) for seed in SEEDS]
    file = stored(tmp_path)
    assert file.keys() >= KEYS and result.keys() >= KEYS
    assert file["difference"] == pytest.approx(sum(differences) / 5)
    assert file["interval"][0] < file["difference"] < file["interval"][1]
    assert (file["baseline"], file["seeds"], file["verdict"]) == (0.5, list(SEEDS), "holds")
    assert file["published"] is True and file["runs"][0]["outcomes"][4]["details"] == {"by": 1004}
    assert (tmp_path / "clip.png").read_bytes().startswith(b"\x89PNG")
    proof = published(tmp_path).proof
    assert proof is not None and (proof.verdict, proof.seeds, proof.budget) == ("holds", 5, "small")


def test_the_machine_is_told_without_its_name(tmp_path: Path) -> None:
    prove(Experiment(0.2).proof(), SEEDS, out=tmp_path)
    machine = stored(tmp_path)["machine"]
    assert machine["processor"] and machine["cores"] >= 1
    assert socket.gethostname() not in machine.values()


def test_a_method_below_its_baseline_does_not_hold(tmp_path: Path) -> None:
    assert prove(Experiment(-0.2).proof(), SEEDS, out=tmp_path)["verdict"] == "does not hold"
    mirrored = Experiment(-0.2).proof(direction=-1)
    assert prove(mirrored, SEEDS, out=tmp_path / "less")["verdict"] == "holds"
    assert prove(Experiment(0.2).proof(margin=0.5), SEEDS, out=tmp_path / "m")["verdict"] == "does not hold"


def test_a_control_that_does_as_well_takes_the_mechanism_from_the_cause(tmp_path: Path) -> None:
    def run(seed: int, budget: str, data: Path | None) -> Outcome:
        noise = 0.001 * (seed % 3)
        arms = {"far": {"top1": 0.5 + noise}, "near": {"top1": 0.699 + noise}, "above": {"top1": 0.8 + noise}}
        return Outcome(0.5, 0.7, arms)

    def cause(*paths: str) -> tuple[str, list[str]]:
        proof = Experiment(0).proof(run=run, controls=dict.fromkeys(paths, "something"))
        said = prove(proof, SEEDS, out=tmp_path / "-".join(paths))
        return said["mechanism_as_the_cause"], [row["method_is_better"] for row in said["controls"]]

    assert cause("far.top1") == ("supported", ["holds"])
    assert cause("far.top1", "above.top1") == ("not supported", ["holds", "does not hold"])
    # As good on the mean: these seeds cannot tell.
    assert cause("near.top1")[0] == "undecided"
    with pytest.raises(ConfigError, match="no detail"):
        cause("far.top5")


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    result = prove(Experiment(0.9).proof(), [1000], out=tmp_path)
    assert (result["verdict"], result["interval"]) == ("undecided", None)


def test_the_same_settings_never_compute_a_seed_twice(tmp_path: Path) -> None:
    experiment = Experiment(0.2)
    prove(experiment.proof(), SEEDS, out=tmp_path)
    prove(experiment.proof(), range(1000, 1007), out=tmp_path)
    assert [seed for seed, _ in experiment.ran] == list(range(1000, 1007))
    assert stored(tmp_path)["seeds"] == list(range(1000, 1007)) and len(stored(tmp_path)["runs"]) == 1


def test_other_settings_are_another_run_and_the_earlier_one_stays(tmp_path: Path) -> None:
    good, bad = Experiment(0.2), Experiment(-0.2)
    prove(bad.proof(), SEEDS, out=tmp_path)
    before = stored(tmp_path)["runs"][0]
    prove(good.proof(), SEEDS, budget="full", out=tmp_path)
    runs = stored(tmp_path)["runs"]
    assert runs[0] == before and [run["verdict"] for run in runs] == ["does not hold", "holds"]
    assert stored(tmp_path)["budget"] == "full"
    prove(good.proof(), range(1000, 1002), data=tmp_path, out=tmp_path)
    assert stored(tmp_path)["budget"] == "full", "a short run displaced a full one"
    assert len(stored(tmp_path)["runs"]) == 3


def test_changed_code_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(0.2)
    prove(experiment.proof(), SEEDS, out=tmp_path)
    monkeypatch.setattr(runner, "code_of", lambda proof: "other")
    prove(experiment.proof(), SEEDS, out=tmp_path)
    assert len(experiment.ran) == 10 and len(stored(tmp_path)["runs"]) == 2


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    experiment = Experiment(0.2)

    def stops(seed: int, budget: str, data: Path | None) -> Outcome:
        if seed == 1003 and len(experiment.ran) == 3:
            raise KeyboardInterrupt
        return experiment(seed, budget, data)

    proof = experiment.proof(run=stops)
    with pytest.raises(KeyboardInterrupt):
        prove(proof, SEEDS, out=tmp_path)
    assert stored(tmp_path)["seeds"] == [1000, 1001, 1002]
    assert stored(tmp_path)["runs"][0]["begun"] == [1003], "a seed that was begun stays named"
    experiment.ran.append((-1, ""))
    prove(proof, SEEDS, out=tmp_path)
    assert [seed for seed, _ in experiment.ran] == [1000, 1001, 1002, -1, 1003, 1004]
    assert stored(tmp_path)["runs"][0]["begun"] == []


def test_development_seeds_are_kept_out_of_what_is_published(tmp_path: Path) -> None:
    result = prove(Experiment(0.2).proof(), range(5), out=tmp_path)
    assert result["published"] is False
    assert not (tmp_path / "clip.json").exists() and (tmp_path / "development" / "clip.json").exists()
    assert published(tmp_path).proof is None


@pytest.mark.parametrize("seeds", [[99, 1000], [100], [500, 501], [98, 99, 100], [], [1000, 1000]])
def test_seeds_that_are_neither_are_refused(seeds: list[int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        prove(Experiment(0.2).proof(), seeds, out=tmp_path)
    assert not list(tmp_path.iterdir())
    assert check_seeds([0, 99]) is False and check_seeds([1000]) is True


def test_damaged_results_and_numbers_that_are_not_finite_stop_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not finite"):
        prove(Experiment(float("nan")).proof(), [1000], out=tmp_path)
    (tmp_path / "clip.json").write_text('{"runs": [1]}')
    with pytest.raises(DataError, match="not the results of a proof"):
        prove(Experiment(0.1).proof(), [1000], out=tmp_path)


def test_every_proof_is_of_the_paper_whose_file_it_is_in() -> None:
    assert "clip" in proven()
    for slug in proven():
        proof = proof_of(slug)
        assert proof.slug == slug and proof.claim.endswith(".") and proof.margin >= 0
    with pytest.raises(ConfigError, match="no proof yet"):
        proof_of("3d-ovs" if "3d-ovs" not in proven() else "coop")
    with pytest.raises(ConfigError, match="no paper 'clop'"):
        proof_of("clop")


def test_the_command_prints_json_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "proof_of", lambda slug: Experiment(0.2).proof())
    monkeypatch.setattr(base, "proven", lambda: ["clip"])
    words = ["prove", "clip", "--seeds", "2", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout).keys() >= KEYS
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "holds" in done.stdout and "new against old" in done.stdout
    done = CliRunner().invoke(app, ["prove", "--all", "--seeds", "2", "--out", str(tmp_path), "--json"])
    assert [result["slug"] for result in json.loads(done.stdout)] == ["clip"]


@pytest.mark.parametrize(
    "words", [[], ["clip", "--all"], ["clip", "--seed", "500"], ["clip", "--budget", "huge"], ["clop"]]
)
def test_the_command_refuses_what_makes_no_sense(words: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["prove", *words, "--out", str(tmp_path)])
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
