"""How soon a process takes its first step, with nothing cached and with everything cached.

Each figure is a process of its own (`python -m lynx_compile.bench.start …`), as a user's restart is. Both
processes of a backend share one fresh folder for the caches of Inductor, Triton and the kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .backends import BACKENDS

STARTS = {
    **BACKENDS,
    "rt_lynx-precompiled": replace(
        BACKENDS["rt_lynx"], name="rt_lynx-precompiled", options={"precompile": True}
    ),
}
STEADY = 3  # steps after the first, the last of which counts


def run(
    model: str,
    backends: Sequence[str],
    *,
    rank: int,
    blocks: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Start two processes a backend; rows of {model, backend, cold_s, warm_s, tracing_s, faster, step_ms}.

    cold_s, warm_s: switching the backend on and the first step, less a later step, in the first and in the
    second process: imports, tracing, compiling or loading. tracing_s: Dynamo's part of warm_s, which no cache
    on disk covers. blocks: of each kind; None for all.
    backends: of `STARTS`. Raises RuntimeError when a process fails.
    """
    rows = []
    for backend in backends:
        with tempfile.TemporaryDirectory() as folder:
            cold, warm = (
                _process(model, backend, rank, blocks, folder, progress) for _ in ("first", "second")
            )
        rows.append(
            {
                "model": model,
                "backend": backend,
                "cold_s": cold["compile_s"],
                "warm_s": warm["compile_s"],
                "tracing_s": warm["tracing_s"],
                "faster": round(cold["compile_s"] / warm["compile_s"], 2),
                "step_ms": warm["step_ms"],
                "cache_hits": warm["cache_hits"],
            }
        )
    return rows


def _process(
    model: str, backend: str, rank: int, blocks: int | None, folder: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
        "TRITON_CACHE_DIR": str(Path(folder) / "triton"),
        "LYNX_CACHE_DIR": str(Path(folder) / "lynx"),
    }
    what = json.dumps({"model": model, "backend": backend, "rank": rank, "blocks": blocks})
    command = [sys.executable, "-m", "lynx_compile.bench.start", what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a process with backend {backend} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    progress(f"{model}: {backend}: {found['compile_s']:.1f} s")
    return found


def first_step(model: str, backend: str, rank: int, blocks: int | None) -> dict[str, Any]:
    """In a process of its own: compile and take the first steps of a model."""
    import time

    import torch
    from torch.nn.attention import sdpa_kernel

    from ..models import resolve
    from . import step as measurements
    from .backends import attach_random_branches, switch_on

    chosen = STARTS[backend]
    known = resolve(model)
    if blocks is not None:
        known = replace(known, config={**known.config, **known.block_counts(blocks)})
    transformer = known.build("cuda")
    inputs = known.inputs(known.step, "cuda")
    if chosen.lora:  # made here, where a user's would have been loaded
        attach_random_branches(transformer, rank, inputs, deflated=chosen.deflated)
    measurements.first_call_s(transformer, inputs)  # cuBLAS and cuDNN start too, whatever the backend
    start = time.perf_counter()
    switch_on(transformer, replace(chosen, lora=False), rank, inputs)
    switching = time.perf_counter() - start
    with sdpa_kernel(measurements.ATTENTION, set_priority=True):
        seconds = [measurements.first_call_s(transformer, inputs) for _ in range(1 + STEADY)]
    hits = {
        name: int(torch._dynamo.utils.counters[group][counter])
        for name, group, counter in (
            ("aot", "aot_autograd", "autograd_cache_hit"),
            ("inductor", "inductor", "fxgraph_cache_hit"),
        )
    }
    return {
        "compile_s": round(switching + seconds[0] - seconds[-1], 2),
        "tracing_s": tracing_s(),
        "step_ms": round(seconds[-1] * 1e3, 2),
        "cache_hits": hits,
    }


def tracing_s() -> float:
    """Seconds that Dynamo has taken in this process to trace Python and to build guards."""
    import torch

    spent = torch._dynamo.utils.compilation_time_metrics
    return round(sum(sum(spent.get(name, ())) for name in ("bytecode_tracing", "build_guards")), 2)


if __name__ == "__main__":
    print(json.dumps(first_step(**json.loads(sys.argv[1]))))
