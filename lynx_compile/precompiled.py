"""Compiled blocks on disk, with their guards: a later process loads them instead of tracing and compiling.

    lynx_compile.compile_blocks(transformer, fullgraph=True, precompile=True)

The caches of torch keep what Inductor compiled; each process still imports Inductor's front end, traces the
blocks and builds guards, which is most of a start. Here all of it is kept, through `torch._dynamo`'s
ahead-of-time compilation. Weights are inputs of such a call and no part of it.

Dynamo's guards are kept with it and checked at each call. Those that compare identities or look at globals
mean nothing in another process: what they saw is described instead (`_describe`) and compared, code when a
block is first called and everything else at each call. Options, configuration and versions are part of the
key; all modules that were traced are compared before loading. Whatever does not fit, or cannot
be kept, compiles as without `precompile`.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib
import logging
import pickle
import platform
import re
import threading
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import fx, nn
from torch._dynamo.aot_compile import AOTCompiledFunction, aot_compile_fullgraph
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable, SerializableCallable
from torch._dynamo.hooks import Hooks
from torch._dynamo.package import SourceInfo

from . import csrc, passes, runtime
from .files import write_whole
from .report import GraphReport, record, report
from .runtime import build, kernels

log = logging.getLogger(__name__)

GRAPHS = 4  # of a pattern; shapes and states beyond compile as without `precompile`
_IDENTITY = {
    *("ID_MATCH", "FUNCTION_MATCH", "CLASS_MATCH", "MODULE_MATCH", "CLOSURE_MATCH", "BUILTIN_MATCH"),
    *("DICT_VERSION", "NN_MODULE", "WEAKREF_ALIVE"),
}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_CONTAINERS = (dict, set, frozenset, list, tuple)
# what Dynamo names anew in each process: Python's builtins, and torch where it is reached through an object
_NAMED_ANEW = re.compile(r"G\['(__builtins_dict__[_\d]*|_\d+_c\d+)'\]")


class NotKept(Exception):
    """Why a compiled call cannot be kept on disk."""


class Entry(NamedTuple):
    """What a file holds. modules: those that were traced and their digests. seen: guarded expression → what
    it was."""

    modules: dict[str, str]
    seen: dict[str, Hashable]
    reports: tuple[GraphReport, ...]
    call: bytes


class Precompiled:
    """The compiled call of all blocks of one pattern, from disk where it is there and fits.

    entry: calls a block. compiler: the backend with its options. otherwise: the call that compiles as usual.
    identity: what beside the state of torch tells this call from others; its repr must not hold addresses.
    """

    def __init__(
        self,
        entry: types.FunctionType,
        compiler: Callable[..., Any],
        otherwise: Callable[..., Any],
        identity: Hashable,
        dynamic: bool | None,
    ) -> None:
        self._entry, self._compiler, self._otherwise = entry, compiler, otherwise
        self._identity, self._dynamic = identity, dynamic
        self._graphs: list[Graph] = []
        self._looked = 0  # how many of the slots on disk
        self._lock = threading.RLock()

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _compiles_here():
            return self._otherwise(block, *args, **kwargs)
        scope = {"block": block, "args": args, "kwargs": kwargs}
        graph = next((graph for graph in self._graphs if graph.fits(scope)), None)
        if graph is None and self._looked < GRAPHS and not torch.is_grad_enabled():
            with self._lock:
                graph = self._another(scope)
        return (self._otherwise if graph is None else graph.call)(block, *args, **kwargs)

    def _another(self, scope: Mapping[str, Any]) -> Graph | None:
        """A graph that fits, from the next slot on disk that has one, or compiled now into a free one."""
        try:
            folder = build.cache_folder("blocks")
            while folder is not None and self._looked < GRAPHS:
                path = folder / f"{_key(self._identity, scope['block'])}-{self._looked}"
                self._looked += 1
                graph = _load(path, self._entry) or self._compile(path, scope)
                self._graphs.append(graph)
                if graph.fits(scope):
                    return graph
        except Exception as error:
            log.info("a block compiles as without precompile: %s: %s", type(error).__name__, error)
            log.debug("a block compiles as without precompile", exc_info=True)
        self._looked = GRAPHS
        return None

    def _compile(self, path: Path, scope: Mapping[str, Any]) -> Graph:
        """Compile for these arguments, and keep it. Raises NotKept and what torch raises."""
        before = len(report().graphs)
        seen: dict[str, Hashable] = {}
        with _guards_on_hooks():
            made = aot_compile_fullgraph(
                self._entry,
                ((scope["block"], *scope["args"]), dict(scope["kwargs"])),
                Hooks(guard_filter_fn=functools.partial(_keep_guards, seen)),
                self._compile_graph,
                self._dynamic,
            )
        graph = Graph(made, seen)
        if not graph.fits(scope):
            raise NotKept("what its guards saw reads differently now")
        sources = made.source_info().inlined_sources
        made._artifacts.source_info = SourceInfo(set())  # the text of whole modules
        entry = Entry(
            {name: _module_digest(name) for name in sorted({source.module for source in sources})},
            seen,
            report().graphs[before:],
            AOTCompiledFunction.serialize(made, {}).serialized_data,
        )
        content = pickle.dumps(entry)
        try:
            write_whole(path, hashlib.sha256(content).digest() + content)
        except OSError as error:
            log.info("%s was not written (%s)", path, error)
        return graph

    def _compile_graph(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return Compiled(self._compiler(gm, inputs))


class Graph:
    """A compiled call and its guards. seen: see `Entry`."""

    def __init__(self, made: Any, seen: Mapping[str, Hashable]) -> None:
        self.call: Callable[..., Any] = made.fn
        self._guards = made._artifacts.guard_manager
        self._seen = seen
        self._globals: dict[str, Any] = {"G": made.fn.__globals__}
        self._all = _tuple_of(seen)
        # what users may switch, as an attention backend, or replace; keys of registries are only added to
        self._changing = _tuple_of(
            part
            for expression, what in seen.items()
            if not expression.startswith("list(dict.keys(")
            for part in _changing_parts(expression, what)
        )
        self._values: Any = None
        self._known: WeakSet[nn.Module] = WeakSet()

    def fits(self, scope: Mapping[str, Any]) -> bool:
        """Whether this graph is what tracing would give for these arguments now."""
        if not self._guards.check(scope):
            return False
        try:
            names = {**scope, "L": scope}
            if scope["block"] not in self._known:
                found = map(_describe, eval(self._all, self._globals, names))
                if list(found) != list(self._seen.values()):
                    return False
                self._values = eval(self._changing, self._globals, names)
                self._known.add(scope["block"])
            return bool(self._values == eval(self._changing, self._globals, names))
        except Exception:  # an attribute is gone
            log.debug("a guarded expression cannot be read", exc_info=True)
            return False


class Compiled(SerializableCallable):
    """What Inductor compiled; without an attribute `serialize`, by which newer torch would wrap it again."""

    def __init__(self, made: Callable[..., Any]) -> None:
        self._made = BundledAOTAutogradSerializableCallable(made)

    @classmethod
    def serialize_compile_artifacts(cls, fn: Compiled) -> bytes:
        return BundledAOTAutogradSerializableCallable.serialize_compile_artifacts(fn._made)

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Any:
        return BundledAOTAutogradSerializableCallable.deserialize_compile_artifacts(data)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._made(*args, **kwargs)


def _load(path: Path, entry: types.FunctionType) -> Graph | None:
    """What a file holds, None when it is missing, damaged, or of other sources. Raises what torch raises."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, content = content[:32], content[32:]
    if hashlib.sha256(content).digest() != digest:
        return None
    kept: Entry = pickle.loads(content)
    if any(_module_digest(name) != digest for name, digest in kept.modules.items()):
        return None
    with _guards_on_hooks():
        graph = Graph(AOTCompiledFunction.deserialize(kept.call, entry.__globals__, {}), kept.seen)
    for each in kept.reports:
        record(each)
    return graph


