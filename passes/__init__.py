"""Graph rewrites on Dynamo's FX graph: graph in, graph out."""

from .linear import Linear, find_linears, lower_markers, sparsify_linears
from .normalize import normalize

__all__ = ["Linear", "find_linears", "lower_markers", "normalize", "sparsify_linears"]
