"""Device code to machine code: `csrc` compiled by NVRTC, with a disk cache in front.

    cubin("sparsify.cu", arch="sm_90a", defines={"RANK": 64})  →  bytes for `launch.Kernel`

NVRTC comes with torch's CUDA wheels and runs without a GPU, so one pure-Python package serves every torch and
CI compiles what users run. It is called through `cuda.bindings`, whose NVRTC functions are the C API and have
been the same since CUDA 12. (`cuda.core.Program` wraps the same calls, but its early versions load the driver
in order to compile, its module moved, and importing it takes longer than a warm start may.) The result is
always a cubin: PTX from a newer NVRTC would be refused by an older driver. NVRTC has no standard library, and
CUDA's own headers need not be installed: files in `csrc` include only each other.

The cache only saves time. A missing, read-only, foreign or damaged one costs each process a compilation and
nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import torch

from .. import csrc

log = logging.getLogger(__name__)

SOURCES = Path(csrc.__file__).parent
STANDARD = "c++17"
DIGEST_BYTES = hashlib.sha256().digest_size

Defines = Mapping[str, "int | str"]

_starting = threading.Lock()
_under_way: dict[Unit, Future[bytes]] = {}
_unstored: dict[str, bytes] = {}  # by key: what no folder took, so that this process compiles it once


class CompileError(RuntimeError):
    """NVRTC is missing or refused the source; the message carries its log."""


class Unit(NamedTuple):
    """One translation unit: a file of `csrc`, the architecture it is compiled for, and its macros."""

    source: str
    arch: str
    defines: tuple[tuple[str, int | str], ...] = ()


class Compiled(NamedTuple):
    """code: a cubin. log: what NVRTC and ptxas said, with each kernel's resources."""

    code: bytes
    log: str


class Resources(NamedTuple):
    """What ptxas reports of one kernel: registers a thread, bytes of stack and of spills, warnings."""

    kernel: str
    registers: int
    stack: int
    spill: int
    warnings: tuple[str, ...]


def unit(source: str, arch: str, defines: Defines | None = None) -> Unit:
    """A `Unit` with its macros in a canonical order."""
    return Unit(source, arch, tuple(sorted((defines or {}).items())))


def arch_of(capability: tuple[int, int]) -> str:
    """The architecture to compile for on a device of this compute capability.

    Hopper's `wgmma` needs the architecture-specific target; everywhere else the plain one is enough.
    """
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if capability == (9, 0) else "")


def cubin(source: str, *, arch: str, defines: Defines | None = None) -> bytes:
    """Machine code of one file of `csrc` for `arch` (e.g. "sm_90a"), from the cache or freshly compiled.

    Raises CompileError when NVRTC is missing or refuses the source.
    """
    return _started(unit(source, arch, defines)).result()


def prebuild(units: Iterable[Unit]) -> list[Future[bytes]]:
    """Start compiling what the cache lacks, in parallel: NVRTC runs outside the interpreter lock.

    Returns at once; `cubin` waits for what is under way instead of compiling it again.
    """
    return [_started(what) for what in dict.fromkeys(units)]


def _started(what: Unit) -> Future[bytes]:
    with _starting:
        future = _under_way.get(what)
        if future is None:
            future = _under_way[what] = _pool().submit(_cubin, what)
            future.add_done_callback(lambda _: _under_way.pop(what, None))
        return future


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="nvrtc")


def _cubin(what: Unit) -> bytes:
    folder, key = cache_folder(), _key(what)
    path = folder / f"{key}.cubin" if folder is not None else None
    code = _read(path) or _unstored.get(key)
    if code is None:
        code = compile_unit(what).code
        if not _write(path, code):
            _unstored[key] = code
    return code


