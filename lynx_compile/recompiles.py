"""How often blocks may compile anew, and what is said before Dynamo stops compiling.

Dynamo compiles a code object at most `torch._dynamo.config.recompile_limit` times, 8 by default; what fits
none of those graphs then runs eager, dense. A PEFT adapter takes one compilation or more for its name, its
rank, its layers and the first change of its scale: a few adapters reach the limit. `SharedCode` has its own.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._guards import CompileContext

log = logging.getLogger(__name__)

GRAPHS = 64  # that blocks of one pattern keep; Dynamo looks through them only when another one is wanted
MANY = 8  # from which on the user is told what costs the time
_TAKES_LIMIT = "recompile_limit" in inspect.signature(torch.compile).parameters  # newer than torch 2.11
_REMEDY = (
    "LoRA adapters share one graph if they are hot-swapped: pipe.enable_lora_hotswap(target_rank=R) before "
    "the first load_lora_weights(…, adapter_name=NAME), later ones with the same NAME and hotswap=True. "
    "Shapes share one with dynamic=True"
)


class SharedCode:
    """The compiled call of all blocks of one pattern.

    It has a code object of its own, so that Dynamo counts its compilations alone, and keeps up to `GRAPHS`
    graphs where `torch._dynamo.config` allows fewer. Full, it starts over on a fresh code object instead of
    running eager: graphs of adapters long gone are dropped, and what is in use compiles once more.
    """

    def __init__(self, options: Mapping[str, Any], fullgraph: bool, dynamic: bool | None) -> None:
        self._settings: dict[str, Any] = {
            "fullgraph": fullgraph,
            "dynamic": dynamic,
            "options": dict(options),
        }
        self._start_over()

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self._crowded:
            return self._compiled(block, *args, **kwargs)
        with _raised_limit():
            return self._compiled(block, *args, **kwargs)

    def _start_over(self) -> None:
        limit: dict[str, Any] = {"recompile_limit": _limit()} if _TAKES_LIMIT else {}
        self._compiled: Callable[..., Any] = torch.compile(
            own_code(), backend=self._backend, **self._settings, **limit
        )
        self._crowded = False

    def _backend(self, gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        from .backend import rt_lynx

        made = rt_lynx(gm, inputs, **kwargs)
        number = _compilation()
        if number == MANY:
            _warn_of_many()
        if number >= _limit() - 1:
            self._start_over()
        elif number >= torch._dynamo.config.recompile_limit - 1:
            self._crowded = True
        return made


def own_code() -> types.FunctionType:
    """What calls a block, with a code object of its own."""
    return types.FunctionType(_call.__code__.replace(), _call.__globals__, "block")


def warn_before_limit() -> None:
    """Tell the user, at the last compilation that Dynamo allows, what comes next. Called by the backend."""
    limit = torch._dynamo.config.recompile_limit
    if _compilation() == limit:
        log.warning(
            "this code has compiled %d times, all that torch._dynamo.config.recompile_limit allows: what "
            "fits none of its graphs will run eager, every layer dense. %s. Blocks compiled by "
            "lynx_compile.compile_blocks(model) have no such limit",
            *(limit, _REMEDY),
        )


@functools.cache
def _warn_of_many() -> None:
    log.warning(
        "blocks of one pattern have compiled %d times: each name, rank, set of layers and first change of "
        "scale of a LoRA adapter takes a compilation, and so may shapes. %s",
        *(MANY, _REMEDY),
    )


def _call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    returned = block._call_impl(*args, **kwargs)
    if type(returned) is tuple:
        return tuple([_as_one_sample(item) for item in returned])
    return _as_one_sample(returned)


def _as_one_sample(returned: Any) -> Any:
    """What a block returns; for a single sample with the strides of a tensor that is no part of another.

    Image rows cut out of a joint sequence keep its stride from sample to sample. That says nothing of a
    single one, but Dynamo guards on it: the blocks that read such rows would take a graph of their own beside
    that of the first block, which reads a tensor of its own.
    """
    if not isinstance(returned, torch.Tensor) or returned.dim() < 2 or returned.shape[0] != 1:
        return returned
    if not returned.is_contiguous() or returned.stride(0) == returned.shape[1] * returned.stride(1):
        return returned
    return returned[0][None]  # a view; view() and reshape() would keep the stride in Inductor


def _compilation() -> int:
    """The number, from 1, of the compilation of one code object that is going on; 0 outside of any."""
    current = CompileContext.current_compile_id()
    number = None if current is None else current.frame_compile_id
    return 0 if number is None else number + 1


def _limit() -> int:
    return max(GRAPHS, torch._dynamo.config.recompile_limit)


_lock = threading.Lock()
_raised: list[int] = []  # the user's limit, once for each call that goes on


@contextmanager
def _raised_limit() -> Iterator[None]:
    """For the time of a call, where `torch.compile` takes no limit; the last of several calls restores it."""
    config = torch._dynamo.config
    with _lock:
        _raised.append(_raised[0] if _raised else config.recompile_limit)
        config.recompile_limit = max(GRAPHS, _raised[0])
    try:
        yield
    finally:
        with _lock:
            config.recompile_limit = _raised.pop()
            if _raised:
                config.recompile_limit = max(GRAPHS, _raised[0])
