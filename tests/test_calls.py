"""Calls that come again, with a driver that only writes down what it is told: no GPU needed.

Addresses, types and sizes decide whether a checked call may be used again; a kernel that read a tensor of
another shape through an old call would read wrong memory, so each way to change one is tried.
"""

import threading

import pytest
import torch

from lynx_compile.runtime import calls, kernels, launch, operands, ops, sparsify_kernel

from .stand_in import RANK, K, M, N, Operands, normal, parameters, pointers


def test_each_call_launches_on_its_own_outputs(driver):
    layer = Operands()
    outputs = []
    for _ in range(3):
        compressed = layer.sparsify()
        outputs += [compressed, layer.linear(compressed)]  # kept alive: none may come back
    for launched, output in zip(driver.launches, outputs, strict=True):
        made = [output] if isinstance(output, torch.Tensor) else output
        kernel, found = launched[0], parameters(launched)
        at = kernel.parameters.index("O")
        assert list(found[at : at + len(made)]) == pointers(*made)
    shapes = [(tuple(t.shape), t.dtype, t.is_contiguous()) for t in outputs[2]]
    assert shapes == [
        ((M, K // 2), torch.bfloat16, True),
        ((2, K // 64, 128), torch.int32, True),
        ((M,), torch.float32, True),
        ((M, RANK), torch.bfloat16, True),
    ]
    assert (outputs[3].shape, outputs[3].dtype) == ((M, N), torch.bfloat16)


def test_deflation_takes_two_launches_which_share_scratch(driver, prepared):
    layer = Operands()
    for _ in range(2):
        found = layer.sparsify(deflated=RANK)
        assert len(found) == 4
        first, second = (parameters(launched) for launched in driver.launches[-2:])
        at = driver.launches[-1][0].parameters.index("O")
        assert list(second[at : at + 4]) == pointers(*found)
        assert list(first[at : at + 4]) == [0, 0, 0, found[3].data_ptr()]
        assert first[at + 4] == second[at + 4] not in (0, *pointers(*found))
    layer.sparsify()
    assert prepared == ["sparsify"] * 2
    assert len(driver.launches) == 5


def test_operands_are_checked_once(driver, prepared):
    layer = Operands()
    compressed = layer.sparsify()
    first = layer.linear(compressed)
    for _ in range(3):
        layer.sparsify()
        layer.linear(compressed)
    assert prepared == ["sparsify", "linear"]
    operands = pointers(*compressed[1:3], layer.bias, layer.gate)
    assert len(driver.launches) == 8
    assert set(operands) <= set(parameters(driver.launches[-1]))
    assert first.data_ptr() not in parameters(driver.launches[-1])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:64],
        lambda x: x.view(-1, 2 * K),
        lambda x: x.view(-1, 64),
        lambda x: x.view(torch.float16),
        lambda x: x.view(2, -1, K),
        lambda x: x.as_strided((M // 2, K), (2 * K, 1)),
        lambda x: x.as_strided((M, K), (0, 1)),
    ],
    ids=["rows", "wider", "narrower", "dtype", "batch", "every other row", "one row"],
)
def test_another_input_at_the_same_address_is_checked_again(driver, prepared, change):
    layer = Operands()
    kernels._sparsify("identity", [layer.x])
    other = change(layer.x)
    assert other.data_ptr() == layer.x.data_ptr()
    values, *_ = kernels._sparsify("identity", [other])
    assert prepared == ["sparsify"] * 2
    assert values.shape == (other.numel() // other.shape[-1], other.shape[-1] // 2)
    assert values.dtype == other.dtype
    kernels._sparsify("identity", [layer.x])  # the newer one took its place
    assert prepared == ["sparsify"] * 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: {"weight": a.weight.view(-1, 2 * K)}, ValueError, r"weight is \(16, 256\) and values"),
        (lambda a: {"weight": a.weight.view(torch.float16)}, TypeError, "weight is torch.float16"),
        (lambda a: {"weight": a.weight[:20]}, ValueError, r"\(20, 128\).*N % 16"),
        (lambda a: {"bias": a.bias[:, :16]}, ValueError, r"bias has shape \(1, 16\).*N = 32.*M = 96"),
        (lambda a: {"bias": normal(5, N)}, ValueError, r"bias has shape \(5, 32\).*divides M = 96"),
        (lambda a: {"bias": normal(1, N + 8)}, ValueError, "bias has shape"),
        (lambda a: {"gate": normal(0, N)}, ValueError, r"gate has shape \(0, 32\)"),
        (lambda a: {"gate": normal(7, N)}, ValueError, r"gate has shape \(7, 32\).*one row of N = 32"),
        (lambda a: {"residual": a.residual[:95]}, ValueError, "residual has shape .*expected 3072"),
        (lambda a: {"lora_up": a.up.float()}, TypeError, "lora_up is torch.float32"),
        (lambda a: {"bias": normal(N + 1)[1:]}, ValueError, r"bias starts at 0x.*bias.clone\(\)"),
        (lambda a: {"activation": "tanh"}, ValueError, "unknown activation 'tanh'"),
        (lambda a: {"version": 0}, ValueError, "version 0"),
    ],
)
def test_what_a_known_call_would_misread_is_refused(driver, change, error, message):
    layer = Operands()
    compressed = layer.sparsify()
    layer.linear(compressed)
    with pytest.raises(error, match=message):
        layer.linear(compressed, **change(layer))


def test_layers_of_one_input_are_checked_once(driver, monkeypatch):
    layer, weights = Operands(), [normal(n, K) for n in (N, 2 * N, 4 * N)]
    ups = [normal(n, RANK) for n in (N, 2 * N, 4 * N)]
    checked = []
    original = operands.checked
    monkeypatch.setattr(operands, "checked", lambda *args: (checked.append(args), original(*args))[1])
    *compressed, t = layer.sparsify()
    lists = [t] * 3, weights, ups, [layer.bias, None, None], ["none"] * 3, [None] * 3, [None] * 3, [], []
    results = [kernels._sparse_linears(*compressed, *lists) for _ in range(3)]
    assert len(checked) == 3
    assert [[y.shape for y in ys] for ys in results] == [[(M, n) for n in (N, 2 * N, 4 * N)]] * 3
    written = {pointer for launched in driver.launches for pointer in parameters(launched)}
    assert {y.data_ptr() for ys in results for y in ys} <= written
    other = normal(M, RANK)
    kernels._sparse_linears(*compressed, [t, t, other], *lists[1:])
    assert len(checked) == 6
    assert other.data_ptr() in {t.data_ptr() for call in checked for t in call if t is not None}


@pytest.mark.parametrize("samples", [1, 3, 96])
def test_bias_and_gate_hold_a_row_a_sample(driver, samples):
    layer = Operands(samples=samples)
    layer.linear(layer.sparsify())
    found = parameters(driver.launches[-1])
    assert found.count(M // samples) >= 2  # for M, too, with one sample
    layer.linear(layer.sparsify(), bias=None, gate=None)
    alone = parameters(driver.launches[-1])
    assert found.count(M // samples) - alone.count(M // samples) == (0 if samples == 1 else 2)


def test_options_and_places_are_told_apart(driver, prepared):
    layer, vector, other = Operands(), normal(K), normal(K)
    for options in (
        {"shift": vector}, {"score": vector}, {"compensation": "native"}, {"shift": vector, "score": other},
    ):  # fmt: skip
        layer.sparsify(**options)
        layer.sparsify(**options)
    assert len(prepared) == 4
    compressed = layer.sparsify()
    for options in ({"gate": None}, {"bias": None}, {"activation": "gelu"}, {"residual": None}):
        layer.linear(compressed, **options)
        layer.linear(compressed, **options)
    assert prepared.count("linear") == 4


def test_a_tensor_may_come_twice(driver, prepared):
    layer, vector = Operands(), normal(2 * K)
    both = vector[:K]
    for _ in range(3):
        layer.sparsify(shift=both, score=both)
    assert len(prepared) == 1
    other = vector.as_strided(
        (K,), (2,)
    )  # the same address, every other element: refused, but not taken for both
    with pytest.raises(ValueError, match="score needs 128 contiguous"):
        layer.sparsify(shift=both, score=other)
    layer.sparsify(shift=both, score=vector[:K])
    assert len(prepared) == 3


def test_a_wide_branch_takes_several_launches(driver):
    layer = Operands(rank=320)
    *first, t = layer.sparsify()
    writes = []
    for launched in driver.launches:
        at = launched[0].parameters.index("O")
        writes.append(list(parameters(launched)[at : at + 4]))
    step = 2 * sparsify_kernel.MAX_RANK
    assert writes[0] == pointers(*first, t)
    assert writes[1:] == [[0, 0, 0, t.data_ptr() + i * step] for i in (1, 2)]


def test_copies_of_operands_are_made_anew(driver, prepared):
    layer = Operands()
    x = normal(K, M).t()  # columns first: no kernel reads that
    for _ in range(2):
        values, metadata, scale, t = kernels._sparsify("identity", [x], layer.down)
    weight = normal(K, N).t()
    for _ in range(2):
        layer.linear((values, metadata, scale, t), weight=weight)
    assert prepared == ["sparsify"] * 2 + ["linear"] * 2
    assert x.data_ptr() not in parameters(driver.launches[0])
    ranked = layer.linear((values, metadata, scale, t[:, :8]), lora_up=layer.up[:, :8])
    assert ranked.shape == (M, N)


def test_t_may_lie_in_a_wider_one(driver, prepared):
    layer = Operands()
    *compressed, t = kernels._sparsify("identity", [layer.x], normal(3 * RANK, K))
    for _ in range(2):
        layer.linear((*compressed, t[:, RANK : 2 * RANK]))
    assert prepared == ["sparsify", "linear"]


def test_no_more_calls_are_kept_than_asked_for(driver, monkeypatch):
    monkeypatch.setattr(calls, "MAX_CALLS", 8)
    layers = [Operands(m=16) for _ in range(20)]
    for layer in layers:
        layer.sparsify()
        assert len(kernels._sparsify_calls._entries) <= 8


def test_empty_batch(driver):
    layer = Operands(m=0)
    compressed = layer.sparsify()
    assert [t.shape[0] for t in compressed] == [0] * 4
    assert layer.linear(compressed).shape == (0, N)
    assert driver.launches == []


def test_threads_do_not_mix_their_parameters(driver):
    layers = [Operands() for _ in range(4)]
    compressed = [layer.sparsify() for layer in layers]
    driver.launches.clear()
    outputs = [[] for _ in layers]
    ready = threading.Barrier(len(layers))

    def work(i):
        ready.wait()
        outputs[i] += [layers[i].linear(compressed[i]) for _ in range(100)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.threads) == 1 + len(layers)
    scale_of = {layer[2].data_ptr(): i for i, layer in enumerate(compressed)}
    launched = [{y.data_ptr() for y in ys} for ys in outputs]
    assert len(driver.launches) == 400
    for one in driver.launches:
        found = parameters(one)
        (owner,) = {scale_of[p] for p in found if p in scale_of}
        assert found[one[0].parameters.index("O")] in launched[owner]


def test_another_device_and_deterministic_mode_take_the_long_way(driver, monkeypatch):
    layer = Operands()
    expected = [tuple(t.shape) for t in layer.sparsify()]
    made = []
    empty = calls.empty
    monkeypatch.setattr(calls, "empty", lambda *spec: (made.append(spec), empty(*spec))[1])
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 3)
    layer.sparsify()
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1)
    torch.use_deterministic_algorithms(True)
    try:
        layer.sparsify()
    finally:
        torch.use_deterministic_algorithms(False)
    layer.sparsify()
    assert [shape for shape, _, _ in made] == expected * 2
    assert len(driver.launches) == 4


@pytest.mark.parametrize("kind", [calls.Facts, calls._guard_type])
def test_facts_tell_tensors_apart(kind, monkeypatch):
    monkeypatch.setattr(calls, "_guard_type", kind)
    x = normal(4, 64)
    same = calls._guard((x, x.clone()))
    assert same(normal(4, 64), normal(4, 64))
    for other in (x[:2], x.view(2, 128), x.view(torch.float16), x.t().contiguous().t(), x.view(1, 4, 64)):
        assert not same(x, other)
        assert not same(other, x)


def test_a_launch_that_fails_says_which(driver, monkeypatch):
    layer = Operands()
    layer.sparsify()
    monkeypatch.setattr(launch, "_error_text", lambda status: f"error {status}")
    for frame in (
        next(iter(kernels._sparsify_calls._entries.values()))[0].launches[0].kernel._frames.of.values()
    ):
        monkeypatch.setattr(frame, "call", lambda *arguments: 700)
    with pytest.raises(launch.LaunchError, match=r"launching sparsify .*grid \(\d+, 1, 1\).*error 700"):
        layer.sparsify()


@pytest.mark.parametrize("samples", [1, 2])
def test_layers_beside_rows_share_a_call_that_is_remembered(driver, monkeypatch, samples):
    layer, widths, sides, others = Operands(m=128), (N, 2 * N, 4 * N), ["top", "", "bottom"], (5, 0, 3)
    checked = []
    original = operands.checked
    monkeypatch.setattr(operands, "checked", lambda *args: (checked.append(args), original(*args))[1])
    *compressed, t = layer.sparsify()
    weights, ups = ([normal(n, k) for n in widths] for k in (K, RANK))
    lists = [t] * 3, weights, ups, [layer.bias, None, None], ["none"] * 3, [None] * 3, [None] * 3
    besides = [normal(samples, count, n) if count else None for count, n in zip(others, widths, strict=True)]
    for _ in range(2):
        driver.launches.clear()
        ys = kernels._sparse_linears(*compressed, *lists, besides, sides)
        assert [tuple(y.shape) for y in ys] == [
            (128 + samples * count, n) for count, n in zip(others, widths, strict=True)
        ]
        first, _, last = (y.view(samples, -1, n) for y, n in zip(ys, widths, strict=True))
        assert torch.equal(first[:, :5], besides[0])
        assert torch.equal(last[:, -3:], besides[2])
        rows = 128 // samples
        written = {pointer for launched in driver.launches for pointer in parameters(launched)}
        for sample in range(samples):
            for y, above, count, n in zip(ys, (5, 0, 0), others, widths, strict=True):
                assert y.data_ptr() + (sample * (rows + count) + above) * n * 2 in written
        assert len(checked) == 3
    longer = [normal(samples, 6, N), *besides[1:]]
    assert kernels._sparse_linears(*compressed, *lists, longer, sides)[0].shape[0] == 128 + 6 * samples
    moved = kernels._sparse_linears(*compressed, *lists, besides, ["bottom", "", "top"])
    assert torch.equal(moved[0].view(samples, -1, N)[:, -5:], besides[0])
    assert len(kernels._sparse_linears(*compressed, *lists, [], [])) == 3
    with pytest.raises(TypeError, match=r"top is torch.float32"):
        kernels._sparse_linears(*compressed, *lists, [besides[0].float(), *besides[1:]], sides)
    with pytest.raises(ValueError, match=r"bottom has shape"):
        kernels._sparse_linears(*compressed, *lists, [*besides[:2], normal(samples, 3, N)], sides)


@pytest.mark.parametrize("side", ["left", "top", "bottom"])
def test_a_layer_that_chooses_writes_to_its_place(driver, monkeypatch, side):
    layer, beside = Operands(m=128), normal(128, 8) if side == "left" else normal(2, 5, N)
    for name in ("sparsify", "sparse_linear", "sparse_linears"):
        monkeypatch.setattr(ops, name, getattr(kernels, f"_{name}"))
    own, none = [[one] for one in (layer.bias, layer.bias, layer.up)], [None]
    lists = *own, [0, 0, RANK, 1], ["silu"], none, none, [beside], [side]
    for least in (0, 129):
        (y,) = ops._linears("identity", [layer.x], [layer.weight], least, *lists, layer.down)
        whole = ops.placed(y.new_zeros(128, N), *ops.parts([beside], [side], 0))
        assert y.shape == whole.shape
        filled = whole != 0
        assert torch.equal(y[filled], whole[filled])
    assert len(driver.launches) == (2 if side == "left" else 3)  # 64 rows a sample: a launch for each


def test_samples_that_share_a_block_are_joined_behind_one_call(driver, monkeypatch):
    layer, checked = Operands(m=2 * 70), []
    original = operands.checked
    monkeypatch.setattr(operands, "checked", lambda *args: (checked.append(args), original(*args))[1])
    *compressed, t = layer.sparsify()
    lists = [t] * 2, [layer.weight] * 2, [layer.up] * 2, [None] * 2, ["none"] * 2, [None] * 2, [None] * 2
    besides = [normal(2, 5, N), None]
    driver.launches.clear()
    for _ in range(3):
        y, other = kernels._sparse_linears(*compressed, *lists, besides, ["top", ""])
        assert torch.equal(y.view(2, 75, N)[:, :5], besides[0])
        assert other.shape == (140, N)
        alone = kernels._sparse_linear(*compressed, t, layer.weight, layer.up, top=besides[0])
        assert alone.shape == (150, N)
    assert len(checked) == 3  # of the two layers together, and of the one alone


@pytest.mark.parametrize(
    ("besides", "sides", "message"),
    [
        (
            [normal(1, 4, N)],
            ["Top"],
            r"layer 0 has a tensor on side 'Top'; give a tensor on one of left, top",
        ),
        ([normal(1, 4, N)], [""], "layer 0 has a tensor on side ''"),
        ([None], ["top"], "layer 0 has nothing on side 'top'"),
        ([normal(1, 4, N)], [], "1 besides and 0 sides for 1 layers"),
        ([None, None], ["", ""], "2 besides and 2 sides for 1 layers"),
    ],
)
def test_sides_that_no_layer_has_are_refused_everywhere(driver, besides, sides, message):
    layer = Operands()
    *compressed, t = layer.sparsify()
    lists = [t], [layer.weight], [None], [None], ["none"], [None], [None]
    for op in (kernels._sparse_linears, ops._sparse_linears, ops._sparse_linears_fake):
        with pytest.raises(ValueError, match=message):
            op(*compressed, *lists, besides, sides)
    both = [[None], [None], [None], [], ["none"], [None], [None], besides, sides]
    for op in (ops._linears, ops._linears_fake):
        with pytest.raises(ValueError, match=message):
            op("identity", [layer.x], [layer.weight], 0, *both)


def test_what_stands_beside_is_checked_also_below_the_break_even():
    layer = Operands()
    lists = [[None], [None], [None], [], ["none"], [None], [None]]
    for beside, error, message in (
        (normal(1, 4, N).float(), TypeError, "linears: top is torch.float32"),
        (normal(5, 4, N), ValueError, "linears: top has shape"),
    ):
        with pytest.raises(error, match=message):
            ops._linears("identity", [layer.x], [layer.weight], M + 1, *lists, [beside], ["top"])


def test_rows_on_another_device_are_refused_by_a_known_call_too(driver):
    layer, rows = Operands(m=128), normal(2, 5, N)
    *compressed, t = layer.sparsify()
    lists = [t], [layer.weight], [None], [None], ["none"], [None], [None]
    kernels._sparse_linears(*compressed, *lists, [rows], ["top"])
    kernels._sparse_linear(*compressed, t, layer.weight, top=rows)
    with pytest.raises(ValueError, match="top is on meta"):
        kernels._sparse_linears(*compressed, *lists, [rows.to("meta")], ["top"])
    with pytest.raises(ValueError, match="top is on meta"):
        kernels._sparse_linear(*compressed, t, layer.weight, top=rows.to("meta"))


def test_no_layers(driver):
    *compressed, _ = Operands().sparsify()
    assert kernels._sparse_linears(*compressed, *[[] for _ in range(9)]) == []
