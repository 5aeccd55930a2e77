"""The CUDA implementations of the `rt_lynx::` ops: check the operands, choose a kernel, launch it.

`unavailable_reason` is the question every pass asks before it rewrites anything. Where there are no kernels
(fp32, fp64, GPUs before Ampere, no NVRTC) the ops still run, as the definition in plain PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from . import build, gemm_mma, gemm_sm90, launch, layout, ops, semantics, sparsify_kernel

DTYPES = (torch.bfloat16, torch.float16)
FIRST_CAPABILITY = (8, 0)  # Ampere: the first sparse tensor cores
ALIGNMENT = 16  # bytes: the widest access of the kernels
RANK_MULTIPLE = 16  # depth of one tensor-core step
ROWS_MULTIPLE = 16  # of N

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
def _gemm(device: int, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """The sparse GEMM for a device and an element type; None where the definition has to do."""
    if device < 0 or unavailable_reason(torch.device("cuda", device), dtype) is not None:
        return None
    return gemm_sm90.sparse_gemm if _is_hopper(device) else gemm_mma.sparse_gemm


def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def prepare(graph: fx.Graph, tensor_of: Callable[[fx.Node], Tensor | None]) -> list[Future[bytes]]:
    """Start compiling what the ops in `graph` will launch, in the background.

    tensor_of: what is known of a node's value, e.g. its fake tensor. Symbolic sizes count as their hints.
    Nothing depends on this: a kernel that is missed, or that another size needs, is compiled when it is used.
    """
    units: list[build.Unit] = []
    sparsified: dict[fx.Node, _Size] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (ops.sparsify, ops.sparse_linear, ops.linears):
            continue
        args, options = fx.map_arg((node.args, node.kwargs), tensor_of)
        if node.target is ops.sparse_linear:
            size = sparsified.get(node.args[0].args[0])  # values are item 0 of what sparsify returns
            if size is not None:
                tail = options.get("gate"), options.get("residual")
                units += _gemm_unit(size, args[4], options.get("activation", "none"), tail)
            continue
        producer, inputs = args[:2]
        size = _size(producer, inputs)
        if size is None:
            continue
        sparsified[node] = size
        tensors = {name: options.get(name) for name in ("shift", "score", "lora_down")}
        found = sparsify_kernel.kernels_for(producer, inputs, size.m, size.k, size.device, **tensors)
        units += [kernel.unit(size.arch) for kernel in found]
        if node.target is ops.linears:
            tails = zip(options["gates"], options["residuals"], strict=True)
            for weight, activation, tail in zip(args[2], options["activations"], tails, strict=True):
                units += _gemm_unit(size, weight, activation, tail)
    return build.prebuild(units)


class _Size(NamedTuple):
    """X (m, k), its dtype and where it is."""

    m: int
    k: int
    dtype: torch.dtype
    device: int
    arch: str


def _size(producer: str, inputs: Sequence[Tensor | None]) -> _Size | None:
    """The size of a producer's output; None when it is not known or has no kernels."""
    needed = inputs[: 2 if producer.startswith("cat") else 1]
    first = inputs[0]
    if first is None or any(t is None for t in needed) or first.device.type != "cuda":
        return None
    index = torch.cuda.current_device() if first.device.index is None else first.device.index
    if unavailable_reason(torch.device("cuda", index), first.dtype) is not None:
        return None
    m, k = (n if isinstance(n, int) else int(n.node.hint) for n in ops.producer_shape(producer, inputs))
    return _Size(m, k, first.dtype, index, build.arch_of(torch.cuda.get_device_capability(index)))


def _gemm_unit(
    size: _Size, weight: Tensor | None, activation: str, tail: Sequence[Tensor | None]
) -> list[build.Unit]:
    if weight is None:
        return []
    kernel_for = gemm_sm90.kernel_for if _is_hopper(size.device) else gemm_mma.kernel_for
    has_tail = any(t is not None for t in tail)
    kernel = kernel_for(size.device, size.dtype, size.m, weight.shape[0], size.k, activation, has_tail)
    return [kernel.unit(size.arch)]


