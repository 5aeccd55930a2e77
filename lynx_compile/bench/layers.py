"""Every kind of linear layer of a production transformer alone, as the paper's figure has them.

A kind is the layers of a repeated block that read the same X: Q, K and V are one, with one sparsify between
them. They run through the backend as a user's model does, nothing but the linear layers in the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import attach
from ..models import Step, resolve
from ..regional import compile_blocks
from ..report import clear_report, report
from ..runtime import kernels
from .timing import SECONDS, PowerMeter, median_ms, sets_needed

LEAST_TOKENS = 64  # fewer rows: modulation and other layers on one row a sample
DTYPE = torch.bfloat16


class Kind(NamedTuple):
    """Layers that read one X (M, K): their names within a block of class `block`, and their N."""

    block: str
    names: tuple[str, ...]
    m: int
    ns: tuple[int, ...]
    k: int


class SharedInput(nn.Module):
    """Linear layers on one X."""

    def __init__(self, ns: Sequence[int], k: int, device: str | torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(k, n, device=device, dtype=dtype) for n in ns)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x (1, M, K) → one (1, M, N) a layer."""
        return [layer(x) for layer in self.layers]


def run(
    models: Sequence[str],
    *,
    resolution: int = 1024,
    rank: int = 64,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every kind of every model; returns {power_w, clock_mhz, rows, averages}.

    rows: {model, block, layers, count, m, n, k, lora_rank, decision, dense_ms, total_ms, total_no_lora_ms,
    speedup}, times of one block's layers, everything counted. averages: time of all sparse kinds, weighted by
    their count, dense over sparse.
    Raises RuntimeError where there are no kernels to measure.
    """
    reason = kernels.unavailable_reason(torch.device("cuda", 0), DTYPE)
    if reason is not None:
        raise RuntimeError(f"nothing to measure here: {reason}")
    rows = []
    with torch.no_grad(), PowerMeter() as meter:
        for name in models:
            for kind, count in kinds(name, resolution).items():
                progress(f"{name}: {', '.join(kind.names)}")
                rows.append({"model": name, "count": count, **measure(kind, rank, seconds)})
    load = meter.load()
    return {
        "power_w": load.power_w,
        "clock_mhz": load.clock_mhz,
        "averages": averages(rows),
        "rows": rows,
    }


def kinds(name: str, resolution: int) -> dict[Kind, int]:
    """The kinds of a known model and how many blocks have each, from one step on meta tensors."""
    known = resolve(name)
    model = known.build("meta")
    repeated: Any = model._repeated_blocks
    readers: dict[tuple[str, int], list[tuple[str, nn.Linear]]] = {}
    inputs: dict[tuple[str, int], Tensor] = {}  # kept, so that no later input has the address of one
    for path, block in model.named_modules():
        if type(block).__name__ not in repeated:
            continue
        for local, module in block.named_modules():
            if isinstance(module, nn.Linear):

                def read(module: Any, args: Any, path: str = path, local: str = local) -> None:
                    key = (path, id(args[0]))
                    inputs[key] = args[0]
                    readers.setdefault(key, []).append((local, module))

                module.register_forward_pre_hook(read)
    step = Step(resolution, resolution, 1, known.step.frames, known.step.text_tokens)
    with torch.no_grad():
        model(**known.inputs(step))
    found: Counter[Kind] = Counter()
    for (path, address), layers in readers.items():
        x = inputs[path, address]
        m = x.numel() // x.shape[-1]
        if m >= LEAST_TOKENS:
            block_class = type(model.get_submodule(path)).__name__
            names, modules = zip(*layers, strict=True)
            ns = tuple(module.out_features for module in modules)
            found[Kind(block_class, names, m, ns, x.shape[-1])] += 1
    return dict(found)


def measure(kind: Kind, rank: int, seconds: float) -> dict[str, Any]:
    """Times in ms of the layers of one kind: dense, and as the backend runs them when nothing is skipped."""
    n, itemsize = sum(kind.ns), DTYPE.itemsize
    count = sets_needed(itemsize * (kind.m * kind.k + n * kind.k))
    sets = nn.ModuleList(SharedInput(kind.ns, kind.k, "cuda", DTYPE) for _ in range(count))
    xs = [torch.randn(1, kind.m, kind.k, device="cuda", dtype=DTYPE) for _ in range(count)]

    def timed() -> float:
        return round(median_ms([lambda s=s, x=x: s(x) for s, x in zip(sets, xs, strict=True)], seconds), 5)  # type: ignore[misc]

    dense_ms = timed()
    _switch_on(sets)
    total_no_lora_ms = timed()
    for shared in sets:
        attach_branches(shared, rank)
    _switch_on(sets)
    total_ms = timed()
    decision = "sparse" if all(row.decision == "sparse" for row in report().rows) else "dense"
    return {
        "block": kind.block,
        "layers": list(kind.names),
        "m": kind.m,
        "n": n,
        "k": kind.k,
        "lora_rank": rank,
        "decision": decision,
        "dense_ms": dense_ms,
        "total_ms": total_ms,
        "total_no_lora_ms": total_no_lora_ms,
        "speedup": round(dense_ms / total_ms, 4),
    }


def _switch_on(sets: nn.Module) -> None:
    torch._dynamo.reset()
    clear_report()
    compile_blocks(sets, blocks=["SharedInput"], dynamic=False, only=["*"], rest="eager", strict=True)


def attach_branches(shared: Any, rank: int) -> None:
    """Random LoRA branches, one down-projection for all layers of X, as a calibrated profile has them."""
    k = shared.layers[0].in_features
    weight = shared.layers[0].weight
    down = torch.randn(rank, k, device=weight.device, dtype=weight.dtype) / k**0.5
    for layer in shared.layers:
        up = torch.randn(layer.out_features, rank, device=weight.device, dtype=weight.dtype) / rank**0.5
        attach(layer, down=down, up=up)


def averages(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By model: the time of all its sparse layers, dense over sparse."""
    found = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        sparse = [row for row in rows if row["model"] == model and row["decision"] == "sparse"]
        if sparse:
            dense_ms, total_ms = (
                sum(row["count"] * row[key] for row in sparse) for key in ("dense_ms", "total_ms")
            )
            found[model] = round(dense_ms / total_ms, 4)
    return found
