"""Linear layers with 2:4 sparse activations against cuBLAS, sparse and 8-bit peers, every cost counted.

All inputs are random normal. M, N, K as everywhere: X (M, K), W (N, K).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime import kernels, ops
from .timing import SECONDS, PowerMeter, median_ms, medians_ms, sets_needed

PAPER_SHAPES = tuple((size, size, k) for k in (3072, 12288) for size in (2048, 4096, 8192))
DIT_SHAPES = (
    (4096, 3072, 3072),
    (4096, 9216, 3072),
    (4096, 12288, 3072),
    (4096, 3072, 12288),
    (4608, 21504, 3072),
    (4608, 3072, 15360),
)
# Text streams: where the break-even lies, so what the cost model must know; peers would tell it nothing.
FEW_TOKENS = tuple(
    (m, n, k) for m in (256, 512, 1024) for n, k in ((3072, 3072), (12288, 3072), (3072, 12288))
)
RANK = 64
PEERS = ("cusparselt_ms", "pytorch_spmm_ms", "fp8_rowwise_ms")
CUSPARSELT_ALGORITHMS = 6  # tried for each shape


class Chain(NamedTuple):
    """A producer and the linear layer behind it.

    inputs: columns of each input. dense: the same in PyTorch, of inputs, extra, weight and bias.
    extra: "modulation" for a shift and a scale, "tail" for a gate and a residual.
    """

    name: str
    shape: tuple[int, int, int]
    producer: str
    inputs: tuple[int, ...]
    dense: Callable[..., Tensor]
    extra: str = ""


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift, weight, bias)


def _gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.gelu(x, approximate="tanh"), weight, bias)


def _gated(x: Tensor, gate: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return residual + gate * _gelu(x, weight, bias)


def _joined(attention: Tensor, mlp: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(torch.cat([attention, F.gelu(mlp, approximate="tanh")], -1), weight, bias)


CHAINS = (
    Chain("gelu → down", (4096, 3072, 12288), "gelu_tanh", (12288,), _gelu),
    Chain("gelu → down → gate · y + residual", (4096, 3072, 12288), "gelu_tanh", (12288,), _gated, "tail"),
    Chain("adaLN → qkv", (4096, 9216, 3072), "layer_norm", (3072,), _modulated, "modulation"),
    Chain("adaLN → up", (4096, 12288, 3072), "layer_norm", (3072,), _modulated, "modulation"),
    Chain("cat(attn, gelu) → proj_out", (4608, 3072, 15360), "cat_gelu_tanh", (3072, 12288), _joined),
)


def run(
    shapes: Sequence[tuple[int, int, int]] = PAPER_SHAPES + DIT_SHAPES,
    *,
    rank: int = RANK,
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = SECONDS,
    few_tokens: Sequence[tuple[int, int, int]] = FEW_TOKENS,
    chains: Sequence[Chain] = CHAINS,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure; returns {power_w, clock_mhz, rows, few_tokens, chains, geomean_speedup, ...}.

    few_tokens: rows without peers, which the geometric mean does not count.

    Raises RuntimeError where there are no kernels to measure.
    """
    reason = kernels.unavailable_reason(torch.device("cuda", 0), dtype)
    if reason is not None:
        raise RuntimeError(f"nothing to measure here: {reason}")
    rows, short_rows, chain_rows = [], [], []
    with torch.inference_mode(), PowerMeter() as meter:
        for shape in shapes:
            progress("M, N, K = {}, {}, {}".format(*shape))
            rows.append(measure_shape(*shape, rank, dtype, seconds))
        for shape in few_tokens:
            progress("M, N, K = {}, {}, {}".format(*shape))
            short_rows.append(measure_shape(*shape, rank, dtype, seconds / 3, peers=False))
        for chain in chains:
            progress(chain.name)
            chain_rows.append(measure_chain(chain, rank, dtype, seconds))
    load = meter.load()
    return {
        "power_w": load.power_w,
        "clock_mhz": load.clock_mhz,
        "rows": rows,
        "few_tokens": short_rows,
        "chains": chain_rows,
        "geomean_speedup": geomean([row["speedup"] for row in rows]),
        "geomean_chain_speedup": geomean([row["speedup"] for row in chain_rows]),
    }


