"""Every kernel under every tool of compute-sanitizer: `make sanitize`, or

    python -m tests.gpu.sanitize [--tool racecheck] [--kernels gemm]

prints a line for each tool and group of kernels, what the tools report, and fails if that is anything.

racecheck runs the Hopper GEMM as the variant in which every thread tells that it has done with a slot
(ALL_RELEASE). In the one that ships, one thread speaks for its warpgroup, whose matrix instruction cannot be
done before all of its warps have come to it; the tool does not know that (docs/kernels_gemm.md).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch

from lynx_compile.runtime import (
    build,
    gemm_mma,
    gemm_sm90,
    kernels,  # noqa: F401 (registers the ops)
    layout,
    operands,
    semantics,
    sparsify_geometry,
    sparsify_kernel,
)
from lynx_compile.runtime.residual_norm import residual_norm
from lynx_compile.runtime.rotary import rotary

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
CLEAN = re.compile(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards")
SECONDS = 300  # of one tool on one group

_generator = torch.Generator().manual_seed(1)


def normal(*shape: int) -> torch.Tensor:
    """Made on the CPU: the tools then see hardly any kernel but ours."""
    return torch.randn(*shape, generator=_generator).bfloat16()


def _gpu(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.cuda() for t in tensors]


def _close(y: torch.Tensor, expected: torch.Tensor) -> None:
    error = ((y.cpu().double() - expected).norm() / expected.norm()).item()
    assert error < 3e-3, f"relative error {error:.1e}"


def _double(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.double()


def _multiply(gemm: Callable[..., torch.Tensor], **options: gemm_sm90.Tile) -> None:
    """Tails in every direction; LoRA, gate and residual; samples that meet within a warpgroup."""
    for m, n, k, rank, tail, samples in (
        (700, 400, 448, 64, False, 1),
        (129, 208, 256, 16, True, 1),
        (300, 208, 256, 0, True, 3),
    ):
        x = normal(m, k)
        keep = semantics.keep_mask(x.abs())
        pruned = torch.where(keep, x, torch.zeros_like(x))
        scale, t, weight, bias = torch.rand(m), normal(m, rank), normal(n, k), normal(samples, n)
        up = normal(n, rank) if rank else None
        gate, residual = (normal(samples, n), normal(m, n)) if tail else (None, None)
        call = *_gpu(*layout.pack(pruned, keep), scale, t, weight, up, bias), "gelu", *_gpu(gate, residual)
        expected = semantics.sparse_linear(
            *(pruned.double(), scale.double(), t.double(), weight.double()),
            lora_up=_double(up), bias=bias.double(), activation="gelu",
            gate=_double(gate), residual=_double(residual),
        )  # fmt: skip
        for _ in range(2):
            _close(gemm(*call, **options), expected)


def run_gemm() -> None:
    """Every tile, and several layers in one launch."""
    variants = product(gemm_sm90.RATES, [torch.bfloat16], ["gelu"], range(3))
    build.prebuild(gemm_sm90.kernel(*variant).unit("sm_90a") for variant in variants)
    for tile in gemm_sm90.RATES:
        _multiply(gemm_sm90.sparse_gemm, tile=tile)
    _several()


def _several() -> None:
    """Layers of one X in one launch. A call knows addresses only: operands are held until it ran."""
    x, scale = normal(300, 192), torch.rand(300)
    keep = semantics.keep_mask(x.abs())
    pruned = torch.where(keep, x, torch.zeros_like(x))
    parts = [(normal(300, 16), normal(n, 192), normal(n, 16), normal(1, n)) for n in (208, 400, 16)]
    layers = [operands.Layer(*_gpu(*part), "none", None, None) for part in parts]
    values, metadata, scales = _gpu(*layout.pack(pruned, keep), scale)
    outputs = gemm_sm90.prepare_all(values, metadata, scales, layers).run()
    for y, (t, weight, up, bias) in zip(outputs, parts, strict=True):
        whole = pruned.double(), scale.double(), t.double(), weight.double()
        _close(y, semantics.sparse_linear(*whole, lora_up=up.double(), bias=bias.double()))


def run_portable() -> None:
    """The GEMM of other GPUs, and `sparsify` as they run it."""
    _multiply(gemm_mma.sparse_gemm)
    defines = sparsify_kernel.defines
    sparsify_kernel.defines = lambda *a: {**defines(*a), "PORTABLE": 1}
    _sparsify(clusters=False)


def run_sparsify() -> None:
    """Every kind of producer, with t by warps and by a warpgroup, blocks alone and in clusters; deflation."""
    _sparsify(clusters=True)


def _sparsify(clusters: bool) -> None:
    k, whole = 832, sparsify_geometry.Geometry
    geometries = [None, whole(2, 3, 3, 1, 1, 1)]
    if clusters:
        geometries += [whole(4, 3, 3, 1, 2, 1), whole(4, 3, 4, 1, 2, 4), whole(5, 3, 4, 1, 1, 4)]
    for geometry in geometries:
        _lay_out(geometry, clusters)
        on_cpu, vectors = normal(170, 2 * k), _gpu(*normal(2, 1, 2 * k).chunk(2, -1))
        # initcheck knows of no writes by kernels it does not look at, such as a copy of torch's
        wide, x = on_cpu.cuda(), on_cpu[:, :k].contiguous().cuda()
        producers = {
            "identity": [x],
            "gelu_tanh": [x],
            "silu_mul": list(wide.chunk(2, -1)),
            "cat_gelu": [x[:, :192], x[:, 192:]],
            "layer_norm": [x, None, None, *vectors],
            "rms_norm": [x, None, None, *vectors],
        }
        ranks = (0, 48, 160) if geometry is None else (64, 128) if geometry.helpers == 4 else (64,)
        for rank in ranks:
            options = {"eps": 1e-6, "mult_offset": 1.0, "lora_down": normal(rank, k).cuda() if rank else None}
            for producer, inputs in producers.items():
                sparsify_kernel.sparsify(producer, inputs, **options)
                if rank and geometry is None:
                    sparsify_kernel.sparsify(producer, inputs, deflated=rank - 11, **options)
            shift, score = _gpu(torch.randn(2, k), torch.rand(k))
            sparsify_kernel.sparsify("identity", [x], shift=shift, score=score, **options)


def _lay_out(geometry: sparsify_geometry.Geometry | None, clusters: bool) -> None:
    """From here on `sparsify` works as `geometry` says where that fits, and else as it chooses."""

    def choose(variant, m, k, sms, _, smem):
        if geometry and not variant.deflate and sparsify_geometry.fits(geometry, variant, k, smem):
            return geometry
        return sparsify_geometry.choose(variant, m, k, sms, clusters, smem)

    sparsify_kernel.choose = choose
    sparsify_kernel.plan.cache_clear()


def run_rotary() -> None:
    """Queries of two streams, with and without a norm, out of a wider projection."""
    for channels in (64, 128):
        parts = list(normal(2, 70, 3, 5, channels).cuda()[:, :, 0].split((30, 40), 1))
        angles = [
            [torch.randn(1, part.shape[1], channels // 2, 1).cuda() for part in parts] for _ in range(2)
        ]
        rotary(parts, [normal(channels).cuda(), None], [1e-6, -1.0], *angles)


def run_residual_norm() -> None:
    """A row that one warp covers, and one that takes several."""
    for columns in (264, 3072):
        x, residual = normal(2, 33, columns).cuda(), normal(2, 33, columns).cuda()
        residual_norm(x, normal(columns).cuda(), normal(2, 1, columns).cuda(), residual, 1e-5)


RUNS = {
    "sparsify": run_sparsify,
    "sparse_gemm": run_gemm,
    "portable": run_portable,
    "rotary": run_rotary,
    "residual_norm": run_residual_norm,
}


def _all_release() -> None:
    """From here on kernels of the GEMM are built with ALL_RELEASE."""
    plain = gemm_sm90.kernel

    def kernel(*variant: object) -> object:
        found = plain(*variant)  # type: ignore[arg-type]
        found.defines["ALL_RELEASE"] = 1
        return found

    gemm_sm90.kernel = kernel  # type: ignore[assignment]


def _checked(tool: str | None, group: str, shipped: bool) -> str:
    """What a tool has to say about a group of kernels, "" for nothing; without a tool, whether it runs."""
    command = [sys.executable, "-m", "tests.gpu.sanitize", "--run", group]
    if tool == "racecheck" and not shipped:
        command.append("--all-release")
    if tool:
        name = "spars" if group == "portable" else group
        options = "--tool", tool, "--print-limit", "5", "--kernel-name", f"kns={name}"
        command = ["compute-sanitizer", *options, *command]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor has an end of its own
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired as late:
        said = b"".join(part for part in (late.stdout, late.stderr) if part).decode(errors="replace")
        return f"not done after {SECONDS} s; until then: {said[:4000]}"
    text = done.stdout + done.stderr
    clean = done.returncode == 0 and f"{group}: ran" in text and (not tool or CLEAN.search(text))
    return "" if clean else text[:4000]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", choices=TOOLS, action="append")
    parser.add_argument("--kernels", choices=RUNS, action="append")
    parser.add_argument("--shipped", action="store_true", help="racecheck on the GEMM without ALL_RELEASE")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--all-release", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        if options.all_release:
            _all_release()
        RUNS[options.run]()
        torch.cuda.synchronize()
        print(f"{options.run}: ran")
        return 0
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for tools in ([None], options.tool or TOOLS):  # at first without: what compiles is in the cache then
            jobs = list(product(tools, options.kernels or RUNS))
            reports = pool.map(lambda job: _checked(*job, options.shipped), jobs)
            for (tool, group), report in zip(jobs, reports, strict=True):
                if tool or report:
                    print(f"{tool or 'no tool':10s} {group:14s} {report or 'clean'}", flush=True)
                failed += bool(report)
            if failed:
                break
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
