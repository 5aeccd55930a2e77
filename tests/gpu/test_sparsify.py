"""The sparsify kernel against `semantics.py`: selection and metadata exact, the rest within rounding.

A producer's own result is not an output of the kernel, but with the identity as LoRA down-projection t is z
itself, bit for bit. Producers are held to the fp64 definition through it, and the pruning to the reference on
exactly the z that the kernel pruned.
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lynx_compile.runtime import layout, semantics, sparsify_kernel
from lynx_compile.runtime.sparsify_kernel import sparsify

pytestmark = pytest.mark.gpu

few = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=50)
dtypes = st.sampled_from([torch.bfloat16, torch.float16])
seeds = st.integers(0, 2**31)
PRODUCERS = sorted(set(semantics.PRODUCERS) - {"identity"})


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Fresh memory holds NaN and the largest integers, so that an element nobody wrote shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(seed, *shape, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def assert_pruned_like(got, z, score=None, compensation="norm"):
    """Values and metadata are the reference's on z exactly; the scale to fp32 accumulation."""
    values, metadata, scale, _ = got
    expected = semantics.sparsify(z, score=score, compensation=compensation)
    expected_values, expected_metadata = layout.pack(expected.pruned, expected.keep)
    assert torch.equal(metadata, expected_metadata)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(scale, expected.scale, rtol=1e-5, atol=0, equal_nan=True)


def assert_t_like(t, z, lora_down):
    """t is the rounded exact product up to fp32 accumulation error."""
    exact = z.double() @ lora_down.double().T
    bound = torch.finfo(t.dtype).eps / 2 * exact.abs() + 2e-6 * (
        z.double().abs() @ lora_down.double().abs().T
    )
    assert ((t.double() - exact).abs() <= bound + torch.finfo(t.dtype).tiny).all()


