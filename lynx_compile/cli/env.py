"""`rt-lynx env`: what a bug report needs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

app = typer.Typer()

PACKAGES = (
    *("lynx-compile", "torch", "triton", "diffusers", "transformers", "peft", "accelerate", "torchao"),
    *("cuda-bindings", "nvidia-cuda-nvrtc", "safetensors", "numpy", "sympy"),
)
VARIABLE_PREFIXES = ("LYNX_", "TORCH", "PYTORCH_", "CUDA_", "NVIDIA_", "TRITON_", "DIFFUSERS_")


@app.command("env")
def env(json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Print what a bug report needs: versions, GPU, compiler, cache, kernels, variables."""
    from rich.console import Console

    sections = collect()
    if json:
        import json as encoder

        typer.echo(encoder.dumps(sections, indent=2))
        return
    console = Console(soft_wrap=True)
    for title, entries in sections.items():
        console.print(f"[bold]{title}[/bold]")
        for name, value in entries.items():
            console.print(f"  {name}: {value}", markup=False, highlight=False)


def collect() -> dict[str, dict[str, Any]]:
    """The sections of the report; a missing part is said, never raised."""
    return {
        "versions": _versions(),
        "devices": _devices(),
        "compiler": _compiler(),
        "backend": _backend(),
        "variables": _variables(),
    }


def _versions() -> dict[str, Any]:
    import importlib.metadata as metadata
    import platform

    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> dict[str, Any]:
    import torch

    from .. import cost
    from ..runtime import kernels

    if not torch.cuda.is_available():
        return {"cpu": kernels.unavailable_reason(torch.device("cpu"), torch.bfloat16)}
    found: dict[str, Any] = {"CUDA of torch": torch.version.cuda, "driver": _driver()}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        reason = kernels.unavailable_reason(torch.device("cuda", index), torch.bfloat16)
        table = cost.device_key(properties.name)
        found[f"cuda:{index}"] = (
            f"{properties.name}, {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors; "
            f"{reason or 'kernels available'}; cost table: {table or 'none'}"
        )
    return found


def _driver() -> str:
    import shutil
    import subprocess

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown (no nvidia-smi)"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False).stdout.split()
    return answer[0] if answer else "unknown (nvidia-smi does not answer)"


def _compiler() -> dict[str, Any]:
    from ..runtime import build

    try:
        nvrtc = ".".join(map(str, build.nvrtc_version()))
    except Exception as error:  # a bug report must come out whatever is broken
        nvrtc = f"unavailable: {error}"
    folder = build.cache_folder()
    if folder is None:
        return {"NVRTC": nvrtc, "kernel cache": "no writable folder: kernels are compiled in every process"}
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    held = f"{len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB"
    return {"NVRTC": nvrtc, "kernel cache": str(folder), "kernel cache holds": held}


def _backend() -> dict[str, Any]:
    import torch

    from .. import cost
    from ..runtime import ops

    return {
        "registered": "rt_lynx" in torch._dynamo.list_backends(exclude_tags=()),
        "op version": ops.VERSION,
        "cost tables": ", ".join(cost.devices()),
    }


def _variables() -> dict[str, str]:
    import os

    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLE_PREFIXES)}