def _sparsify(
    producer: str,
    inputs: Sequence[Tensor | None],
    *,
    eps: float = 0.0,
    mult_offset: float = 0.0,
    shift: Tensor | None = None,
    score: Tensor | None = None,
    lora_down: Tensor | None = None,
    compensation: str = "norm",
    version: int = ops.VERSION,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = inputs[0]
    assert first is not None, "a producer's first input is a tensor"
    rank = 0 if lora_down is None else lora_down.shape[0]
    arguments: dict[str, Any] = {"eps": eps, "mult_offset": mult_offset, "shift": shift, "score": score}
    if version != ops.VERSION or _gemm(first.get_device(), first.dtype) is None:
        return ops._sparsify_reference(
            producer, inputs, **arguments, lora_down=lora_down, compensation=compensation, version=version
        )
    if not rank % RANK_MULTIPLE:
        return sparsify_kernel.sparsify(
            producer, inputs, **arguments, lora_down=lora_down, compensation=compensation
        )
    assert lora_down is not None
    padded = F.pad(lora_down, (0, 0, 0, -rank % RANK_MULTIPLE))
    values, metadata, scale, t = sparsify_kernel.sparsify(
        producer, inputs, **arguments, lora_down=padded, compensation=compensation
    )
    return values, metadata, scale, t[:, :rank].contiguous()


def _sparse_linear(
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    t: Tensor,
    weight: Tensor,
    *,
    lora_up: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    version: int = ops.VERSION,
) -> Tensor:
    device, dtype = values.get_device(), values.dtype
    gemm = _gemm(device, dtype)
    if gemm is None or version != ops.VERSION:
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
            version=version,
        )
    m, half = values.shape
    n, k = weight.shape
    if n % ROWS_MULTIPLE or k % layout.BLOCK_COLUMNS or not k or 2 * half != k:
        _refuse_shapes(values, weight)
    if activation not in semantics.ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; one of {', '.join(semantics.ACTIVATIONS)}")
    words = -(-m // layout.BLOCK_ROWS) * (k // layout.BLOCK_COLUMNS) * layout.WORDS
    values = _operand("values", values, dtype, device, m * half)
    metadata = _operand("metadata", metadata, torch.int32, device, words)
    scale = _operand("scale", scale, torch.float32, device, m)
    weight = _operand("weight", weight, dtype, device, n * k)
    if lora_up is not None:
        rank = lora_up.shape[1]
        if rank % RANK_MULTIPLE:
            t, lora_up = (F.pad(x, (0, -rank % RANK_MULTIPLE)) for x in (t, lora_up))
            rank = lora_up.shape[1]
        t = _operand("t", t, dtype, device, m * rank, rows_apart=True)
        lora_up = _operand("lora_up", lora_up, dtype, device, n * rank) if rank else None
    if bias is not None:
        bias = _operand("bias", bias, dtype, device, n)
    if gate is not None:
        samples = gate.numel() // n
        if not samples or m % samples:
            raise ValueError(
                f"sparse_linear: gate has shape {tuple(gate.shape)}; expected one row of N = {n} for each "
                f"sample, and a number of samples that divides M = {m}"
            )
        gate = _operand("gate", gate, dtype, device, samples * n)
    if residual is not None:
        residual = _operand("residual", residual, dtype, device, m * n)
    if not m or not n:
        return values.new_empty((m, n))
    return gemm(values, metadata, scale, t, weight, lora_up, bias, activation, gate, residual)


def _operand(
    name: str, tensor: Tensor, dtype: torch.dtype, device: int, elements: int, rows_apart: bool = False
) -> Tensor:
    """The tensor, contiguous. Raises TypeError or ValueError when a kernel would misread it.

    rows_apart: the rows of a matrix need not follow each other, as in columns of a wider one.
    """
    if not tensor.is_contiguous() and not (
        rows_apart and tensor.stride(1) == 1 and tensor.stride(0) * tensor.element_size() % ALIGNMENT == 0
    ):
        tensor = tensor.contiguous()
    if (
        tensor.dtype is not dtype
        or tensor.get_device() != device
        or tensor.numel() != elements
        or tensor.data_ptr() % ALIGNMENT
    ):
        _refuse_operand(name, tensor, dtype, device, elements)
    return tensor


def _refuse_operand(name: str, tensor: Tensor, dtype: torch.dtype, device: int, elements: int) -> NoReturn:
    if tensor.dtype is not dtype:
        raise TypeError(f"sparse_linear: {name} is {tensor.dtype}, expected {dtype}; cast it")
    if tensor.get_device() != device:
        raise ValueError(f"sparse_linear: {name} is on {tensor.device}, expected cuda:{device}; move it")
    if tensor.numel() != elements:
        raise ValueError(
            f"sparse_linear: {name} has shape {tuple(tensor.shape)}, {tensor.numel()} elements, "
            f"expected {elements}"
        )
    raise ValueError(
        f"sparse_linear: {name} starts at {tensor.data_ptr():#x}, not a multiple of {ALIGNMENT} bytes; "
        f"pass {name}.clone()"
    )


def _refuse_shapes(values: Tensor, weight: Tensor) -> NoReturn:
    raise ValueError(
        f"sparse_linear: weight is {tuple(weight.shape)} and values {tuple(values.shape)}; the kernels need "
        f"weight (N, K) and values (M, K / 2) with N % {ROWS_MULTIPLE} == 0 and "
        f"K % {layout.BLOCK_COLUMNS} == 0; run this layer dense"
    )


_library.impl("sparsify", _sparsify)
_library.impl("sparse_linear", _sparse_linear)