def _guards_on_hooks() -> Any:
    """`torch.compile` looks for hooks once, as it traces; what is loaded has to look by itself."""
    return torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)


def _compiles_here() -> bool:
    """Whether `torch.compile` would compile now, neither disabled nor under a mode or another compilation."""
    return not (
        torch._dynamo.config.disable
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._dynamo.eval_frame._stance.stance != "default"
    )


def _keep_guards(seen: dict[str, Hashable], guards: Sequence[Any]) -> list[bool]:
    """Which guards go into a file. What the others saw goes into `seen`. Raises NotKept."""
    kept = []
    for guard in guards:
        keep = not guard.is_global and not _IDENTITY & {guard.guard_type, *(guard.derived_guard_types or ())}
        kept.append(keep)
        if keep:
            continue
        if not guard.has_value:
            raise NotKept(f"a guard {guard.guard_type} on {guard.name!r} has nothing to describe")
        try:
            what = _describe(guard.value)
        except NotKept as error:
            raise NotKept(f"{error} ({guard.guard_type} on {guard.name})") from None
        if not _NAMED_ANEW.match(guard.name):
            seen[guard.name] = what
        elif what[0] not in ("module", "named"):
            raise NotKept(f"{guard.name}, {what}, has no name that lasts")
    return kept


