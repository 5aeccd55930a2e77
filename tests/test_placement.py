"""Where a layer's part of a larger matrix is written, with a GEMM in PyTorch that writes to addresses."""

import ctypes
import struct
from types import SimpleNamespace

import pytest
import torch

from lynx_compile.runtime import kernels, ops, placement, semantics
from lynx_compile.runtime.calls import Call, Launch, pointers
from lynx_compile.runtime.operands import Layer

from . import stand_in

K = 128


class Gemm:
    """Stands for a kernel: computes y of each layer and writes its rows `stride` elements apart."""

    def __init__(self, compressed, layers, stride):
        self.compressed, self.layers, self.stride = compressed, layers, stride

    def launch(self, device, grid, packed, outputs):
        addresses = struct.unpack(f"={len(self.layers)}Q", outputs)
        for layer, address in zip(self.layers, addresses, strict=True):
            y = ops._sparse_linear_reference(*self.compressed, *layer)
            step = (self.stride or y.shape[1]) * y.element_size()
            for i, row in enumerate(y):
                ctypes.memmove(address + i * step, row.data_ptr(), row.nbytes)


def prepare_all(values, metadata, scale, layers, *, y_stride=0):
    launch = Launch(Gemm((values, metadata, scale), layers, y_stride), (1, 1, 1), b"", pointers(len(layers)))
    outputs = [((values.shape[0], layer.weight.shape[0]), values.dtype) for layer in layers]
    return Call(-1, outputs, [launch])


def together(arguments, besides, sides):
    """The wholes of layers as the call's launches and `fill` write them; None where there is no call."""
    compressed, layers = arguments[0][:3], [Layer(*one[3:]) for one in arguments]
    tails = [tail for layer in layers for tail in (layer.gate, layer.residual)]
    if not placement.possible(compressed[0].shape[0], besides, sides, tails):
        return None
    call = placement.prepare(prepare_all, compressed, layers, besides, sides)
    if call is None:
        return None
    wholes = [torch.full(shape, torch.nan, dtype=dtype) for shape, _, dtype in call.outputs]
    for launch in call.launches:
        addresses = [whole.data_ptr() for whole in wholes]
        launch.kernel.launch(0, launch.grid, launch.packed, launch.outputs(*addresses))
    return [placement.fill(*one) for one in zip(wholes, besides, sides, strict=True)]


def placed(layer, **beside):
    """The whole of one layer; None where there is no call."""
    ((side, part),) = beside.items()
    wholes = together([layer], [part], [side])
    return None if wholes is None else wholes[0]


def layer(m, n, rank=16, samples=1, **tail):
    generator = torch.Generator().manual_seed(m * n)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    s = ops.sparsify("identity", [normal(m, K)], lora_down=normal(2 * rank, K) if rank else None)
    t = s[3][:, :rank]
    up = normal(n, rank) if rank else None
    bias = normal(samples, n) if samples > 1 else normal(n)
    gate, residual = (normal(1, n), normal(m, n)) if tail else (None, None)
    return *s[:3], t, normal(n, K), up, bias, "gelu", gate, residual


def expected(layer, **beside):
    return ops._sparse_linear_reference(*layer, **beside)


@pytest.mark.parametrize("m", [1, 64, 77])
@pytest.mark.parametrize("width", [8, 200])
@pytest.mark.parametrize("tail", [{}, {"gate": True}])
def test_beside(m, width, tail):
    arguments, left = layer(m, 48, **tail), torch.randn(1, m, width)
    assert torch.equal(placed(arguments, left=left), expected(arguments, left=left))


def test_a_width_that_no_store_fits_has_no_call():
    assert placed(layer(64, 48), left=torch.randn(64, 6)) is None


@pytest.mark.parametrize(
    ("samples", "rows", "others"), [(1, 77, 5), (1, 64, 0), (2, 64, 3), (3, 128, 64), (2, 64, 0)]
)
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("own_bias", [False, True])
@pytest.mark.parametrize("side", ["top", "bottom"])
def test_below_and_above(samples, rows, others, rank, own_bias, side):
    arguments = layer(samples * rows, 48, rank, samples if own_bias else 1)
    beside = {side: torch.randn(samples, others, 48)}
    torch.testing.assert_close(placed(arguments, **beside), expected(arguments, **beside))