def compile_unit(what: Unit) -> Compiled:
    """Compile without looking at the cache. Raises CompileError."""
    nvrtc = _nvrtc()
    path = SOURCES / what.source
    options = [
        f"--gpu-architecture={what.arch}",
        f"--std={STANDARD}",
        f"--include-path={SOURCES}",
        "--ptxas-options=-v",
        "--generate-line-info",  # profilers show source lines; the code is the same
        *(f"--define-macro={name}={value}" for name, value in what.defines),
    ]
    encoded = [option.encode() for option in options]
    program = _checked(nvrtc.nvrtcCreateProgram(path.read_bytes(), str(path).encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        text = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, text)
        messages = text.rstrip(b"\0").decode(errors="replace")
        if status:  # NVRTC_SUCCESS is 0
            version = ".".join(map(str, nvrtc_version()))
            raise CompileError(f"NVRTC {version}: {status.name} on {path} ({' '.join(options)})\n{messages}")
        code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        nvrtc.nvrtcGetCUBIN(program, code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(bytes(code), messages)


def resources(compiled: Compiled) -> list[Resources]:
    """Registers, stack frame and spills of each kernel in ptxas's report, and the unit's warnings."""
    lines = compiled.log.splitlines()
    warnings = tuple(line.strip() for line in lines if re.search(r"\bC7\d\d\d\b|warning", line))
    found = []
    for block in compiled.log.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", block)
        stack = re.search(r"(\d+) bytes stack frame", block)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
        registers = re.search(r"Used (\d+) registers", block)
        if not (name and stack and spills and registers):
            raise CompileError(f"cannot read ptxas's report:\n{compiled.log}")
        spill = int(spills[1]) + int(spills[2])
        found.append(Resources(name[1], int(registers[1]), int(stack[1]), spill, warnings))
    return found


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC that compiles. Raises CompileError when there is none."""
    _, major, minor = _nvrtc().nvrtcVersion()
    return major, minor


@functools.cache
def supported_archs() -> frozenset[int]:
    """Compute capabilities NVRTC compiles for, as 10·major + minor. Raises CompileError without NVRTC."""
    nvrtc = _nvrtc()
    return frozenset(_checked(nvrtc.nvrtcGetSupportedArchs()))


@functools.cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library
    except Exception as error:  # not installed, or installed without its library
        # The bindings find only the NVRTC of their own major version, which has to be that of torch's wheels.
        version = torch.version.cuda
        pin = "nvidia-cuda-nvrtc" if version is None else f"'cuda-bindings=={version.split('.')[0]}.*'"
        raise CompileError(
            f"NVRTC, which compiles the kernels, could not be loaded ({error}); "
            f"pip install 'lynx-compile[cuda]' {pin}"
        ) from error
    return nvrtc


def _checked(result: tuple[Any, Any]) -> Any:
    status, value = result
    if status:
        raise CompileError(f"NVRTC failed: {status.name}")
    return value


def cache_folder(name: str = "kernels") -> Path | None:
    """The private folder of what is compiled, cubins by default, made if needed; None when there is none.

    `LYNX_CACHE_DIR` overrides the user's cache folder. A folder that others may write to is not used: its
    content would run with this user's rights.
    """
    base = os.environ.get("LYNX_CACHE_DIR") or platformdirs.user_cache_dir("lynx-compile")
    folder = Path(base).expanduser() / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        log.info("%s are compiled anew in each process: no cache folder %s (%s)", name, folder, error)
        return None
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        log.warning("cache folder %s is unused because others may write to it; chmod 700 it", folder)
        return None
    return folder


def _key(what: Unit) -> str:
    parts = (*what, STANDARD, *nvrtc_version(), _sources_digest(what.source))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def _sources_digest(source: str) -> str:
    digest = hashlib.sha256()
    for path in [SOURCES / source, *sorted(SOURCES.glob("*.cuh"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _read(path: Path | None) -> bytes | None:
    """The cubin at `path` when it is there and whole. An entry is the cubin's SHA-256, then the cubin."""
    if path is None:
        return None
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    digest, code = entry[:DIGEST_BYTES], entry[DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path | None, code: bytes) -> bool:
    """Put an entry in place at once: readers see the old one, none, or this one, never a part of it.

    Returns whether it is there now.
    """
    if path is None:
        return False
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        log.info("kernel cache entry %s was not written (%s)", path, error)
        return False
    return True
