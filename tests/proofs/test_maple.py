"""The proof of MaPLe: its experiment measures every arm on both halves and repeats itself."""

from __future__ import annotations

from clipworks.checkpoints.zoo import load
from clipworks.data.splits import world_style
from clipworks.evaluate.fewshot import harmonic_mean
from clipworks.proofs import maple as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED

SEED = 0
assert SEED < FIRST_EVALUATION_SEED
TINY = proof.Size(test=24, epochs=1, rates=(0.0035,), shots=1)


def test_the_experiment_measures_every_arm_and_repeats_itself() -> None:
    clip = load("seedling")
    splits = world_style(proof.STYLE, clip.preprocessing.image_size, SEED)
    outcome = proof.experiment(clip, splits, SEED, TINY)
    assert outcome.details.keys() == {
        "zero_shot", "coop", "language", "vpt", "ivlp", "maple", "frozen_maps",
    }  # fmt: skip
    for arm in outcome.details.values():
        assert all(0 <= value <= 1 for value in arm.values())
        assert arm["harmonic"] == harmonic_mean(arm["base"], arm["new"])
    assert outcome.method == outcome.details["maple"]["harmonic"]
    assert outcome.baseline == outcome.details["coop"]["harmonic"]
    assert proof.experiment(clip, splits, SEED, TINY) == outcome


def test_frozen_maps_stay_as_they_start_while_the_prompts_learn() -> None:
    clip = load("seedling")
    splits = world_style(proof.STYLE, clip.preprocessing.image_size, SEED)
    pictures, labels = [splits.train[i].image for i in range(8)], [i % 2 for i in range(8)]
    settings = {"class_names": ["a", "b"], "batch_size": 4, "lr": 0.1, "progress": False}
    short, long = (
        proof.FrozenMaps(clip, epochs=epochs, **settings).fit(pictures, labels).module_ for epochs in (1, 2)
    )
    assert all((one == other).all() for one, other in zip(short.maps.parameters(), long.maps.parameters()))
    assert all((one != other).any() for one, other in zip(short.prompts, long.prompts))
