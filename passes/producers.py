"""The producers of `sparsify` that the passes know, by one question."""

from __future__ import annotations

from torch import fx

from .activation import match_activation
from .concat import match_concatenation
from .gated import match_gated
from .norm import match_norm
from .producer import Producer, recognise

PRODUCERS = (match_activation, match_gated, match_norm, match_concatenation)


def producer_of(x: fx.Node) -> Producer | None:
    """What stands in front of a linear layer that reads x, as one of the producers of `sparsify`."""
    return next((found for match in PRODUCERS if (found := recognise(x, match))), None)
