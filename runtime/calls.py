"""Calls that come again: checked and packed once, then nothing but outputs, their addresses and launches.

    call = known.find(options, operands)              # seen at these addresses, of these types and sizes?
    if call is None:
        call = known.keep(options, operands, Call(device, outputs, launches))   # after all checks
    return call.run()

Layers of a model meet the same addresses in every step, so nearly all calls are found. One that is not costs
its checks, and never more than that: an entry is used only for operands that would pass them in the same way.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor
from torch._C._dynamo import guards

from .launch import Grid, Kernel

MAX_CALLS = 4096  # of one op that are remembered

Sizes = tuple[int, ...]
Options = tuple[Any, ...]
Operands = Sequence[Tensor | None]


class Facts:
    """What decides how a kernel reads tensors, besides their addresses. `TensorGuards` in Python."""

    def __init__(self, *tensors: Tensor, **dynamic: None) -> None:
        self.facts = self._of(tensors)

    def check(self, *tensors: Tensor) -> bool:
        return self._of(tensors) == self.facts

    @staticmethod
    def _of(tensors: Iterable[Tensor]) -> list[object]:
        return [(t.dtype, t.get_device(), t.shape, t.stride()) for t in tensors]


# What compiled code is guarded with, all of `Facts` in one call: no public name.
_facts: Callable[..., Any] = getattr(guards, "TensorGuards", Facts)
_STATIC = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}


class Launch(NamedTuple):
    """One launch of a call.

    packed: the kernel's parameters, outputs apart. outputs: from the addresses of the call's outputs to the
    parameters that stand for them, `pointers(count)` for a kernel that writes all of them from the start.
    """

    kernel: Kernel
    grid: Grid
    packed: bytes
    outputs: Callable[..., bytes]


def pointers(count: int) -> Callable[..., bytes]:
    """`Launch.outputs` of a kernel that takes plain pointers."""
    return struct.Struct(f"={count}Q").pack


class Call:
    """Launches on new outputs. Everything else they read and write is known.

    outputs: (shape, dtype) of each; they are contiguous. copies: of operands in layouts that no kernel takes,
    which makes it a call for once.
    """

    def __init__(
        self,
        device: int,
        outputs: Sequence[tuple[Sizes, torch.dtype]],
        launches: Sequence[Launch],
        copies: Sequence[Tensor] = (),
    ) -> None:
        self.device, self.launches, self.copies = device, launches, copies
        self.outputs = [(shape, _strides(shape), dtype) for shape, dtype in outputs]
        usual = {1: _run_with_one, 4: _run_with_four}.get(len(outputs)) if len(launches) == 1 else None
        # Launches on torch's current stream of the device; returns the outputs.
        self.run: Callable[[], Sequence[Tensor]] = self.run_any if usual is None else usual(self)

    def run_any(self) -> Sequence[Tensor]:
        """`run` for any number of outputs and launches, from any device, also in deterministic mode."""
        with torch.cuda.device(self.device):
            outputs = [empty(*output) for output in self.outputs]
            addresses = [output.data_ptr() for output in outputs]
            for kernel, grid, packed, encode in self.launches:
                kernel.launch(self.device, grid, packed, encode(*addresses))
        return outputs


def _run_with_one(call: Call) -> Callable[[], Sequence[Tensor]]:
    """`Call.run` for one output and one launch, without the loops: they cost a tenth of the call."""
    (output,), ((kernel, grid, packed, encode),) = call.outputs, call.launches
    device, launch = call.device, kernel.launch

    def run() -> Sequence[Tensor]:
        if _C._cuda_getDevice() != device or _C._get_deterministic_algorithms():
            return call.run_any()
        y = _empty_strided(*output)
        launch(device, grid, packed, encode(y.data_ptr()))
        return (y,)

    return run


def _run_with_four(call: Call) -> Callable[[], Sequence[Tensor]]:
    """`Call.run` for four outputs and one launch."""
    (first, second, third, fourth), ((kernel, grid, packed, encode),) = call.outputs, call.launches
    device, launch = call.device, kernel.launch

    def run() -> Sequence[Tensor]:
        if _C._cuda_getDevice() != device or _C._get_deterministic_algorithms():
            return call.run_any()
        a, b = _empty_strided(*first), _empty_strided(*second)
        c, d = _empty_strided(*third), _empty_strided(*fourth)
        launch(device, grid, packed, encode(a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr()))
        return a, b, c, d

    return run


class Known:
    """The calls of one op, by its options and its operands' addresses."""

    def __init__(self) -> None:
        self._entries: dict[Options, tuple[Call, Callable[..., bool], Callable[..., Any]]] = {}

    def find(self, options: Options, operands: Operands) -> Call | None:
        """The call for these operands, if it was made before; operands may be None."""
        entry = self._entries.get((options, *[0 if o is None else o.data_ptr() for o in operands]))
        if entry is None:
            return None
        call, same, present = entry
        return call if same(*present(operands)) else None

    def keep(self, options: Options, operands: Operands, call: Call) -> Call:
        """Remember `call`, and return it."""
        if not call.copies:
            if len(self._entries) >= MAX_CALLS:
                self._entries.clear()
            present = _chosen([i for i, operand in enumerate(operands) if operand is not None])
            key = options, *[0 if o is None else o.data_ptr() for o in operands]
            self._entries[key] = call, _facts(*present(operands), **_STATIC).check, present
        return call


def _chosen(indices: Sequence[int]) -> Callable[..., Any]:
    """Picks some items of a tuple, as a tuple."""
    return itemgetter(*indices) if len(indices) > 1 else itemgetter(slice(indices[0], indices[0] + 1))


def empty(shape: Sizes, strides: Sizes, dtype: torch.dtype) -> Tensor:
    """`torch.empty_strided` on the current CUDA device."""
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


# What compiled code allocates with: no public name. In deterministic mode new memory may have to hold poison,
# of which it knows nothing.
_empty_strided: Callable[..., Tensor] = getattr(guards, "_empty_strided_cuda", empty)


def _strides(shape: Sizes) -> Sizes:
    """Of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))
