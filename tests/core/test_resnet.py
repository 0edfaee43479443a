"""CLIP's ModifiedResNet as an open tower: maps for tokens, stages for blocks, a pool that attends."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.core.config import ResNetConfig
from clipworks.core.resnet import Bottleneck, ModifiedResNet
from clipworks.core.towers import Tap
from clipworks.errors import ConfigError, ShapeError


def tower(layers: tuple[int, int, int, int] = (1, 2, 1, 1), size: int = 64) -> ModifiedResNet:
    module = ModifiedResNet(ResNetConfig(size, layers, 4, 2), 24)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and name not in ("mean", "std"):
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(0.5 + noise.abs() if name.endswith("running_var") else noise * 0.2)
    return module.eval()


def draw(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def naive_pool(module: ModifiedResNet, maps: Tensor) -> Tensor:
    """The pool as torch's own multi-head attention computes it: for every token, of which one is taken."""
    cells = maps.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([cells.mean(0, keepdim=True), cells]) + module.positions[:, None]
    width = module.width
    q, k, v = module.pool.qkv.weight.chunk(3)
    out, _ = F.multi_head_attention_forward(
        tokens,
        tokens,
        tokens,
        width,
        module.pool.heads,
        in_proj_weight=None,
        in_proj_bias=module.pool.qkv.bias,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=module.pool.out.weight,
        out_proj_bias=module.pool.out.bias,
        use_separate_proj_weight=True,
        q_proj_weight=q,
        k_proj_weight=k,
        v_proj_weight=v,
        training=False,
        need_weights=False,
    )
    return out[0]


def test_the_pool_equals_the_naive_attention() -> None:
    module = tower()
    with torch.no_grad():
        maps = module.run(module.place(module.read(draw(2, 3, 64, 64))))
        assert maps.shape == (2, 128, 2, 2)
        assert torch.allclose(module.project(maps), naive_pool(module, maps), atol=1e-5)
        assert torch.allclose(module(draw(2, 3, 64, 64)), module.project(maps), atol=1e-6)


def test_a_bottleneck_equals_its_definition() -> None:
    block = Bottleneck(6, 4, stride=2).eval()
    x = draw(2, 6, 8, 8)
    with torch.no_grad():
        y = torch.relu(block.bn_1(F.conv2d(x, block.conv_1.weight)))
        y = torch.relu(block.bn_2(F.conv2d(y, block.conv_2.weight, padding=1)))
        y = block.bn_3(F.conv2d(F.avg_pool2d(y, 2), block.conv_3.weight))
        assert block.shortcut is not None
        short = block.shortcut.bn(F.conv2d(F.avg_pool2d(x, 2), block.shortcut.conv.weight))
        assert torch.allclose(block(x), torch.relu(y + short), atol=1e-6)


def test_no_convolution_but_the_first_has_a_stride() -> None:
    strides = [module.stride for module in tower().modules() if isinstance(module, nn.Conv2d)]
    assert strides.count((2, 2)) == 1 and set(strides) == {(1, 1), (2, 2)}


def test_a_single_cell_is_read_as_if_the_pool_saw_it_alone() -> None:
    module = tower()
    maps = draw(2, 128, 2, 2)
    with torch.no_grad():
        everywhere = module.project(maps, at="all")
        assert everywhere.shape == (2, 24, 2, 2)
        at = torch.tensor([3, 0])
        assert torch.allclose(
            module.project(maps, at=at), everywhere.flatten(2)[torch.arange(2), :, at], atol=1e-6
        )
        v = F.linear(
            maps[0, :, 1, 0], *(part.chunk(3)[2] for part in (module.pool.qkv.weight, module.pool.qkv.bias))
        )
        assert torch.allclose(everywhere[0, :, 1, 0], module.pool.out(v), atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (32, 128)])
def test_pictures_of_any_grid_are_read(size: tuple[int, int]) -> None:
    module = tower()
    with torch.no_grad():
        assert module(draw(1, 3, *size)).shape == (1, 24)


def test_stages_are_the_blocks_and_a_hook_sees_them() -> None:
    module, tap = tower(), Tap()
    with torch.no_grad():
        module.run(module.read(draw(1, 3, 64, 64)), around=tap)
    assert [tuple(tap[i].shape) for i in range(4)] == [
        (1, 16, 16, 16),
        (1, 32, 8, 8),
        (1, 64, 4, 4),
        (1, 128, 2, 2),
    ]


def test_two_stretches_of_stages_are_one_run() -> None:
    module = tower()
    with torch.no_grad():
        maps = module.read(draw(1, 3, 64, 64))
        assert torch.equal(module.run(module.run(maps, stop=2), start=2), module.run(maps))


def test_bytes_are_floats_of_255ths_and_the_gradient_reaches_the_pixels() -> None:
    module = tower()
    pixels = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(module(pixels), module(pixels.float() / 255))
    floats = draw(1, 3, 64, 64).requires_grad_()
    module(floats).square().sum().backward()
    assert (
        floats.grad is not None
        and math.isfinite(float(floats.grad.sum()))
        and bool(floats.grad.abs().sum() > 0)
    )


def test_what_a_resnet_cannot_take_is_an_error() -> None:
    module = tower()
    with pytest.raises(ShapeError, match="patches of 32"):
        module(draw(1, 3, 48, 48))
    with pytest.raises(ConfigError, match="extra tokens"):
        module.place(draw(1, 4, 8, 8), extra=draw(1, 4))
    with pytest.raises(ConfigError, match="no attention"):
        module.run(draw(1, 4, 16, 16), mask="causal")
    with pytest.raises(ConfigError, match="not a multiple of 32"):
        ResNetConfig(50, (1, 1, 1, 1), 4, 2)


def test_training_normalizes_by_the_batch_and_evaluation_does_not() -> None:
    module = tower().train()
    before = module.stem.bn_1.running_mean.clone()
    module(draw(4, 3, 64, 64))
    assert not torch.equal(module.stem.bn_1.running_mean, before)
    module.eval()
    before = module.stem.bn_1.running_mean.clone()
    with torch.no_grad():
        alone, together = module(draw(4, 3, 64, 64)[:1]), module(draw(4, 3, 64, 64))[:1]
    assert torch.equal(module.stem.bn_1.running_mean, before) and torch.allclose(alone, together, atol=1e-5)
