"""The proof of CLIP-DINOiser: its arms are what the method does, and the experiment repeats itself."""

from __future__ import annotations

import numpy as np
import torch

from clipworks.checkpoints.zoo import load
from clipworks.methods.dense.maskclip import MaskCLIP
from clipworks.parts.localization import MaskTeacher
from clipworks.parts.segmentation import Segmentation
from clipworks.proofs import clip_dinoiser as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED, detail

SEED = 0
assert SEED < FIRST_EVALUATION_SEED
TINY = proof.Size(train=6, chosen_on=3, test=4, epochs=1, width=8)


def test_an_arm_of_a_scene_is_what_the_method_says_of_it() -> None:
    clip, some = load("seedling"), proof.scenes(SEED, range(4))
    method = proof.dinoiser(clip, SEED, TINY).fit(some.pixels, MaskTeacher(some.instances))
    look = proof.Look(clip, some, range(4), method.ask(proof.LABELS).vectors, residual=True)
    likely = look.likely(proof.learned_arm(method), look.vectors)
    found = list(method.segment_all(some.pixels, proof.LABELS))
    assert all(
        isinstance(one, Segmentation) and torch.allclose(one.coarse, mine, atol=1e-5)
        for one, mine in zip(found, likely, strict=True)
    )
    plain = look.likely(proof.plain, look.vectors)
    named = MaskCLIP(clip, templates=proof.SENTENCES, size=proof.SIDE, window=proof.SIDE)
    assert torch.allclose(named.segment(some.pixels[0], proof.LABELS).coarse, plain[0], atol=1e-5)


def test_truth_names_the_color_of_every_instance() -> None:
    some = proof.scenes(SEED, range(5))
    for instances, truth in zip(some.instances, some.truth, strict=True):
        assert np.array_equal(truth.numpy() == 0, instances == 0)
        for instance in np.unique(instances):
            assert len(np.unique(truth.numpy()[instances == instance])) == 1


def test_the_oracle_averages_over_instances_and_a_box_over_neighbors() -> None:
    some = proof.scenes(SEED, range(1))
    teacher = MaskTeacher(some.instances)
    crop = proof.Crop(0, 0, (proof.SIDE, proof.SIDE), (0, 0, proof.SIDE, proof.SIDE), False)
    pairs = teacher.targets(torch.zeros(1, 3, 1, 1), (16, 16), [crop]).pairs[0]
    features = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = proof.oracle(some)(features, features, range(1)).flatten(2)[0]
    for place in (0, 100, 137, 255):
        expected = features.flatten(2)[0][:, pairs[place]].mean(dim=1)
        assert torch.allclose(found[:, place], expected, atol=1e-5)
    around = proof.box(3)(features, features, range(1))
    assert torch.allclose(around[0, :, 4, 5], features[0, :, 3:6, 4:7].mean(dim=(1, 2)), atol=1e-6)
    assert torch.allclose(around[0, :, 0, 0], features[0, :, :2, :2].mean(dim=(1, 2)), atol=1e-6)


def test_the_experiment_measures_every_arm_and_repeats_itself() -> None:
    outcome = proof.experiment(SEED, TINY)
    for name in ("maskclip", "box", "own", "masks", "affinity", "tuned", "oracle"):
        assert all(0 <= value <= 1 for value in outcome.details[name].values())
    assert outcome.baseline == outcome.details["maskclip"]["all"]
    assert outcome.method == outcome.details["masks"]["ruled"]
    for path in proof.PROOF.controls:
        assert 0 <= detail({"details": outcome.details}, path) <= 1
    assert proof.experiment(SEED, TINY) == outcome
