"""Graph rewrites on Dynamo's FX graph: graph in, graph out."""

from collections.abc import Callable

from torch import fx

from .activation import fold_activations
from .choice import choose_at_run_time
from .concat import fold_concatenations
from .epilogue import fold_epilogues
from .gated import fold_gated
from .linear import Linear, find_linears, lower_markers, sparsify_linears
from .lora import join_lora
from .norm import fold_norms
from .normalize import normalize
from .producer import Producer
from .producers import producer_of
from .residual import fold_residual_norms
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
    fold_residual_norms,
    fold_rotations,
    choose_at_run_time,
    run_together,
)

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
