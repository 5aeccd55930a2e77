"""One denoising step of a production transformer under every backend a user can switch on.

Random weights at the exact geometry, created on the GPU; blocks are compiled one kind at a time, as
`model.compile_repeated_blocks` does. Each row is measured on the same model in the same process.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..layers import LynxLinear, attach, detach
from ..models import Step, resolve
from ..regional import compile_blocks
from ..report import clear_report, report
from .split import split_ms
from .timing import PowerMeter

MODELS = ("flux", "qwen-image", "z-image")
SECONDS = 1.0
WARMUPS = 2
RANK = 64
# cuDNN's attention is the fastest on Hopper; every backend gets it
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# The layers that the paper leaves dense after compensation (paper: layer skipping), in diffusers' names.
PAPER_SKIPS: dict[str, tuple[str, ...]] = {
    "FluxTransformer2DModel": ("single_transformer_blocks.*.proj_out",),
    "ZImageTransformer2DModel": ("*.attention.to_out.0", "*.feed_forward.w3"),
}


@dataclass(frozen=True)
class Backend:
    """What a user switches on. compile: on the blocks of the model; None for eager mode.

    everything: sparse wherever it pays, also where the safe defaults stay dense. paper: but not the paper's
    skipped layers. lora: with a LoRA branch on each sparse layer.
    """

    name: str
    inductor: bool = False
    mode: str | None = None
    fp8: bool = False
    lynx: bool = False
    lora: bool = False
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
        Backend("rt_lynx-everything-no-lora", lynx=True, everything=True),
        Backend(
            "rt_lynx-cudagraphs",
            lynx=True,
            lora=True,
            everything=True,
            paper=True,
            options={"mode": "reduce-overhead"},
        ),
    )
}
DEFAULT_BACKENDS = ("eager", "inductor", "rt_lynx", "rt_lynx-paper-skips", "rt_lynx-everything")


def run(
    models: Sequence[str] = MODELS,
    *,
    resolutions: Sequence[int] = (1024,),
    batches: Sequence[int] = (1,),
    backends: Sequence[str] = DEFAULT_BACKENDS,
    rank: int = RANK,
    seconds: float = SECONDS,
    device: str | torch.device = "cuda",
    layers: Mapping[str, int] | None = None,
    progress: Callable[[str], None] = lambda text: None,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Measure every model × backend × resolution × batch; the rows of `docs/results/step_<device>.json`.

    progress: told what goes on. keep: given all rows so far after each backend.
    layers: overrides of a config's layer counts, as {"num_layers": 2}: smaller models for tests.
    A backend that fails is told to `progress` and has no row. Raises ValueError for an unknown backend.
    """
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown:
        raise ValueError(f"unknown backend {unknown[0]!r}; one of {', '.join(BACKENDS)}")
    rows: list[dict[str, Any]] = []
    for name in models:
        progress(f"{name}: building")
        known = resolve(name)
        known = replace(known, config={**known.config, **(layers or {})})
        model = known.build(device)
        points = [
            Step(size, size, batch, known.step.frames, known.step.text_tokens)
            for size in resolutions
            for batch in batches
        ]
        inputs = [(step, known.inputs(step, device)) for step in points]
        for backend in (BACKENDS[name] for name in backends):
            progress(f"{name}: {backend.name}")
            try:
                with compiled(model, backend, rank), sdpa_kernel(ATTENTION, set_priority=True):
                    for step, example in inputs:
                        row = {
                            "model": name,
                            "resolution": step.width,
                            "batch": step.batch,
                            "backend": backend.name,
                            "lora_rank": rank if backend.lora else 0,
                            **measure(model, example, seconds),
                            "sparse_flops_share": sparse_share(model, example) if backend.lynx else 0.0,
                        }
                        rows.append(row)
                        progress(f"{name}: {backend.name}: {row['step_ms']:.1f} ms")
            except RuntimeError as error:  # not installed, out of memory, does not compile: the others go on
                progress(
                    f"{name}: {backend.name} has no figures: {str(error).strip() or type(error).__name__}"
                )
            _add_speedups(rows)
            keep(rows)
            if backend.fp8:  # quantised in place
                del model
                _release()
                model = known.build(device)
        del model, inputs
        _release()
    return rows


