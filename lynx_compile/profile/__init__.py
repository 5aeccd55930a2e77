"""Profiles: what calibration writes and a model is prepared with. Format: `docs/profiles.md`."""

from .apply import apply_profile, remove_profile
from .branch import Branch
from .errors import ProfileError
from .fingerprint import Fingerprint, fingerprint
from .format import SCHEMA, Layer, Profile
from .io import load_profile, save_profile, seal
from .merge import diff, merge
from .steps import StepSwitch

__all__ = [
    "SCHEMA",
    "Branch",
    "Fingerprint",
    "Layer",
    "Profile",
    "ProfileError",
    "StepSwitch",
    "apply_profile",
    "diff",
    "fingerprint",
    "load_profile",
    "merge",
    "remove_profile",
    "save_profile",
    "seal",
]