def geomean(values: Sequence[float]) -> float | None:
    """Geometric mean; None of nothing."""
    return round(math.exp(sum(map(math.log, values)) / len(values)), 4) if values else None


class Layer(NamedTuple):
    """One input set: X and what a linear layer holds. a, b: the LoRA factors A (R, K) and B (N, R)."""

    x: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor


def layers(m: int, n: int, k: int, rank: int, dtype: torch.dtype) -> list[Layer]:
    """As many input sets as push each other out of the L2 cache."""
    count = sets_needed(dtype.itemsize * (m * k + n * k))
    return [
        Layer(
            _normal(m, k, dtype=dtype),
            _normal(n, k, dtype=dtype) / k**0.5,
            _normal(rank, k, dtype=dtype) / k**0.5,
            _normal(n, rank, dtype=dtype) / rank**0.5,
            _normal(n, dtype=dtype),
        )
        for _ in range(count)
    ]


def _normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


Calls = list[Callable[[], Any]]


def measure_shape(
    m: int, n: int, k: int, rank: int, dtype: torch.dtype, seconds: float, peers: bool = True
) -> dict[str, Any]:
    """One row of the table: every method on one shape, in ms; None for what a peer cannot run."""
    sets = layers(m, n, k, rank, dtype)
    pruned = [ops.sparsify("identity", [s.x], lora_down=s.a) for s in sets]

    def multiply(s: Layer, compressed: Sequence[Tensor], lora: bool) -> Tensor:
        return ops.sparse_linear(*compressed, s.weight, lora_up=s.b if lora else None, bias=s.bias)

    def ours(s: Layer, lora: bool) -> Tensor:
        return multiply(s, ops.sparsify("identity", [s.x], lora_down=s.a if lora else None), lora)

    pairs = list(zip(sets, pruned, strict=True))
    rivals = {
        "cublas_ms": _each(sets, lambda s: F.linear(s.x, s.weight, s.bias)),
        "total_ms": _each(sets, lambda s: ours(s, lora=True)),
        "total_no_lora_ms": _each(sets, lambda s: ours(s, lora=False)),
        "sparsify_ms": _each(sets, lambda s: ops.sparsify("identity", [s.x], lora_down=s.a)),
        "sparsify_no_lora_ms": _each(sets, lambda s: ops.sparsify("identity", [s.x])),
        "gemm_ms": _each(pairs, lambda p: multiply(p[0], p[1], lora=True)),
        "gemm_no_lora_ms": _each(pairs, lambda p: multiply(p[0], p[1], lora=False)),
    }
    row: dict[str, Any] = {
        "m": m,
        "n": n,
        "k": k,
        "dtype": str(dtype).removeprefix("torch."),
        "lora_rank": rank,
    }
    if peers:
        row |= dict.fromkeys(PEERS)
        rivals |= _peers(sets)
    row |= _rounded(medians_ms(rivals, seconds))
    row["speedup"] = round(row["cublas_ms"] / row["total_ms"], 4)
    return row


def _each(items: Sequence[Any], call: Callable[[Any], Any]) -> Calls:
    return [lambda item=item: call(item) for item in items]  # type: ignore[misc]


def _rounded(times: dict[str, float]) -> dict[str, float]:
    return {name: round(time, 5) for name, time in times.items()}