@pytest.mark.parametrize(
    "arguments", [layer(2 * 70, 48), layer(128, 48, gate=True), layer(256, 48, samples=4)]
)
@pytest.mark.parametrize("side", ["top", "bottom"])
def test_what_cannot_be_below_or_above_has_no_call(arguments, side):
    """Samples that end inside a block of metadata; a gate or a residual, whose rows would have to move; a
    bias of other samples."""
    assert placed(arguments, **{side: torch.randn(2, 4, 48)}) is None


@pytest.mark.parametrize(("samples", "rows"), [(1, 77), (2, 64), (3, 128)])
@pytest.mark.parametrize("own_bias", [False, True])
def test_layers_with_other_rows_on_either_side_or_none(samples, rows, own_bias):
    """One call for each sample, whatever each layer has around it, with a t and a width of its own."""
    m, count = samples * rows, samples if own_bias else 1
    first = layer(m, 48, samples=count)
    others = [
        (*first[:3], *layer(m, n, rank, samples=count)[3:]) for n, rank in ((32, 0), (48, 16), (16, 16))
    ]
    arguments, sides = [first, *others], ["top", "bottom", "", "top"]
    besides = [torch.randn(samples, 5, 48), torch.randn(samples, 0, 32), None, torch.randn(samples, 9, 16)]
    got = together(arguments, besides, sides)
    want = [
        expected(one, **({side: beside} if side else {}))
        for one, beside, side in zip(arguments, besides, sides, strict=True)
    ]
    for y, by_itself in zip(got, want, strict=True):
        torch.testing.assert_close(y, by_itself)
    calls = zip(*[one[3:] for one in arguments], strict=True)
    for y, by_op in zip(got, ops._sparse_linears(*first[:3], *calls, besides, sides), strict=True):
        torch.testing.assert_close(y, by_op)


def test_layers_that_cannot_share_a_call():
    one, two = layer(128, 48), layer(128, 48)
    rows = [torch.randn(samples, 4, 48) for samples in (1, 2)]
    assert together([one, two], rows, ["top", "top"]) is None  # of other samples
    assert together([one, two], [torch.randn(128, 8), None], ["left", ""]) is None
    assert together([layer(128, 48, gate=True), two], [None, rows[0]], ["", "top"]) is None
    for y, want in zip(together([one, two], [None, None], ["", ""]), (one, two), strict=True):
        torch.testing.assert_close(y, expected(want))


def test_the_reference_is_a_concatenation():
    arguments = layer(128, 48)
    y = semantics.sparse_linear(
        ops.layout.unpack(*arguments[:2]), *arguments[2:5], lora_up=arguments[5], bias=arguments[6],
        activation="gelu",
    )  # fmt: skip
    left, top = torch.randn(2, 64, 24), torch.randn(2, 3, 48)
    assert torch.equal(expected(arguments, left=left), torch.cat([left.reshape(128, 24), y], 1))
    whole = torch.cat([top, y.reshape(2, 64, 48)], 1)
    assert torch.equal(expected(arguments, top=top), whole.reshape(-1, 48))
    whole = torch.cat([y.reshape(2, 64, 48), top], 1)
    assert torch.equal(expected(arguments, bottom=top), whole.reshape(-1, 48))


@pytest.mark.parametrize(
    ("beside", "error", "words"),
    [
        ({"left": torch.zeros(96, 8)}, TypeError, "left is torch.float32, expected torch.bfloat16; cast it"),
        ({"top": torch.zeros(2, 3, 32)}, TypeError, "top is torch.float32"),
        ({"left": torch.zeros(95, 8).bfloat16()}, ValueError, r"left has shape \(95, 8\); expected M = 96"),
        ({"top": torch.zeros(2, 3, 30).bfloat16()}, ValueError, r"top has shape \(2, 3, 30\)"),
        ({"top": torch.zeros(5, 3, 32).bfloat16()}, ValueError, "a multiple of S"),
        ({"top": torch.zeros(0, 3, 32).bfloat16()}, ValueError, "a multiple of S"),
        ({"top": torch.zeros(3, 32).bfloat16()}, ValueError, r"expected \(S, T, N = 32\)"),
        ({"bottom": torch.zeros(2, 3, 30).bfloat16()}, ValueError, r"bottom has shape \(2, 3, 30\)"),
        (
            {"left": torch.zeros(96, 8), "top": torch.zeros(2, 3, 32)},
            ValueError,
            "left and top are both given",
        ),
        (
            {"top": torch.zeros(2, 3, 32), "bottom": torch.zeros(2, 3, 32)},
            ValueError,
            "top and bottom are both",
        ),
    ],
)
def test_what_cannot_stand_beside_is_refused(beside, error, words):
    operands = stand_in.Operands()
    compressed = ops.sparsify("identity", [operands.x])
    with pytest.raises(error, match=words):
        ops.sparse_linear(*compressed, operands.weight, **beside)


