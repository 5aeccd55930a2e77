"""Layers that write a part of their output, and layers that run together, against each layer alone."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from lynx_compile.runtime import kernels, ops  # noqa: F401 (importing kernels registers them)

pytestmark = pytest.mark.gpu
K = 256


def normal(seed, *shape, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def layer(n, rank, seed, dtype=torch.bfloat16):
    up = normal(seed + 1, n, rank, dtype=dtype) if rank else None
    return normal(seed, n, K, dtype=dtype) / 16, up, normal(seed + 2, n, dtype=dtype)


def close(y, want):
    torch.testing.assert_close(y, want, rtol=1e-2, atol=1e-2 * want.abs().max().item())
    assert (y.float() - want.float()).norm() <= 2e-3 * want.float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("samples", "rows", "others"), [(1, 1024, 40), (1, 77, 3), (2, 128, 16), (3, 70, 5), (2, 64, 0)]
)
@pytest.mark.parametrize("side", ["top", "bottom"])
def test_beside_the_rows_of_each_sample(samples, rows, others, dtype, side):
    x, down = normal(0, samples * rows, K, dtype=dtype), normal(1, 32, K, dtype=dtype) / 16
    s = ops.sparsify("identity", [x], lora_down=down)
    weight, up, bias = layer(320, 32, 2, dtype)
    beside = normal(9, samples, others, 320, dtype=dtype)
    alone = ops.sparse_linear(*s, weight, lora_up=up, bias=bias, activation="gelu")
    want = ops.placed(alone, None, beside, None) if side == "top" else ops.placed(alone, None, None, beside)
    calls = [
        ops.sparse_linear(*s, weight, lora_up=up, bias=bias, activation="gelu", **{side: beside})
        for _ in range(2)
    ]
    assert torch.equal(*calls)  # the second call is one that came before
    by_sample = calls[0].view(samples, -1, 320)
    assert torch.equal(by_sample[:, :others] if side == "top" else by_sample[:, rows:], beside)
    close(calls[0], want)  # a sample alone may have another tile, which sums in another order


@pytest.mark.parametrize("width", [64, 200, 3072])
@pytest.mark.parametrize(("m", "n", "rank"), [(1024, 320, 32), (77, 3072, 0), (4608, 1024, 64)])
def test_beside_other_columns(m, n, rank, width):
    x = normal(0, m, K)
    s = ops.sparsify("identity", [x], lora_down=normal(1, rank, K) / 16 if rank else None)
    weight, up, bias = layer(n, rank, 2)
    left = normal(9, 1, m, width)
    gate, residual = normal(11, 1, n), normal(12, m, n)
    for tail in ({}, {"activation": "gelu_tanh"}, {"gate": gate, "residual": residual}):
        want = ops.placed(ops.sparse_linear(*s, weight, lora_up=up, bias=bias, **tail), left, None, None)
        for _ in range(2):
            got = ops.sparse_linear(*s, weight, lora_up=up, bias=bias, **tail, left=left)
            assert torch.equal(got, want)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sizes", [(320, 320, 320, 1024), (16, 3072), (3072, 64, 512, 128, 256)])
@pytest.mark.parametrize("m", [1, 77, 4608])
def test_together_is_each_alone(m, sizes, shared):
    x = normal(0, m, K)
    ranks = [32] * len(sizes) if shared else [16 * (i % 3) for i in range(len(sizes))]
    down = normal(1, 32 if shared else max(sum(ranks), 16), K) / 16
    *compressed, t = ops.sparsify("identity", [x], lora_down=down)
    layers, ts, at = [], [], 0
    for i, (n, rank) in enumerate(zip(sizes, ranks, strict=True)):
        layers.append(layer(n, rank, 10 * i))
        ts.append(t if shared else t[:, at : at + rank])
        at += rank
    weights, ups, biases = map(list, zip(*layers, strict=True))
    activations = ["none"] * (len(sizes) - 1) + ["gelu_tanh"]
    none = [None] * len(sizes)
    for _ in range(2):
        got = ops.sparse_linears(*compressed, ts, weights, ups, biases, activations, none, none, [], [])
        for y, own_t, (weight, up, bias), activation in zip(got, ts, layers, activations, strict=True):
            want = ops.sparse_linear(*compressed, own_t, weight, lora_up=up, bias=bias, activation=activation)
            close(y, want)


@pytest.mark.parametrize(("samples", "rows"), [(1, 77), (1, 4096), (2, 1024), (2, 70)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_together_beside_rows_is_each_alone(samples, rows, dtype):
    """Rows above, below and none in one call; with samples of 70 rows that cannot be, and each is alone."""
    m, sizes = samples * rows, (320, 320, 3072, 64)
    x, down = normal(0, m, K, dtype=dtype), normal(1, 32, K, dtype=dtype) / 16
    *compressed, t = ops.sparsify("identity", [x], lora_down=down)
    layers = [layer(n, 32, 10 * i, dtype) for i, n in enumerate(sizes)]
    weights, ups, biases = map(list, zip(*layers, strict=True))
    sides, others = ["top", "bottom", "", "top"], [40, 8, 0, 1]
    besides = [
        normal(50 + i, samples, count, n, dtype=dtype) if count else None
        for i, (n, count) in enumerate(zip(sizes, others, strict=True))
    ]
    none, ts = [None] * len(sizes), [t] * len(sizes)
    for _ in range(2):
        got = ops.sparse_linears(
            *compressed, ts, weights, ups, biases, ["gelu"] * 4, none, none, besides, sides
        )
        for i, (y, (weight, up, bias)) in enumerate(zip(got, layers, strict=True)):
            alone = ops.sparse_linear(*compressed, t, weight, lora_up=up, bias=bias, activation="gelu")
            want = ops.placed(alone, *ops.parts(besides, sides, i))
            assert y.shape == want.shape
            close(y, want)
            if besides[i] is not None:
                whole = y.view(samples, -1, sizes[i])
                end = slice(others[i]) if sides[i] == "top" else slice(rows, None)
                assert torch.equal(whole[:, end], besides[i])


@pytest.mark.parametrize("least", [0, 9999])
@pytest.mark.parametrize("side", ["left", "top", "bottom"])
def test_what_chooses_at_run_time_has_its_place_too(least, side):
    m, n = 1024, 320
    x = normal(0, m, K)
    weight, _, bias = layer(n, 0, 2)
    beside = normal(9, m, 64) if side == "left" else normal(9, 1, 40, n)
    lists = [bias], [bias], [None], [], ["gelu"], [None], [None]
    (got,) = ops.linears("identity", [x], [weight], least, *lists, [beside], [side])
    alone = ops.linears("identity", [x], [weight], least, *lists, [], [])[0]
    assert torch.equal(got, ops.placed(alone, *ops.parts([beside], [side], 0)))
