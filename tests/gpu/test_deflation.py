"""Deflation in the sparsify kernel: t·A leaves z before it is pruned.

With small whole numbers every product and sum is exact, so that the kernel must agree with `semantics.py` to
the bit, ties included. Other data is held to fp64, given the t that the kernel itself has rounded.
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from hypothesis import given
from hypothesis import strategies as st

from lynx_compile.runtime import kernels, layout, ops, semantics, sparsify_kernel
from lynx_compile.runtime.sparsify_kernel import sparsify

from .test_sparsify import (
    PRODUCERS,
    assert_t_like,
    dtypes,
    few,
    normal,
    producer_inputs,
    seeds,
    shape_of,
)

pytestmark = pytest.mark.gpu


def whole(seed, *shape, most, dtype, sparse=0.0):
    """Whole numbers from −most to most, a share `sparse` of them zero."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randint(-most, most + 1, shape, generator=generator, device="cuda")
    return (x * (torch.rand(shape, generator=generator, device="cuda") >= sparse)).to(dtype)


def assert_same(got, x, **options):
    expected = semantics.sparsify(x, **options)
    values, metadata = layout.pack(expected.pruned, expected.keep)
    assert torch.equal(got[3], expected.t)
    assert torch.equal(got[1], metadata)
    assert torch.equal(got[0], values)
    torch.testing.assert_close(got[2], expected.scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("producer", ["identity", "relu", "cat_relu", "relu_mul"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(
    m=st.one_of(st.integers(1, 300), st.sampled_from([512, 4096, 4608, 19997])),
    blocks=st.sampled_from([1, 2, 5, 13, 48, 192]),
    rank=st.sampled_from([16, 64, 80, 256, 304]),
    part=st.sampled_from([1.0, 1.0, 0.7]),
    compensation=st.sampled_from(semantics.COMPENSATIONS),
    vectors=st.sampled_from([(), (), ("shift",), ("score",), ("shift", "score")]),
    samples=st.sampled_from([1, 1, 2, 3]),
    seed=seeds,
)
@few
def test_exact_on_whole_numbers(producer, dtype, m, blocks, rank, part, compensation, vectors, samples, seed):
    m, k = m * samples if m < 4000 else m // samples * samples, 64 * blocks
    if m * k > 40e6:
        m = 40_000_000 // k // samples * samples
    first = 64 * (blocks // 2)
    if producer == "cat_relu" and first:
        inputs = [
            whole(seed, m, first, most=4, dtype=dtype),
            whole(seed + 1, m, k - first, most=4, dtype=dtype),
        ]
    elif producer == "relu_mul":
        inputs = list(whole(seed, m, 2 * k, most=3, dtype=dtype).chunk(2, -1))
    else:
        producer = "identity" if producer == "cat_relu" else producer
        inputs = [whole(seed, m, k, most=4, dtype=dtype)]
    down = whole(seed + 2, rank, k, most=1, dtype=dtype, sparse=max(0.2, 1 - 8 / k))
    options = {"compensation": compensation, "deflated": min(max(int(rank * part), 1), 256)}
    if "shift" in vectors:
        options["shift"] = whole(seed + 3, samples, 1, k, most=2, dtype=torch.float32)
    if "score" in vectors:
        options["score"] = whole(seed + 4, k, most=3, dtype=torch.float32).abs()
    got = sparsify(producer, inputs, lora_down=down, **options)
    assert_same(got, semantics.produce(producer, inputs), lora_down=down, **options)


def assert_pruned_what_is_left(got, x, down, deflated):
    """z = x − t·A to rounding, of which the larger two of four are kept. x: in fp64, as rounded."""
    values, metadata, scale, t = got
    taken = t[:, :deflated].double() @ down[:deflated].double()
    z = x - taken
    size = x.abs() + t[:, :deflated].double().abs() @ down[:deflated].double().abs()
    bound = torch.finfo(values.dtype).eps / 2 * z.abs() + 3e-6 * size + torch.finfo(values.dtype).tiny
    kept = layout.kept_indices(metadata, len(x))

    def chosen(of):
        return of.unflatten(-1, (-1, 4)).gather(-1, kept)

    of_kept, error = chosen(z), chosen(bound).flatten(-2)
    assert ((values.double() - of_kept.flatten(-2)).abs() <= error).all()
    second = z.abs().unflatten(-1, (-1, 4)).topk(2).values[..., 1]
    assert (of_kept.abs().amin(-1) >= second - 2 * bound.unflatten(-1, (-1, 4)).amax(-1)).all()
    expected = (z.square().sum(-1) / (of_kept.square().sum((-1, -2)) + semantics.NORM_EPS)).sqrt()
    torch.testing.assert_close(scale.double(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("producer", PRODUCERS)
@given(
    samples=st.sampled_from([1, 2, 3]),
    rows=st.one_of(st.integers(1, 70), st.sampled_from([256])),
    blocks=st.sampled_from([1, 4, 30]),
    dtype=dtypes,
    present=st.sampled_from([(False, False, True, True), (True,) * 4]),
    vector_dtype=st.sampled_from([None, torch.float32]),
    deflated=st.sampled_from([64, 50, 128]),
    seed=seeds,
)
@few
def test_producers(producer, samples, rows, blocks, dtype, present, vector_dtype, deflated, seed):
    """X comes from the same kernel with the identity for A, and for norms from the definition."""
    inputs = producer_inputs(
        producer, samples * rows, 64 * blocks, dtype, samples, present, vector_dtype, seed
    )
    _, k = shape_of(inputs, producer)
    options = {"eps": 1e-6, "mult_offset": 1.0}
    down = (normal(seed + 9, 128, k) * k**-0.5).to(dtype)
    got = sparsify(producer, inputs, lora_down=down, deflated=deflated, **options)
    plain = sparsify(producer, inputs, lora_down=down, **options)
    assert torch.equal(got[3], plain[3])
    identity = torch.eye(k, device="cuda", dtype=dtype)
    x = sparsify(producer, inputs, lora_down=identity, **options)[3]
    if not producer.endswith("_norm"):  # whose sums are added in another order for another rank
        assert_t_like(got[3], x, down)
        assert_pruned_what_is_left(got, x.double(), down, deflated)
        return
    exact = semantics.produce(producer, [None if t is None else t.double() for t in inputs], **options)
    expected = semantics.sparsify(exact.to(dtype), lora_down=down, deflated=deflated)
    values, metadata = layout.pack(expected.pruned, expected.keep)
    assert (got[1] != metadata).float().mean() <= 0.1
    same = (layout.kept_indices(got[1], len(x)) == layout.kept_indices(metadata, len(x))).all(-1)
    same = same.repeat_interleave(2, -1)
    near = torch.isclose(got[0].double(), values.double(), rtol=2**-6, atol=0.05)
    assert near[same].all()
    assert same.float().mean() >= 0.97
    torch.testing.assert_close(got[2], expected.scale, rtol=5e-3, atol=0)


@pytest.mark.parametrize("k", [3072, 12288, 15360])
def test_the_shapes_of_the_models(k):
    for m in (512, 4096, 4608):
        x = normal(m + k, m, k, dtype=torch.bfloat16)
        down = (normal(k, 64, k) * k**-0.5).to(torch.bfloat16)
        got = sparsify("identity", [x], lora_down=down, deflated=64)
        assert_t_like(got[3], x, down)
        assert_pruned_what_is_left(got, x.double(), down, 64)
        for _ in range(5):
            again = sparsify("identity", [x], lora_down=down, deflated=64)
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("producer", ["identity", "gelu", "layer_norm", "cat_gelu_tanh"])
def test_what_older_gpus_run(producer, monkeypatch):
    inputs = producer_inputs(producer, 150, 640, torch.bfloat16, 2, (True,) * 4, torch.float32, 3)
    k = shape_of(inputs, producer)[1]
    down = (normal(6, 48, k) * k**-0.5).to(torch.bfloat16)
    options = {"eps": 1e-6, "lora_down": down, "deflated": 40, "shift": normal(4, 2, k) / 4}
    new = sparsify(producer, inputs, **options)
    defines, choose = sparsify_kernel.defines, sparsify_kernel.choose
    monkeypatch.setattr(sparsify_kernel, "defines", lambda *a: {**defines(*a), "PORTABLE": 1})
    monkeypatch.setattr(sparsify_kernel, "choose", lambda *a: choose(*a[:4], False, 100 * 1024))
    caches = sparsify_kernel.plan, sparsify_kernel._kernel
    for cache in caches:
        cache.cache_clear()
    try:
        old = sparsify(producer, inputs, **options)
    finally:
        for cache in caches:
            cache.cache_clear()
    assert (old[1] != new[1]).float().mean() < 0.05  # t is a sum in another order
    torch.testing.assert_close(old[2], new[2], rtol=2e-3, atol=0)
    torch.testing.assert_close(old[3], new[3], rtol=2**-7, atol=2e-2)


def test_a_poisoned_row_stays_alone():
    """NaN in one row changes no bit of another."""
    inputs = producer_inputs("layer_norm", 130, 512, torch.bfloat16, 1, (True,) * 4, None, 9)
    down = (normal(8, 64, 512) * 512**-0.5).to(torch.bfloat16)
    clean = sparsify("layer_norm", inputs, lora_down=down, deflated=64)
    inputs[0] = inputs[0].clone()
    inputs[0][77, 5] = torch.nan
    poisoned = sparsify("layer_norm", inputs, lora_down=down, deflated=64)
    others = torch.arange(130, device="cuda") != 77
    for i in (0, 2, 3):
        assert torch.equal(clean[i][others], poisoned[i][others])
    clean, poisoned = (layout.kept_indices(got[1], 130)[others] for got in (clean, poisoned))
    assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("rank", [40, 64, 304])
def test_the_op(rank):
    """Ranks that no kernel takes as they are: padded, or by the definition."""
    assert kernels.unavailable_reason(torch.device("cuda", 0), torch.bfloat16) is None
    x, down = (
        whole(1, 70, 448, most=4, dtype=torch.bfloat16),
        whole(2, rank, 448, most=1, dtype=torch.bfloat16, sparse=0.98),
    )
    for _ in range(2):
        got = ops.sparsify("identity", [x], lora_down=down, deflated=rank)
        assert_same(got, x, lora_down=down, deflated=rank)


def test_under_graph_capture():
    x, down = normal(1, 777, 1024, dtype=torch.bfloat16), normal(2, 64, 1024, dtype=torch.bfloat16) / 32
    sparsify("gelu", [x], lora_down=down, deflated=64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        got = sparsify("gelu", [y], lora_down=down, deflated=64)
    x.copy_(normal(3, 777, 1024))
    graph.replay()
    expected = sparsify("gelu", [x * 2], lora_down=down, deflated=64)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_no_rows_and_too_many_directions():
    empty = torch.empty(0, 64, device="cuda", dtype=torch.float16)
    down = normal(1, 304, 64, dtype=torch.float16)
    assert [len(part) for part in sparsify("identity", [empty], lora_down=down, deflated=16)] == [0] * 4
    x = normal(2, 8, 64, dtype=torch.float16)
    for deflated in (-1, 257, 305):
        with pytest.raises(ValueError, match=f"deflated={deflated} "):
            sparsify("identity", [x], lora_down=down, deflated=deflated)
