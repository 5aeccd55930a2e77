"""NVRTC builds and their cache: the cache saves time and can never do harm."""

import os
import stat
import subprocess
import sys
import threading

import pytest

from lynx_compile.runtime import build

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")

SOURCE = """
#include "factor.cuh"
extern "C" __global__ void fill(float* out, int n) {
    if (threadIdx.x < n) out[threadIdx.x] = kFactor * VALUE;
}
"""
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 1) spill(float* p, int n) {
    float held[64];
    for (int i = 0; i < 64; ++i) held[i] = p[i * n];
    asm volatile("" ::: "memory");
    for (int i = 0; i < 64; ++i) p[held[i] > 0 ? i : n] = held[(i * n) % 64];
}
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder of sources in place of csrc, and an empty cache."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "fill.cu").write_text(SOURCE)
    (folder / "spill.cu").write_text(SPILLING)
    (folder / "factor.cuh").write_text("constexpr float kFactor = 2;")
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setenv("LYNX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_unstored", {})
    build._sources_digest.cache_clear()
    yield folder
    build._sources_digest.cache_clear()


@pytest.fixture
def compilations(monkeypatch):
    """The units that were really compiled."""
    seen = []
    original = build.compile_unit
    monkeypatch.setattr(build, "compile_unit", lambda what: (seen.append(what), original(what))[1])
    return seen


def fill(value=1, arch="sm_90a"):
    return build.cubin("fill.cu", arch=arch, defines={"VALUE": value})


def entries(tmp_path):
    return sorted((tmp_path / "cache" / "kernels").iterdir())


def test_second_call_is_served_from_the_cache(sources, compilations):
    first = fill()
    assert first[:4] == b"\x7fELF"
    assert fill() == first
    assert len(compilations) == 1


def test_key_covers_macros_arch_source_and_headers(sources, compilations):
    codes = {fill(1), fill(2), fill(1, arch="sm_80")}
    for name, text in (("factor.cuh", "constexpr float kFactor = 3;"), ("fill.cu", SOURCE + "// changed")):
        (sources / name).write_text(text)
        build._sources_digest.cache_clear()
        codes.add(fill(1))
    assert len(compilations) == 5
    assert len(codes) >= 4  # a comment alone may give the same code


def test_key_covers_the_nvrtc_version(sources, compilations, monkeypatch):
    fill()
    monkeypatch.setattr(build, "nvrtc_version", lambda: (99, 0))
    fill()
    assert len(compilations) == 2


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b[:100] + b"\0\1" + b[102:], lambda b: b""])
def test_damaged_entry_is_rebuilt(sources, compilations, tmp_path, damage):
    code = fill()
    (entry,) = entries(tmp_path)
    entry.write_bytes(damage(entry.read_bytes()))
    assert fill() == code
    assert fill() == code
    assert len(compilations) == 2


def test_cache_folder_is_private(sources, tmp_path):
    fill()
    (entry,) = entries(tmp_path)
    assert stat.S_IMODE(entry.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600


def test_folder_that_others_may_write_to_is_not_used(sources, compilations, tmp_path, caplog):
    folder = tmp_path / "cache" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    fill()
    fill()
    assert len(compilations) == 1  # kept in memory
    assert not list(folder.iterdir())
    assert "chmod 700" in caplog.text


def test_missing_and_unwritable_folders_only_cost_time(sources, compilations, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LYNX_CACHE_DIR", str(tmp_path / "file"))
    assert fill()[:4] == b"\x7fELF"
    monkeypatch.setenv("LYNX_CACHE_DIR", str(tmp_path / "cache"))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Read-only file system")

    monkeypatch.setattr(build.tempfile, "mkstemp", refuse)  # also where tests run as root
    assert fill(2)[:4] == b"\x7fELF"
    assert len(compilations) == 2
    assert fill()[:4] == fill(2)[:4] == b"\x7fELF"
    assert len(compilations) == 2  # once a process


def test_failed_write_leaves_nothing_behind(sources, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.os, "fsync", full)
    assert fill()[:4] == b"\x7fELF"
    assert entries(tmp_path) == []


def test_processes_and_threads_at_once(sources, tmp_path):
    program = (
        "import pathlib, sys\n"
        "from lynx_compile.runtime import build\n"
        "build.SOURCES = pathlib.Path(sys.argv[1])\n"
        "codes = [build.cubin('fill.cu', arch='sm_90a', defines={'VALUE': i}) for i in range(4)]\n"
        "assert all(code[:4] == b'\\x7fELF' for code in codes)\n"
    )
    command = [sys.executable, "-c", program, str(sources)]
    processes = [subprocess.Popen(command, env=dict(os.environ)) for _ in range(2)]
    found = []
    threads = [threading.Thread(target=lambda: found.append(fill(1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in processes] == [0, 0]
    assert len(set(found)) == 1
    assert len(entries(tmp_path)) == 4
    assert all(build._read(entry) is not None for entry in entries(tmp_path))


def test_prebuild_fills_the_cache(sources, compilations):
    started = build.prebuild(build.unit("fill.cu", "sm_90a", {"VALUE": i}) for i in range(3))
    assert [future.result()[:4] for future in started] == [b"\x7fELF"] * 3
    assert sorted(dict(what.defines)["VALUE"] for what in compilations) == [0, 1, 2]
    fill(2)
    assert len(compilations) == 3


def test_a_call_waits_for_what_is_under_way(sources, compilations):
    build.prebuild([build.unit("fill.cu", "sm_90a", {"VALUE": 1})] * 2)
    assert fill(1)[:4] == b"\x7fELF"
    assert len(compilations) == 1


def test_errors_carry_the_log_and_the_command(sources):
    with pytest.raises(build.CompileError, match=r"sm_90a.*VALUE=undeclared(.|\n)*undeclared.*undefined"):
        fill("undeclared")


def test_missing_nvrtc_names_the_remedy(sources, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    build._nvrtc.cache_clear()
    with pytest.raises(build.CompileError, match=r"lynx-compile\[cuda\]"):
        build.compile_unit(build.unit("fill.cu", "sm_90a", {"VALUE": 1}))


def test_resources_read_from_the_report(sources):
    (clean,) = build.resources(build.compile_unit(build.unit("fill.cu", "sm_90a", {"VALUE": 1})))
    assert (clean.kernel, clean.stack, clean.spill, clean.warnings) == ("fill", 0, 0, ())
    assert 0 < clean.registers < 32
    (spilling,) = build.resources(build.compile_unit(build.unit("spill.cu", "sm_90a")))
    assert spilling.stack > 0
    assert spilling.spill > 0
    assert spilling.registers == 64


@pytest.mark.parametrize(("capability", "arch"), [((8, 0), "sm_80"), ((9, 0), "sm_90a"), ((12, 0), "sm_120")])
def test_arch_of(capability, arch):
    assert build.arch_of(capability) == arch
