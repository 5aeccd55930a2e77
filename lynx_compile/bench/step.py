"""One denoising step of a production transformer under every backend a user can switch on.

Random weights at the exact geometry, created on the GPU; blocks are compiled one kind at a time, as
`model.compile_repeated_blocks` does. All backends of a model stay compiled side by side in one process and
are timed in turn, several rounds of it, so that a drifting clock meets all of them.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..models import Resolved, Step, resolve
from ..report import clear_report, report
from .backends import BACKENDS, Backend, State, switch_off, switch_on
from .split import heaviest, kernels, total_ms
from .timing import Load, PowerMeter

MODELS = ("flux", "qwen-image", "z-image")
SECONDS = 1.0
ROUNDS = 3  # in each, every backend has its turn
WARMUPS = 3  # CUDA graphs: the second call records, the third is the first replay
HOST_CALLS = 3
HEATING_S = 1.0  # of steps before the rounds: the chip is at its power limit for the first of them too
RANK = 64
GRAPH_LIMIT = 256  # graphs one code object may have: the backends share those of `compile_repeated_blocks`
# cuDNN's attention is the fastest on Hopper; every backend gets it
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

Row = dict[str, Any]


@dataclass
class Rival:
    """A backend that is compiled on a model, and what has been measured of it, by resolution and batch."""

    backend: Backend
    model: nn.Module
    state: State
    rows: dict[Step, Row] = field(default_factory=dict)
    times: dict[Step, list[float]] = field(default_factory=dict)
    loads: dict[Step, list[Load]] = field(default_factory=dict)

    def profile(self, point: Step, inputs: Mapping[str, Any]) -> None:
        """The split of a step's GPU time by kernel, as it runs now."""
        ran = kernels(lambda: step(self.model, inputs))
        self.rows[point] |= {
            **{name: round(ms, 3) for name, ms in total_ms(ran).items()},
            "launches": len(ran),
            "kernels": heaviest(ran),
        }

    def time(self, point: Step, inputs: Mapping[str, Any], seconds: float) -> None:
        """One round more: `step_ms`, power and clock of the row become medians over all rounds."""
        with PowerMeter() as meter:
            self.times.setdefault(point, []).extend(step_times(lambda: step(self.model, inputs), seconds))
        self.loads.setdefault(point, []).append(meter.load())
        powers, clocks = zip(*self.loads[point], strict=True)
        self.rows[point] |= {
            "step_ms": round(statistics.median(self.times[point]), 3),
            "power_w": round(statistics.median(powers), 1),
            "clock_mhz": statistics.median(clocks),
        }


