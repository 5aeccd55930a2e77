"""What a profile must not be loaded with or applied to, beyond what its hashes tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lynx_compile.profile import (
    Branch,
    Layer,
    Profile,
    ProfileError,
    apply_profile,
    fingerprint,
    save_profile,
    seal,
)


def model(layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))


def profile(of: nn.Module) -> Profile:
    branch = Branch(down=torch.ones(4, 64), up=torch.ones(64, 4), shift=torch.ones(64))
    return Profile(fingerprint(of), {"0": Layer((64, 64), True, "", branch)})


def test_a_model_with_more_layers_is_refused_also_as_a_finetune() -> None:
    apply_profile(model(2), profile(model(2)), check_weights=False)
    with pytest.raises(ProfileError, match=r"model\.structure: the model's linear layers are not those"):
        apply_profile(model(3), profile(model(2)), check_weights=False)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "lynx_vectors.safetensors"])
def test_tensors_of_no_layer_are_not_sealed(tmp_path: Path, file: str) -> None:
    save_profile(profile(model(2)), tmp_path)
    seal(tmp_path)
    save_file({**load_file(tmp_path / file), "base_model.model.7.extra": torch.ones(2)}, tmp_path / file)
    with pytest.raises(ProfileError, match=rf"{file}: base_model\.model\.7\.extra: belongs to no layer"):
        seal(tmp_path)
