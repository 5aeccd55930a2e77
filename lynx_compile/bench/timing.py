"""Time on the GPU with power and clocks beside it.

A chip at its power limit runs at the clock its power allows, so a time on zeros, out of a warm cache or
without load before it says little: calls are repeated for a third of a second over rotating inputs.
"""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

SECONDS = 0.3
WARM_SHARE = 0.3  # of `seconds`, in front and not counted
TURNS = 4  # of each rival
GRAPH_MS = 4.0  # about how long one replay of a graph of calls takes
L2_MULTIPLE = 3  # rotating inputs together are this many times the L2 cache
MAX_SETS = 24


class Load(NamedTuple):
    """Medians while something was timed: watts, and the clock of the multiprocessors in MHz."""

    power_w: float
    clock_mhz: float


def sets_needed(bytes_of_one: int) -> int:
    """How many input sets to rotate so that none is in the L2 cache when its turn comes again."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    return min(max(-(-L2_MULTIPLE * cache // bytes_of_one), 2), MAX_SETS)


def median_ms(calls: Sequence[Callable[[], Any]], seconds: float = SECONDS) -> float:
    """Median time of one call in ms, over at least `seconds`, going through `calls` in turn.

    The calls are captured into a CUDA graph, so that host time does not show. What cannot be captured is
    timed as launched.
    """
    return medians_ms({"": calls}, seconds)[""]


def medians_ms(
    rivals: Mapping[str, Sequence[Callable[[], Any]]], seconds: float = SECONDS
) -> dict[str, float]:
    """`median_ms` of each rival, measured by turns: none is the only one to find the chip cool.

    Each comes `TURNS` times, in an order that turns round, and has its own clock and power in a part of each
    turn that does not count.
    """
    runs = {name: _captured(calls) for name, calls in rivals.items()}
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(TURNS):
        for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            run, _ = runs[name]
            _spend(run, seconds / TURNS * WARM_SHARE)
            times[name] += _spend(run, seconds / TURNS)
    return {name: statistics.median(times[name]) / count for name, (_, count) in runs.items()}


def _spend(run: Callable[[], Any], seconds: float) -> list[float]:
    """Times of `run` in ms, which add up to at least `seconds`; at least two."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds * 1e3:
        times.append(_elapsed_ms(run))
    return times


def _captured(calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], Any], int]:
    """What makes about `GRAPH_MS` of calls, and how many those are."""
    for call in calls:
        call()
    once = _elapsed_ms(lambda: [call() for call in calls]) / len(calls)
    rounds = max(round(GRAPH_MS / max(once * len(calls), 1e-3)), 1)
    return _repeated(calls, rounds), rounds * len(calls)


def _repeated(calls: Sequence[Callable[[], Any]], rounds: int) -> Callable[[], Any]:
    def all_of_them() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_of_them()
    except RuntimeError:
        torch.cuda.synchronize()
        return all_of_them
    return graph.replay


def _elapsed_ms(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class PowerMeter:
    """Samples power and clock of the current device in a thread, between `with` and its end.

        with PowerMeter() as meter: …
        meter.load()  →  Load(power_w=697.0, clock_mhz=1515.0)

    Samples of an idle chip are left out: below half of the highest power seen.
    """

    INTERVAL = 0.02

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PowerMeter:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def load(self) -> Load:
        """Medians over the samples under load; zeros when neither NVML nor nvidia-smi answered."""
        if not self._samples:
            return Load(0.0, 0.0)
        busy = max(power for power, _ in self._samples) / 2
        powers, clocks = zip(*(sample for sample in self._samples if sample[0] >= busy), strict=True)
        return Load(round(statistics.median(powers), 1), float(statistics.median(clocks)))

    def _sample(self) -> None:
        read = (_nvml_reader() or _smi_reader()) if torch.cuda.is_available() else None
        while read is not None and not self._stop.is_set():
            self._samples.append(read())
            time.sleep(self.INTERVAL)


def _nvml_reader() -> Callable[[], tuple[float, float]] | None:
    """Power in W and multiprocessor clock in MHz through nvidia-ml-py, where it is installed."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")

        def read() -> tuple[float, float]:
            clock = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
            return pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3, float(clock)

        read()
    except Exception:  # not installed, or a driver that refuses
        return None
    return read


def _smi_reader() -> Callable[[], tuple[float, float]] | None:
    device = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    query = ["nvidia-smi", device, "--query-gpu=power.draw,clocks.sm", "--format=csv,noheader,nounits"]

    def read() -> tuple[float, float]:
        power, clock = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(",")
        return float(power), float(clock)

    try:
        read()
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return read
