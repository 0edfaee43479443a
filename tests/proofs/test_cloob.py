"""The proof of CLOOB: its world is tied where it says so, its experiment runs at a size without meaning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clipworks.core.clip import unit
from clipworks.data.source import iterate
from clipworks.data.world.scenes import Scene
from clipworks.methods.pretrain.cloob import CLOOB
from clipworks.proofs import cloob as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED

SEED = 0
assert SEED < FIRST_EVALUATION_SEED
TINY = replace(
    proof.SIZES["small"], train=64, held=24, test=24, steps=5, batch_size=32, pixels=32, width=32, depth=1
)


def test_textures_go_with_colors_in_training_only_and_captions_are_true() -> None:
    pictures = proof.world(SEED, replace(TINY, train=300, held=1, test=300))

    def tied(source: object) -> float:
        things = [example.extra["scene"].objects[0] for example in iterate(source)]  # type: ignore[arg-type]
        shares = []
        for color in proof.COLORS:
            textures = [thing.texture for thing in things if thing.color == color]
            shares.append(max(map(textures.count, set(textures))) / len(textures))
        return sum(shares) / len(shares)

    assert tied(pictures.train) > 0.5 > tied(pictures.test)
    said = [0, 0]
    for example in iterate(pictures.train):
        scene: Scene = example.extra["scene"]
        thing, words = scene.objects[0], str(example.texts["alt"]).split()
        assert words[0] == thing.size and thing.shape in words
        others = {*proof.COLORS, *proof.TEXTURES} - {thing.color, thing.texture}
        assert not others & set(words)
        said = [said[0] + (thing.color in words), said[1] + (thing.texture in words)]
    assert all(0.7 < count / 300 < 0.9 for count in said)


def test_arms_are_the_losses_that_they_are_named_after() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (unit(torch.randn(8, 4, generator=generator, dtype=torch.float64)) for _ in range(2))
    given = {"image": x, "text": y, "scale": torch.tensor(30.0, dtype=torch.float64).log()}
    found = {name: arm.loss(given)["loss"] for name, arm in proof.ARMS.items()}
    torch.testing.assert_close(found["cloob"], CLOOB(30.0, proof.BETA).loss(given)["loss"])
    assert found["infonce"] == found["infonce_fixed"]  # they differ in what is learned
    assert proof.ARMS["infonce"].learned and not proof.ARMS["infonce_fixed"].learned
    assert len({round(float(loss), 9) for loss in found.values()}) == 5


@pytest.mark.parametrize("towers", [False, True])
def test_the_experiment_measures_every_arm_and_repeats_itself(
    towers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "RATES", (1e-3,))
    arms = {name: proof.ARMS[name] for name in ("infonce_fixed", "cloob")}
    monkeypatch.setattr(proof, "ARMS", arms)
    size = replace(TINY, towers=towers)
    outcome = proof.experiment(SEED, size)
    assert outcome.details.keys() == arms.keys()
    for row in outcome.details.values():
        assert row["both"] == pytest.approx((row["color"] + row["texture"]) / 2)
        assert 1 <= row["image_directions"] <= 24
    assert (outcome.baseline, outcome.method) == tuple(row["both"] for row in outcome.details.values())
    assert proof.experiment(SEED, size) == outcome
