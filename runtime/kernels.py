"""The CUDA implementations of the `rt_lynx::` ops: check the operands, choose a kernel, launch it.

`unavailable_reason` is the question every pass asks before it rewrites anything. Where there are no kernels
(fp32, fp64, GPUs before Ampere, no NVRTC) the ops still run, as the definition in plain PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import (
    build,
    gemm_mma,
    gemm_sm90,
    launch,
    operands,
    ops,
    placement,
    residual_norm,
    residual_norm_kernel,
    rotary,
    rotary_kernel,
    semantics,
    sparsify_kernel,
)
from .calls import Call, Direct, Known, Operands, Options, Shortcut
from .operands import RANK_MULTIPLE

DTYPES = (torch.bfloat16, torch.float16)
FIRST_CAPABILITY = (8, 0)  # Ampere: the first sparse tensor cores

_library = torch.library.Library(ops.NAMESPACE, "IMPL", "CUDA")


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `device` has no kernels for `dtype`, in words a report can print; None when it has.

    Needs neither a GPU nor NVRTC: their absence is a reason like any other.
    """
    if device.type != "cuda":
        return f"no kernels: the model is on {device.type!r}, and sparse tensor cores are on NVIDIA GPUs"
    if dtype not in DTYPES:
        return f"no kernels: dtype is {dtype}, and the kernels take torch.bfloat16 or torch.float16"
    return _device_reason(device.index)


@functools.cache
def _device_reason(index: int | None) -> str | None:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"no kernels: torch {torch.__version__} sees no CUDA device here"
    capability = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    if capability < FIRST_CAPABILITY:
        found = f"{name} has compute capability {capability[0]}.{capability[1]}"
        return f"no kernels: {found}, and sparse tensor cores start at 8.0"
    try:
        version, archs = build.nvrtc_version(), build.supported_archs()
    except build.CompileError as error:
        return f"no kernels: {error}"
    shown = ".".join(map(str, version))
    if int("".join(map(str, capability))) not in archs:
        return f"no kernels: NVRTC {shown} does not know {name}; install a newer nvidia-cuda-nvrtc"
    if version[0] > launch.driver_version()[0]:
        driver = ".".join(map(str, launch.driver_version()))
        return f"no kernels: NVRTC {shown} needs a newer driver than this one (CUDA {driver})"
    return None


@functools.cache
def _gemms(device: int, dtype: torch.dtype) -> Callable[..., Call] | None:
    """What prepares sparse GEMMs on a device for an element type; None where the definition has to do."""
    if device < 0 or unavailable_reason(torch.device("cuda", device), dtype) is not None:
        return None
    return gemm_sm90.prepare_all if is_hopper(device) else gemm_mma.prepare_all


def is_hopper(device: int) -> bool:
    """Whether the device has `wgmma`, which the fast GEMM needs."""
    return torch.cuda.get_device_capability(device) == (9, 0)


_sparsify_calls, _linear_calls, _together_calls, _rotary_calls, _residual_norm_calls = (
    Known() for _ in range(5)
)
# apart from the others, whose `Shortcut` returns outputs as a call leaves them: these are still to be filled
_placed_calls, _placed_together_calls = Known(), Known()


def _sparsify_key(
    producer: str,
    inputs: Sequence[Tensor | None],
    lora_down: Tensor | None = None,
    eps: float = 0.0,
    mult_offset: float = 0.0,
    shift: Tensor | None = None,
    score: Tensor | None = None,
    compensation: str = "norm",
    deflated: int = 0,
    version: int = ops.VERSION,
) -> tuple[Options, Operands]:
    return (producer, eps, mult_offset, compensation, deflated, version), (*inputs, lora_down, shift, score)


def _linear_key(
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    t: Tensor,
    weight: Tensor,
    lora_up: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    left: Tensor | None = None,
    top: Tensor | None = None,
    bottom: Tensor | None = None,
    version: int = ops.VERSION,
) -> tuple[Options, Operands]:
    placed = left is not None or top is not None or bottom is not None
    return (activation, placed, version), (values, metadata, scale, t, weight, lora_up, bias, gate, residual)