@given(
    m=st.one_of(st.integers(1, 300), st.sampled_from([512, 4096, 4608, 19997])),
    blocks=st.sampled_from([1, 2, 3, 5, 8, 13, 48]),
    rank=st.sampled_from([0, 0, 16, 48, 64, 80, 160, 256, 304]),
    dtype=dtypes,
    compensation=st.sampled_from(semantics.COMPENSATIONS),
    vectors=st.sampled_from([(), ("shift",), ("score",), ("shift", "score")]),
    vector_dtype=st.sampled_from([None, torch.float32]),
    samples=st.sampled_from([1, 1, 2, 3]),
    seed=seeds,
)
@many
def test_any_shape(m, blocks, rank, dtype, compensation, vectors, vector_dtype, samples, seed):
    k = 64 * blocks
    m *= samples
    x = normal(seed, m, k, dtype=dtype)
    vectors = {name: normal(seed + 1, k).abs().to(vector_dtype or dtype) for name in vectors}
    if "shift" in vectors and samples > 1:  # a row a sample, within wider rows
        vectors["shift"] = normal(seed + 3, samples, 1, 3 * k).to(vector_dtype or dtype)[..., k : 2 * k]
    lora_down = normal(seed + 2, rank, k, dtype=dtype) if rank else None
    got = sparsify("identity", [x], lora_down=lora_down, compensation=compensation, **vectors)
    z = x
    if "shift" in vectors:
        of_rows = vectors["shift"].float().reshape(-1, k).repeat_interleave(m // samples, 0)
        z = (x.float() - of_rows).to(dtype)
    assert_pruned_like(got, z, vectors.get("score"), compensation)
    kept = layout.pack(*semantics.sparsify(z, score=vectors.get("score"))[:2])[0]
    assert torch.equal(got[0].view(torch.int16), kept.view(torch.int16))  # the sign of zeros as well
    assert got[3].shape == (m, rank)
    if lora_down is not None:
        assert_t_like(got[3], z, lora_down)


@pytest.mark.parametrize("k", [3072, 12288, 15360])
@pytest.mark.parametrize("rank", [0, 64])
def test_the_shapes_of_the_models(k, rank):
    for m in (512, 4096, 4608):
        x = normal(m + k, m, k, dtype=torch.bfloat16)
        lora_down = normal(k, rank, k, dtype=torch.bfloat16) if rank else None
        got = sparsify("identity", [x], lora_down=lora_down)
        assert_pruned_like(got, x)
        if lora_down is not None:
            assert_t_like(got[3], x, lora_down)


def adversarial(kind, m, k, dtype, seed):
    x = normal(seed, m, k)
    info = torch.finfo(dtype)
    if kind == "ties":
        x = (x * 1.5).round().clamp(-1, 1)
    elif kind == "zeros":
        x = torch.zeros_like(x)
    elif kind == "signed zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "denormals":
        x = x * (info.tiny / 8)
    elif kind == "huge":
        x = x.sign() * info.max * (1 - x.abs().clamp(max=1) / 4)
    elif kind == "outliers":
        x[:, ::97] *= 1000
    elif kind == "poisoned row":
        row = x[m // 2]
        row[::3], row[1::7], row[2::11] = torch.nan, torch.inf, -torch.inf
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind", ["ties", "zeros", "signed zeros", "denormals", "huge", "outliers", "poisoned row"]
)
def test_adversarial_data(kind, dtype):
    m, k = 200, 448
    x = adversarial(kind, m, k, dtype, 5)
    for score in (None, torch.rand(k, device="cuda"), torch.zeros(k, device="cuda")):
        assert_pruned_like(sparsify("identity", [x], score=score), x, score)
    lora_down = normal(6, 64, k, dtype=dtype)
    t = sparsify("identity", [x], lora_down=lora_down)[3]
    if kind == "poisoned row":
        assert not t[m // 2].isfinite().any()
        keep = torch.arange(m, device="cuda") != m // 2
        x, t = x[keep], t[keep]
    if kind != "huge":
        assert_t_like(t, x, lora_down)


def producer_inputs(producer, m, k, dtype, samples, present, vector_dtype, seed):
    """Inputs with the channels at about unit scale, some of them views with wide rows."""
    if producer.startswith("cat"):
        first = 64 * (seed % (k // 64))
        wide = normal(seed, m, k + 64, dtype=dtype)
        return [wide[:, :first] if first else normal(seed, m, 64, dtype=dtype), wide[:, first + 64 :]]
    if producer.endswith("_mul"):
        return list((2 * normal(seed, m, 2 * k)).to(dtype).chunk(2, -1))
    x = (3 * normal(seed, m, k)).to(dtype)
    if not producer.endswith("_norm"):
        return [x]
    x = (x.float() * 2 + 1.5).to(dtype)
    weight, bias = (normal(seed + i, k).to(vector_dtype or dtype) for i in (1, 2))
    modulation = normal(seed + 3, samples, 1, 6 * k).to(vector_dtype or dtype).chunk(6, -1)
    vectors = [weight, bias, modulation[1], modulation[4]]
    return [x, *(v if p else None for v, p in zip(vectors, present, strict=True))]


def shape_of(inputs, producer):
    k = sum(t.shape[-1] for t in inputs) if producer.startswith("cat") else inputs[0].shape[-1]
    return inputs[0].shape[0], k


@pytest.mark.parametrize("producer", PRODUCERS)
@given(
    samples=st.sampled_from([1, 2, 3]),
    rows=st.one_of(st.integers(1, 70), st.sampled_from([256])),
    blocks=st.sampled_from([1, 4]),
    dtype=dtypes,
    present=st.sampled_from([(False, False, True, True), (True,) * 4, (True, False, False, False)]),
    vector_dtype=st.sampled_from([None, torch.float32]),
    shifted=st.booleans(),
    seed=seeds,
)
@few
def test_producers(producer, samples, rows, blocks, dtype, present, vector_dtype, shifted, seed):
    inputs = producer_inputs(
        producer, samples * rows, 64 * blocks, dtype, samples, present, vector_dtype, seed
    )
    _, k = shape_of(inputs, producer)
    identity = torch.eye(k, device="cuda", dtype=dtype)
    shift = normal(seed, k) if shifted else None
    options = {"eps": 1e-6, "mult_offset": 1.0}
    got = sparsify(producer, inputs, lora_down=identity, shift=shift, **options)
    z = got[3]
    exact = semantics.produce(producer, [None if t is None else t.double() for t in inputs], **options)
    expected = exact.to(dtype)
    if shift is not None:
        expected = (expected.float() - shift).to(dtype)
    ulp = torch.finfo(dtype).eps * torch.maximum(expected.double().abs(), exact.abs())
    error = (z.double() - expected.double()).abs()
    assert (error <= ulp + 4e-7 * exact.abs().amax(-1, keepdim=True) + torch.finfo(dtype).tiny).all()
    # Far out in a tail even fp64's 1 + tanh(u) has no digits left.
    assert ((z != expected) & (exact.abs() > 1e-6)).sum() <= 2 + 0.01 * z.numel()
    assert_pruned_like(got, z)
    if not producer.endswith("_norm"):  # whose sums are added in another order without t
        for a, b in zip(got[:2], sparsify(producer, inputs, shift=shift, **options)[:2], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("producer", ["identity", "gelu", "silu_mul", "layer_norm", "cat_gelu_tanh"])
@pytest.mark.parametrize("rank", [0, 48, 160])
def test_what_older_gpus_run(producer, rank, monkeypatch):
    """The code for GPUs before Hopper gives the same bits, but for sums that are added in another order."""
    inputs = producer_inputs(producer, 2 * 75, 640, torch.bfloat16, 2, (True,) * 4, torch.float32, 3)
    k = shape_of(inputs, producer)[1]
    options = {
        "eps": 1e-6,
        "shift": normal(4, 2, k),
        "score": normal(5, k).abs(),
        "lora_down": normal(6, rank, k, dtype=torch.bfloat16) if rank else None,
    }
    plain = {name: options[name] for name in ("eps", "lora_down")}
    expected = [sparsify(producer, inputs, **given) for given in (options, plain)]
    defines, choose = sparsify_kernel.defines, sparsify_kernel.choose
    monkeypatch.setattr(sparsify_kernel, "defines", lambda *a: {**defines(*a), "PORTABLE": 1})
    monkeypatch.setattr(sparsify_kernel, "choose", lambda *a: choose(*a[:4], False, 100 * 1024))
    caches = sparsify_kernel.plan, sparsify_kernel._kernel
    for cache in caches:
        cache.cache_clear()
    try:
        got = [sparsify(producer, inputs, **given) for given in (options, plain)]
    finally:
        for cache in caches:
            cache.cache_clear()
    for old, new in zip(got, expected, strict=True):
        if producer.endswith("_norm"):  # whose moments are sums, too
            assert (old[1] != new[1]).float().mean() < 0.01
        else:
            assert torch.equal(old[0], new[0])
            assert torch.equal(old[1], new[1])
        torch.testing.assert_close(old[2], new[2], rtol=1e-4, atol=0)
        torch.testing.assert_close(old[3], new[3], rtol=2**-7, atol=2e-2)


@pytest.mark.parametrize("producer", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize(("m", "k"), [(70, 3072), (70, 12288), (4096, 3072), (33, 20480)])
def test_norms_of_wide_rows(producer, m, k):
    """Rows that stay in shared memory, that partly do, and that a cluster shares; far from zero mean."""
    inputs = producer_inputs(producer, m, k, torch.bfloat16, 1, (False, False, True, True), None, 3)
    inputs[0] = (inputs[0].float() + 50).to(torch.bfloat16)
    for rank in (0, 64):
        identity = torch.eye(64, k, device="cuda", dtype=torch.bfloat16) if rank else None
        got = sparsify(producer, inputs, eps=1e-6, mult_offset=1.0, lora_down=identity)
        exact = semantics.produce(producer, [None if t is None else t.double() for t in inputs], 1e-6, 1.0)
        if rank:
            torch.testing.assert_close(got[3].double(), exact[:, :rank], rtol=2**-8, atol=1e-4)
        kept = layout.kept_indices(got[1], m)
        chosen = exact.unflatten(-1, (-1, 4)).gather(-1, kept)
        torch.testing.assert_close(got[0].double(), chosen.flatten(-2), rtol=2**-8, atol=1e-4)
        smallest_kept = chosen.abs().amin(-1)
        best_two = exact.abs().unflatten(-1, (-1, 4)).topk(2).values[..., 1]
        assert (smallest_kept >= best_two * (1 - 2**-7) - 1e-4).all()


@pytest.mark.parametrize("producer", ["identity", "gelu", "silu_mul", "layer_norm", "cat_gelu_tanh"])
def test_repeats_are_bit_identical(producer):
    m, k = 1000, 3072
    inputs = producer_inputs(producer, m, k, torch.bfloat16, 2, (True,) * 4, None, 7)
    lora_down = normal(8, 64, shape_of(inputs, producer)[1], dtype=torch.bfloat16)
    first = sparsify(producer, inputs, eps=1e-6, lora_down=lora_down)
    for _ in range(20):
        again = sparsify(producer, inputs, eps=1e-6, lora_down=lora_down)
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, again, strict=True)
        )


def test_a_poisoned_row_stays_alone():
    """NaN in one row changes no bit of another, through the norm and the LoRA branch as well."""
    inputs = producer_inputs("layer_norm", 130, 512, torch.bfloat16, 1, (True,) * 4, None, 9)
    lora_down = normal(8, 64, 512, dtype=torch.bfloat16)
    clean = sparsify("layer_norm", inputs, lora_down=lora_down)
    inputs[0] = inputs[0].clone()
    inputs[0][77, 5] = torch.nan
    poisoned = sparsify("layer_norm", inputs, lora_down=lora_down)
    others = torch.arange(130, device="cuda") != 77
    for i in (0, 2, 3):
        assert torch.equal(clean[i][others], poisoned[i][others])
    assert torch.equal(
        layout.kept_indices(clean[1], 130)[others], layout.kept_indices(poisoned[1], 130)[others]
    )


def test_leading_dimensions_and_strided_rows():
    wide = normal(1, 3, 50, 4 * 128, dtype=torch.bfloat16)
    for x in (wide[..., 128:256], wide[:, 10:40, :128], wide.transpose(0, 1)[..., :64], wide[:, ::2, 64:192]):
        assert_pruned_like(sparsify("identity", [x]), x.reshape(-1, x.shape[-1]))


def test_no_rows():
    values, metadata, scale, t = sparsify(
        "identity", [torch.empty(0, 64, device="cuda", dtype=torch.float16)]
    )
    assert values.shape == (0, 32)
    assert metadata.shape == (0, 1, 128)
    assert scale.shape == (0,)
    assert t.shape == (0, 0)


def test_under_graph_capture_and_on_another_stream():
    x = normal(1, 777, 1024, dtype=torch.bfloat16)
    lora_down = normal(2, 64, 1024, dtype=torch.bfloat16)
    sparsify("gelu", [x], lora_down=lora_down)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        got = sparsify("gelu", [y], lora_down=lora_down)
    x.copy_(normal(3, 777, 1024))
    graph.replay()
    expected = sparsify("gelu", [x * 2], lora_down=lora_down)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        got = sparsify("gelu", [x * 2], lora_down=lora_down)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda x: {"inputs": [x.float()]}, TypeError, "bfloat16 or float16"),
        (lambda x: {"inputs": [x.cpu()]}, TypeError, "cpu"),
        (lambda x: {"inputs": [x[:, :96].contiguous()]}, ValueError, "multiple of 64"),
        (lambda x: {"inputs": [x.flatten()[1:-127].view(-1, 128)]}, ValueError, "multiple of 16 bytes"),
        (lambda x: {"shift": x[0, :64].clone()}, ValueError, "shift .* needs K = 128"),
        (lambda x: {"shift": x[:3]}, ValueError, "divides M"),
        (lambda x: {"score": x[0, :64].clone()}, ValueError, "score needs 128"),
        (lambda x: {"score": x[0].double()}, TypeError, "score must be"),
        (lambda x: {"lora_down": x[:24]}, ValueError, "multiple of 16"),
        (lambda x: {"lora_down": x[:16].half()}, TypeError, "lora_down must be torch.bfloat16"),
        (lambda x: {"compensation": "none"}, ValueError, "compensation"),
        (lambda x: {"producer": "softmax"}, ValueError, "producer"),
        (lambda x: {"producer": "silu_mul", "inputs": [x, x[1:]]}, ValueError, "do not fit"),
        (lambda x: {"producer": "rms_norm", "inputs": [x, None, None, x[:7], None]}, ValueError, "divides M"),
    ],
)
def test_what_it_does_not_take(arguments, error, message):
    x = normal(1, 32, 128, dtype=torch.bfloat16)
    given_arguments = {"producer": "identity", "inputs": [x], **arguments(x)}
    with pytest.raises(error, match=message):
        sparsify(**given_arguments)
