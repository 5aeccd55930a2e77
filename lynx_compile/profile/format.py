"""The profile in memory, and `lynx.json`: its schema, written and read strictly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..runtime.semantics import COMPENSATIONS, GROUP
from .branch import Branch
from .errors import ProfileError
from .fingerprint import Fingerprint

SCHEMA = 3
FORMAT = "lynx-profile"
DAMAGED = "the file is damaged or was edited by hand; fetch it again or calibrate again"

UNDECIDED = "calibrated, nothing chosen: the safe defaults decide"


@dataclass(eq=False)
class Layer:
    """One linear layer (N, K) of a profile.

    sparse, reason: the decision and why; with the reason UNDECIDED it is left to the backend's policy, which
    keeps sensitive classes of layers dense.  branch: what runs beside it when sparse (kept for dense layers
    too, so that decisions can be changed without calibrating again).  tokens: rows of one sample in one
    call.  error_before, error_after: relative output error with norm compensation alone and with the
    branch.  sensitivity: relative error of the velocity and of the final sample when only this layer is
    sparse.
    """

    shape: tuple[int, int]
    sparse: bool
    reason: str
    branch: Branch = field(default_factory=Branch)
    tokens: int = 0
    error_before: float | None = None
    error_after: float | None = None
    sensitivity: dict[str, float] = field(default_factory=dict)

    @property
    def decision(self) -> str | None:
        """What the profile says: "sparse", "dense", or None where the policy decides."""
        return None if self.reason == UNDECIDED else "sparse" if self.sparse else "dense"


@dataclass(eq=False)
class Profile:
    """What a calibration found for one model.

    compensation: as in `runtime.semantics`.  dense_steps, dense_last_steps of steps: the first and the last
    ones run dense.  studies: measured tables behind the decisions (JSON values).  provenance: what made the
    profile (JSON values).
    """

    model: Fingerprint
    layers: dict[str, Layer]
    compensation: str = "norm"
    dense_steps: int = 0
    dense_last_steps: int = 0
    steps: int = 20
    studies: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def sparse_layers(self) -> dict[str, Branch]:
        """name → branch of the layers that run sparse."""
        return {name: layer.branch for name, layer in self.layers.items() if layer.sparse}


def to_json(profile: Profile) -> dict[str, Any]:
    """`lynx.json` without the tensors, the files' hashes and the digest."""
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "model": {
            "class": profile.model.model,
            "structure": profile.model.structure,
            "weights": profile.model.weights,
        },
        "compensation": profile.compensation,
        "dense_steps": profile.dense_steps,
        "dense_last_steps": profile.dense_last_steps,
        "steps": profile.steps,
        "layers": {name: _layer_to_json(layer) for name, layer in profile.layers.items()},
        "studies": profile.studies,
        "provenance": profile.provenance,
    }


def _layer_to_json(layer: Layer) -> dict[str, Any]:
    branch = layer.branch
    return {
        "shape": list(layer.shape),
        "decision": "sparse" if layer.sparse else "dense",
        "reason": layer.reason,
        "rank": branch.rank,
        "shift": branch.shift is not None,
        "score": branch.score is not None,
        "deflate": branch.deflate,
        "dense_tokens": branch.dense_tokens,
        "tokens": layer.tokens,
        "error_before": layer.error_before,
        "error_after": layer.error_after,
        "sensitivity": layer.sensitivity,
    }


@dataclass(frozen=True)
class Described:
    """A layer as `lynx.json` describes it: the layer without tensors, and which tensors it must have."""

    layer: Layer
    rank: int
    shift: bool
    score: bool