def _sparsify(
    producer: str,
    inputs: Sequence[Tensor | None],
    lora_down: Tensor | None = None,
    eps: float = 0.0,
    mult_offset: float = 0.0,
    shift: Tensor | None = None,
    score: Tensor | None = None,
    compensation: str = "norm",
    deflated: int = 0,
    version: int = ops.VERSION,
) -> Sequence[Tensor]:
    options, given = _sparsify_key(
        producer, inputs, lora_down, eps, mult_offset, shift, score, compensation, deflated, version
    )
    call = _sparsify_calls.find(options, given)
    if call is not None:
        return call.run()
    first = inputs[0]
    assert first is not None, "a producer's first input is a tensor"
    rank = 0 if lora_down is None else lora_down.shape[0]
    arguments: dict[str, Any] = {"eps": eps, "mult_offset": mult_offset, "shift": shift, "score": score}
    arguments |= {"lora_down": lora_down, "compensation": compensation, "deflated": deflated}
    no_kernel = _gemms(first.get_device(), first.dtype) is None or deflated > sparsify_kernel.MAX_DEFLATED
    if version != ops.VERSION or no_kernel:
        return ops._sparsify_reference(producer, inputs, **arguments, version=version)
    if not rank % RANK_MULTIPLE:
        call = sparsify_kernel.prepare(producer, inputs, **arguments)
        return _sparsify_calls.keep(options, given, call).run()
    assert lora_down is not None
    arguments["lora_down"] = F.pad(lora_down, (0, 0, 0, -rank % RANK_MULTIPLE))
    *compressed, t = sparsify_kernel.prepare(producer, inputs, **arguments).run()
    return *compressed, t[:, :rank].contiguous()


def _sparse_linear(
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    t: Tensor,
    weight: Tensor,
    lora_up: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    left: Tensor | None = None,
    top: Tensor | None = None,
    bottom: Tensor | None = None,
    version: int = ops.VERSION,
) -> Tensor:
    options, given = _linear_key(
        values,
        metadata,
        scale,
        t,
        weight,
        lora_up,
        bias,
        activation,
        gate,
        residual,
        left,
        top,
        bottom,
        version,
    )
    sides = zip((left, top, bottom), ops.SIDES, strict=True)
    beside, side = next((one for one in sides if one[0] is not None), (None, ""))
    if beside is not None:
        options = *options, side, beside.shape, beside.dtype, beside.device
    known = _linear_calls if beside is None else _placed_calls
    call = known.find(options, given)
    if call is not None:
        return placement.fill(call.run()[0], beside, side)
    ops.check_beside(values, weight.shape[0], left, top, bottom)
    prepare_all = _gemms(values.get_device(), values.dtype)
    if prepare_all is None or version != ops.VERSION:
        return ops._sparse_linear_reference(
            values,
            metadata,
            scale,
            t,
            weight,
            lora_up=lora_up,
            bias=bias,
            activation=activation,
            gate=gate,
            residual=residual,
            left=left,
            top=top,
            bottom=bottom,
            version=version,
        )
    if activation not in semantics.ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; one of {', '.join(semantics.ACTIVATIONS)}")
    if not values.shape[0] or not weight.shape[0]:
        return ops.placed(values.new_empty((values.shape[0], weight.shape[0])), left, top, bottom)
    call = None
    if beside is None or placement.possible(values.shape[0], [beside], [side], [gate, residual]):
        checked = operands.checked(values, metadata, scale, t, weight, lora_up, bias, gate, residual)
        *compressed, t, weight, lora_up, bias, gate, residual = checked
        layers = [operands.Layer(t, weight, lora_up, bias, activation, gate, residual)]
        if beside is None:
            call = prepare_all(*compressed, layers)
        else:
            call = placement.prepare(prepare_all, compressed, layers, [beside], [side])
    if call is None:
        layer = t, weight, lora_up, bias, activation, gate, residual
        return ops.placed(_sparse_linear(values, metadata, scale, *layer), left, top, bottom)
    if all(a is b for a, b in zip(checked, given, strict=True)):
        known.keep(options, given, call)
    return placement.fill(call.run()[0], beside, side)


def _together_key(
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    ts: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_ups: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    gates: Sequence[Tensor | None],
    residuals: Sequence[Tensor | None],
    besides: Sequence[Tensor | None],
    sides: Sequence[str],
    version: int = ops.VERSION,
) -> tuple[Options, Operands]:
    given = values, metadata, scale, *ts, *weights, *lora_ups, *biases, *gates, *residuals
    if not sides:
        return (*activations, version), given
    facts = [None if beside is None else (beside.shape, beside.dtype, beside.device) for beside in besides]
    return (*activations, *sides, *facts, version), given


