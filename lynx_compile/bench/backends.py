"""What a user can switch on for a transformer, and switching between several on one model.

    with switched_on(model, BACKENDS["rt_lynx"], rank=64, inputs=inputs):
        model(**inputs)

Backends that are measured against each other stay compiled side by side: `State` holds what one of them put
onto the modules, so that going from one to the next costs no compilation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.statistics import Hooks, Readers
from ..calibration.text_rows import text_rows_of
from ..layers import LynxLinear, attach, detach
from ..regional import compile_blocks

# The layers that the paper leaves dense after compensation (paper: layer skipping), in diffusers' names.
PAPER_SKIPS: dict[str, tuple[str, ...]] = {
    "FluxTransformer2DModel": ("single_transformer_blocks.*.proj_out",),
    "ZImageTransformer2DModel": ("*.attention.to_out.0", "*.feed_forward.w3"),
}


@dataclass(frozen=True)
class Backend:
    """What a user switches on. inductor, mode: on the blocks of the model; neither: eager mode.

    everything: sparse wherever it pays, also where the safe defaults stay dense. paper: but not the paper's
    skipped layers. lora: with a LoRA branch on each sparse layer. deflated: whose directions leave X before
    pruning, as `rt-lynx calibrate` makes them. text_dense: the text rows of joint sequences stay dense.
    fp8: quantises the weights in place.
    """

    name: str
    inductor: bool = False
    mode: str | None = None
    fp8: bool = False
    lynx: bool = False
    lora: bool = False
    deflated: bool = False
    text_dense: bool = False
    everything: bool = False
    paper: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("eager"),
        Backend("inductor", inductor=True),
        Backend("inductor-max-autotune", inductor=True, mode="max-autotune-no-cudagraphs"),
        Backend("inductor-cudagraphs", inductor=True, mode="reduce-overhead"),
        Backend("fp8-rowwise", inductor=True, fp8=True),
        Backend("rt_lynx", lynx=True, lora=True),
        Backend("rt_lynx-paper-skips", lynx=True, lora=True, everything=True, paper=True),
        Backend("rt_lynx-everything", lynx=True, lora=True, everything=True),
        Backend("rt_lynx-everything-deflated", lynx=True, lora=True, deflated=True, everything=True),
        Backend("rt_lynx-everything-text-dense", lynx=True, lora=True, text_dense=True, everything=True),
        Backend("rt_lynx-everything-no-lora", lynx=True, everything=True),
        Backend(
            "rt_lynx-cudagraphs",
            lynx=True,
            lora=True,
            everything=True,
            options={"mode": "reduce-overhead"},
        ),
    )
}


@contextmanager
def switched_on(
    model: nn.Module, backend: Backend, rank: int, inputs: Mapping[str, Any], dynamic: bool | None = None
) -> Iterator[None]:
    """The model's repeated blocks under a backend; plain eager modules again at the end.

    A model that fp8 has quantised stays quantised.
    """
    try:
        switch_on(model, backend, rank, inputs, dynamic)
        yield
    finally:
        switch_off(model)


def switch_on(
    model: nn.Module, backend: Backend, rank: int, inputs: Mapping[str, Any], dynamic: bool | None = None
) -> None:
    """Put a backend onto the repeated blocks of a model in eager mode; they compile on their first call.

    inputs: of one step, from which it is seen which layers read the same tensor.

    Raises RuntimeError when the backend needs a package that is not installed, or text rows to keep dense.
    """
    if backend.fp8:
        _quantize_fp8(model)
    if backend.lora:
        attach_random_branches(model, rank, inputs, deflated=backend.deflated, text_dense=backend.text_dense)
    if backend.lynx:
        skip = PAPER_SKIPS.get(type(model).__name__, ()) if backend.paper else ()
        only = ["*"] if backend.everything else []
        compile_blocks(
            model,
            fullgraph=True,
            dynamic=dynamic,
            skip=list(skip),
            only=only,
            strict=True,
            **backend.options,
        )
    elif backend.inductor:
        compile_repeated: Any = model.compile_repeated_blocks
        compile_repeated(fullgraph=True, mode=backend.mode, dynamic=dynamic)


def switch_off(model: nn.Module) -> None:
    """Undo `switch_on`, but for the quantisation of weights."""
    for module in model.modules():
        module._compiled_call_impl = None
        if isinstance(module, LynxLinear):
            detach(module)


@dataclass(frozen=True)
class State:
    """What a backend put onto the modules of a model: compiled calls, per-layer data and decisions."""

    calls: Mapping[nn.Module, Any]
    layers: Mapping[nn.Module, tuple[dict[str, Any], dict[str, Tensor | None]]]

    @classmethod
    def of(cls, model: nn.Module) -> State:
        calls = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
        layers: dict[nn.Module, Any] = {
            m: (_lynx(vars(m)), _lynx(m._buffers)) for m in model.modules() if isinstance(m, LynxLinear)
        }
        return cls(calls, layers)

    def restore(self, model: nn.Module) -> None:
        """Back to this state, with the very same tensors: nothing is compiled or captured again."""
        switch_off(model)
        for layer, (attributes, buffers) in self.layers.items():
            attach(layer)
            vars(layer).update(attributes)
            layer._buffers.update(buffers)
        for module, call in self.calls.items():
            module._compiled_call_impl = call


def _lynx(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if name.startswith("lynx_")}


def attach_random_branches(
    model: nn.Module,
    rank: int,
    inputs: Mapping[str, Any],
    seed: int = 0,
    deflated: bool = False,
    text_dense: bool = False,
) -> int:
    """A random LoRA branch on every linear layer of the repeated blocks that tokens go through.

    As in a calibrated profile, layers that read the same tensor share A; an eager step on `inputs` tells
    which do. Layers that stay dense ignore theirs. deflated: the branch takes its directions out of X before
    pruning. text_dense: layers that read text and image as one sequence leave the rows of the text in
    `inputs` dense. Returns how many were attached. Raises RuntimeError where no layer is known to read both.
    """
    joint = text_rows_of(model, (), inputs) if text_dense else None
    if text_dense and joint is None:
        raise RuntimeError(
            f"no layer of {type(model).__name__} is known to read text and image as one sequence"
        )
    glob, text = joint or ("", 0)
    kinds: Any = model._repeated_blocks
    linears = {
        f"{path}.{name}": module
        for path, block in model.named_modules()
        if type(block).__name__ in kinds
        for name, module in block.named_modules()
        if type(module) is nn.Linear and "mod" not in name.lower() and "norm" not in name.lower()
    }
    readers = Readers()
    with torch.no_grad(), Hooks(model, linears, readers.see, readers.end_of_call):
        model(**inputs)
    torch.manual_seed(seed)
    attached = 0
    for group in readers.groups().values():
        weight = linears[group[0]].weight
        down = torch.randn(rank, weight.shape[1], device=weight.device, dtype=weight.dtype)
        down /= weight.shape[1] ** 0.5
        for name in group:
            n = linears[name].out_features
            up = torch.randn(n, rank, device=weight.device, dtype=weight.dtype) * (0.01 / rank**0.5)
            attach(
                linears[name],
                down=down,
                up=up,
                deflated=rank if deflated else 0,
                dense_tokens=text if fnmatchcase(name, glob) else 0,
            )
        attached += len(group)
    return attached


def _quantize_fp8(model: nn.Module) -> None:
    """torchao's dynamic fp8 with a scale per row, in place."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise RuntimeError("it needs torchao; install it with: pip install 'lynx-compile[bench]'") from error
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
