"""Which devices and dtypes have kernels.

`unavailable_reason` is the question every pass asks before it rewrites anything.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

DTYPES = (torch.bfloat16, torch.float16)
FIRST_CAPABILITY = (8, 0)  # Ampere: the first sparse tensor cores


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `device` has no kernels for `dtype`, in words a report can print; None when it has.

    Needs neither a GPU nor cuda.core: their absence is a reason like any other.
    """
    if device.type != "cuda":
        return f"no kernels: the model is on {device.type!r}, and sparse tensor cores are on NVIDIA GPUs"
    if dtype not in DTYPES:
        return f"no kernels: dtype is {dtype}, and the kernels take torch.bfloat16 or torch.float16"
    return _device_reason(device.index)


@functools.cache
def _device_reason(index: int | None) -> str | None:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"no kernels: torch {torch.__version__} sees no CUDA device here"
    capability = torch.cuda.get_device_capability(index)
    if capability < FIRST_CAPABILITY:
        found = f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}"
        return f"no kernels: {found}, and sparse tensor cores start at 8.0"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        return "no kernels: cuda.core, which compiles them, is missing; pip install 'lynx-compile[cuda]'"
    return None