@contextmanager
def compiled(model: nn.Module, backend: Backend, rank: int) -> Iterator[None]:
    """The model's repeated blocks under a backend, undone at the end."""
    torch._dynamo.reset()
    clear_report()
    _release()
    if backend.fp8:
        _quantize_fp8(model)
    if backend.lora:
        attach_random_branches(model, rank)
    if backend.lynx:
        skip = PAPER_SKIPS.get(type(model).__name__, ()) if backend.paper else ()
        only = ["*"] if backend.everything else []
        compile_blocks(model, fullgraph=True, skip=list(skip), only=only, strict=True, **backend.options)
    elif backend.inductor:
        compile_repeated: Any = model.compile_repeated_blocks
        compile_repeated(fullgraph=True, mode=backend.mode)
    try:
        yield
    finally:
        for module in model.modules():
            module._compiled_call_impl = None
            if isinstance(module, LynxLinear):
                detach(module)
        torch._dynamo.reset()


def measure(model: nn.Module, inputs: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """Times of one step in ms, compile time in s, peak memory in GiB and power in W.

    step_ms: median between CUDA events. host_ms: until the last launch of a step, the GPU idle before.
    compile_s: the first call less a later one. The split is the profiler's, by kernel name, of one step.
    """
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        model(**inputs)
        torch.cuda.synchronize()
        first_s = time.perf_counter() - start
        for _ in range(WARMUPS):
            model(**inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        host_ms = []
        for _ in range(3):
            start = time.perf_counter()
            model(**inputs)
            host_ms.append((time.perf_counter() - start) * 1e3)
            torch.cuda.synchronize()
        with PowerMeter() as meter:
            times = _step_times(lambda: model(**inputs), seconds)
        step_ms = statistics.median(times)
        split = split_ms(lambda: model(**inputs))
    return {
        "step_ms": round(step_ms, 3),
        **{name: round(ms, 3) for name, ms in split.items()},
        "host_ms": round(statistics.median(host_ms), 3),
        "compile_s": round(first_s - step_ms / 1e3, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "power_w": meter.load().power_w,
        "clock_mhz": meter.load().clock_mhz,
    }


def _step_times(call: Callable[[], Any], seconds: float) -> list[float]:
    """Milliseconds between events around each call, the calls queued one behind the other."""
    times: list[float] = []
    end_of_run = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end_of_run:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        events[-1].synchronize()
        times += [a.elapsed_time(b) for a, b in pairwise(events)]
    return times


def attach_random_branches(model: nn.Module, rank: int, seed: int = 0) -> int:
    """A random LoRA branch on every linear layer of the repeated blocks that tokens go through.

    Layers that stay dense ignore theirs. Returns how many were attached.
    """
    kinds: Any = model._repeated_blocks
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    linears = {
        module: None
        for block in blocks
        for name, module in block.named_modules()
        if type(module) is nn.Linear and "mod" not in name.lower() and "norm" not in name.lower()
    }
    torch.manual_seed(seed)
    for module in linears:
        n, k = module.weight.shape
        device, dtype = module.weight.device, module.weight.dtype
        down = torch.randn(rank, k, device=device, dtype=dtype) / k**0.5
        up = torch.randn(n, rank, device=device, dtype=dtype) * (0.01 / rank**0.5)
        attach(module, down=down, up=up)
    return len(linears)


def sparse_share(model: nn.Module, inputs: Mapping[str, Any]) -> float:
    """Share of the FLOPs of all linear layers that ran sparse.

    Blocks share graphs and the report knows names within a block: a layer takes the decision of the row with
    its name's end and its shape.
    """
    decided = {(row.name, row.n, row.k, row.m): row.decision for row in report().rows}
    flops = {"sparse": 0, "dense": 0}
    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def count(module: Any, args: Any, output: Tensor, path: str = path) -> None:
                n, k = module.weight.shape
                m = output.numel() // n
                names = [path.split(".", start)[-1] for start in range(path.count(".") + 1)]
                found = [decided[key] for name in names if (key := (name, n, k, m)) in decided]
                flops[found[0] if found else "dense"] += 2 * m * n * k

            hooks.append(module.register_forward_hook(count))
    implementations = {m: m._compiled_call_impl for m in model.modules()}
    for module in implementations:
        module._compiled_call_impl = None
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, implementation in implementations.items():
            module._compiled_call_impl = implementation
    return round(flops["sparse"] / sum(flops.values()), 4)


def _quantize_fp8(model: nn.Module) -> None:
    """torchao's dynamic fp8 with a scale per row, in place."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise RuntimeError("backend fp8-rowwise needs torchao: pip install torchao") from error
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def _add_speedups(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        same = ("model", "resolution", "batch")
        base = [
            other["step_ms"]
            for other in rows
            if other["backend"] == "inductor" and all(other[key] == row[key] for key in same)
        ]
        row["speedup_vs_inductor"] = round(base[0] / row["step_ms"], 4) if base else None


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()
