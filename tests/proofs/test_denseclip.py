"""The proof of DenseCLIP: its arms lack what they say they lack, and the experiment repeats itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clipworks.checkpoints.zoo import load
from clipworks.engine.randomness import own_randomness
from clipworks.methods.dense.denseclip import Network, Seen, pixel_loss
from clipworks.proofs import denseclip as proof
from clipworks.proofs.base import FIRST_EVALUATION_SEED, detail

SEED = 0
assert SEED < FIRST_EVALUATION_SEED
SMALL: dict[str, Any] = {
    "decoder_width": 8,
    "decoder_layers": 1,
    "head_width": 8,
    "train_tower": False,
    "seed": SEED,
    "progress": False,
}


def made(name: str) -> tuple[Any, Network, Seen, torch.Tensor]:
    """An arm, its network as it starts, a picture that it could see, and t."""
    arm = proof.ARMS[name](load("seedling"), proof.NAMES, **SMALL)
    with own_randomness(SEED):
        network = arm._network(len(proof.NAMES))
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, width, 8, 8, generator=generator) for width in [arm.tower.width] * 4]
    places = torch.randn(2, arm.tower.out_width, 8, 8, generator=generator)
    seen = Seen(tuple(drawn), places.mean(dim=(2, 3)), places)
    return arm, network.eval(), seen, arm._bank(proof.NAMES)(network.contexts).detach()


def test_truth_names_the_color_of_every_thing() -> None:
    for index, (image, mask) in enumerate(zip(*proof.scenes(SEED, range(4)), strict=True)):
        scene = proof.sample(proof.WORLD, SEED, index)
        assert image.shape == (64, 64, 3)
        named = {proof.NAMES[number] for number in np.unique(mask)} - {"background"}
        assert named and named <= {thing.color for thing in scene.objects}


def test_the_head_alone_sees_no_name_and_has_no_other_loss() -> None:
    arm, network, seen, vectors = made("fpn")
    labels = torch.randint(0, 13, (2, 64, 64), generator=torch.Generator().manual_seed(1))
    first = arm._loss(network, seen, vectors, labels)
    assert torch.equal(first, arm._loss(network, seen, vectors.flip(0), labels))
    assert torch.equal(first, pixel_loss(network.logits(seen, torch.zeros(2, 13, 8, 8)), labels))
    other, others, _, _ = made("denseclip")
    assert other._loss(others, seen, vectors, labels) > pixel_loss(
        others.logits(seen, others.score_map(seen, vectors)), labels
    )


def test_without_the_decoder_class_vectors_do_not_see_the_picture() -> None:
    arm, network, seen, vectors = made("no_decoder")
    assert torch.equal(network.refined(seen, vectors), vectors.expand(2, -1, -1))
    learned = {id(one) for group in arm._groups(network) for one in group["params"]}
    assert id(network.gamma) not in learned and id(network.decoder.out[1].weight) in learned
    assert not torch.equal(made("denseclip")[1].refined(seen, vectors), vectors.expand(2, -1, -1))


def test_free_vectors_are_learned_and_begin_as_long_as_those_of_names() -> None:
    arm, network, _, vectors = made("free")
    assert vectors.data_ptr() == network.contexts.data_ptr() and network.contexts.requires_grad
    assert any(network.contexts is one for group in arm._groups(network) for one in group["params"])
    assert torch.allclose(vectors.norm(dim=1), made("denseclip")[3].norm(dim=1), rtol=1e-4)


def test_permuted_names_are_the_same_vectors_in_another_order() -> None:
    (arm, _, _, _), (_, network, _, vectors) = made("permuted"), made("denseclip")
    permuted = arm._bank(proof.NAMES)(network.contexts)
    closest = (permuted @ vectors.mT).argmax(dim=1)
    assert sorted(closest.tolist()) == list(range(13)) and closest.tolist() != list(range(13))
    assert torch.allclose(permuted, vectors[closest], atol=1e-4)


@pytest.mark.parametrize("train", [(4, 6)])
def test_the_experiment_measures_every_arm_and_repeats_itself(train: tuple[int, ...]) -> None:
    size = proof.Size(train=train, test=4, steps=2)
    outcome = proof.experiment(SEED, size)
    assert outcome.details.keys() == proof.ARMS.keys()
    assert outcome.baseline == outcome.details["fpn"]["at_6"]
    assert outcome.method == outcome.details["denseclip"]["at_6"]
    for path in proof.PROOF.controls:
        assert 0 <= detail({"details": outcome.details}, path.replace("100", "6")) <= 1
    assert proof.experiment(SEED, size) == outcome
