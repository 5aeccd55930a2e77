"""Which patterns fire in which diffusers transformers, with the default decisions.

python -m tests.zoo.patterns    one Markdown line a pattern, for docs/patterns.md
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lynx_compile.backend import rewrite
from lynx_compile.options import Options
from lynx_compile.runtime import ops
from lynx_compile.runtime.residual_norm import residual_norm
from lynx_compile.runtime.rotary import rotary

from .reference import OPTIONS
from .registry import ZOO, build

_SUFFIXES = (
    "Transformer2DModel",
    "Transformer3DModel",
    "Transformer1DModel",
    "2DModel",
    "Transformer",
    "Model",
)


def fired(name: str) -> set[str]:
    """Producers and epilogues of the rewritten graphs of one class, "shared" for one sparsify of several."""
    found: set[str] = set()

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        dense = gm.graph
        rewrite(gm, Options.parse(OPTIONS), recorded=False)
        for node in gm.graph.nodes:
            if node.target is ops.sparsify:
                readers = {layer for part in node.users for layer in part.users}
                found.add(node.args[0])
                together = sum(len(r.args[3]) for r in readers if r.target is ops.sparse_linears)
                alone = sum(r.target is ops.sparse_linear for r in readers)
                found.update({"shared"} if together + alone > 1 else ())
            elif node.target in (rotary, residual_norm):
                found.add(node.target._opname)
            elif node.target is ops.sparse_linear:
                places = ("gate", "residual", "left", "top")
                found.update(key for key in places if node.kwargs.get(key) is not None)
                found.update({"activation"} if node.kwargs.get("activation", "none") != "none" else ())
        gm.graph = dense
        return gm.forward

    torch._dynamo.reset()
    model, inputs = build(name)
    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs)
    return found


def table() -> dict[str, list[str]]:
    """Pattern → the classes it fires in, by their short names."""
    fires: dict[str, list[str]] = {}
    for name in sorted(ZOO):
        short = next((name.removesuffix(s) for s in _SUFFIXES if name.endswith(s) and name != s), name)
        for pattern in fired(name):
            fires.setdefault(pattern, []).append(short)
    return fires


if __name__ == "__main__":
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    for pattern, classes in sorted(table().items()):
        print(f"| `{pattern}` | {len(classes)} | {', '.join(classes)} |")