def _peers(sets: list[Layer]) -> dict[str, Calls]:
    """PyTorch's own 2:4 path with its sparsification, cuSPARSELt without, and fp8 without quantisation."""
    found: dict[str, Calls] = {}
    try:
        packed = [(_tile_sparsify(s.x), s.weight) for s in sets]
        algorithm = _fastest_algorithm(*packed[0])

        def multiply(compressed: Tensor, weight: Tensor) -> Tensor:
            return torch._cslt_sparse_mm(compressed, weight.t(), alg_id=algorithm)

        multiply(*packed[0])
        found["cusparselt_ms"] = _each(packed, lambda pair: multiply(*pair))
        found["pytorch_spmm_ms"] = _each(sets, lambda s: multiply(_tile_sparsify(s.x), s.weight))
    except (RuntimeError, AttributeError):  # a torch without cuSPARSELt
        pass
    try:
        operands = [(*_to_fp8(s.x), *_to_fp8(s.weight)) for s in sets]
        _fp8_linear(operands[0])
        found["fp8_rowwise_ms"] = _each(operands, _fp8_linear)
    except (RuntimeError, AttributeError):
        pass
    return found


def _tile_sparsify(x: Tensor) -> Tensor:
    """X compressed by PyTorch's fused kernel, values and metadata in cuSPARSELt's one buffer."""
    return torch._sparse_semi_structured_tile(x, algorithm="", use_cutlass=False)[0].view(x.shape[0], -1)


def _fastest_algorithm(compressed: Tensor, weight: Tensor) -> int:
    """cuSPARSELt's fastest algorithm for this shape."""
    times = {}
    for algorithm in range(CUSPARSELT_ALGORITHMS):

        def multiply(algorithm: int = algorithm) -> Tensor:
            return torch._cslt_sparse_mm(compressed, weight.t(), alg_id=algorithm)

        try:
            times[algorithm] = median_ms([multiply], seconds=0.01)
        except RuntimeError:  # fewer algorithms for this shape
            break
    return min(times, key=times.__getitem__) if times else 0


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn), scale


def _fp8_linear(operands: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    x, x_scale, weight, weight_scale = operands
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def measure_chain(chain: Chain, rank: int, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Producer and linear layer: Inductor's compiled chain against `sparsify` with the producer fused."""
    m, n, k = chain.shape
    sets = []
    for layer in layers(m, n, k, rank, dtype):
        inputs = [_normal(1, m, columns, dtype=dtype) for columns in chain.inputs]
        shapes = {"modulation": [(1, 1, k)] * 2, "tail": [(1, 1, n), (1, m, n)]}.get(chain.extra, [])
        sets.append((layer, inputs, [_normal(*shape, dtype=dtype) for shape in shapes]))
    compiled = torch.compile(chain.dense, fullgraph=True, dynamic=False)

    def dense(item: Any) -> Tensor:
        layer, inputs, extra = item
        return compiled(*inputs, *extra, layer.weight, layer.bias)

    def compress(item: Any, lora: bool = True) -> Sequence[Tensor]:
        layer, inputs, extra = item
        arguments: dict[str, Any] = {"lora_down": layer.a if lora else None}
        if chain.extra == "modulation":
            shift, scale = extra
            inputs = [*inputs, None, None, scale, shift]
            arguments |= {"eps": 1e-6, "mult_offset": 1.0}
        return ops.sparsify(chain.producer, inputs, **arguments)

    def multiply(item: Any, compressed: Sequence[Tensor], lora: bool = True) -> Tensor:
        layer, _, extra = item
        tail = dict(zip(("gate", "residual"), extra, strict=True)) if chain.extra == "tail" else {}
        return ops.sparse_linear(
            *compressed, layer.weight, lora_up=layer.b if lora else None, bias=layer.bias, **tail
        )

    pairs = [(item, compress(item)) for item in sets]
    row: dict[str, Any] = {"chain": chain.name, "m": m, "n": n, "k": k, "lora_rank": rank}
    row |= _rounded(
        medians_ms(
            {
                "inductor_ms": _each(sets, dense),
                "total_ms": _each(sets, lambda item: multiply(item, compress(item))),
                "total_no_lora_ms": _each(sets, lambda item: multiply(item, compress(item, False), False)),
                "sparsify_ms": _each(sets, compress),
                "gemm_ms": _each(pairs, lambda pair: multiply(*pair)),
            },
            seconds,
        )
    )
    row["speedup"] = round(row["inductor_ms"] / row["total_ms"], 4)
    return row