def _describe(value: Any) -> tuple[Hashable, ...]:
    """What another process must find in its place. Raises NotKept where that cannot be said."""
    if isinstance(value, enum.Enum):
        return "enum", type(value).__module__, type(value).__qualname__, value.name
    if isinstance(value, _PLAIN):
        return "plain", type(value).__name__, repr(value)
    if isinstance(value, types.ModuleType):
        return "module", value.__name__
    if isinstance(value, types.FunctionType):
        return "function", value.__module__, value.__qualname__, _code_digest(value.__code__)
    if isinstance(value, types.CodeType):
        return "code", _code_digest(value)
    if type(value) is object:
        return ("sentinel",)
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return "named", value.__module__, value.__qualname__
    if isinstance(value, _CONTAINERS):
        plain = all(isinstance(item, _PLAIN) for item in value)
        return (
            "container",
            type(value).__qualname__,
            len(value),
            tuple(sorted(map(repr, value))) if plain else (),
        )
    if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return "operator", str(value)
    raise NotKept(f"a guard looks at a {type(value).__module__}.{type(value).__qualname__}")


def _changing_parts(expression: str, what: Any) -> Sequence[str]:
    """Of an expression in `Entry.seen`, what to compare at each call."""
    if what[0] in ("enum", "plain", "function", "code"):
        return (expression,)
    return (f"type({expression})", f"len({expression})") if what[0] == "container" else ()


def _tuple_of(expressions: Any) -> types.CodeType:
    return compile(
        f"({''.join(f'{expression}, ' for expression in dict.fromkeys(expressions))})", "guards", "eval"
    )


def _code_digest(code: types.CodeType) -> str:
    constants = [
        _code_digest(each) if isinstance(each, types.CodeType) else _text(each) for each in code.co_consts
    ]
    parts = code.co_name, code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _text(value: Any) -> str:
    """repr(value), in which sets have an order."""
    return repr(sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else value)


def _key(identity: Hashable, block: nn.Module) -> str:
    """The name of what a block compiles to in torch's present state. Raises NotKept."""
    from torch._inductor import config as inductor

    settings = (torch._dynamo.config, torch._functorch.config, inductor)
    cuda = torch.backends.cuda
    first = next(block.parameters(), None)
    parts = (
        *(_package_digest(), torch.__version__, torch.version.cuda, platform.python_version()),
        *(platform.machine(), platform.system(), identity),
        [
            (name, _text(value))
            for config in settings
            for name, value in config.save_config_portable().items()
        ],
        *(cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        *(cuda.cudnn_sdp_enabled(), torch._C._get_sdp_priority_order()),
        torch.get_float32_matmul_precision(),
        None if first is None else (first.device.type, kernels.unavailable_reason(first.device, first.dtype)),
        torch.cuda.get_device_name(first.device) if first is not None and first.is_cuda else None,
    )
    text = repr(parts)
    if address := re.search(" at 0x", text):
        object_name = text[: address.start()].rpartition("<")[2]
        raise NotKept(f"a setting is an object that only this process has: {object_name}")
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _package_digest() -> str:
    """Of all files of this package: what it would trace, rewrite and launch."""
    digest = hashlib.sha256()
    folders = (Path(__file__).parent, *(Path(m.__file__ or "").parent for m in (passes, runtime, csrc)))
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".json"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def _file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _module_digest(name: str) -> str:
    """Of a module's file, and of the functions and classes it defines as they are now, patched or not."""
    module = importlib.import_module(name)
    path = getattr(module, "__file__", None)
    if path is None:
        raise NotKept(f"the source of {name} is no file")
    found = [_file_digest(path)]
    for key, value in sorted(vars(module).items()):
        if getattr(value, "__module__", None) != name:
            continue
        held = sorted(vars(value).items()) if isinstance(value, type) else [("", value)]
        for part, function in held:
            own = getattr(function, "__module__", None) or ""
            if not (name.startswith("torch.") and own.startswith("torch.")):  # torch patches its own classes
                found.append(f"{key}.{part}: {digest}" if (digest := _function_digest(function)) else "")
    found = [each for each in found if each]  # no other attributes: pickling adds some to classes
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def _function_digest(value: Any) -> str:
    """Of the code of a function and of those it wraps; empty for what is none."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    if not isinstance(value, types.FunctionType):
        return ""
    held = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
    wrapped = [each for each in (*held, getattr(value, "__wrapped__", None)) if each is not value]
    return " ".join((_code_digest(value.__code__), *map(_function_digest, wrapped)))
