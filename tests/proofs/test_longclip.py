"""The proof of Long-CLIP: its captions agree where they must, and its experiment runs at any size."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clipworks.methods.pretrain.longclip import LongClip, stretched_length
from clipworks.proofs import laboratory
from clipworks.proofs import longclip as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED

TINY = replace(
    proof.SIZES["small"], known=96, new=40, samples=96, steps=2, batch_size=8, groups=3, test=12, width=32,
    depth=1, components=2,
)  # fmt: skip
SEED = 0
assert SEED < FIRST_EVALUATION_SEED


def test_captions_of_a_group_agree_as_far_as_an_untouched_model_reads_and_no_further() -> None:
    groups = [proof.group(SEED, number) for number in range(5)]
    texts = [[str(example.texts["long"]) for example in group] for group in groups]
    tokenizer = laboratory.tokenizer_of([text for group in texts for text in group] * 20)
    long = stretched_length(proof.CONTEXT, 5, 4)
    for group, captions in zip(groups, texts, strict=True):
        ids = [tokenizer.encode(caption) for caption in captions]
        assert len({tuple(row[: proof.CONTEXT - 2]) for row in ids}) == 1
        assert len({tuple(row[: long - 2]) for row in ids}) == proof.GROUP
        assert len({example.texts["short"] for example in group}) == 1
        assert len({example.image.tobytes() for example in group}) == proof.GROUP


def test_the_control_is_as_long_as_long_clip_and_keeps_no_row() -> None:
    texts = [f"a red circle in the top left {i}" for i in range(50)]
    tokenizer = laboratory.tokenizer_of(texts, 300, context_length=proof.CONTEXT)
    base = laboratory.fresh_clip(tokenizer, SEED, width=32, depth=1)
    kept, control = LongClip().prepare(base), proof.interpolated(base)
    assert control.text.positions.shape == kept.text.positions.shape
    assert control.tokenizer.context_length == len(control.text.positions)
    rows = base.text.positions
    assert (kept.text.positions[:5] == rows[:5]).all() and not (
        control.text.positions[1:5] == rows[1:5]
    ).any()


def test_the_experiment_measures_every_arm_and_repeats_itself() -> None:
    outcome = proof.experiment(SEED, TINY)
    assert outcome.details.keys() == {
        "untouched", "stretched", "interpolated", "direct", "long_only", "without_components", "long_clip",
    }  # fmt: skip
    for found in outcome.details.values():
        assert found.keys() == {"late", "short", "long", "both"} and all(
            0 <= value <= 1 for value in found.values()
        )
    assert outcome.details["untouched"]["late"] == pytest.approx(0.1)
    direct = outcome.details["direct"]
    assert outcome.baseline == pytest.approx((direct["late"] + direct["short"]) / 2)
    assert proof.experiment(SEED, TINY) == outcome