def run(
    models: Sequence[str] = MODELS,
    *,
    resolutions: Sequence[int] = (1024,),
    batches: Sequence[int] = (1,),
    backends: Sequence[str] = tuple(BACKENDS),
    rank: int = RANK,
    seconds: float = SECONDS,
    device: str | torch.device = "cuda",
    blocks: int | None = None,
    warm: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Measure every model × backend × resolution × batch; the rows of `docs/results/step_<device>.json`.

    With several resolutions or batches a backend is compiled once, for dynamic shapes.
    seconds: least time of one measurement, all rounds. progress: told what goes on. keep: given all rows so
    far, after each backend and each round. blocks: of each kind, for a smaller model; None for all.
    warm: backends that may find their compilation in the caches on disk; they get no compile time.
    A backend that fails is told to `progress` and has no row. Raises ValueError for an unknown backend.
    """
    unknown = [name for name in (*backends, *warm) if name not in BACKENDS]
    if unknown:
        raise ValueError(f"unknown backend {unknown[0]!r}; one of {', '.join(BACKENDS)}")
    chosen = [BACKENDS[name] for name in backends]
    done: list[Row] = []
    with torch._dynamo.config.patch(recompile_limit=GRAPH_LIMIT, accumulated_recompile_limit=4 * GRAPH_LIMIT):
        for name in models:
            known = resolve(name)
            if blocks is not None:
                known = replace(known, config={**known.config, **known.block_counts(blocks)})
            points = [
                Step(size, size, batch, known.step.frames, known.step.text_tokens)
                for size in resolutions
                for batch in batches
            ]
            comparison = Comparison(name, known, points, device, rank, warm, progress)
            done += comparison.run(chosen, seconds, partial(_keep_all, keep, done))
            del comparison
            release()
    return with_speedups(done)


def _keep_all(keep: Callable[[list[Row]], None], done: Sequence[Row], rows: Sequence[Row]) -> None:
    keep(with_speedups([*done, *rows]))


class Comparison:
    """The backends on one model, side by side."""

    def __init__(
        self,
        name: str,
        known: Resolved,
        points: Sequence[Step],
        device: str | torch.device,
        rank: int,
        warm: Sequence[str],
        progress: Callable[[str], None],
    ) -> None:
        progress(f"{name}: building")
        torch._dynamo.reset()
        self.name, self.known, self.device, self.rank = name, known, device, rank
        self.warm, self.progress = warm, progress
        self.inputs = {point: known.inputs(point, device) for point in points}
        before = allocated()
        self.model = known.build(device)
        self.model_bytes = allocated() - before
        self.rivals: list[Rival] = []

    def run(
        self, backends: Sequence[Backend], seconds: float, keep: Callable[[list[Row]], None]
    ) -> list[Row]:
        """Compile each backend, then time them in turn. Returns the rows by backend."""
        start_workers(self.device)
        step(self.model, next(iter(self.inputs.values())))  # cuBLAS and cuDNN start: nobody's compilation
        for backend in backends:
            self.progress(f"{self.name}: {backend.name}")
            caches = nullcontext() if backend.name in self.warm else cold_caches()
            attention = sdpa_kernel(ATTENTION, set_priority=True)
            with self.told(backend), attention, caches, inductor_settings_kept():
                self.rivals.append(self.prepare(backend, seconds / ROUNDS))
            switch_off(self.model)
            release()
            keep(self.rows())
        self.heat()
        for again in range(ROUNDS):
            for rival in self.rivals:
                with self.told(rival.backend), sdpa_kernel(ATTENTION, set_priority=True):
                    rival.state.restore(rival.model)
                    for point, inputs in self.inputs.items():
                        step(rival.model, inputs)
                        rival.time(point, inputs, seconds / ROUNDS)
                        if again == ROUNDS - 1:  # the chip as warm for each of them
                            rival.profile(point, inputs)
            keep(self.rows())
        for rival in self.rivals:
            for row in rival.rows.values():
                self.progress("{model} {resolution} × {batch}: {backend}: {step_ms:.1f} ms".format(**row))
        return self.rows()

    def heat(self) -> None:
        """Bring the chip to its working state; drop what was timed while it cooled between compilations."""
        for rival in self.rivals:
            rival.times.clear()
            rival.loads.clear()
        if self.rivals:
            first, inputs = self.rivals[0], next(iter(self.inputs.values()))
            with self.told(first.backend), sdpa_kernel(ATTENTION, set_priority=True):
                first.state.restore(first.model)
                step_times(lambda: step(first.model, inputs), HEATING_S)

    def rows(self) -> list[Row]:
        return [row for rival in self.rivals for row in rival.rows.values()]

    @contextmanager
    def told(self, backend: Backend) -> Iterator[None]:
        """What goes wrong with one backend is told, and the others go on: not installed, out of memory."""
        try:
            yield
        except RuntimeError as error:
            said = str(error).strip() or type(error).__name__
            self.progress(f"{self.name}: {backend.name} has no figures: {said}")

    def prepare(self, backend: Backend, seconds: float) -> Rival:
        """Compile a backend and measure what needs no rival beside it; times too, in case the rest fails."""
        before = allocated()
        model = self.known.build(self.device) if backend.fp8 else self.model  # fp8 replaces the weights
        others = before if backend.fp8 else before - self.model_bytes
        clear_report()
        graphs = compiled_graphs()
        first = next(iter(self.inputs.values()))
        switch_on(model, backend, self.rank, first, dynamic=True if len(self.inputs) > 1 else None)
        rival = Rival(backend, model, State.of(model))
        for point, inputs in self.inputs.items():
            first_s = first_call_s(model, inputs)
            row: Row = {
                "model": self.name,
                "resolution": point.width,
                "batch": point.batch,
                "backend": backend.name,
                "lora_rank": self.rank if backend.lora else 0,
                "step_ms": 0.0,
                **steady(model, inputs, others),
            }
            rival.rows[point] = row
            rival.time(point, inputs, seconds)
            rival.profile(point, inputs)
            compile_s = round(max(first_s - row["step_ms"] / 1e3, 0.0), 2)
            row["compile_s"] = None if backend.name in self.warm else compile_s
            row["graphs"] = compiled_graphs() - graphs
            row |= (
                sparse_work(model, inputs)
                if backend.lynx
                else {"sparse_flops_share": 0.0, "sparsify_gb": 0.0}
            )
        return rival


def step(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """One denoising step: all blocks of it belong to one generation of CUDA graphs."""
    torch.compiler.cudagraph_mark_step_begin()
    with torch.no_grad():
        return model(**inputs)


def first_call_s(model: nn.Module, inputs: Mapping[str, Any]) -> float:
    """Seconds of the first call, compilation and all."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step(model, inputs)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def steady(model: nn.Module, inputs: Mapping[str, Any], others: int) -> dict[str, float]:
    """A compiled step: host time in ms, peak memory in GiB.

    host_ms: until the last launch of a step, the GPU idle before. others: bytes that are held at the same
    time but do not belong to this backend.
    """
    for _ in range(WARMUPS):
        step(model, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    host_ms = []
    for _ in range(HOST_CALLS):
        start = time.perf_counter()
        step(model, inputs)
        host_ms.append((time.perf_counter() - start) * 1e3)
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - others
    return {
        "host_ms": round(statistics.median(host_ms), 3),
        "peak_gib": round(peak / 2**30, 3),
    }


def step_times(call: Callable[[], Any], seconds: float) -> list[float]:
    """Milliseconds between events around each call, the calls queued one behind the other."""
    times: list[float] = []
    end_of_run = time.perf_counter() + seconds
    while not times or time.perf_counter() < end_of_run:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        events[-1].synchronize()
        times += [a.elapsed_time(b) for a, b in pairwise(events)]
    return times


def sparse_work(model: nn.Module, inputs: Mapping[str, Any]) -> Row:
    """What ran sparse: its share of all linear FLOPs, and the least GB that sparsify has to move for it.

    Blocks share graphs and the report knows names within a block: a layer takes the decision of the row with
    its name's end and its shape; where a graph serves any number of tokens, that of its break-even. Layers
    that read the same tensor share its sparsify.
    """
    decided = {(row.name, row.n, row.k, None if row.symbol else row.m): row for row in report().rows}
    flops = {True: 0, False: 0}
    moved: list[float] = []
    counted: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def count(module: Any, args: Any, output: Tensor, path: str = path) -> None:
                n, k = module.weight.shape
                m = output.numel() // n
                names = [path.split(".", start)[-1] for start in range(path.count(".") + 1)]
                keys = [(name, n, k, tokens) for name in names for tokens in (m, None)]
                row = next((decided[key] for key in keys if key in decided), None)
                sparse = row is not None and row.decision == "sparse" and m >= (row.min_tokens or 0)
                # text rows of a joint sequence may stay dense in a sparse layer
                text = output.shape[0] * abs(getattr(module, "lynx_dense_tokens", 0)) if sparse else 0
                flops[sparse] += 2 * (m - text) * n * k
                flops[False] += 2 * text * n * k
                if sparse and counted.get(id(args[0])) is not args[0]:
                    counted[id(args[0])] = args[0]
                    moved.append(sparsify_bytes(m - text, k, output.element_size()))

            hooks.append(module.register_forward_hook(count))
    calls = State.of(model).calls
    for module in calls:
        module._compiled_call_impl = None
    try:
        step(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, call in calls.items():
            module._compiled_call_impl = call
    return {
        "sparse_flops_share": round(flops[True] / sum(flops.values()), 4),
        "sparsify_gb": round(sum(moved) / 1e9, 4),
    }


def sparsify_bytes(m: int, k: int, itemsize: int) -> float:
    """X (M, K) read; values, metadata and scale written."""
    return m * k * itemsize * 1.5 + m * k / 8 + 4 * m


@contextmanager
def cold_caches() -> Iterator[None]:
    """Inductor, Triton and the kernels' cubins find nothing on disk: what compiles in here compiles anew."""
    from torch._inductor.utils import fresh_cache

    with (
        fresh_cache(),
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, LYNX_CACHE_DIR=folder),
    ):
        yield


@contextmanager
def inductor_settings_kept() -> Iterator[None]:
    """What a backend sets in here is not set for the next: torchao leaves Inductor's tuning on."""
    from torch._inductor import config

    settings: Any = config
    saved = settings.save_config()
    try:
        yield
    finally:
        settings.load_config(saved)


def start_workers(device: str | torch.device) -> None:
    """Inductor's compile workers start with the first compilation of a process: not part of any figure."""
    if torch.device(device).type == "cuda":
        torch.compile(lambda x: x.sin() + 1)(torch.ones(16, device=device))


def compiled_graphs() -> int:
    """Graphs that Dynamo has compiled in this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def allocated() -> int:
    """Bytes in use on the GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def with_speedups(rows: list[Row]) -> list[Row]:
    for row in rows:
        same = ("model", "resolution", "batch")
        base = [
            other["step_ms"]
            for other in rows
            if other["backend"] == "inductor" and all(other[key] == row[key] for key in same)
        ]
        row["speedup_vs_inductor"] = round(base[0] / row["step_ms"], 4) if base else None
    return rows
