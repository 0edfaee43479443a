"""The proof of m²-Mix: its arms differ in what they say, its experiment runs at a size without meaning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clipworks.core.clip import unit
from clipworks.data.source import iterate
from clipworks.data.world.captions import describe
from clipworks.errors import DataError
from clipworks.proofs import m2mix as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED

SEED = 0
assert SEED < FIRST_EVALUATION_SEED
TINY = replace(proof.SIZES["small"], train=16, test=8, probe=6, epochs=1, batch_size=8)


def test_no_caption_occurs_twice_and_all_are_of_one_style() -> None:
    pairs = proof.world(SEED, replace(TINY, train=30, test=20))
    examples = [*iterate(pairs.train), *iterate(pairs.test)]
    assert len(examples) == 50 == len({example.texts["alt"] for example in examples})
    for example in examples:
        assert example.extra["scene"].style == proof.STYLE
        assert example.texts["alt"] == describe(example.extra["scene"], "short")
    for example in iterate(pairs.probe):
        thing = example.extra["scene"].objects[0]
        assert pairs.classes.names[example.label or 0] == f"{thing.color} {thing.shape}"


def test_controls_keep_what_they_do_not_change() -> None:
    generator = torch.Generator().manual_seed(0)
    v, t = (unit(torch.randn(6, 8, generator=generator, dtype=torch.float64)) for _ in range(2))
    weight = torch.tensor(0.3, dtype=v.dtype)
    mixed, noise = proof.M2Mix().mixtures(v, t, weight), proof.Noise().mixtures(v, t, weight)
    torch.testing.assert_close((noise * v).sum(dim=1), (mixed * v).sum(dim=1))
    torch.testing.assert_close(noise.norm(dim=1), torch.ones(6, dtype=v.dtype))
    assert ((noise * t).sum(dim=1) - (mixed * t).sum(dim=1)).abs().min() > 1e-3
    other = proof.Mismatched().mixtures(v, t, weight)
    torch.testing.assert_close(other, proof.M2Mix().mixtures(v, t.roll(1, dims=0), weight))


def test_calibration_error_of_a_known_case() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]]).log()
    labels = torch.tensor([0, 1, 0, 0])
    # Bin of 0.9: half right; bin of 0.6: half right.
    assert proof.calibration_error(logits, labels) == pytest.approx(0.5 * 0.4 + 0.5 * 0.1, abs=1e-6)


def test_the_experiment_measures_every_arm_and_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    some = {name: arm for name, arm in proof.arms(0.05, True).items() if name in ("plain", "m2")}
    monkeypatch.setattr(proof, "arms", lambda temperature, more: some)
    outcome = proof.experiment(SEED, TINY)
    assert outcome.details.keys() == {"zero_shot", *some}
    assert outcome.method == outcome.details["m2"]["recall"]
    assert outcome.baseline == outcome.details["plain"]["recall"]
    assert proof.experiment(SEED, TINY) == outcome


def test_every_arm_has_its_own_objective() -> None:
    few, all_of_them = proof.arms(0.05, False), proof.arms(0.05, True)
    assert list(few) == ["plain", "soft", "m2", "ends"] == list(all_of_them)[:4]
    assert few["soft"].temperature == pytest.approx(0.25) and few["soft"].weight == 0
    said = {
        (type(arm), arm.weight, arm.beta, arm.fade, arm.temperature, arm.single)
        for arm in all_of_them.values()
    }
    assert len(said) == len(all_of_them)


def test_without_photographs_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no flickr8k-1000"):
        proof.experiment(SEED, TINY, tmp_path)


def test_photographs_are_of_the_train_split_and_the_probe_is_unseen(shelf: Path) -> None:
    pytest.importorskip("pyarrow")
    pairs = proof.photographs(SEED, TINY, shelf)
    assert len(pairs.train) == 16 and len(pairs.test) == 8 and len(pairs.classes) == 20
    assert "tarantula" in pairs.classes.names
    assert all(len(example.texts["alt"]) == 5 for example in iterate(pairs.test))
