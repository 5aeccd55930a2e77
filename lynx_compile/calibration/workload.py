"""What a calibration runs: the model, driven batch by batch by its pipeline or by given inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..profile.components import transformer_of, transformers_of
from ..profile.steps import scheduled_step


class Workload(Protocol):
    """`run(i)` sends batch i through `model`, first denoising step to last, and returns the result.

    model: the transformer whose linear layers are calibrated. The result is the final sample (latents or
    pixels), (B, ...), and depends on nothing but i and the model: seeds belong to the batch. `identity` names
    the data, so that an interrupted calibration is resumed on the same data only.
    """

    model: nn.Module

    @property
    def identity(self) -> str: ...

    def __len__(self) -> int: ...

    def run(self, batch: int) -> Tensor: ...


class Inputs:
    """A module and the inputs it is called with: tensors, tuples of arguments or dicts of keywords."""

    def __init__(self, model: nn.Module, inputs: Iterable[Any]) -> None:
        self.model = model
        self.inputs = list(inputs)
        if not self.inputs:
            raise ValueError("calibration needs at least one input; the iterable of inputs is empty")

    @property
    def identity(self) -> str:
        digest = hashlib.sha256()
        for value in self.inputs:
            for tensor in _tensors(value):
                digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.detach().reshape(-1)[:64].double().cpu().numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.inputs)

    @torch.no_grad()
    def run(self, batch: int) -> Tensor:
        value = self.inputs[batch]
        if isinstance(value, Mapping):
            out = self.model(**value)
        elif isinstance(value, (tuple, list)):
            out = self.model(*value)
        else:
            out = self.model(value)
        return first_tensor(out)


class Pipeline:
    """A diffusers pipeline and the prompts it runs; one seed a prompt, so batches may be cut anywhere.

    call: further keyword arguments of the pipeline, such as guidance_scale, height or width.  component: of
    a pipeline with several transformers, as Wan 2.2's, the one to calibrate; all of them run.
    Raises ValueError when the pipeline has no transformer, or several and none is named, or without prompts.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        steps: int,
        batch_size: int = 1,
        seed: int = 0,
        call: Mapping[str, Any] | None = None,
        to_sample: Callable[[Any], Tensor] | None = None,
        component: str | None = None,
    ) -> None:
        named = transformers_of(pipe)
        if not named:
            raise ValueError(
                f"{type(pipe).__name__} has no transformer; pass the module and its inputs instead"
            )
        if not prompts:
            raise ValueError("calibration needs at least one prompt")
        transformer_of(pipe, component)  # refuses a component that is not there or has to be named
        self.model: nn.Module = getattr(pipe, component or next(iter(named)))
        self.component = component if len(named) > 1 else None
        self.pipe = pipe
        self.prompts = list(prompts)
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        self.call = dict(call or {})
        self.to_sample = to_sample or first_tensor

    @property
    def identity(self) -> str:
        what = (self.prompts, self.steps, self.batch_size, self.seed, sorted(self.call.items()))
        return hashlib.sha256(repr(what).encode()).hexdigest()

    def __len__(self) -> int:
        return -(-len(self.prompts) // self.batch_size)

    def step(self) -> tuple[int, int]:
        """The step the pipeline is at, and how many there are; ValueError if its scheduler is silent."""
        found = scheduled_step(self.pipe, self.steps)
        if found is None:
            raise ValueError(
                f"the scheduler of {type(self.pipe).__name__} has no step_index, which would tell the steps "
                f"that {self.component!r} makes; calibrate it without an aim"
            )
        return found

    @torch.no_grad()
    def run(self, batch: int) -> Tensor:
        start = batch * self.batch_size
        prompts = self.prompts[start : start + self.batch_size]
        generators = [torch.Generator().manual_seed(self.seed + start + i) for i in range(len(prompts))]
        out = self.pipe(
            prompts, num_inference_steps=self.steps, generator=generators, output_type="latent", **self.call
        )
        return self.to_sample(out)


def first_tensor(value: Any) -> Tensor:
    """The first tensor in a module's or pipeline's output. Raises TypeError when it holds none."""
    for tensor in _tensors(value):
        return tensor
    raise TypeError(f"no tensor in an output of type {type(value).__name__}")


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
