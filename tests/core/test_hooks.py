"""The open tower: six small uses, each against a naive form, eager, compiled and checkpointed."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipworks.core.attention import Attention, Block
from clipworks.core.config import BlockConfig, TextConfig, VisionConfig, uniform_blocks
from clipworks.core.towers import Tap, TextTower, VisionTower, compose, variant
from clipworks.errors import ConfigError, ShapeError

WIDTH, DEPTH = 32, 3


def tower(**options: object) -> VisionTower:
    config = VisionConfig(32, 8, WIDTH, uniform_blocks(DEPTH, WIDTH, 4), activation="quick_gelu", **options)
    module = VisionTower(config, 24)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def pixels(n: int = 2) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)) * 0.3


def naive_attention(block: Block, x: Tensor) -> Tensor:
    """Multi-head attention written out head by head from the weights."""
    attention = block.attention
    d, w = attention.head_width, x.shape[-1]
    q, k, v = (
        F.linear(x, *pair)
        for pair in zip(attention.qkv.weight.split(w), attention.qkv.bias.split(w), strict=True)
    )
    heads = []
    for h in range(attention.heads):
        part = slice(h * d, (h + 1) * d)
        scores = q[..., part] @ k[..., part].transpose(-1, -2) / d**0.5
        heads.append(scores.softmax(-1) @ v[..., part])
    return F.linear(torch.cat(heads, -1), attention.out.weight, attention.out.bias)


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def naive_mlp(block: Block, x: Tensor) -> Tensor:
    hidden = F.linear(x, block.mlp.fc.weight, block.mlp.fc.bias)
    return F.linear(hidden * torch.sigmoid(1.702 * hidden), block.mlp.proj.weight, block.mlp.proj.bias)


def naive_block(block: Block, x: Tensor) -> Tensor:
    x = x + naive_attention(block, norm(block.ln_1, x))
    return x + naive_mlp(block, norm(block.ln_2, x))


def start(module: VisionTower) -> Tensor:
    """Tokens (B, N, w) as the reference builds them."""
    patches = module.patches((pixels() - module.mean) / module.std).flatten(2).transpose(1, 2)
    tokens = torch.cat([module.class_token.expand(len(patches), 1, -1), patches], 1) + module.positions
    return norm(module.ln_pre, tokens)


def finish(module: VisionTower, tokens: Tensor) -> Tensor:
    return norm(module.ln_post, tokens[:, 0]) @ module.projection.weight.T


Use = Callable[[VisionTower], tuple[Tensor, Tensor]]


def deep_prompts(module: VisionTower) -> tuple[Tensor, Tensor]:
    prompts = nn.Parameter(draw(DEPTH, 4, WIDTH))

    def overwrite(i: int, block: Callable[..., Tensor], tokens: Tensor) -> Tensor:
        return block(torch.cat([tokens[:, :-4], prompts[i].expand(len(tokens), -1, -1)], 1))

    placed = module.place(module.read(pixels()), extra=torch.zeros(4, WIDTH))
    ours = module.project(module.run(placed, around=overwrite))
    tokens = start(module)
    for i, block in enumerate(module.blocks):
        with_prompts = torch.cat([tokens, prompts[i].expand(len(tokens), -1, -1)], 1)
        tokens = naive_block(block, with_prompts)[:, : tokens.shape[1]]
    return ours, finish(module, tokens)


def adapters(module: VisionTower) -> tuple[Tensor, Tensor]:
    down, up = nn.Parameter(draw(DEPTH, WIDTH, 8)), nn.Parameter(draw(DEPTH, 8, WIDTH))

    def adapt(i: int, block: Callable[..., Tensor], tokens: Tensor) -> Tensor:
        tokens = block(tokens)
        return tokens + (tokens @ down[i]).relu() @ up[i]

    ours = module.project(module.run(module.place(module.read(pixels())), around=adapt))
    tokens = start(module)
    for i, block in enumerate(module.blocks):
        tokens = naive_block(block, tokens)
        tokens = tokens + (tokens @ down[i]).relu() @ up[i]
    return ours, finish(module, tokens)


def values_only(attention: Attention, x: Tensor, mask: object) -> Tensor:
    return attention.out(attention.qkv(x).chunk(3, -1)[2])


def value_attention(module: VisionTower) -> tuple[Tensor, Tensor]:
    def last_values(i: int, block: Callable[..., Tensor], tokens: Tensor) -> Tensor:
        return block(tokens, attend=values_only) if i == DEPTH - 1 else block(tokens)

    ours = module.project(module.run(module.place(module.read(pixels())), around=last_values), at="all")
    tokens = start(module)
    for block in module.blocks[:-1]:
        tokens = naive_block(block, tokens)
    last = module.blocks[-1]
    x = norm(last.ln_1, tokens)
    v = F.linear(x, last.attention.qkv.weight[2 * WIDTH :], last.attention.qkv.bias[2 * WIDTH :])
    tokens = tokens + F.linear(v, last.attention.out.weight, last.attention.out.bias)
    tokens = tokens + naive_mlp(last, norm(last.ln_2, tokens))
    return ours, norm(module.ln_post, tokens) @ module.projection.weight.T


def messages(module: VisionTower) -> tuple[Tensor, Tensor]:
    make = nn.Parameter(draw(WIDTH, WIDTH))

    def exchange(i: int, block: Callable[..., Tensor], tokens: Tensor) -> Tensor:
        message = (tokens[:, :1] @ make).mean(0, keepdim=True).expand(len(tokens), -1, -1)
        return block(torch.cat([tokens, message], 1))[:, :-1]

    ours = module.project(module.run(module.place(module.read(pixels())), around=exchange))
    tokens = start(module)
    for block in module.blocks:
        message = (tokens[:, :1] @ make).mean(0, keepdim=True).expand(len(tokens), -1, -1)
        tokens = naive_block(block, torch.cat([tokens, message], 1))[:, :-1]
    return ours, finish(module, tokens)


def lora(module: VisionTower) -> tuple[Tensor, Tensor]:
    a, b = nn.Parameter(draw(2, WIDTH)), nn.Parameter(draw(3 * WIDTH, 2))
    name = "blocks.1.attention.qkv.weight"
    changed = variant(module, {name: lambda weight: weight + b @ a})
    ours = changed(pixels())
    tokens = start(module)
    for i, block in enumerate(module.blocks):
        if i != 1:
            tokens = naive_block(block, tokens)
            continue
        x = norm(block.ln_1, tokens)
        weight = block.attention.qkv.weight + b @ a
        q, k, v = (x @ weight.T + block.attention.qkv.bias).chunk(3, -1)
        split = [t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v)]
        mixed = (split[0] @ split[1].transpose(-1, -2) / 8**0.5).softmax(-1) @ split[2]
        mixed = mixed.transpose(1, 2).flatten(2)
        tokens = tokens + mixed @ block.attention.out.weight.T + block.attention.out.bias
        tokens = tokens + naive_mlp(block, norm(block.ln_2, tokens))
    return ours, finish(module, tokens)


def early_exit(module: VisionTower) -> tuple[Tensor, Tensor]:
    ours = module.project(module.run(module.place(module.read(pixels())), stop=2))
    tokens = start(module)
    for block in module.blocks[:2]:
        tokens = naive_block(block, tokens)
    return ours, finish(module, tokens)


USES = [deep_prompts, adapters, value_attention, messages, lora, early_exit]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_use_of_the_hook_equals_the_naive_form(use: Use) -> None:
    ours, naive = use(tower())
    assert (ours - naive).abs().max() < 1e-6 * max(1, naive.abs().max())


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_use_of_the_hook_survives_activation_checkpointing_with_its_gradients(use: Use) -> None:
    plain, kept = tower(), tower()
    kept.checkpointing = True
    for module in (plain, kept):
        module.requires_grad_(True)
        use(module)[0].square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), kept.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-6), name


def compiler(test: Callable[..., None]) -> Callable[..., None]:
    """What the compiler itself warns of while it is loaded and looks around is not ours to mend."""
    for warning in ("ignore:The .grad attribute of a Tensor", "ignore:.*torch.jit:DeprecationWarning"):
        test = pytest.mark.filterwarnings(warning)(test)
    return test


@compiler
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_use_of_the_hook_equals_the_naive_form_under_compile(use: Use) -> None:
    torch.compiler.reset()
    module = tower()
    module.compile_blocks(backend="aot_eager")
    ours, naive = use(module)
    assert (ours - naive).abs().max() < 1e-6 * max(1, naive.abs().max())


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_use_of_the_hook_equals_the_naive_form_under_the_default_compiler(use: Use) -> None:
    torch.compiler.reset()
    module = tower()
    module.compile_blocks()
    ours, naive = use(module)
    assert (ours - naive).abs().max() < 1e-6 * max(1, naive.abs().max())


def test_hook_that_does_nothing_changes_no_bit() -> None:
    module = tower()
    placed = module.place(module.read(pixels()))
    assert torch.equal(module.run(placed), module.run(placed, around=lambda i, block, tokens: block(tokens)))


@pytest.mark.slow
def test_hook_that_does_nothing_costs_under_one_percent_of_a_vit_b_block() -> None:
    config = VisionConfig(224, 32, 768, uniform_blocks(1, 768))
    module = VisionTower(config, 512).eval()
    tokens = torch.randn(8, 50, 768, generator=torch.Generator().manual_seed(0))

    def seconds(call: Callable[[], object], repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats

    with torch.no_grad():
        block = min(seconds(lambda: module.run(tokens), 10) for _ in range(3))
        # The walk through a thousand blocks that cost nothing leaves the price of the hook alone.
        module.blocks = nn.ModuleList(Nothing() for _ in range(1000))
        bare = min(seconds(lambda: module.run(tokens), 3) for _ in range(3)) / 1000
        hooked = (
            min(seconds(lambda: module.run(tokens, around=lambda i, b, t: b(t)), 3) for _ in range(3)) / 1000
        )
    assert hooked - bare < 0.01 * block


class Nothing(nn.Module):
    def forward(self, tokens: Tensor, mask: object = None) -> Tensor:
        return tokens


def test_composed_hooks_nest_with_the_first_outermost() -> None:
    order = []

    def named(name: str) -> Callable[..., Tensor]:
        def hook(i: int, block: Callable[..., Tensor], tokens: Tensor) -> Tensor:
            order.append(f"{name} in")
            tokens = block(tokens)
            order.append(f"{name} out")
            return tokens

        return hook

    module = tower()
    module.run(module.place(module.read(pixels())), stop=1, around=compose(named("a"), None, named("b")))
    assert order == ["a in", "b in", "b out", "a out"]
    assert compose(None) is None


def test_outer_hook_hands_its_attention_through_the_inner_one() -> None:
    module = tower()
    placed = module.place(module.read(pixels()))
    outer = compose(lambda i, block, t: block(t, attend=values_only), lambda i, block, t: block(t) * 2)
    expected = 2 * module.blocks[0](placed, attend=values_only)
    assert torch.equal(module.run(placed, stop=1, around=outer), expected)


def test_tap_keeps_the_tokens_after_its_blocks() -> None:
    module = tower()
    placed = module.place(module.read(pixels()))
    tap = Tap(0, 2)
    final = module.run(placed, around=tap)
    assert sorted(tap.tokens) == [0, 2]
    assert torch.equal(tap[2], final)
    assert torch.equal(tap[0], module.run(placed, stop=1))


def test_shortcut_of_the_last_block_gives_the_vector_and_the_gradients_of_the_whole_one() -> None:
    short, whole = tower(), tower()
    for module in (short, whole):
        module.requires_grad_(True)
    a = short(pixels())
    b = whole.project(whole.run(whole.place(whole.read(pixels()))))
    assert torch.allclose(a, b, atol=1e-6)
    a.square().sum().backward()
    b.square().sum().backward()
    for (name, p), q in zip(short.named_parameters(), whole.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5), name


def test_variant_of_the_last_block_is_run_as_it_is() -> None:
    module = tower()
    changed = variant(
        module, modules={f"blocks.{DEPTH - 1}.attention.qkv": lambda linear: nn.Sequential(linear)}
    )
    assert torch.allclose(changed(pixels()), module(pixels()), atol=1e-6)


def test_two_stretches_of_blocks_equal_one_run() -> None:
    module = tower()
    placed = module.place(module.read(pixels()))
    assert torch.equal(module.run(module.run(placed, stop=1), start=1), module.run(placed))


def test_variant_leaves_the_original_and_shares_the_rest() -> None:
    module = tower()
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    delta = torch.zeros(24, WIDTH, requires_grad=True)
    changed = variant(module, {"projection.weight": module.projection.weight.detach() + 1 + delta})
    changed(pixels()).sum().backward()
    assert delta.grad is not None and delta.grad.abs().sum() > 0
    assert all(torch.equal(before[name], weight) for name, weight in module.state_dict().items())
    assert changed.blocks[0].mlp.fc.weight is module.blocks[0].mlp.fc.weight
    assert changed is not module and type(changed) is type(module)


def test_variant_evaluates_a_function_at_every_use_and_chains_them() -> None:
    module = nn.Linear(3, 3)
    factor = torch.tensor(2.0)
    once = variant(module, {"weight": lambda w: w * factor})
    twice = variant(once, {"weight": lambda w: w + 1})
    assert torch.equal(twice.weight, module.weight * 2 + 1)
    factor.fill_(3.0)
    assert torch.equal(once.weight, module.weight * 3)
    assert torch.equal(twice.weight, module.weight * 3 + 1)
    assert type(module) is nn.Linear


def test_variant_finds_the_parameters_of_a_function_that_is_a_module() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(1, 3))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.a

    update = LowRank()
    changed = variant(nn.Linear(3, 3), {"weight": update})
    assert any(p is update.a for p in changed.parameters())
    assert sum(p.numel() for p in changed.parameters()) == 9 + 3 + 3


def test_variant_replaces_modules() -> None:
    module = tower()
    changed = variant(module, modules={"blocks.0.mlp": lambda mlp: nn.Identity()})
    placed = module.place(module.read(pixels()))
    block = module.blocks[0]
    middle = placed + block.attention(block.ln_1(placed))
    assert torch.allclose(changed.run(placed, stop=1), middle + block.ln_2(middle))
    assert isinstance(module.blocks[0].mlp.fc, nn.Linear)


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ({"projection.wait": torch.zeros(1)}, ConfigError),
        ({"projection.weight": torch.zeros(1)}, ShapeError),
        ({"blocks.9.ln_1.weight": torch.zeros(1)}, ConfigError),
    ],
)
def test_variant_refuses_what_does_not_fit(weights: dict[str, Tensor], error: type[Exception]) -> None:
    with pytest.raises(error):
        variant(tower(), weights)


def test_causal_mask_of_fewer_queries_than_keys_belongs_to_the_last_ones() -> None:
    attention = Attention(16, 2)
    q, k, v = draw(1, 5, 48).chunk(3, -1)
    whole = attention.mix(q, k, v, "causal")
    assert torch.allclose(attention.mix(q[:, 3:], k, v, "causal"), whole[:, 3:], atol=1e-6)


def test_mask_may_be_a_function_of_the_length() -> None:
    attention = Attention(16, 2)
    q, k, v = draw(1, 5, 48).chunk(3, -1)
    lower = torch.ones(5, 5, dtype=torch.bool).tril()
    by_function = attention.mix(q, k, v, lambda n: torch.ones(n, n, dtype=torch.bool).tril())
    assert torch.allclose(by_function, attention.mix(q, k, v, "causal"), atol=1e-6)
    assert torch.allclose(by_function, attention.mix(q, k, v, lower), atol=1e-6)
    with pytest.raises(ConfigError):
        attention.mix(q, k, v, "casual")


def test_blocks_of_different_geometry_live_in_one_tower() -> None:
    blocks = (BlockConfig(4, 8, 64), BlockConfig(2, 8, 16))
    module = VisionTower(VisionConfig(32, 8, WIDTH, blocks), 24)
    assert module(pixels()).shape == (2, 24)
    assert module.blocks[1].attention.qkv.weight.shape == (48, WIDTH)


def test_text_tower_with_extra_tokens_gets_a_mask_that_fits() -> None:
    from clipworks.core.tokenizer import Tokens

    module = TextTower(TextConfig(16, 50, WIDTH, uniform_blocks(2, WIDTH, 4)), 24)
    tokens = Tokens(torch.tensor([[1, 5, 6, 2]]), torch.tensor([3]))
    content = module.read(tokens)
    with_extra = module.run(module.place(content, extra=draw(3, WIDTH)))
    assert torch.allclose(with_extra[:, :4], module.run(module.place(content)), atol=1e-6)