@pytest.mark.parametrize("side", ["left", "top", "bottom"])
def test_a_part_of_another_dtype_is_refused_also_after_a_right_one(driver, side):
    operands = stand_in.Operands()
    right = torch.zeros(96, 8) if side == "left" else torch.zeros(2, 3, 32)
    without = {"residual": None, "gate": None}
    compressed = operands.sparsify()
    operands.linear(compressed, **without, **{side: right.bfloat16()})
    with pytest.raises(TypeError, match=f"{side} is torch.float32"):
        operands.linear(compressed, **without, **{side: right})


def test_a_call_is_remembered_for_its_own_side(driver, monkeypatch):
    operands, prepare, made = stand_in.Operands(), placement.prepare, []
    monkeypatch.setattr(placement, "prepare", lambda *given: made.append(given[3:]) or prepare(*given))
    compressed, part = operands.sparsify(), torch.zeros(1, 96, 32).bfloat16()  # fits on every side
    for _ in range(2):
        for side in ("left", "top", "bottom"):
            operands.linear(compressed, residual=None, gate=None, **{side: part})
    assert made == [([part], [side]) for side in ("left", "top", "bottom")]


@pytest.mark.parametrize(
    ("rows", "left", "top"),
    [(0, (2, 0, 8), None), (4, (4, 0), None), (0, None, (2, 3, 48)), (0, None, (0, 3, 48))],
)
@pytest.mark.parametrize("below", [False, True])
def test_nothing_beside_or_below(rows, left, top, below):
    y = torch.randn(rows, 48)
    columns, others = [None if shape is None else torch.randn(shape) for shape in (left, top)]
    whole = ops.placed(y, columns, None, others) if below else ops.placed(y, columns, others, None)
    assert whole.shape == (6 if top and top[0] else rows, 48 + (left[-1] if left else 0))


def test_nothing_is_filled_in():
    y = torch.randn(4, 48)
    assert torch.equal(placement.fill(y.clone(), torch.randn(4, 0), "left"), y)
    assert placement.fill(y, None, "") is y


def test_layers_together_are_checked_once_and_remembered(monkeypatch):
    made = []

    def prepare_all(values, metadata, scale, layers):
        made.append(layers)
        run = lambda: [  # noqa: E731
            ops._sparse_linear_reference(values, metadata, scale, *layer) for layer in layers
        ]
        return SimpleNamespace(run=run, copies=())

    monkeypatch.setattr(kernels, "_gemms", lambda device, dtype: prepare_all)
    *compressed, t, weight, up, bias, activation, _, _ = layer(64, 48)
    compressed[2] = compressed[2].float()
    _, _, _, other_t, other_weight, *_ = layer(64, 96, 0)
    lists = [t, other_t], [weight, other_weight], [up, None], [bias, None], [activation, "none"]
    none = [None, None]
    for _ in range(2):
        got = kernels._sparse_linears(*compressed, *lists, none, none, [], [])
        want = ops._sparse_linears(*compressed, *lists, none, none, [], [])
        for y, expected_y in zip(got, want, strict=True):
            assert torch.equal(y, expected_y)
    assert [len(layers) for layers in made] == [2]  # the second call was one that came before
    with pytest.raises(ValueError, match="weight"):
        kernels._sparse_linears(
            *compressed, [t], [weight[:, :64]], [up], [bias], ["none"], [None], [None], [], []
        )
