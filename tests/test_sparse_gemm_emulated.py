"""The Hopper GEMM, its launch parameters included, against `semantics.sparse_linear` without a GPU."""

import shutil

import pytest
import torch

from lynx_compile.runtime import gemm_sm90, layout, operands, semantics

from .emulation import Emulator, install
from .stand_in import forget

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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("gemm"))


@pytest.fixture
def device(monkeypatch):
    """A function that puts an emulator in place of the driver.

    It has so few multiprocessors that a block computes several tiles, and copies land late.
    """

    def put(emulator):
        emulator.seed, emulator.late = 1, True
        install(monkeypatch, emulator, multiprocessors=4)

    yield put
    forget()


@pytest.fixture
def whole(device, compiled):
    """The kernels as they are."""
    device(compiled)


class Case:
    """Random operands of the layers of one X.

    layers: (N, rank, rows of the bias, activation, rows of the gate, whether a residual is added) of each.
    """

    def __init__(self, m, k, layers, seed=0, dtype=torch.bfloat16):
        self.generator = torch.Generator().manual_seed(seed)
        self.m, self.dtype = m, dtype
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
        return (scale * torch.randn(*shape, generator=self.generator)).to(self.dtype)

    def exact(self, layer, change=torch.Tensor.double):
        t, weight, *rest = layer
        up, bias, activation, gate, residual = (change(v) if torch.is_tensor(v) else v for v in rest)
        return semantics.sparse_linear(
            change(self.pruned), change(self.x[2]), change(t), change(weight),
            lora_up=up, bias=bias, activation=activation, gate=gate, residual=residual,
        )  # fmt: skip

    def check(self, tile, beside=0):
        """All of y within one rounding of the exact result, and nothing beside it written."""
        widths = [layer.weight.shape[0] for layer in self.layers]
        stride = widths[0] + beside if beside else 0
        call = gemm_sm90.prepare_all(*self.x, self.layers, tile=tile, y_stride=stride)
        whole = [torch.full((self.m + 2 * GUARD, stride or n), torch.nan, dtype=self.dtype) for n in widths]
        for kernel, grid, packed, encode in call.launches:
            kernel.launch(-1, grid, packed, encode(*[y[GUARD:].data_ptr() for y in whole]))
        for n, y, layer in zip(widths, whole, self.layers, strict=True):
            own = y[GUARD:-GUARD, :n]
            exact, magnitude = self.exact(layer), self.exact(layer, lambda v: v.double().abs())
            error = (own.double() - exact).abs()
            rounding = 1.004 * torch.finfo(self.dtype).eps / 2 * exact.abs() + torch.finfo(self.dtype).tiny
            assert (error <= rounding + 1e-5 * magnitude).all()
            assert y.isnan().sum() == y.numel() - own.numel()
        return len(call.launches)


@pytest.mark.parametrize("tile", [WIDE, THREE], ids=str)
def test_layers_of_one_launch(whole, tile):
    """Several widths, ranks and biases; rows that fill more than one cluster, and columns past the end."""
    layers = [
        (400, 64, 1, "none", 0, False),
        (208, 0, 0, "none", 0, False),
        (16, 80, 1, "none", 0, False),
    ]
    assert Case(520, 192, layers).check(tile) == 1


def test_every_second_tile_walks_k_backwards(whole):
    Case(300, 320, [(1040, 16, 1, "none", 0, False)]).check(TALL, beside=64)


def test_fp16(whole):
    layers = [(208, 16, 1, "gelu_tanh", 1, True)]
    Case(130, 320, layers, dtype=torch.float16).check(ALONG_N)


@pytest.mark.parametrize("rows", [64, 33])
@pytest.mark.parametrize("tile", [TALL, ALONG_N], ids=str)
def test_gate_residual_and_samples(whole, tile, rows):
    """Samples that end where a block of rows does, and inside one."""
    layers = [(272, 16, 4, "gelu", 2, True)]
    Case(4 * rows, 128, layers, seed=rows).check(tile)


@pytest.mark.parametrize("tile", SPLIT, ids=str)
@pytest.mark.parametrize("rank", [0, 16, 80])
def test_parts_of_k_add_up(whole, tile, rank):
    """Parts of unequal length, fewer steps of the branch than parts, more layers than one."""
    layers = [(208, rank, 1, "gelu", 0, False), (48, 0, 1, "gelu", 0, False)]
    Case(130, 64 * (2 * tile.split + 1), layers).check(tile)


def test_parts_of_k_with_gate_residual_and_samples(whole):
    layers = [(208, 16, 4, "gelu", 2, True)]
    Case(4 * 33, 320, layers).check(SPLIT[2], beside=32)


def test_a_part_of_k_must_not_be_empty(whole):
    with pytest.raises(ValueError, match="cannot split K = 192: each part needs 64 columns"):
        Case(130, 192, [(208, 0, 1, "none", 0, False)]).check(SPLIT[2])


def test_partial_sums_sent_before_the_ring_is_empty_show(device, tmp_path):
    def edit(source):
        first = "ptx::cluster_sync();  // nothing is left in any ring"
        assert first in source
        both = "ptx::cluster_sync(), ptx::cluster_sync();  // both of `exchange`"
        assert both in source
        return source.replace(first, "").replace(both, "ptx::cluster_sync();")

    device(Emulator(tmp_path, edit))
    with pytest.raises((AssertionError, RuntimeError)):
        Case(130, 64 * 13, [(208, 0, 1, "none", 0, False)]).check(SPLIT[1])


def test_a_slot_given_up_too_early_shows(device, tmp_path):
    late = "        wgmma::wait<1>();\n        if (k > 0) release_previous();\n"
    early = "        if (k > 0) release_previous();\n        wgmma::wait<1>();\n"

    def edit(source):
        assert late in source
        return source.replace(late, early)

    device(Emulator(tmp_path, edit))
    with pytest.raises(AssertionError):
        Case(300, 640, [(304, 0, 0, "none", 0, False)]).check(TALL)


def test_an_arrival_that_is_missing_shows(device, tmp_path):
    def edit(source):
        return source.replace("if (r > 0) release_previous();", "")

    device(Emulator(tmp_path, edit))
    with pytest.raises(RuntimeError, match="deadlock"):
        Case(300, 320, [(304, 256, 0, "none", 0, False)]).check(TALL)