def _sparse_linears(
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    ts: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_ups: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    gates: Sequence[Tensor | None],
    residuals: Sequence[Tensor | None],
    besides: Sequence[Tensor | None],
    sides: Sequence[str],
    version: int = ops.VERSION,
) -> list[Tensor]:
    lists = ts, weights, lora_ups, biases, activations, gates, residuals
    options, given = _together_key(values, metadata, scale, *lists, besides, sides, version)
    known = _placed_together_calls if sides else _together_calls
    call = known.find(options, given)
    if call is not None:
        return _filled(call.run(), besides, sides)
    ops.check_sides("sparse_linears", len(weights), besides, sides)
    for i, weight in enumerate(weights if sides else ()):
        ops.check_beside(values, weight.shape[0], *ops.parts(besides, sides, i), op="sparse_linears")
    prepare_all = _gemms(values.get_device(), values.dtype)
    empty = not values.shape[0] or not weights or not all(weight.shape[0] for weight in weights)
    unknown = not set(activations) <= set(semantics.ACTIVATIONS)
    if prepare_all is None or version != ops.VERSION or empty or unknown:
        return ops._sparse_linears(values, metadata, scale, *lists, besides, sides, version)
    if sides and not placement.possible(values.shape[0], besides, sides, [*gates, *residuals]):
        if "left" in sides:  # each alone has a place
            return ops._sparse_linears(values, metadata, scale, *lists, besides, sides, version)
        return _joined((values, metadata, scale), lists, besides, sides)
    layers, as_given = [], True
    for t, weight, up, bias, activation, gate, residual in zip(*lists, strict=True):
        one = values, metadata, scale, t, weight, up, bias, gate, residual
        checked = operands.checked(*one)
        as_given &= all(a is b for a, b in zip(checked, one, strict=True))
        *compressed, t, weight, up, bias, gate, residual = checked
        layers.append(operands.Layer(t, weight, up, bias, activation, gate, residual))
    if sides:
        call = placement.prepare(prepare_all, compressed, layers, besides, sides)
        if call is None:
            return _joined((values, metadata, scale), lists, besides, sides)
    else:
        call = prepare_all(*compressed, layers)
    if as_given:
        known.keep(options, given, call)
    return _filled(call.run(), besides, sides)


def _joined(
    compressed: Any, lists: Any, besides: Sequence[Tensor | None], sides: Sequence[str]
) -> list[Tensor]:
    """The layers without what stands beside them, in a call that is remembered, and then joined to that."""
    arguments: tuple[Any, ...] = (*compressed, *lists, [], [])
    ys = _sparse_linears(*arguments)
    return [ops.placed(y, *ops.parts(besides, sides, i)) for i, y in enumerate(ys)]


def _filled(ys: Sequence[Tensor], besides: Sequence[Tensor | None], sides: Sequence[str]) -> list[Tensor]:
    if not sides:
        return list(ys)
    return [placement.fill(*one) for one in zip(ys, besides, sides, strict=True)]


def _rotary_key(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    eps: Sequence[float],
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    version: int = ops.VERSION,
) -> tuple[Options, Operands]:
    return (*eps, version), (*parts, *weights, *cos, *sin)


def _rotary(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    eps: Sequence[float],
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    version: int = ops.VERSION,
) -> Tensor:
    options, given = _rotary_key(parts, weights, eps, cos, sin, version)
    call = _rotary_calls.find(options, given)
    if call is not None:
        return call.run()[0]
    first = parts[0]
    if version != ops.VERSION or unavailable_reason(first.device, first.dtype) is not None:
        return rotary._rotary_reference(parts, weights, eps, cos, sin, version)
    return _rotary_calls.keep(options, given, rotary_kernel.prepare(parts, weights, eps, cos, sin)).run()[0]


def _residual_norm_key(
    x: Tensor,
    weight: Tensor | None,
    mult: Tensor | None,
    residual: Tensor,
    eps: float,
    mult_offset: float = 0.0,
    version: int = ops.VERSION,
) -> tuple[Options, Operands]:
    return (eps, mult_offset, version), (x, weight, mult, residual)


def _residual_norm(
    x: Tensor,
    weight: Tensor | None,
    mult: Tensor | None,
    residual: Tensor,
    eps: float,
    mult_offset: float = 0.0,
    version: int = ops.VERSION,
) -> Tensor:
    arguments = x, weight, mult, residual, eps, mult_offset
    options, given = _residual_norm_key(*arguments, version)
    call = _residual_norm_calls.find(options, given)
    if call is not None:
        return call.run()[0]
    known = x.shape[-1] in residual_norm.CHANNELS
    if version != ops.VERSION or not known or unavailable_reason(x.device, x.dtype) is not None:
        return residual_norm._residual_norm_reference(*arguments, version)
    return _residual_norm_calls.keep(options, given, residual_norm_kernel.prepare(*arguments)).run()[0]


_library.impl("rotary", _rotary)
_library.impl("residual_norm", _residual_norm)
_library.impl("sparsify", _sparsify)
_library.impl("sparse_linear", _sparse_linear)
_library.impl("sparse_linears", _sparse_linears)
Shortcut.install(ops.sparsify, _sparsify_calls, _sparsify_key)
Shortcut.install(ops.sparse_linear, _linear_calls, _linear_key)
Shortcut.install(ops.sparse_linears, _together_calls, _together_key)
Shortcut.install(rotary.rotary, _rotary_calls, _rotary_key)
Shortcut.install(residual_norm.residual_norm, _residual_norm_calls, _residual_norm_key)
Direct.install(ops.linears, ops._linears, slice(1, 3))
