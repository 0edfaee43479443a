"""LaCLIP: the law of the draw, all texts at once, the authors' model and their files."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipworks.checkpoints import layouts, rules
from clipworks.checkpoints.known import parameters
from clipworks.checkpoints.zoo import load
from clipworks.core.attention import Attention
from clipworks.core.clip import Clip
from clipworks.core.config import uniform_blocks
from clipworks.core.tokenizer import Tokens
from clipworks.data.batch import Batch
from clipworks.errors import CheckpointError, ConfigError, DataError
from clipworks.methods.pretrain.clip import ClipObjective
from clipworks.methods.pretrain.laclip import CONFIG, LaClip, fresh_model, from_checkpoint


@pytest.fixture
def clip(tiny_clip: Callable[..., Any]) -> Any:
    return tiny_clip(0, image={"image_size": 16}, text={"vocab_size": 64, "context_length": 12}).double()


def sentences(n: int, generator: torch.Generator, length: int = 7) -> Tokens:
    ids = torch.randint(1, 62, (n, length), generator=generator)
    ids[:, -1] = 63
    return Tokens(ids, torch.full((n,), length - 1))


def batch_of(n: int = 5, texts: int = 3, seed: int = 0) -> Batch:
    """Pictures with so many texts each, those of a picture not side by side."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sentences(n * texts, generator)
    owner = torch.arange(n).repeat(texts)
    return Batch(
        torch.rand(n, 3, 16, 16, generator=generator).double(),
        {"rewrite": dataclasses.replace(tokens, owner=owner)},
        keys=[str(i) for i in range(n)],
    )


def loss(objective: Any, clip: Any, batch: Batch) -> Tensor:
    (term,) = objective.loss(objective.features(clip, batch)).values()
    assert isinstance(term, Tensor)
    return term


