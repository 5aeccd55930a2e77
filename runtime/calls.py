"""Calls that come again: checked and packed once, then nothing but outputs, their addresses and launches.

    call = known.find(options, operands)              # seen at these addresses, of these types and sizes?
    if call is None:
        call = known.keep(options, operands, Call(device, outputs, launches))   # after all checks
    return call.run()

Layers of a model meet the same addresses in every step, so nearly all calls are found. One that is not costs
its checks, and never more than that: an entry is used only for operands that would pass them in the same way.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor
from torch._C._dynamo import guards

from .launch import Grid, Kernel

log = logging.getLogger(__name__)

MAX_CALLS = 1024  # of one op that are remembered, 10 KB each
MAX_CHECKS = 4  # of one call: inference mode or not, inside the dispatcher or in front of it

Sizes = tuple[int, ...]
Options = tuple[Any, ...]
Operands = Sequence[Tensor | None]


class Facts:
    """What decides how a kernel reads tensors, besides their addresses."""

    def __init__(self, *tensors: Tensor, **dynamic: None) -> None:
        self.facts = self._of(tensors)

    def check(self, *tensors: Tensor) -> bool:
        return self._of(tensors) == self.facts

    @staticmethod
    def _of(tensors: Iterable[Tensor]) -> list[object]:
        return [(t.dtype, t.get_device(), t.shape, t.stride()) for t in tensors]


# What compiled code is guarded with: all of `Facts` and what the dispatcher goes by, in one call. Not public.
_guard_type: Callable[..., Any] = getattr(guards, "TensorGuards", Facts)
_grad_enabled = torch.is_grad_enabled
_data_ptr = Tensor.data_ptr  # of tensors alone: an FX proxy would write the question into its graph
_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def _guard(tensors: Iterable[Tensor]) -> Callable[..., bool]:
    return _guard_type(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


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
    which makes it a call for once. scratch: outputs that launches leave for later ones and nobody else sees.
    """

    def __init__(
        self,
        device: int,
        outputs: Sequence[tuple[Sizes, torch.dtype]],
        launches: Sequence[Launch],
        copies: Sequence[Tensor] = (),
        scratch: Sequence[tuple[Sizes, torch.dtype]] = (),
    ) -> None:
        self.device, self.launches, self.copies = device, launches, copies
        self.outputs = [(shape, _strides(shape), dtype) for shape, dtype in (*outputs, *scratch)]
        self.kept = len(outputs)
        usual = {1: _run_with_one, 4: _run_with_four} if len(launches) == 1 and not scratch else {}
        # Launches on torch's current stream of the device; returns the outputs.
        self.run: Callable[[], Sequence[Tensor]] = usual.get(len(outputs), _run_with_many)(self)

    def run_any(self) -> Sequence[Tensor]:
        """`run` for any number of outputs and launches, from any device, also in deterministic mode."""
        with torch.cuda.device(self.device):
            outputs = [empty(*output) for output in self.outputs]
            addresses = [output.data_ptr() for output in outputs]
            for kernel, grid, packed, encode in self.launches:
                kernel.launch(self.device, grid, packed, encode(*addresses))
        return outputs[: self.kept]


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


def _run_with_many(call: Call) -> Callable[[], Sequence[Tensor]]:
    """`Call.run` for any number of outputs and launches."""
    device, outputs, launches = call.device, call.outputs, [(x.kernel.launch, *x[1:]) for x in call.launches]
    kept = call.kept

    def run() -> Sequence[Tensor]:
        if _C._cuda_getDevice() != device or _C._get_deterministic_algorithms():
            return call.run_any()
        made = [_empty_strided(*output) for output in outputs]
        addresses = [output.data_ptr() for output in made]
        for launch, grid, packed, encode in launches:
            launch(device, grid, packed, encode(*addresses))
        return made[:kept]

    return run


class Known:
    """The calls of one op, by its options and its operands' addresses."""

    def __init__(self) -> None:
        self._entries: dict[Options, _Entry] = {}

    def find(self, options: Options, operands: Operands) -> Call | None:
        """The call for these operands, if it was made before; operands may be None."""
        entry = self._entries.get((options, *[-1 if o is None else _data_ptr(o) for o in operands]))
        if entry is not None:
            for i, j in entry.twice:
                if operands[i] is not operands[j]:
                    return None
            tensors = entry.present(operands)
            for same in entry.checks:
                if same(*tensors):
                    return entry.call
        return None

    def keep(self, options: Options, operands: Operands, call: Call) -> Call:
        """Remember `call`, unless it is for once or for a subclass of tensors, and return it."""
        if not call.copies and all(type(operand) in _PLAIN for operand in operands):
            if len(self._entries) >= MAX_CALLS:
                self._entries.clear()
            key = options, *[-1 if o is None else _data_ptr(o) for o in operands]
            first: dict[int, int] = {}  # where each tensor comes first, by its id: a guard takes it once
            places = [(i, first.setdefault(id(o), i)) for i, o in enumerate(operands) if o is not None]
            present = _chosen(list(first.values()))
            tensors = present(operands)
            twice = tuple((i, j) for i, j in places if i != j)
            self._entries[key] = _Entry(call, present, twice, Facts(*tensors), [_guard(tensors)])
        return call

    def admit(self, options: Options, operands: Operands) -> None:
        """Let `find` know these operands also in the state of dispatch that the thread is in now."""
        entry = self._entries.get((options, *[-1 if o is None else _data_ptr(o) for o in operands]))
        if entry is not None and all(operands[i] is operands[j] for i, j in entry.twice):
            tensors = entry.present(operands)
            plain = all(type(tensor) in _PLAIN for tensor in tensors)
            if plain and len(entry.checks) < MAX_CHECKS and entry.facts.check(*tensors):
                entry.checks.insert(0, _guard(tensors))


