"""Run a workload and gather the moments of what its linear layers read: in passes, resumable, data-parallel.

Pass 0 runs an eighth of the batches and finds which layers read tokens, which read the same tensor, and every
input's mean (the shift); where no mean is wanted, one call tells the rest. Later passes gather moments for as
many distinct inputs as the memory budget holds. Batches are dealt out to the processes of the default group
in turn; sums are reduced at the end of each pass.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..profile.branch import Branch
from ..profile.fingerprint import fingerprint, linear_layers
from .statistics import Hooks, InputMean, Moments, Readers, moments_bytes, rows_of, spread_over
from .workload import Workload

SAVE_EVERY_S = 60.0
MOST_ROWS = 1 << 14  # of one call: more samples say more than more of their tokens
MEAN_SHARE = 8  # one batch in eight: means settle after a few thousand tokens

# (the layers that read an input, its moments, its shift) → tensors to keep, by name
Solve = Callable[[list[str], Moments, "Tensor | None"], dict[str, Tensor]]


@dataclass
class Found:
    """Result of pass 0. An input is named after its leader, the first layer that reads it.

    groups: leader → the layers that read it.  means: leader → x̄, (K,) fp32.  tokens: linear layer → rows of
    one sample in one call, for every one that ran.
    """

    groups: dict[str, list[str]] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


@dataclass
class Collector:
    """Gathers moments of what a workload's linear layers read.

    dense_tokens: layer → leading tokens of each sample to leave out, below 0 its last.
    memory: bytes of device memory for moments. state: folder for what a resumed run needs; None keeps
    nothing.  quiet: no progress bar.  purpose: what `solve` depends on; state kept for another purpose is not
    used.  most_rows: of each input at each call that count, evenly spread over what there are.
    """

    workload: Workload
    compensation: str = "norm"
    shifted: bool = True
    dense_tokens: Mapping[str, int] = field(default_factory=dict)
    memory: int = 8 << 30
    state: Path | None = None
    quiet: bool = False
    purpose: str = ""
    most_rows: int = MOST_ROWS

    def __post_init__(self) -> None:
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.linears = linear_layers(self.workload.model)
        self.fingerprint = fingerprint(self.workload.model)
        if self.state is not None:
            self.state.mkdir(parents=True, exist_ok=True)

    def run(self, solve: Solve) -> tuple[Found, dict[str, Tensor]]:
        """Calls `solve` once for each distinct input, and returns what pass 0 found and all it kept.

        Raises ValueError when no layer of the model can run sparse, BlockingIOError while another calibration
        keeps its state in the folder.
        """
        with self._alone():
            return self._run(solve)

    def _run(self, solve: Solve) -> tuple[Found, dict[str, Tensor]]:
        found = self._find()
        if not found.groups:
            name = self.fingerprint.model
            raise ValueError(
                f"{name} has no linear layer that can run sparse: of {len(self.linears)}, none "
                "is in a numbered block and reads (batch, tokens, K) with K % 64 == 0 and N % 16 == 0"
            )
        kept: dict[str, Tensor] = {}
        parts = self._parts(found.groups)
        for number, leaders in enumerate(parts, start=1):
            path = self._path(f"part-{number}.safetensors")
            tensors = self._load(path)
            if tensors is None:
                moments = self._gather(f"pass {number} of {len(parts)}", leaders, found)
                tensors = {}
                for leader in leaders:
                    tensors |= solve(found.groups[leader], moments.pop(leader), self._shift(found, leader))
                if self.rank == 0:
                    self._store(path, tensors)
            kept |= tensors
        return found, kept

    @torch.no_grad()
    def errors(self, branches: Mapping[str, Branch]) -> dict[str, float]:
        """‖Ŷ − Y‖ / ‖Y‖ of each layer at the dense model's inputs, over the batches of pass 0."""
        linears = {name: self.linears[name] for name in branches}
        ready = {
            name: replace(branch.to(linears[name].weight.device, linears[name].weight.dtype), dense_tokens=0)
            for name, branch in branches.items()
        }
        device = next(self.workload.model.parameters()).device
        sums = {name: torch.zeros(2, device=device) for name in branches}

        def see(name: str, x: Tensor) -> None:
            rows, module = rows_of(x, self.dense_tokens.get(name, 0)), linears[name]
            y = F.linear(rows, module.weight, module.bias).float()
            apart = ready[name](module, rows).float() - y
            sums[name] += torch.stack([apart.square().sum(), y.square().sum()])

        batches = range(self.rank, -(-len(self.workload) // MEAN_SHARE), self.world)
        with Hooks(self.workload.model, linears, see):
            for batch in self._progress("errors", batches):
                self.workload.run(batch)
        total = torch.stack(list(sums.values())).double() if sums else torch.zeros(0, 2)
        if self.world > 1:
            dist.all_reduce(total)
        roots = (total[:, 0] / total[:, 1].clamp_min(1e-300)).sqrt()
        return dict(zip(sums, roots.tolist(), strict=True))

    def _find(self) -> Found:
        path = self._path("inputs.safetensors")
        with self._opened(path) as file:
            if file is not None:
                return Found(
                    **json.loads(file.metadata()["found"]), means={k: file.get_tensor(k) for k in _keys(file)}
                )
        readers, found = Readers(), Found()
        sums: dict[str, InputMean] = {}

        def see(name: str, x: Tensor) -> None:
            found.tokens.setdefault(name, x.shape[-2] if x.dim() > 2 else 1)
            if not is_candidate(name, x, self.linears[name].out_features):
                return
            if readers.see(name, x) == name and self.shifted:
                mean = sums.setdefault(name, InputMean.zeros(x.shape[-1], x.device))
                mean.update(spread_over(rows_of(x, self.dense_tokens.get(name, 0)), self.most_rows))

        def end() -> None:
            readers.end_of_call()
            if not self.shifted:
                raise _Enough

        batches = range(self.rank, -(-len(self.workload) // MEAN_SHARE), self.world)
        with Hooks(self.workload.model, self.linears, see, end), contextlib.suppress(_Enough):
            for batch in self._progress("inputs and means", batches):
                self.workload.run(batch)
        found.groups = readers.groups()
        if self.world > 1:
            box = [(found.groups, found.tokens)]
            dist.broadcast_object_list(box, src=0)
            found.groups, found.tokens = box[0]
        for leader in found.groups:
            weight = self.linears[leader].weight
            mean = sums.get(leader) or InputMean.zeros(weight.shape[1], weight.device)
            if self.world > 1:
                mean.all_reduce()
            found.means[leader] = mean.mean().cpu()
        if self.rank == 0:
            self._store(path, found.means, found=json.dumps({"groups": found.groups, "tokens": found.tokens}))
        return found

    def _gather(self, label: str, leaders: Sequence[str], found: Found) -> dict[str, Moments]:
        shifts: dict[str, Tensor | None] = {}
        moments: dict[str, Moments] = {}
        for leader in leaders:
            weight = self.linears[leader].weight
            moments[leader] = Moments.zeros(weight.shape[1], weight.device)
            shift = self._shift(found, leader)
            shifts[leader] = None if shift is None else shift.to(weight.device)
        path = self._path(f"{label.replace(' ', '-')}-rank-{self.rank}.safetensors")
        batches = list(range(self.rank, len(self.workload), self.world))
        done = 0
        with self._opened(path) as file:
            if file is not None:
                done = int(file.metadata()["done"])
                for leader, sums in moments.items():
                    sums.restore({key: file.get_tensor(f"{leader}/{key}") for key in sums.state()})

        def see(name: str, x: Tensor) -> None:
            rows = spread_over(rows_of(x, self.dense_tokens.get(name, 0)), self.most_rows)
            moments[name].update(rows, shifts[name], self.compensation)

        saved = time.monotonic()
        with Hooks(self.workload.model, {name: self.linears[name] for name in leaders}, see):
            for number, batch in enumerate(self._progress(label, batches, done), start=done + 1):
                self.workload.run(batch)
                if number < len(batches) and time.monotonic() - saved > SAVE_EVERY_S:
                    state = {
                        f"{name}/{key}": t
                        for name, sums in moments.items()
                        for key, t in sums.state().items()
                    }
                    self._store(path, state, done=str(number))
                    saved = time.monotonic()
        if self.world > 1:
            for sums in moments.values():
                sums.all_reduce()
        if path is not None:
            path.unlink(missing_ok=True)
        return moments

    def _parts(self, groups: dict[str, list[str]]) -> list[list[str]]:
        """Inputs in the order they run, cut so that each part's moments fit the memory budget."""
        parts: list[list[str]] = []
        room = 0
        for leader in groups:
            need = moments_bytes(self.linears[leader].in_features)
            if need > self.memory:
                raise ValueError(
                    f"the moments of {leader!r} (K = {self.linears[leader].in_features}) take "
                    f"{need / 2**20:.0f} MiB, "
                    f"above the memory budget of {self.memory / 2**20:.0f} MiB; raise it"
                )
            if need > room:
                parts.append([])
                room = self.memory
            parts[-1].append(leader)
            room -= need
        return parts

    def _shift(self, found: Found, leader: str) -> Tensor | None:
        return found.means[leader] if self.shifted else None

    def _progress(self, label: str, batches: Sequence[int], done: int = 0) -> Iterator[int]:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(
            TextColumn("{task.description}"), *columns, disable=self.quiet or self.rank > 0
        ) as progress:
            task = progress.add_task(label, total=len(batches), completed=done)
            for batch in batches[done:]:
                yield batch
                progress.advance(task)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the state folder; the system lets go of it when the process ends, however it ends."""
        if self.state is None or self.rank > 0:  # the processes of one group share it
            yield
            return
        lock = FileLock(self.state / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise BlockingIOError(
                f"{self.state} holds the state of another calibration that still runs; "
                "wait for its end, or give each a folder of its own (state=…, --state)"
            ) from error
        try:
            yield
        finally:
            lock.release()

    @property
    def _key(self) -> str:
        """Names everything the state depends on: another calibration in the same folder starts afresh."""
        model = self.fingerprint
        settings = (
            self.compensation,
            self.shifted,
            sorted(self.dense_tokens.items()),
            self.memory,
            self.most_rows,
            self.world,
            self.purpose,
        )
        return f"{model.model} {model.structure} {model.weights} {self.workload.identity} {settings}"

    def _path(self, name: str) -> Path | None:
        return None if self.state is None else self.state / name

    def _opened(self, path: Path | None) -> Any:
        """The state file when it is there and belongs to this calibration, else a context of None."""
        if path is not None and path.is_file():
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError:  # damaged on disk: gathered anew
                return _Nothing()
            if (file.metadata() or {}).get("key") == self._key:
                return file
        return _Nothing()

    def _load(self, path: Path | None) -> dict[str, Tensor] | None:
        with self._opened(path) as file:
            return None if file is None else {key: file.get_tensor(key) for key in _keys(file)}

    def _store(self, path: Path | None, tensors: dict[str, Tensor], **metadata: str) -> None:
        if path is None:
            return
        temporary = path.with_suffix(".partial")
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, {"key": self._key, **metadata})
        os.replace(temporary, path)


def _keys(file: Any) -> list[str]:
    return list(file.keys())


class _Enough(Exception):
    """Ends a run of the model when what it was run for is known."""


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def is_candidate(name: str, x: Tensor, out_features: int) -> bool:
    """Whether a layer may run sparse at all: reads tokens, sits in a block, has sizes that suit the kernels.

    Embedders and the final projection sit outside the numbered blocks; modulation reads one row a sample.
    """
    in_block = any(part.isdigit() for part in name.split("."))
    return in_block and x.dim() > 2 and x.shape[-1] % 64 == 0 and out_features % 16 == 0
