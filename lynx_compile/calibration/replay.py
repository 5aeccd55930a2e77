"""Training steps of many small kernels as CUDA graphs: one by one they take longer to launch than to run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

log = logging.getLogger(__name__)


def replayed(run: Callable[[Any], None], examples: Sequence[Any]) -> Callable[[Any], None]:
    """`run(example)` as a CUDA graph, where every example has tensors of the same shapes on a GPU.

    `run` may read the example and tensors that stay where they are, and write to such tensors only; it runs
    twice before it is captured. Elsewhere, and where examples differ, `run` is returned as it is.
    """
    leaves, structure = tree_flatten(examples[0])
    shapes = [_shape(leaf) for leaf in leaves]
    alike = all(
        other == structure and [_shape(leaf) for leaf in found] == shapes
        for found, other in map(tree_flatten, examples)
    )
    if not alike or not all(leaf.is_cuda for leaf in leaves if isinstance(leaf, Tensor)):
        return run
    held = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    example = tree_unflatten(held, structure)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):  # what is made on first use must not be made while capturing
            run(example)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run(example)
    except RuntimeError as error:  # something in the model waits for the device
        torch.cuda.synchronize()
        log.warning("training runs without a CUDA graph: %s", str(error).split("\n")[0])
        return run

    def replay(example: Any) -> None:
        for into, leaf in zip(held, tree_flatten(example)[0], strict=True):
            if isinstance(into, Tensor):
                into.copy_(leaf)
        graph.replay()

    return replay


def _shape(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
