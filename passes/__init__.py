"""Graph rewrites on Dynamo's FX graph: graph in, graph out."""

from collections.abc import Callable

from torch import fx

from .activation import fold_activations, match_activation
from .choice import choose_at_run_time
from .concat import fold_concatenations, match_concatenation
from .epilogue import fold_epilogues
from .gated import fold_gated, match_gated
from .linear import Linear, find_linears, lower_markers, sparsify_linears
from .lora import join_lora
from .norm import fold_norms, match_norm
from .normalize import normalize
from .producer import Producer, recognise
from .rotary import fold_rotations
from .rows import split_rows
from .together import run_together

# What runs once the chosen layers are sparse, in the best order; any other is as correct.
FUSIONS: tuple[Callable[[fx.Graph], int], ...] = (
    join_lora,
    fold_activations,
    fold_gated,
    fold_norms,
    fold_concatenations,
    fold_epilogues,
    fold_rotations,
    choose_at_run_time,
    run_together,
)
PRODUCERS = (match_activation, match_gated, match_norm, match_concatenation)


def producer_of(x: fx.Node) -> Producer | None:
    """What stands in front of a linear layer that reads x, as one of the producers of `sparsify`."""
    return next((found for match in PRODUCERS if (found := recognise(x, match))), None)


__all__ = [
    "FUSIONS",
    "Linear",
    "Producer",
    "find_linears",
    "lower_markers",
    "normalize",
    "producer_of",
    "sparsify_linears",
    "split_rows",
]
