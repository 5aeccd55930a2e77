"""The Hopper GEMM, its launch parameters included, against `semantics.sparse_linear` without a GPU."""

import shutil

import pytest
import torch

from lynx_compile.runtime import gemm_sm90, layout, semantics

from .emulator import Emulator, tensor_map

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the emulator")

WIDE, TALL, THREE, ALONG_N = (
    gemm_sm90.Tile(2, 2, 192, 2, 1),
    gemm_sm90.Tile(2, 1, 256, 2, 1),
    gemm_sm90.Tile(3, 1, 192, 2, 1),
    gemm_sm90.Tile(2, 1, 128, 1, 2),
)
GUARD = 32  # poisoned rows in front of and behind y


@pytest.fixture(autouse=True)
def small_device(monkeypatch):
    """Four multiprocessors, so that a block computes several tiles."""
    monkeypatch.setattr(gemm_sm90, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(gemm_sm90, "tensor_map", tensor_map)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulator")


class Case:
    """Random operands of one call, bf16. bias, samples: rows of the bias and of the gate; 0 for none."""

    def __init__(self, m, n, k, rank=0, bias=1, activation="none", samples=0, residual=False):
        self.generator = torch.Generator().manual_seed(m)
        self.m, self.n, self.activation = m, n, activation
        x = self.normal(m, k)
        keep = semantics.keep_mask(x.float().abs())
        self.pruned = torch.where(keep, x, torch.zeros_like(x))
        self.values, self.metadata = layout.pack(self.pruned, keep)
        self.scale = 0.5 + torch.rand(m, generator=self.generator)
        self.t = self.normal(m, rank + 32)[:, 16 : 16 + rank]
        self.weight = self.normal(n, k, scale=k**-0.5)
        self.options = {
            "lora_up": self.normal(n, rank, scale=rank**-0.5) if rank else None,
            "bias": self.normal(bias, n) if bias else None,
            "gate": self.normal(samples, n) if samples else None,
            "residual": self.normal(m, n) if residual else None,
        }

    def normal(self, *shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=self.generator)).bfloat16()

    def exact(self, change, activation):
        operands = (self.pruned, self.scale, self.t, self.weight)
        options = {name: None if x is None else change(x) for name, x in self.options.items()}
        return semantics.sparse_linear(*map(change, operands), **options, activation=activation)

    def check(self, emulator, tile):
        """All of y within one rounding of the exact result, and nothing around it written."""
        options = {**self.options, "activation": self.activation, "tile": tile}
        call = gemm_sm90.prepare(self.values, self.metadata, self.scale, self.t, self.weight, **options)
        whole = torch.full((self.m + 2 * GUARD, self.n), torch.nan, dtype=torch.bfloat16)
        y = whole[GUARD:-GUARD]
        emulator.run(call, [y], seed=self.m)
        exact = self.exact(torch.Tensor.double, self.activation)
        magnitude = self.exact(lambda x: x.double().abs(), "none")
        assert ((y.double() - exact).abs() <= 0.00392 * exact.abs() + 1e-5 * magnitude + 1e-37).all()
        assert whole.isnan().sum() == whole.numel() - y.numel()


@pytest.mark.parametrize("tile", [WIDE, THREE], ids=str)
def test_several_tiles_a_block(folder, tile):
    """Rows that fill more than one cluster, columns past the end, a LoRA step that is half empty."""
    Case(700, 592, 192, rank=80).check(Emulator(folder), tile)


@pytest.mark.parametrize(("rows", "samples"), [(64, 2), (33, 4)])
@pytest.mark.parametrize("tile", [TALL, ALONG_N], ids=str)
def test_gate_residual_and_samples(folder, tile, rows, samples):
    """Samples that end where a block of rows does, and inside one."""
    case = Case(4 * rows, 272, 128, rank=16, bias=4, activation="gelu", samples=samples, residual=True)
    case.check(Emulator(folder), tile)


def test_a_slot_given_up_too_early_shows(folder):
    late = "        wgmma::wait<1>();\n        if (k > 0) release_previous();\n"
    early = "        if (k > 0) release_previous();\n        wgmma::wait<1>();\n"

    def edit(source):
        assert late in source
        return source.replace(late, early)

    with pytest.raises(AssertionError):
        Case(300, 304, 640).check(Emulator(folder, edit), TALL)


def test_an_arrival_that_is_missing_shows(folder):
    def edit(source):
        assert "if (r > 0) release_previous();" in source
        return source.replace("if (r > 0) release_previous();", "")

    with pytest.raises(RuntimeError, match="deadlock"):
        Case(300, 304, 320, rank=256).check(Emulator(folder, edit), TALL)
