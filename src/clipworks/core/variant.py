"""`variant`: the same module with a few weights or parts replaced, everything else shared.

LoRA, masks, pruning, experts, test-time weights and soups are variants. The module given is never
changed; the variant is a skeleton of shallow copies along the paths to what was replaced, so it costs
no memory but the replacements, and gradients reach them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from clipworks.errors import ConfigError, ShapeError, nearest

M = TypeVar("M", bound=nn.Module)
Weight = Tensor | Callable[[Tensor], Tensor]


def variant(
    module: M,
    weights: Mapping[str, Weight] | None = None,
    modules: Mapping[str, Callable[[nn.Module], nn.Module]] | None = None,
) -> M:
    """A module of the same interface that shares every other tensor with `module`.

    Args:
        module: any module; it stays as it is.
        weights: for the dotted name of a parameter or buffer (...), either a tensor of its shape, which
            takes its place (gradients reach whatever it was computed from), or a function
            of the present tensor that is evaluated each time the weight is used. A function that is an
            `nn.Module` becomes a part of the variant, so that its parameters are found and moved.
        modules: for the dotted name of a submodule, a function from the present one to its successor.

    Returns:
        The variant. Buffers that the module updates in place (batch statistics) are shared as well.

    Raises:
        ConfigError: for a name the module does not have, with the nearest ones.
        ShapeError: for a tensor of another shape.
    """
    twin = _shallow(module)
    copied: dict[str, nn.Module] = {"": twin}
    for name, make in (modules or {}).items():
        parent, leaf = _walk(twin, name, copied)
        if leaf not in parent._modules:
            raise ConfigError(
                f"no module {name!r}{nearest(name, [n for n, _ in module.named_modules() if n])}"
            )
        parent._modules[leaf] = make(parent._modules[leaf])  # type: ignore[arg-type]
        copied.pop(name, None)
    for name, weight in (weights or {}).items():
        parent, leaf = _walk(twin, name, copied)
        _replace(parent, leaf, name, weight, module)
    return twin


def _shallow(module: M) -> M:
    twin = copy.copy(module)
    for registry in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[registry] = dict(module.__dict__[registry])
    twin.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    # A compiled call would be bound to the original's weights.
    twin.__dict__["_compiled_call_impl"] = None
    return twin


def _walk(twin: nn.Module, name: str, copied: dict[str, nn.Module]) -> tuple[nn.Module, str]:
    """Copy the modules on the way to `name`, once each, and return the last one with the leaf's name."""
    *path, leaf = name.split(".")
    parent, place = twin, ""
    for step in path:
        if step not in parent._modules:
            raise ConfigError(f"no module {step!r} on the way to {name!r}{nearest(step, parent._modules)}")
        place = f"{place}.{step}" if place else step
        if place not in copied:
            copied[place] = _shallow(parent.get_submodule(step))
            parent._modules[step] = copied[place]
        parent = copied[place]
    return parent, leaf


def _replace(parent: nn.Module, leaf: str, name: str, weight: Weight, root: nn.Module) -> None:
    current = parent._parameters.get(leaf, parent._buffers.get(leaf))
    if current is None and not hasattr(type(parent), leaf):
        known = [n for n, _ in root.named_parameters()] + [n for n, _ in root.named_buffers()]
        raise ConfigError(f"no weight {name!r}{nearest(name, known)}")
    if current is None:
        current = getattr(parent, leaf)
    if isinstance(weight, Tensor):
        if weight.shape != current.shape:
            raise ShapeError(f"{name}: {tuple(weight.shape)} cannot take the place of {tuple(current.shape)}")
        parent._parameters.pop(leaf, None)
        parent._buffers.pop(leaf, None)
        if isinstance(weight, nn.Parameter):
            parent._parameters[leaf] = weight
        else:
            # A buffer may be a tensor with a history, a parameter may not.
            parent._buffers[leaf] = weight
        return
    _make_computed(parent, leaf, weight, current)


def _make_computed(
    parent: nn.Module, leaf: str, function: Callable[[Tensor], Tensor], current: Tensor
) -> None:
    """Let `parent.leaf` be `function(current)`, evaluated at each use."""
    inner = _computed(parent).get(leaf)
    chained = function if inner is None else (lambda tensor: function(inner(tensor)))
    kept = "_parameters" if leaf in parent._parameters else "_buffers"
    if inner is None:
        # The original stays registered under a name of its own: it is still shared, moved and saved.
        registry: dict[str, Any] = getattr(parent, kept)
        registry.pop(leaf)
        registry[f"{leaf}_original"] = current
    if isinstance(function, nn.Module):
        parent._modules[f"{leaf}_function_{len(parent._modules)}"] = function
    table = {**_computed(parent), leaf: chained}
    base = getattr(type(parent), "_variant_of", type(parent))
    properties = {name: property(_Computed(name, f)) for name, f in table.items()}
    parent.__class__ = type(
        base.__name__,
        (base,),
        {**properties, "_variant_of": base, "_variant_table": table, "__module__": base.__module__},
    )


def _computed(parent: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    return dict(getattr(type(parent), "_variant_table", {}))


class _Computed:
    """Getter of a computed weight."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]):
        self.name = name
        self.function = function

    def __call__(self, module: nn.Module) -> Tensor:
        """The weight (...) as it is now."""
        return self.function(getattr(module, f"{self.name}_original"))
