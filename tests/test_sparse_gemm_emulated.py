"""The Hopper GEMM, its launch parameters included, against `semantics.sparse_linear` without a GPU."""

import shutil

import pytest
import torch

from lynx_compile.runtime import gemm_sm90, layout, operands, semantics

from .emulator import Emulator, tensor_map

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the emulator")

WIDE, TALL, THREE, ALONG_N = (
    gemm_sm90.Tile(2, 2, 192, 2, 1),
    gemm_sm90.Tile(2, 1, 256, 2, 1),
    gemm_sm90.Tile(3, 1, 192, 2, 1),
    gemm_sm90.Tile(2, 1, 128, 1, 2),
)
SPLIT = [
    gemm_sm90.Tile(2, 2, 192, 1, 1, 2),
    gemm_sm90.Tile(2, 1, 192, 1, 1, 2),
    gemm_sm90.Tile(2, 1, 128, 1, 1, 4),
]
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
    """Random operands of the layers of one X, bf16.

    layers: (N, rank, rows of the bias, activation, rows of the gate, whether a residual is added) of each.
    """

    def __init__(self, m, k, layers, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.m = m
        x = self.normal(m, k)
        keep = semantics.keep_mask(x.float().abs())
        self.pruned = torch.where(keep, x, torch.zeros_like(x))
        self.x = *layout.pack(self.pruned, keep), 0.5 + torch.rand(m, generator=self.generator)
        self.layers = [
            operands.Layer(
                self.normal(m, rank + 32)[:, 16 : 16 + rank],
                self.normal(n, k, scale=k**-0.5),
                self.normal(n, rank, scale=rank**-0.5) if rank else None,
                self.normal(bias, n) if bias else None,
                activation,
                self.normal(gate, n) if gate else None,
                self.normal(m, n) if residual else None,
            )
            for n, rank, bias, activation, gate, residual in layers
        ]

    def normal(self, *shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=self.generator)).bfloat16()

    def exact(self, layer, change=torch.Tensor.double):
        t, weight, *rest = layer
        up, bias, activation, gate, residual = (change(v) if torch.is_tensor(v) else v for v in rest)
        return semantics.sparse_linear(
            change(self.pruned), change(self.x[2]), change(t), change(weight),
            lora_up=up, bias=bias, activation=activation, gate=gate, residual=residual,
        )  # fmt: skip

    def check(self, emulator, tile, beside=0):
        """All of y within one rounding of the exact result, and nothing beside it written."""
        widths = [layer.weight.shape[0] for layer in self.layers]
        stride = widths[0] + beside if beside else 0
        call = gemm_sm90.prepare_all(*self.x, self.layers, tile=tile, y_stride=stride)
        whole = [
            torch.full((self.m + 2 * GUARD, stride or n), torch.nan, dtype=torch.bfloat16) for n in widths
        ]
        emulator.run(call, [y[GUARD:] for y in whole], seed=self.m)
        for n, y, layer in zip(widths, whole, self.layers, strict=True):
            own = y[GUARD:-GUARD, :n]
            exact, magnitude = self.exact(layer), self.exact(layer, lambda v: v.double().abs())
            error = (own.double() - exact).abs()
            assert (error <= 0.00392 * exact.abs() + 1e-5 * magnitude + 1e-37).all()
            assert y.isnan().sum() == y.numel() - own.numel()
        return len(call.launches)


@pytest.mark.parametrize("tile", [WIDE, THREE], ids=str)
def test_layers_of_one_launch(folder, tile):
    """Several widths, ranks and biases; rows that fill more than one cluster, and columns past the end."""
    layers = [
        (400, 64, 1, "none", 0, False),
        (208, 0, 0, "none", 0, False),
        (16, 80, 1, "none", 0, False),
    ]
    assert Case(520, 192, layers).check(Emulator(folder), tile) == 1


def test_every_second_tile_walks_k_backwards(folder):
    Case(300, 320, [(1040, 16, 1, "none", 0, False)]).check(Emulator(folder), TALL, beside=64)


@pytest.mark.parametrize("rows", [64, 33])
@pytest.mark.parametrize("tile", [TALL, ALONG_N], ids=str)
def test_gate_residual_and_samples(folder, tile, rows):
    """Samples that end where a block of rows does, and inside one."""
    layers = [(272, 16, 4, "gelu", 2, True)]
    Case(4 * rows, 128, layers, seed=rows).check(Emulator(folder), tile)


@pytest.mark.parametrize("tile", SPLIT, ids=str)
@pytest.mark.parametrize("rank", [0, 16, 80])
def test_parts_of_k_add_up(folder, tile, rank):
    """Parts of unequal length, fewer steps of the branch than parts, more layers than one."""
    layers = [(208, rank, 1, "gelu", 0, False), (48, 0, 1, "gelu", 0, False)]
    Case(130, 64 * (2 * tile.split + 1), layers).check(Emulator(folder), tile)


def test_parts_of_k_with_gate_residual_and_samples(folder):
    layers = [(208, 16, 4, "gelu", 2, True)]
    Case(4 * 33, 320, layers).check(Emulator(folder), SPLIT[2], beside=32)


def test_a_part_of_k_must_not_be_empty():
    with pytest.raises(ValueError, match="cannot split K = 192: each part needs 64 columns"):
        Case(130, 192, [(208, 0, 1, "none", 0, False)]).check(None, SPLIT[2])


def test_partial_sums_sent_before_the_ring_is_empty_show(folder):
    def edit(source):
        first = "ptx::cluster_sync();  // nothing is left in any ring"
        assert first in source
        both = "ptx::cluster_sync(), ptx::cluster_sync();  // both of `exchange`"
        assert both in source
        return source.replace(first, "").replace(both, "ptx::cluster_sync();")

    with pytest.raises((AssertionError, RuntimeError)):
        Case(130, 64 * 13, [(208, 0, 1, "none", 0, False)]).check(Emulator(folder, edit), SPLIT[1])


def test_a_slot_given_up_too_early_shows(folder):
    late = "        wgmma::wait<1>();\n        if (k > 0) release_previous();\n"
    early = "        if (k > 0) release_previous();\n        wgmma::wait<1>();\n"

    def edit(source):
        assert late in source
        return source.replace(late, early)

    with pytest.raises(AssertionError):
        Case(300, 640, [(304, 0, 0, "none", 0, False)]).check(Emulator(folder, edit), TALL)


def test_an_arrival_that_is_missing_shows(folder):
    def edit(source):
        return source.replace("if (r > 0) release_previous();", "")

    with pytest.raises(RuntimeError, match="deadlock"):
        Case(300, 320, [(304, 256, 0, "none", 0, False)]).check(Emulator(folder, edit), TALL)
