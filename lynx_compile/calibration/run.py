"""`calibrate`: from a workload to a profile whose every candidate layer has its branch, nothing chosen.

Decisions come after, from what the layers do to the picture (`sensitivity`, `choose`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..profile import Branch, Layer, Profile, fingerprint
from ..profile.format import UNDECIDED
from ..runtime.sparsify_kernel import MAX_DEFLATED
from .collect import Collector
from .solve import (
    Branches,
    Deflation,
    allocate_ranks,
    deflations,
    from_state,
    lora_branches,
    to_state,
)
from .statistics import Moments
from .workload import Workload

RANK = 64


@torch.compiler.set_stance("force_eager")  # of a model compiled before, the dense layers are what counts
def calibrate(
    workload: Workload,
    *,
    rank: int = RANK,
    total_rank: int | None = None,
    shift: bool = True,
    deflate: bool = True,
    shared: bool = True,
    compensation: str = "norm",
    dense_tokens: Mapping[str, int] | None = None,
    steps: int = 20,
    memory: int = 8 << 30,
    state: str | Path | None = None,
    quiet: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Profile:
    """Run the workload and fit every candidate layer's shift and branch in closed form.

    rank: of every layer's branch, cut to K and to the outputs of the layers that share it.  total_rank:
    instead, a budget over all layers, spent where it takes off most error (no layer above 4·rank).  shift:
    prune around each input's mean.  deflate: the branch takes X's leading directions out before pruning;
    without, it is a LoRA branch beside the pruned layer.  shared: LoRA branches of layers that read one X
    share their down-projection; without, each has its own, which fits better and costs its own time.
    dense_tokens: glob on layer names → leading tokens of each sample that stay dense, below 0 its last.
    steps: denoising steps of one run.  memory: bytes of device memory for statistics.  state: folder from
    which a killed run goes on.

    Under `torchrun` with an initialised process group the batches are shared out and every process returns
    the same profile. Deterministic: the same workload gives the same profile, bit by bit on one device.
    Raises TypeError for what is no workload, ValueError for counts below these, before anything runs, where
    `memory` cannot hold one input, and for a model in which nothing can run sparse; BlockingIOError while
    another calibration keeps its state in that folder.
    """
    start = time.monotonic()
    if not isinstance(getattr(workload, "model", None), nn.Module) or not hasattr(workload, "run"):
        raise TypeError(
            f"a {type(workload).__name__} is no workload; "
            "give calibration.Pipeline(pipe, prompts, steps=20) or calibration.Inputs(module, inputs)"
        )
    model = workload.model
    for what, given, least in (("rank", rank, 0), ("total_rank", total_rank, 0), ("steps", steps, 1)):
        if given is not None and (not isinstance(given, int) or given < least):
            raise ValueError(f"{what}={given!r} is no whole number from {least} on")
    if deflate and rank > MAX_DEFLATED:
        raise ValueError(
            f"rank={rank}: deflation takes at most {MAX_DEFLATED} directions; "
            "or give deflate=False (--no-deflate)"
        )
    text = {
        name: tokens
        for name, _ in model.named_modules()
        for pattern, tokens in (dense_tokens or {}).items()
        if fnmatchcase(name, pattern)
    }
    most = rank if total_rank is None else 4 * rank
    most = min(most, MAX_DEFLATED) if deflate else most
    folder = None if state is None else Path(state)
    purpose = f"rank {most}, {'deflated' if deflate else 'shared' if shared else 'separate'}"
    collector = Collector(workload, compensation, shift, text, memory, folder, quiet, purpose)
    linears = collector.linears

    def solve(names: list[str], moments: Moments, mean: Tensor | None) -> dict[str, Tensor]:
        mu = None if mean is None else mean.to(linears[names[0]].weight.device)
        kept: dict[str, Tensor] = {}
        for together in sharing(names):
            weights = {name: linears[name].weight for name in together}
            kept |= to_state((deflations if deflate else lora_branches)(moments, mu, weights, most))
        return kept

    def sharing(names: list[str]) -> list[list[str]]:
        return [names] if shared or deflate else [[name] for name in names]

    found, kept = collector.run(solve)
    leaders = {name: leader for leader, names in found.groups.items() for name in names}
    fitted = {
        together[0]: from_state(together, kept, Deflation if deflate else Branches)
        for names in found.groups.values()
        for together in sharing(names)
    }
    ranks = dict.fromkeys(fitted, rank) if total_rank is None else allocate_ranks(fitted, {}, total_rank)
    layers: dict[str, Layer] = {}
    for leader, group in fitted.items():
        chosen = min(ranks[leader], group[leader].singular.numel())
        down = group[leader].down(chosen) if chosen else None
        for name, fit in group.items():
            up = None if down is None else fit.up(chosen)
            layers[name] = Layer(
                (linears[name].out_features, linears[name].in_features),
                True,
                UNDECIDED,
                Branch(
                    down,
                    up,
                    found.means[leaders[name]] if shift else None,
                    None,
                    compensation,
                    text.get(name, 0),
                    deflate and down is not None,
                ),
                found.tokens[name],
                fit.error(0),
                fit.error(chosen),
            )
    if deflate:
        for name, error in collector.errors({n: layer.branch for n, layer in layers.items()}).items():
            layers[name].error_after = error
    others = {name: tokens for name, tokens in found.tokens.items() if name not in layers}
    component = getattr(workload, "component", None)
    made = {
        **({} if component is None else {"component": component}),
        "tokens": max((group[leader].rows for leader, group in fitted.items()), default=0),
        "calibration_s": round(time.monotonic() - start, 3),
        "torch": torch.__version__,
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        **(provenance or {}),
    }
    return Profile(
        fingerprint(model),
        dict(sorted(layers.items())),
        compensation,
        steps=steps,
        studies={"other_tokens": others},
        provenance=made,
    )
