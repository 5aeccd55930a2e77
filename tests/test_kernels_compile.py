"""Every kernel compiles for every architecture, without a GPU: no spills, no stack frame, no warnings.

A stack frame means an array that the compiler could not keep in registers, a C75xx warning that it serialised
the tensor cores; either costs most of a kernel's speed without making it wrong.
"""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")

from lynx_compile.runtime import (
    build,
    gemm_mma,
    gemm_sm90,
    residual_norm_kernel,
    rotary_kernel,
    sparsify_kernel,
)
from lynx_compile.runtime.semantics import ACTIVATIONS, PRODUCERS

PORTABLE_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
SHARED_MEMORY = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_90a": 228, "sm_120": 100}  # KB
DTYPES = (torch.bfloat16, torch.float16)
NO_VECTORS = (0,) * 6
NORM_VECTORS = (1, 1, 1, 1, 0, 0)
Z_VECTORS = (0, 0, 0, 0, 2, 2)


def portable_gemm(arch):
    """Both element types with an epilogue that computes and one that does not; on sm_80 all of them."""
    activations = ACTIVATIONS if arch == "sm_80" else ("none", "gelu")
    for dtype, activation in itertools.product(DTYPES, activations):
        yield gemm_mma.kernel(dtype, activation, False).unit(arch)


def hopper_gemm():
    """Every tile with the fullest epilogue; those with the most accumulators with others, too."""
    for i, tile in enumerate(gemm_sm90.RATES):
        yield gemm_sm90.kernel(tile, DTYPES[i % 2], "gelu", 2).unit("sm_90a")
        if tile.blocks * tile.n >= 256 and tile.split == 1:
            for tail, activation in ((0, "none"), (1, "none"), (1, "relu")):
                yield gemm_sm90.kernel(tile, DTYPES[tail], activation, tail).unit("sm_90a")
    for activation in ACTIVATIONS:
        yield gemm_sm90.kernel(next(iter(gemm_sm90.RATES)), DTYPES[0], activation, 1).unit("sm_90a")
    for_racecheck = gemm_sm90.kernel(next(iter(gemm_sm90.RATES)), DTYPES[0], "gelu", 2)
    yield build.unit(gemm_sm90.SOURCE, "sm_90a", {**for_racecheck.defines, "ALL_RELEASE": 1})


def sparsifiers(arch):
    """Every producer with the FLUX rank, and the ranks with the plainest producer."""
    cases = [("identity", rank, NO_VECTORS) for rank in (0, 16, 64, 128)] + [("identity", 64, Z_VECTORS)]
    if arch in ("sm_80", "sm_90a"):
        for producer in PRODUCERS:
            vectors = NORM_VECTORS if producer.endswith("_norm") else NO_VECTORS
            cases.append((producer, 64 if "relu" not in producer else 0, vectors))
    else:
        cases += [
            ("layer_norm", 64, NORM_VECTORS),
            ("gelu_mul", 64, NO_VECTORS),
            ("cat_gelu_tanh", 64, NO_VECTORS),
        ]
    cases = [(*case, False) for case in cases] + [(*case, True) for case in cases if case[1]]
    cases.append(("identity", 256, NO_VECTORS, True))
    cases.append(("layer_norm", 64, (1, 1, 1, 1, 2, 2), True))
    for i, (producer, rank, vectors, deflate) in enumerate(cases):
        variant = sparsify_kernel.Variant(DTYPES[i % 2], producer, rank, vectors, deflate)
        geometry = sparsify_kernel.choose(
            variant, 4096, 3072, 132, arch == "sm_90a", SHARED_MEMORY[arch] * 1024
        )
        yield build.unit(sparsify_kernel.SOURCE, arch, sparsify_kernel.defines(variant, geometry))


def rotations(arch):
    """Every head size, each with another set of options."""
    for i, channels in enumerate(rotary_kernel.CHANNELS):
        weight = (None, *DTYPES[:1], torch.float32)[i % 3]
        yield rotary_kernel.kernel(DTYPES[0], channels, i != 2, weight, 1 + i % 2, True).unit(arch)
    yield rotary_kernel.kernel(DTYPES[1], 128, True, DTYPES[1], 2, True).unit(arch)


def residual_norms(arch):
    """From one lane's columns to the widest row, with every kind of vector."""
    kinds = (None, *DTYPES[:1], torch.float32)
    for i, columns in enumerate((8, 264, 3072, 3840, 6144)):
        weight, mult = kinds[i % 3], kinds[(i + i // 3) % 3]
        yield residual_norm_kernel.kernel(DTYPES[0], columns, weight, mult, True).unit(arch)
    yield residual_norm_kernel.kernel(DTYPES[1], 3840, DTYPES[1], DTYPES[1], True).unit(arch)


def faults(unit):
    """What is wrong with a unit's kernels, in words; nothing when all is well."""
    compiled = build.compile_unit(unit)
    found = build.resources(compiled)
    assert compiled.code[:4] == b"\x7fELF"
    assert found, f"no kernel in {unit}"
    return [f"{unit}: {kernel}" for kernel in found if kernel.stack or kernel.spill or kernel.warnings]


@pytest.mark.parametrize(
    ("source", "arch"),
    [
        *(("gemm_mma", arch) for arch in PORTABLE_ARCHS),
        ("gemm_sm90", "sm_90a"),
        *(("sparsify", arch) for arch in (*PORTABLE_ARCHS, "sm_90a")),
        *(("rotary", arch) for arch in ("sm_80", "sm_90a", "sm_120")),
        *(("residual_norm", arch) for arch in ("sm_80", "sm_90a", "sm_120")),
    ],
)
def test_compiles_clean(source, arch):
    if source == "gemm_mma":
        units = portable_gemm(arch)
    elif source == "gemm_sm90":
        units = hopper_gemm()
    elif source == "rotary":
        units = rotations(arch)
    elif source == "residual_norm":
        units = residual_norms(arch)
    else:
        units = sparsifiers(arch)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        assert list(itertools.chain.from_iterable(pool.map(faults, dict.fromkeys(units)))) == []
