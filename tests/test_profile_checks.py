"""What a profile must not be loaded with or applied to, beyond what its hashes tell."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.parametrize(("given", "of", "steps", "dense"), [(1, 20, 4, 1), (3, 20, 10, 2), (2, 4, 8, 4)])
def test_another_number_of_steps_rounds_the_dense_ones_up(
    given: int, of: int, steps: int, dense: int
) -> None:
    class Pipe:
        transformer = model(2)
        scheduler = SimpleNamespace(step_index=None, begin_index=None, num_inference_steps=steps)

    pipe, made = Pipe(), profile(Pipe.transformer)
    made.dense_steps, made.steps = given, of
    apply_profile(pipe, made)
    found = []
    for step in range(steps):
        pipe.scheduler.step_index = step or None  # diffusers sets it in the first call of step()
        pipe.transformer(torch.zeros(1, 64))
        found.append(pipe.transformer[0].lynx_switch.dense)
    assert found == [True] * dense + [False] * (steps - dense)
