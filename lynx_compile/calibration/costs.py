"""What time a layer saves by running sparse, counted in FLOPs or predicted from a device's measured table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..cost import predict
from ..profile.branch import Branch
from ..profile.fingerprint import linear_layers
from ..profile.format import Profile

FLOPS = "flops"  # in place of a device: a sparse layer takes half


@dataclass(frozen=True)
class Costs:
    """dense_time: of all linear layers in one call, in any one unit.  saved: layer → by running sparse whole.

    rows_saved: layer → by running all rows but its text sparse, for layers that read a joint sequence.
    """

    dense_time: float
    saved: Mapping[str, float]
    rows_saved: Mapping[str, float]

    def fastest(self, steps: float = 1.0) -> float:
        """The speed with every layer sparse that is faster so, in this share of steps."""
        saved = steps * sum(max(saved, 0.0) for saved in self.saved.values())
        return self.dense_time / (self.dense_time - saved)


def costs_of(
    profile: Profile,
    model: nn.Module,
    device: str,
    text_rows: Mapping[str, int] | None = None,
    batch: int = 1,
) -> Costs:
    """Costs of a profile's layers; of the model's other linear layers only their time counts.

    device: FLOPS, or one of `lynx_compile.cost.devices()`, in ms.  text_rows: layer → leading rows of a
    sample that are text, below 0 its last.  batch: samples in one call.
    """
    linears = linear_layers(model)
    other = profile.studies["other_tokens"]
    dense_time = sum(
        _dense(device, batch * tokens, linears[name].out_features, linears[name].in_features)
        for name, tokens in other.items()
    )
    saved, rows_saved = {}, {}
    for name, layer in profile.layers.items():
        (n, k), branch, text = layer.shape, layer.branch, abs((text_rows or {}).get(name, 0))
        dense = _dense(device, batch * layer.tokens, n, k)
        dense_time += dense
        saved[name] = dense - _sparse(device, batch * layer.tokens, n, k, branch)
        if text:
            apart = _sparse(device, batch * (layer.tokens - text), n, k, branch) + _dense(
                device, batch * text, n, k
            )
            rows_saved[name] = dense - apart
    return Costs(dense_time, saved, rows_saved)


def _dense(device: str, m: int, n: int, k: int) -> float:
    return float(m * n * k) if device == FLOPS else predict(device, m, n, k).dense_ms


def _sparse(device: str, m: int, n: int, k: int, branch: Branch) -> float:
    if device == FLOPS:
        return m * n * k / 2
    return predict(device, m, n, k, rank=branch.rank, deflated=branch.deflate).sparse_ms