class _Entry(NamedTuple):
    """facts: of the operands that the call is for. checks: for the same, one for each state of dispatch.

    twice: pairs of places with one tensor in both.
    """

    call: Call
    present: Callable[[Operands], Sequence[Tensor]]
    twice: tuple[tuple[int, int], ...]
    facts: Facts
    checks: list[Callable[..., bool]]


_KINDS: dict[str, Callable[[Sequence[Tensor]], Any]] = {"Tensor": itemgetter(0)}  # of an op's one return


def _under_something() -> bool:
    """Whether a mode or a profiler wants to see each op, or gradients may be wanted of it."""
    return bool(
        _grad_enabled()
        or _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._autograd._profiler_enabled()
    )


def _transformed() -> bool:
    """Whether a transform such as vmap, or a tracer, is at work."""
    return _C._functorch.peek_interpreter_stack() is not None or _C._get_tracing_state() is not None


class Shortcut:
    """Stands in front of an op's dispatcher, which takes a third of a call's time to find nothing to do.

    Operands that went through it before, with the thread in the same state, go to their call at once. All
    others go through it: first uses, subclasses, and whatever comes under a mode, a transform, a tracer, a
    profiler or with gradients enabled.

    key: from the op's arguments to its options and operands, as `Known` takes them.
    """

    def __init__(self, op: Any, known: Known, key: Callable[..., tuple[Options, Operands]]) -> None:
        self.through = op._op
        self._find, self._admit, self._key = known.find, known.admit, key
        returns = [str(value.type) for value in op._schema.returns]
        self._result = _KINDS.get(returns[0], list) if len(returns) == 1 else tuple

    @classmethod
    def install(cls, op: Any, known: Known, key: Callable[..., tuple[Options, Operands]]) -> None:
        """Do so for `op`, an OpOverload. Where torch keeps its way elsewhere, calls stay as they are."""
        try:
            _under_something(), _transformed()
            if _guard_type is not Facts:
                op._op = cls(op, known, key)
        except AttributeError:
            log.info("calls of %s take the way through the dispatcher, in torch %s", op, torch.__version__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _under_something():
            return self.through(*args, **kwargs)
        try:
            options, operands = self._key(*args, **kwargs)
            call = self._find(options, operands)
        except (TypeError, RuntimeError, AttributeError, ValueError):  # no such operands: the op knows more
            return self.through(*args, **kwargs)
        if call is not None:
            return self._result(call.run())
        result = self.through(*args, **kwargs)
        if not _transformed():
            self._admit(options, operands)
        return result

    def __hash__(self) -> int:
        return hash(self.through)  # which is the op's own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.through, name)


class Direct:
    """Stands in front of the dispatcher of an op that is made of others, of which each goes its own way.

    Calls go to `made_of` at once, unless something wants to see the op, as for `Shortcut`, or an operand is
    of a subclass of tensors, which may want to. lists: the places of the arguments that hold operands.
    """

    def __init__(self, op: Any, made_of: Callable[..., Any], lists: slice) -> None:
        self.through, self._made_of, self._lists = op._op, made_of, lists

    @classmethod
    def install(cls, op: Any, made_of: Callable[..., Any], lists: slice) -> None:
        """Do so for `op`, an OpOverload. Where torch keeps its way elsewhere, calls stay as they are."""
        try:
            _under_something(), _transformed()
            op._op = cls(op, made_of, lists)
        except AttributeError:
            log.info("calls of %s take the way through the dispatcher, in torch %s", op, torch.__version__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _under_something() or _transformed():
            return self.through(*args, **kwargs)
        for operands in args[self._lists]:
            if type(operands) is not list or not all(type(operand) in _PLAIN for operand in operands):
                return self.through(*args, **kwargs)
        return self._made_of(*args, **kwargs)

    def __hash__(self) -> int:
        return hash(self.through)  # which is the op's own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.through, name)


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
