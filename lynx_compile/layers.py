"""Per-layer data and decisions, carried by the linear modules themselves.

    attach(model.transformer_blocks[0].attn.to_q, down=A, up=B, shift=mu, decision="sparse")

makes the module a `LynxLinear` in place: same weights, same name, same state dict; what it carries are
non-persistent buffers, so `.to()`, offloading and regional compilation treat them as what they are, inputs of
the graph. Every backend but rt_lynx, and eager mode, still computes the exact dense layer.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .runtime.ops import linear as marked_linear

DECISIONS = ("sparse", "dense")
_BUFFERS = ("lynx_down", "lynx_up", "lynx_shift", "lynx_score", "lynx_bias")
_ATTRIBUTES = (
    *("lynx_decision", "lynx_reason", "lynx_before"),
    *("lynx_dense_tokens", "lynx_deflated", "lynx_switch"),
)


class Switch(Protocol):
    """Anything that says whether the layers that hold it run dense at present (dense first steps)."""

    dense: bool


class LynxLinear(nn.Linear):
    """An `nn.Linear` that carries the data to become sparse. Made by `attach`, undone by `detach`.

    lynx_down (R, K), lynx_up (N, R): the compensating LoRA branch.  lynx_shift (K,): μ.  lynx_score (K,): c.
    lynx_bias (N,): b + W·μ, made from the shift.  Each may be None.
    lynx_decision: "sparse", "dense" or None (the policy decides).  lynx_reason: why, for people.
    lynx_before: decision and reason under the globs of `compile_blocks`, None where those say nothing.
    lynx_dense_tokens: leading tokens of each sample that stay dense; below 0, its last.  lynx_deflated: how
    many leading rows of lynx_down are taken out of x before pruning.  lynx_switch: says when all layers run
    dense.
    """

    lynx_down: Tensor | None
    lynx_up: Tensor | None
    lynx_shift: Tensor | None
    lynx_score: Tensor | None
    lynx_bias: Tensor | None
    lynx_decision: str | None
    lynx_reason: str
    lynx_before: tuple[str | None, str] | None
    lynx_dense_tokens: int
    lynx_deflated: int
    lynx_switch: Switch | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As `nn.Module.to` needs it; buffers that layers have in common stay one tensor."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None:
                self._buffers[name] = _one_copy(old, new)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """x · Wᵀ + b, exactly; the rt_lynx backend replaces it by the sparse layer."""
        # Quantised weights know F.linear, not what is inside it. Dynamo answers this question rightly; of
        # `is_traceable_wrapper_subclass` it says no.
        if hasattr(type(self.weight), "__tensor_flatten__"):
            return nn.functional.linear(input, self.weight, self.bias)
        if _offloaded_alone(self):
            _take_own_tensors(self)
        # Dynamo guards on the switch: one graph for each of its states. A plain linear would not say "dense".
        dense_now = self.lynx_switch is not None and self.lynx_switch.dense
        return marked_linear(
            input,
            self.weight,
            self.bias,
            self.lynx_down,
            self.lynx_up,
            self.lynx_shift,
            self.lynx_score,
            self.lynx_bias,
            "dense" if dense_now else self.lynx_decision or "",
            self.lynx_dense_tokens,
            self.lynx_deflated,
        )


def attach(
    module: nn.Module,
    *,
    down: Tensor | None = None,
    up: Tensor | None = None,
    shift: Tensor | None = None,
    score: Tensor | None = None,
    decision: str | None = None,
    reason: str = "",
    dense_tokens: int = 0,
    deflated: int = 0,
    switch: Switch | None = None,
) -> LynxLinear:
    """Make an `nn.Linear` a `LynxLinear` in place, or replace what one carries; returns the module.

    down (R, K) and up (N, R) come together; shift and score are (K,); the first `deflated` rows of down are
    taken out of x before pruning, and the same columns of up carry them. The first dense_tokens of each
    sample stay dense; below 0, that many of its last. Tensors are moved to the weight's device and dtype;
    layers that are given one tensor object (down or shift of Q, K and V) share its work.
    Raises TypeError for a module that is no plain linear layer, ValueError for a shape or decision that does
    not fit.
    """
    if type(module) not in (nn.Linear, LynxLinear):
        raise TypeError(f"cannot attach to a {type(module).__name__}: it is not a torch.nn.Linear")
    assert isinstance(module, nn.Linear)
    n, k = module.weight.shape
    if (down is None) != (up is None):
        raise ValueError("down and up are the two factors of one LoRA branch: give both or none")
    rank = 0 if down is None else down.shape[0]
    wanted = {
        "down": (down, (rank, k)),
        "up": (up, (n, rank)),
        "shift": (shift, (k,)),
        "score": (score, (k,)),
    }
    for name, (given, shape) in wanted.items():
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"{name} is {tuple(given.shape)}; a layer of (N, K) = {(n, k)} needs {shape}")
    if decision is not None and decision not in DECISIONS:
        raise ValueError(f"decision={decision!r} is unknown; give 'sparse', 'dense' or None")
    if not 0 <= deflated <= rank:
        raise ValueError(f"deflated={deflated} counts leading rows of down, which has {rank}")
    _become(module, LynxLinear)
    assert isinstance(module, LynxLinear)
    module.__dict__.pop("_lynx_hook", None)
    weight = module.weight.detach()
    data: dict[str, Any] = {"lynx_down": down, "lynx_up": up, "lynx_shift": shift, "lynx_score": score}
    for name, given in data.items():
        placed = None if given is None else given.detach().to(device=weight.device, dtype=weight.dtype)
        if given is not None and placed is not None:
            common = _one_copy(given, placed)
            # given may have been written to through .data, which counts no versions
            placed = common if common.is_meta or torch.equal(common, placed) else placed
        module.register_buffer(name, placed, persistent=False)
    module.register_buffer("lynx_bias", _fold(weight, module.bias, module.lynx_shift), persistent=False)
    module.lynx_decision, module.lynx_reason, module.lynx_before = decision, reason, None
    module.lynx_dense_tokens, module.lynx_deflated, module.lynx_switch = dense_tokens, deflated, switch
    return module


def detach(module: nn.Module) -> nn.Module:
    """Undo `attach`: the module is the `nn.Linear` it was. A plain module is returned as it is."""
    if isinstance(module, LynxLinear):
        for name in (*_BUFFERS, *_ATTRIBUTES):
            delattr(module, name)
        module.__dict__.pop("_lynx_hook", None)
        _become(module, nn.Linear)
    return module


def _fold(weight: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """b + W·μ, (N,), rounded once."""
    if shift is None:
        return None
    acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
    folded = weight.to(acc) @ shift.to(acc)
    return (folded if bias is None else folded + bias.detach().to(acc)).to(weight.dtype)


# tensor → (its version then, what it was moved or converted to)
_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _one_copy(given: Tensor, copy: Tensor) -> Tensor:
    """`copy`, or what `given` was made into before on the same device and in the same dtype.

    Layers that read one X share a sparsify only while they hold one tensor object. Moving a model, which goes
    from layer to layer, would leave each with its own.
    """
    if copy is given or given.is_inference():  # which counts no versions: it may have been written to since
        return copy
    known = [(then, other) for then, ref in _copies.get(given, ()) if (other := ref()) is not None]
    for then, other in known:
        if then == given._version and other.device == copy.device and other.dtype == copy.dtype:
            return other
    _copies[given] = [(then, weakref.ref(other)) for then, other in (*known, (given._version, copy))]
    return copy


def _offloaded_alone(module: nn.Module) -> bool:
    """Whether diffusers offloads this layer by itself and it may still share tensors with others."""
    hooks = getattr(module, "_diffusers_hook", None)
    hook = None if hooks is None else hooks.get_hook("group_offloading")
    return hook is not None and getattr(module, "_lynx_hook", None) is not hook


@torch.compiler.disable
def _take_own_tensors(module: nn.Module) -> None:
    """Tensors of its own, for a layer that diffusers offloads by itself, in place of what it shares.

    diffusers fetches each layer's tensors while the layer before still computes. Of a tensor that both hold,
    the copy in use would be replaced by one that is still on its way. The first step, in which this runs,
    fetches nothing ahead. Layers with tensors of their own have a sparsify of their own.
    """
    hook = vars(module)["_diffusers_hook"].get_hook("group_offloading")
    kept = hook.group.cpu_param_dict  # tensor → it in the host's memory; empty unless fetched ahead
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer in kept:
            module._buffers[name] = own = buffer.detach()
            kept[own] = kept.pop(buffer)
    module._lynx_hook = hook


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Swap the class; the bound forward that hooks (accelerate, diffusers) keep follows."""
    module.__class__ = cls
    for name, held in list(vars(module).items()):
        bound = isinstance(held, types.MethodType) and held.__self__ is module
        if bound and getattr(held, "__name__", "") == "forward":  # torchao binds a partial, which has no name
            setattr(module, name, types.MethodType(cls.forward, module))
