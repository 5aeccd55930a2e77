"""Prepare a model with a profile, and undo it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .branch import Branch
from .components import models_of, transformer_of
from .errors import ProfileError
from .fingerprint import fingerprint, linear_layers
from .format import Profile
from .io import JSON, load_profile
from .steps import StepSwitch, StepTracker

_STATE = "_lynx_profile"


def apply_profile(
    target: Any,
    profile: Profile | str | Path,
    *,
    component: str | None = None,
    check_weights: bool = True,
) -> Profile:
    """Attach a profile to a transformer or a pipeline's; `torch.compile(…, backend="rt_lynx")` picks it up.

    profile: as loaded, a folder, or a hub id ("user/name"). Layers the profile keeps dense are marked so;
    where nothing was chosen the backend's safe defaults decide. With dense first or last steps a hook on the
    transformer follows the schedule (give the pipeline rather than its transformer: then the hook reads the
    scheduler and needs no device synchronisation). A profile applied before is removed. component: which
    transformer of a pipeline with several, by default the one that the profile says. check_weights=False
    accepts a finetune of the calibrated model: same layers, other weights.

    Raises TypeError for what is no profile, ValueError where the component is not there or has to be named,
    ProfileError when the profile was made for another model or does not load.
    """
    from ..layers import attach

    models_of(target)  # refuses what is neither module nor pipeline
    if not isinstance(profile, (Profile, str, Path)):
        raise TypeError(
            f"a profile is a Profile, a folder or a hub id, not {profile!r}; "
            "remove_profile takes one off a model"
        )
    if not isinstance(profile, Profile):
        profile = load_profile(_folder(profile))
    model = transformer_of(target, _component(target, profile, component))
    check_fits(model, profile, check_weights=check_weights)
    remove_profile(model)
    linears = linear_layers(model)
    switch = StepSwitch() if profile.dense_steps or profile.dense_last_steps else None
    shared = _Shared()
    for name, layer in profile.layers.items():
        module = linears[name]
        branch = layer.branch
        attach(
            module,
            down=shared(branch.down) if layer.sparse else None,
            up=_up(branch, module) if layer.sparse else None,
            shift=shared(branch.shift) if layer.sparse else None,
            score=shared(branch.score) if layer.sparse else None,
            dense_tokens=branch.dense_tokens if layer.sparse else 0,
            deflated=branch.deflated if layer.sparse else 0,
            switch=switch if layer.sparse else None,
            decision=layer.decision,
            reason=f"profile: {layer.reason}",
        )
    handle = None
    if switch is not None:
        pipe = target if target is not model and hasattr(target, "scheduler") else None
        ends = profile.dense_steps, profile.dense_last_steps
        tracker = StepTracker(switch, *ends, profile.steps, pipe)
        handle = model.register_forward_pre_hook(tracker, with_kwargs=True)
    model.__dict__[_STATE] = (list(profile.layers), handle)
    return profile


def remove_profile(target: Any) -> None:
    """Undo `apply_profile` on a model or all of a pipeline's; one without a profile is left as it is."""
    from ..layers import detach

    for model in models_of(target):
        names, handle = model.__dict__.pop(_STATE, ((), None))
        if handle is not None:
            handle.remove()
        linears = linear_layers(model)
        for name in names:
            detach(linears[name])


def _component(target: Any, profile: Profile, given: str | None) -> str | None:
    """Which transformer a profile is for: of a pipeline with several, calibration wrote it down."""
    made_for = profile.provenance.get("component")
    if made_for is None:
        return given
    if isinstance(target, nn.Module):
        if profile.dense_steps or profile.dense_last_steps:
            raise ValueError(
                f"the profile's dense steps count those of a whole run, of which {made_for!r} makes a part: "
                f"apply it to the pipeline, or set dense_steps and dense_last_steps to 0"
            )
        return given
    if given not in (None, made_for):
        raise ProfileError(
            JSON,
            "provenance.component",
            f"is {made_for!r}, not {given!r}",
            f"apply it with component={made_for!r}, or calibrate {given!r}",
        )
    return str(made_for)


def _up(branch: Branch, module: nn.Linear) -> Tensor | None:
    """B as the layer runs it: under deflation with W·Aᵀ, of A as it is rounded there."""
    weight = module.weight.detach()
    return None if branch.down is None else branch.to(weight.device, weight.dtype).carrying(weight)


def check_fits(model: nn.Module, profile: Profile, *, check_weights: bool = True) -> None:
    """Raise ProfileError unless the profile was made for this model."""
    linears = linear_layers(model)
    for name, layer in profile.layers.items():
        if name not in linears:
            raise ProfileError(
                JSON,
                f"layers.{name}",
                f"{type(model).__name__} has no such linear layer",
                f"this profile was made for another model ({profile.model.model}); calibrate this one",
            )
        module = linears[name]
        if layer.shape != (module.out_features, module.in_features):
            raise ProfileError(
                JSON,
                f"layers.{name}.shape",
                f"is {list(layer.shape)}, the model's layer is {[module.out_features, module.in_features]}",
                f"this profile was made for another size of {profile.model.model}; calibrate this model",
            )
    found = fingerprint(model)
    if found.structure != profile.model.structure:
        raise ProfileError(
            JSON,
            "model.structure",
            f"the model's linear layers are not those of the calibrated {profile.model.model}",
            "calibrate this model",
        )
    if check_weights and found.weights != profile.model.weights:
        raise ProfileError(
            JSON,
            "model.weights",
            "the model has other weights than the calibrated one",
            "calibrate these weights, or pass check_weights=False for a finetune of the calibrated model",
        )


class _Shared:
    """One tensor for equal ones: layers that read one X share its sparsify if they hold one's data."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Tensor] = {}
        self._seen: dict[int, Tensor] = {}  # by id, of tensors that `_known` or the profile keep alive

    def __call__(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in self._seen:
            content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
            key = tuple(tensor.shape), tensor.dtype, hashlib.sha256(content).digest()
            self._seen[id(tensor)] = self._known.setdefault(key, tensor)
        return self._seen[id(tensor)]


def _folder(profile: str | Path) -> Path:
    path = Path(profile)
    if path.is_dir() or isinstance(profile, Path) or str(profile).count("/") != 1:
        return path
    from .hub import pull

    return pull(str(profile))