def from_json(data: Any, file: str) -> tuple[Profile, dict[str, Described]]:
    """A profile without tensors, and what its tensors must be. Raises ProfileError naming the field."""
    top = _Fields(data, file, "")
    if top.get("format", str) != FORMAT:
        raise ProfileError(
            file, "format", f"is {data['format']!r}, not {FORMAT!r}", "this is not a Lynx profile"
        )
    schema = top.get("schema", int)
    if schema != SCHEMA:
        newer = schema > SCHEMA
        raise ProfileError(
            file,
            "schema",
            f"is {schema}, this version reads {SCHEMA}",
            "upgrade lynx-compile" if newer else "calibrate again with this version",
        )
    model = _Fields(top.get("model", dict), file, "model")
    layers = {
        name: _described(_Fields(value, file, f"layers.{name}"))
        for name, value in top.get("layers", dict).items()
    }
    profile = Profile(
        Fingerprint(model.get("class", str), model.get("structure", str), model.get("weights", str)),
        {name: described.layer for name, described in layers.items()},
        top.choice("compensation", COMPENSATIONS),
        top.count("dense_steps"),
        top.count("dense_last_steps"),
        top.count("steps", least=1),
        top.get("studies", dict),
        top.get("provenance", dict),
    )
    return profile, layers


def _described(fields: _Fields) -> Described:
    shape = fields.get("shape", list)
    if len(shape) != 2 or not all(type(size) is int and 0 < size < 1 << 31 for size in shape):
        raise fields.error("shape", f"is {shape!r}, not two sizes [N, K]")
    if fields.choice("decision", ("sparse", "dense")) == "sparse" and shape[1] % GROUP:
        raise fields.error("decision", f"is sparse, but K = {shape[1]} is no multiple of {GROUP}")
    sensitivity = _Fields(fields.get("sensitivity", dict), fields.file, f"{fields.path}.sensitivity")
    layer = Layer(
        (shape[0], shape[1]),
        fields.get("decision", str) == "sparse",
        fields.get("reason", str),
        Branch(dense_tokens=fields.tokens("dense_tokens"), deflate=fields.get("deflate", bool)),
        fields.count("tokens"),
        fields.number("error_before", optional=True),
        fields.number("error_after", optional=True),
        {name: sensitivity.number(name) or 0.0 for name in sensitivity.data},
    )
    rank = fields.count("rank")
    if rank > min(shape):
        raise fields.error("rank", f"is {rank}, above the layer's smaller size {min(shape)}")
    if layer.branch.deflate and not rank:
        raise fields.error("deflate", "is true, but there is no rank")
    return Described(layer, rank, fields.get("shift", bool), fields.get("score", bool))


class _Fields:
    """Typed access to a JSON object; every error names file, field and remedy."""

    def __init__(self, data: Any, file: str, path: str) -> None:
        if not isinstance(data, dict):
            raise ProfileError(
                file, path or "top level", f"is a {type(data).__name__}, not an object", DAMAGED
            )
        self.data, self.file, self.path = data, file, path

    def error(self, name: str, problem: str) -> ProfileError:
        return ProfileError(self.file, f"{self.path}.{name}" if self.path else name, problem, DAMAGED)

    def get(self, name: str, kind: type) -> Any:
        if name not in self.data:
            raise self.error(name, "is missing")
        value = self.data[name]
        if type(value) is not kind:
            raise self.error(name, f"is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.get(name, str)
        if value not in allowed:
            raise self.error(name, f"is {value!r}, not one of {', '.join(allowed)}")
        return value

    def count(self, name: str, least: int = 0) -> int:
        value = self.get(name, int)
        if not least <= value < 1 << 31:
            raise self.error(name, f"is {value}, not a count from {least} on")
        return value

    def tokens(self, name: str) -> int:
        """Leading tokens of a sample; below 0, its last."""
        value = self.get(name, int)
        if not -(1 << 31) < value < 1 << 31:
            raise self.error(name, f"is {value}, not a number of tokens")
        return value

    def number(self, name: str, optional: bool = False) -> float | None:
        if optional and self.data.get(name, 0) is None:
            return None
        value = self.data.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not -1e300 < value < 1e300:
            raise self.error(name, f"is {value!r}, not a finite number")
        return float(value)
