"""Recipes: strict keys, round trips, and what the schedule makes of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipworks.engine.recipe import Recipe
from clipworks.engine.schedule import image_size, learning_rate_factor, resize
from clipworks.errors import ConfigError


def test_unknown_key_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean warmup"):
        Recipe.from_dict({"warm_up": 3})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("lr", -1.0),
        ("ema", 1.0),
        ("accumulate", 0),
        ("clip_gradient", 0.0),
        ("precision", "fp8"),
    ],
)
def test_values_that_cannot_work_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        Recipe(**{field: value})  # type: ignore[arg-type]


def test_shares_of_image_sizes_must_be_whole() -> None:
    with pytest.raises(ConfigError, match=r"0\.5, 0\.4"):
        Recipe(image_sizes=((0.5, 32), (0.4, 64)))


def test_yaml_and_dict_give_back_the_recipe(tmp_path: Path) -> None:
    recipe = Recipe(epochs=3, lr=5e-4, ema=0.999, image_sizes=((0.25, 32), (0.75, 64)), clip_gradient=1.0)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "epochs: 3\nlr: 5e-4\nema: 0.999\nimage_sizes: [[0.25, 32], [0.75, 64]]\nclip_gradient: 1\n"
    )
    assert Recipe.from_yaml(path) == recipe


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [1\n"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        Recipe.from_yaml(path)


def test_fingerprint_tells_recipes_apart() -> None:
    recipe = Recipe(steps=10)
    assert recipe.fingerprint() == Recipe.from_dict(recipe.to_dict()).fingerprint()
    others = [dataclasses.replace(recipe, lr=1e-4), dataclasses.replace(recipe, seed=1)]
    assert len({r.fingerprint() for r in [recipe, *others]}) == 3


@given(step=st.integers(0, 999), warmup=st.integers(0, 500), final=st.sampled_from([0.0, 0.1]))
def test_cosine_schedule_is_its_closed_form(step: int, warmup: int, final: float) -> None:
    recipe = Recipe(steps=1000, warmup=warmup, final_lr=final)
    if step < warmup:
        expected = (step + 1) / warmup
    else:
        expected = final + (1 - final) * math.cos(math.pi / 2 * (step - warmup) / (1000 - warmup)) ** 2
    assert learning_rate_factor(step, 1000, recipe) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule_rises_to_one_and_never_rises_again(schedule: str) -> None:
    recipe = Recipe(steps=100, warmup=10, schedule=schedule)  # type: ignore[arg-type]
    factors = [learning_rate_factor(step, 100, recipe) for step in range(100)]
    assert factors[:10] == sorted(factors[:10]) and factors[9] == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True) and factors[-1] > 0


@given(steps=st.integers(4, 500))
def test_image_sizes_take_their_shares_of_the_steps_in_order(steps: int) -> None:
    recipe = Recipe(steps=steps, image_sizes=((0.5, 32), (0.25, 48), (0.25, 64)))
    sizes = [image_size(step, steps, recipe) for step in range(steps)]
    assert sizes == sorted(sizes)  # type: ignore[type-var]
    for share, size in recipe.image_sizes:
        assert abs(sizes.count(size) - share * steps) <= 1
    assert image_size(3, steps, Recipe(steps=steps)) is None


def test_resizing_keeps_flat_pictures_flat_and_bytes_bytes() -> None:
    pixels = torch.full((2, 3, 64, 64), 77, dtype=torch.uint8)
    small = resize(pixels, 24)
    assert small.shape == (2, 3, 24, 24) and small.dtype == torch.uint8 and bool((small == 77).all())
    assert resize(pixels, 64) is pixels and resize(pixels, None) is pixels
