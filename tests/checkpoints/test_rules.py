"""The rules of every layout are bijections, for any geometry; what they do not mention is an error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipworks.checkpoints import layouts, own, rules
from clipworks.checkpoints.geometry import facts, geometry
from clipworks.checkpoints.settings import Stated, check_claims, from_config, merged
from clipworks.core.config import (
    BlockConfig,
    Config,
    PreprocessingConfig,
    ResNetConfig,
    TextConfig,
    VisionConfig,
    uniform_blocks,
)
from clipworks.errors import CheckpointError

LAYOUTS = ("openai", "custom", "siglip", "transformers")


@st.composite
def texts(draw: st.DrawFn, siglip: bool) -> TextConfig:
    width = 4 * draw(st.integers(1, 4))
    blocks = tuple(
        BlockConfig(2, width // 2, draw(st.integers(1, 20))) for _ in range(draw(st.integers(1, 3)))
    )
    return TextConfig(
        draw(st.integers(2, 9)), draw(st.integers(3, 20)), width, blocks, "gelu",
        mask="none" if siglip else "causal", projection="biased" if siglip else "linear",
    )  # fmt: skip


@st.composite
def configs(draw: st.DrawFn, layout: str) -> Config:
    siglip = layout == "siglip" or (layout == "transformers" and draw(st.booleans()))
    text = draw(texts(siglip))
    width, patch, grid = 4 * draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    if layout in ("openai", "custom") and draw(st.booleans()):
        layers = tuple(draw(st.integers(1, 2)) for _ in range(4))
        resnet = ResNetConfig(32 * grid, layers, 2, heads=draw(st.sampled_from([1, 2, 4, 8])))  # type: ignore[arg-type]
        return Config(draw(st.integers(1, 9)), resnet, text, sigmoid=draw(st.booleans()))
    blocks = tuple(
        BlockConfig(2, width // 2, draw(st.integers(1, 20))) for _ in range(draw(st.integers(1, 3)))
    )
    if not siglip:
        patches = layout != "transformers" and draw(st.booleans())
        sigmoid = layout != "transformers" and draw(st.booleans())
        image = VisionConfig(patch * grid, patch, width, blocks, "gelu", patch_bias=patches)
        return Config(draw(st.integers(1, 9)), image, text, sigmoid=sigmoid)
    image = VisionConfig(
        patch * grid, patch, width, blocks, "gelu", class_token=False, pre_norm=False, patch_bias=True,
        pooling="attention", projection=False,
    )  # fmt: skip
    return Config(width, image, text, sigmoid=True, preprocessing=PreprocessingConfig("squash"))


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Config]:
    layout = draw(st.sampled_from(LAYOUTS))
    return layout, draw(configs(layout))


def numbered(config: Config) -> dict[str, Tensor]:
    """Weights in which no two numbers are the same, so that a swap cannot go unnoticed."""
    weights, count = {}, 0
    for name, tensor in own.skeleton(config).state_dict().items():
        weights[name] = torch.arange(count, count + tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
        count += tensor.numel()
    return weights


@settings(max_examples=40)
@given(cases())
def test_reading_undoes_writing_and_every_number_is_there_once(case: tuple[str, Config]) -> None:
    layout, config = case
    weights = numbered(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    all_rules = list(layouts.rules(layout, config))  # type: ignore[arg-type]
    written = rules.write(all_rules, weights)
    numbers = torch.cat([tensor.flatten() for tensor in written.values()]).sort().values
    assert torch.equal(numbers, torch.arange(len(numbers), dtype=torch.float64))
    back = rules.read(all_rules, written, shapes, "file")
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    again = rules.write(all_rules, back)
    assert again.keys() == written.keys() and all(torch.equal(again[name], written[name]) for name in again)


@settings(max_examples=40)
@given(cases())
def test_the_geometry_is_read_off_the_shapes(case: tuple[str, Config]) -> None:
    layout, config = case
    written = rules.write(layouts.rules(layout, config), numbered(config))  # type: ignore[arg-type]
    assert layouts.recognize(written, "file") == layout
    stated = from_config(config, "the config")
    found = geometry(layout, written, merged([stated], "file"), "file")  # type: ignore[arg-type]
    assert found == config
    check_claims([stated], facts(found), "file")


@settings(max_examples=40)
@given(cases(), st.data())
def test_a_tensor_too_few_too_many_or_bent_is_named(case: tuple[str, Config], data: st.DataObject) -> None:
    layout, config = case
    weights = numbered(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    all_rules = list(layouts.rules(layout, config))  # type: ignore[arg-type]
    written = rules.write(all_rules, weights)
    name = data.draw(st.sampled_from(sorted(written)))
    what = data.draw(st.sampled_from(["missing", "extra", "shape", "nan"]))
    broken = dict(written)
    if what == "missing":
        if name.endswith("num_batches_tracked"):
            return
        del broken[name]
    elif what == "extra":
        broken[f"{name}_extra"] = broken[name]
    elif what == "shape":
        broken[name] = torch.cat([broken[name].flatten(), torch.zeros(1)])
    else:
        broken[name] = broken[name].clone()
        broken[name].view(-1)[0] = float("nan")
    with pytest.raises(CheckpointError) as caught:
        rules.read(all_rules, broken, shapes, "file.pt")
    assert "file.pt" in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_a_layout_without_place_for_an_architecture_says_so() -> None:
    blocks = uniform_blocks(1, 8, 1)
    text = TextConfig(4, 8, 8, blocks)
    resnet = Config(8, ResNetConfig(32, (1, 1, 1, 1), 2, 1), text)
    mean = Config(8, VisionConfig(8, 4, 8, blocks, pooling="mean"), text)
    for layout, config in (("transformers", resnet), ("siglip", resnet), ("openai", mean), ("siglip", mean)):
        with pytest.raises(CheckpointError):
            list(layouts.rules(layout, config))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "prefix", ["module.", "module.module.", "_orig_mod.", "module._orig_mod.", "model.", "module.clip."]
)
def test_prefixes_of_wrappers_are_taken_off(prefix: str) -> None:
    names = ("logit_scale", "visual.module_list.weight", "visual.conv1.weight", "positional_embedding")
    weights = {f"{prefix}{name}": torch.zeros(1) for name in names}
    weights[f"{prefix}attn_mask"] = torch.zeros(2, 2)
    assert layouts.clean(weights, "file").keys() == set(names)
    inside = {"visual._orig_mod.conv1._fsdp_wrapped_module.weight": torch.zeros(1)}
    assert list(layouts.clean(inside, "file")) == ["visual.conv1.weight"]


def test_a_name_that_is_there_with_and_without_a_prefix_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="twice"):
        layouts.clean({"module.a": torch.zeros(1), "a": torch.zeros(1)}, "file")


def test_unknown_names_are_said_to_be_so() -> None:
    with pytest.raises(CheckpointError, match=r"no layout known.*encoder\.weight"):
        layouts.recognize({"encoder.weight": torch.zeros(1)}, "file.pt")


def test_two_sources_that_disagree_are_both_named() -> None:
    from clipworks.checkpoints.settings import Settings

    stated = [
        Stated("one.json", Settings(activation="gelu")),
        Stated("two.json", Settings(activation="quick_gelu")),
    ]
    with pytest.raises(
        CheckpointError, match=r"activation is gelu in one\.json, but quick_gelu in two\.json"
    ):
        merged(stated, "file")
