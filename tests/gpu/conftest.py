"""What the GPU tests share. They run with `make test-gpu`; elsewhere they are skipped."""

import pytest
import torch

from lynx_compile.runtime import layout, semantics


def pytest_collection_modifyitems(items):
    """No GPU, no GPU tests."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Fresh memory holds NaN and the largest integers, so that an element nobody wrote shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Operands:
    """Random normal operands of `sparse_linear` for X (m, k) and W (n, k), and the exact result."""

    def __init__(self, m, n, k, *, dtype=torch.bfloat16, rank=0, bias=False, activation="none", samples=0,
                 residual=False, seed=0, edit=lambda x: None):  # fmt: skip
        self.generator = torch.Generator("cuda").manual_seed(seed)
        self.dtype, self.activation = dtype, activation
        self.x = self.normal(m, k)
        edit(self.x)
        down = self.normal(rank, k, scale=k**-0.5) if rank else None
        self.pruned, keep, self.scale, self.t = semantics.sparsify(self.x, lora_down=down)
        self.values, self.metadata = layout.pack(self.pruned, keep)
        self.weight = self.normal(n, k, scale=k**-0.5)
        self.lora_up = self.normal(n, rank, scale=rank**-0.5) if rank else None
        self.bias = self.normal(n) if bias else None
        self.gate = self.normal(samples, n) if samples else None
        self.residual = self.normal(m, n) if residual else None

    def normal(self, *shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=self.generator, device="cuda")).to(self.dtype)

    def inputs(self):
        return self.values, self.metadata, self.scale, self.t, self.weight

    def options(self):
        return {
            "lora_up": self.lora_up,
            "bias": self.bias,
            "activation": self.activation,
            "gate": self.gate,
            "residual": self.residual,
        }

    def exact(self):
        """y in fp64, not rounded."""
        optional = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in self.options().items()}
        return semantics.sparse_linear(
            self.pruned.double(), self.scale.double(), self.t.double(), self.weight.double(), **optional
        )

    def magnitude(self):
        """Sum of the absolute products behind each element of y: the scale of accumulation errors."""
        size = self.scale.double()[:, None] * (self.pruned.double().abs() @ self.weight.double().abs().T)
        if self.lora_up is not None:
            size = size + self.t.double().abs() @ self.lora_up.double().abs().T
        if self.bias is not None:
            size = size + self.bias.double().abs()
        if self.gate is not None:
            size = size * self.gate.double().abs().repeat_interleave(len(size) // len(self.gate), 0)
        if self.residual is not None:
            size = size + self.residual.double().abs()
        return size


def assert_rounded(y, operands, accumulation=3e-6):
    """y is the exact result within one rounding to its dtype, plus fp32 accumulation error."""
    exact = operands.exact()
    bound = torch.finfo(y.dtype).eps / 2 * exact.abs() + accumulation * operands.magnitude()
    bound += torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps
    error = (y.double() - exact).abs()
    worst = (error / bound).argmax().item()
    assert (error <= bound).all(), (
        f"element {divmod(worst, y.shape[1])} is {y.flatten()[worst]} instead of {exact.flatten()[worst]}, "
        f"off by {(error / bound).max():.2f} times the bound"
    )