def test_one_text_a_picture_is_clips_loss_bit_for_bit(clip: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    batch = Batch(torch.rand(5, 3, 16, 16, generator=generator), {"rewrite": sentences(5, generator)})
    plain = loss(ClipObjective(source="rewrite"), clip, batch)
    for texts in (1, "all"):
        assert torch.equal(loss(LaClip(texts), clip, batch), plain)  # type: ignore[arg-type]


def test_all_texts_are_averaged_and_meet_those_of_their_number_only(clip: Any) -> None:
    batch = batch_of(n=5, texts=3)
    image = F.normalize(clip.image(batch.images), dim=1)
    tokens = batch.texts["rewrite"]
    text = F.normalize(clip.text(Tokens(tokens.ids, tokens.ends)), dim=1).view(3, 5, -1)
    own = torch.arange(5)
    expected = torch.zeros((), dtype=torch.float64)
    for rows in text:
        logits = clip.scale.exp() * image @ rows.T
        expected = expected + (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 6
    torch.testing.assert_close(loss(LaClip("all"), clip, batch), expected, rtol=1e-10, atol=0)


def test_equal_texts_of_a_picture_give_clips_loss_and_gradient(clip: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    one = sentences(4, generator)
    many = Tokens(one.ids.repeat(3, 1), one.ends.repeat(3), torch.arange(4).repeat(3))
    images = torch.rand(4, 3, 16, 16, generator=generator).double()
    parameters_ = list(clip.parameters())
    plain = loss(ClipObjective(source="rewrite"), clip, Batch(images, {"rewrite": one}))
    ours = loss(LaClip("all"), clip, Batch(images, {"rewrite": many}))
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=0)
    for a, b in zip(
        torch.autograd.grad(ours, parameters_), torch.autograd.grad(plain, parameters_), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_unequal_numbers_of_texts_are_refused(clip: Any) -> None:
    batch = batch_of(n=3, texts=2)
    tokens = batch.texts["rewrite"]
    for owner in ([0, 1, 2, 0, 1, 1], [0, 1, 2, 0, 1]):
        batch.texts["rewrite"] = Tokens(
            tokens.ids[: len(owner)], tokens.ends[: len(owner)], torch.tensor(owner)
        )
        with pytest.raises(DataError, match="equally many"):
            LaClip("all").features(clip, batch)
    with pytest.raises(DataError, match="several"):
        LaClip().features(clip, batch_of())
    with pytest.raises(ConfigError):
        LaClip(2)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- the authors' model


def test_normed_attention_is_the_formula_of_each_head() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = Attention(12, 3, qk_norm_eps=1e-6).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    q, k, v = F.linear(x, attention.qkv.weight, attention.qkv.bias).chunk(3, dim=-1)

    def norm(row: Tensor, layer: Any) -> Tensor:
        centered = row - row.mean()
        return centered / (centered.square().mean() + 1e-6).sqrt() * layer.weight + layer.bias

    expected = torch.zeros_like(x)
    for b in range(2):
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            queries = torch.stack([norm(row, attention.qkv.query_norm) for row in q[b, :, part]])
            keys = torch.stack([norm(row, attention.qkv.key_norm) for row in k[b, :, part]])
            expected[b, :, part] = (queries @ keys.T / 2).softmax(dim=1) @ v[b, :, part]
    torch.testing.assert_close(attention(x), attention.out(expected), rtol=1e-12, atol=1e-12)

    before = attention(x)
    with torch.no_grad():
        attention.qkv.weight[:12] *= 10
        attention.qkv.bias[:12] *= 10
    torch.testing.assert_close(attention(x), before, rtol=1e-4, atol=1e-4)


def small_config(image_size: int = 32) -> Any:
    """The authors' model in small."""
    blocks = uniform_blocks(2, 32, heads=2)
    image = dataclasses.replace(CONFIG.image, image_size=image_size, patch_size=8, width=32, blocks=blocks)
    text = dataclasses.replace(
        CONFIG.text, context_length=12, vocab_size=64, width=32, blocks=uniform_blocks(2, 32, heads=8)
    )
    return dataclasses.replace(CONFIG, width=16, image=image, text=text)


def lively(seed: int = 0) -> Clip:
    """A small model of which every weight shows."""
    clip = Clip.from_config(small_config(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in clip.named_parameters():
            if tensor.ndim:
                rest = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0
                spread = 0.2 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
                tensor.copy_(rest + spread * torch.randn(tensor.shape, generator=generator))
    return clip


def released(clip: Clip) -> dict[str, Tensor]:
    weights = rules.write(layouts.rules("laclip", clip.config), clip.state_dict())
    return {f"module.{name}": tensor.clone() for name, tensor in weights.items()}


def save(path: Path, weights: dict[str, Tensor]) -> Path:
    options = argparse.Namespace(model="CLIP_VITB16", lr=1e-3, output_dir="runs", betas=(0.9, 0.98))
    torch.save({"epoch": 35, "state_dict": weights, "args": options, "best_acc1": 40.0}, path)
    return path


def naive_image(weights: dict[str, Tensor], pixels: Tensor, heads: int = 2) -> Tensor:
    """The image tower written out from the names of the file."""
    w = {name.removeprefix("module.visual."): tensor for name, tensor in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def line(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = F.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8)
    x = (
        torch.cat([w["cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        + w["pos_embed"]
    )
    for i in range(2):
        name = f"blocks.{i}"
        b, n, width = x.shape
        qkv = line(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").view(b, n, 3, heads, width // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = norm(q, f"{name}.attn.q_norm"), norm(k, f"{name}.attn.k_norm")
        mixed = (q @ k.transpose(-1, -2) * (width // heads) ** -0.5).softmax(-1) @ v
        x = x + line(mixed.transpose(1, 2).reshape(b, n, width), f"{name}.attn.proj")
        x = x + line(F.gelu(line(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    return norm(x, "norm")[:, 0] @ weights["module.image_projection"]


def test_released_files_have_the_tensors_of_the_authors_model() -> None:
    names = [name for rule in layouts.rules("laclip", CONFIG) for name in rule.theirs]
    assert len(names) == 349 and parameters(CONFIG) == 149_623_041
    assert {"visual.blocks.11.attn.k_norm.bias", "image_projection", "visual.pos_embed"} <= set(names)


@pytest.mark.checkpoint("laclip")
def test_released_file_is_read_as_its_names_say(tmp_path: Path) -> None:
    original = lively()
    weights = released(original)
    loaded = from_checkpoint(save(tmp_path / "cc12m_laclip.pt", weights), tokenizer=False)
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(
        loaded.image(pixels), naive_image(weights, (pixels - mean) / std), rtol=0, atol=1e-5
    )
    tokens = sentences(4, torch.Generator().manual_seed(6))
    torch.testing.assert_close(loaded.text(tokens), original.text(tokens), rtol=0, atol=1e-6)
    assert loaded.config.preprocessing.interpolation == "bilinear"
    assert (loaded.config.image.activation, loaded.config.text.activation) == ("gelu", "quick_gelu")

    exchanged = dataclasses.replace(
        loaded.config, text=dataclasses.replace(loaded.config.text, activation="gelu")
    )
    other = Clip.from_config(exchanged)
    other.load_state_dict(loaded.state_dict())
    assert (other.text(tokens) - loaded.text(tokens)).abs().max() > 1e-3


@pytest.mark.checkpoint("laclip")
def test_file_without_a_norm_or_with_a_stranger_is_refused(tmp_path: Path) -> None:
    weights = released(lively())
    less = {name: x for name, x in weights.items() if "1.attn.k_norm" not in name}
    with pytest.raises(CheckpointError, match="k_norm"):
        from_checkpoint(save(tmp_path / "less.pt", less), tokenizer=False)
    more = weights | {"module.visual.head.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"visual\.head"):
        from_checkpoint(save(tmp_path / "more.pt", more), tokenizer=False)
    with pytest.raises(CheckpointError, match="activation"):
        load(save(tmp_path / "said.pt", weights), activation="quick_gelu", tokenizer=False)


@pytest.mark.checkpoint("laclip")
@pytest.mark.parametrize(("width", "activation"), [(64, "gelu"), (1024, "quick_gelu")])
def test_files_of_the_large_runs_have_the_activation_of_their_size(
    tiny_clip: Callable[..., Any], tmp_path: Path, width: int, activation: str
) -> None:
    image = {"image_size": 16, "width": width, "blocks": uniform_blocks(1, width)}
    text = {"vocab_size": 64, "context_length": 12, "width": 64, "blocks": uniform_blocks(1, 64)}
    clip = tiny_clip(0, image=image, text=text)
    weights = rules.write(layouts.rules("openai", clip.config), clip.state_dict())
    torch.save({"state_dict": weights}, tmp_path / "laion.pt")
    loaded = from_checkpoint(tmp_path / "laion.pt", tokenizer=False)
    assert loaded.config.image.activation == loaded.config.text.activation == activation


def test_no_other_layout_takes_a_model_with_norms_on_queries_and_keys(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        lively().save_open_clip(tmp_path)
    lively().save(tmp_path / "own")
    assert load(tmp_path / "own", tokenizer=False).config.image.qk_norm


def test_fresh_model_has_the_authors_initial_weights() -> None:
    config = dataclasses.replace(small_config(), text=dataclasses.replace(CONFIG.text, width=32, blocks=()))
    one, same, other = (fresh_model(config=config, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    qkv = one.image.blocks[0].attention.qkv
    assert not torch.equal(qkv.weight, other.image.blocks[0].attention.qkv.weight)
    assert qkv.weight.abs().max() <= 32**-0.5 < qkv.weight.abs().max() * 1.01
    assert float(qkv.weight.detach().std()) == pytest.approx((32 * 3) ** -0.5, rel=0.05)  # of an even draw
    assert float(one.image.positions.detach().std()) == pytest.approx(0.02, rel=0.15)
    assert torch.equal(qkv.query_norm.weight, torch.ones(16))
