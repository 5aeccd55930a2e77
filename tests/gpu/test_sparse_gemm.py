"""The Hopper GEMM against `semantics.sparse_linear` in fp64: shapes, tiles, epilogues, hostile data."""

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lynx_compile.runtime import build, calls, gemm_mma, gemm_sm90, layout, operands, semantics

pytestmark = pytest.mark.gpu

few = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=150)
dtypes = st.sampled_from([torch.bfloat16, torch.float16])
seeds = st.integers(0, 2**31)
rows = st.one_of(
    st.sampled_from([1, 2, 15, 63, 64, 65, 127, 128, 129, 192, 255, 256, 257, 511, 512, 513, 4608]),
    st.integers(1, 3000),
    st.integers(3000, 20000),
)
GUARD = 300  # poisoned rows in front of and behind y
PAPER_SHAPES = [
    *((mn, mn, k) for k in (3072, 12288) for mn in (2048, 4096, 8192)),
    *((4096, n, 3072) for n in (3072, 9216, 12288)),
    (4096, 3072, 12288),
    (4608, 21504, 3072),
    (4608, 3072, 15360),
]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Variants at once and in parallel, instead of one by one on first use; of fp16 those that tests use."""
    units = ((unit, dict(unit.defines)) for unit in gemm_sm90.variants())
    build.prebuild(unit for unit, macros in units if macros["BF16"] or macros["ACTIVATION"] == 0)


def splittable(k, tile):
    """k, or the least one that the tile can split."""
    return max(k, 64 * tile.split) if tile else k


def guarded_empty(buffers):
    """An allocator of outputs in the middle of NaN, where an element not written and a write outside show."""

    def empty(shape, strides, dtype):
        m, n = shape
        buffers.append(torch.full((m + 2 * GUARD, n), torch.nan, dtype=dtype, device="cuda"))
        return buffers[-1][GUARD : GUARD + m]

    return empty


class Case:
    """Random operands of one call and its exact result.

    bias, samples: rows of the bias and of the gate; 0 for none.
    """

    def __init__(self, m, n, k, dtype=torch.bfloat16, seed=0, rank=0, bias=1, activation="none", samples=0,
                 residual=False):  # fmt: skip
        self.generator = torch.Generator("cuda").manual_seed(seed)
        self.m, self.n, self.k, self.dtype = m, n, k, dtype
        x = self.normal(m, k)
        self.pruned = torch.where(semantics.keep_mask(x.abs()), x, torch.zeros_like(x))
        self.values, self.metadata = layout.pack(self.pruned, semantics.keep_mask(x.abs()))
        self.scale = 0.5 + torch.rand(m, generator=self.generator, device="cuda")
        beside = 16 * (seed % 2)  # t may be columns of a wider matrix
        self.t = self.normal(m, beside + rank + beside)[:, beside : beside + rank]
        self.weight = self.normal(n, k, scale=k**-0.5)
        self.options = {
            "lora_up": self.normal(n, rank, scale=rank**-0.5) if rank else None,
            "bias": self.normal(bias, n) if bias else None,
            "activation": activation,
            "gate": self.normal(samples, n) if samples else None,
            "residual": self.normal(m, n) if residual else None,
        }

    def normal(self, *shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=self.generator, device="cuda")).to(self.dtype)

    def on(self, other):
        """This case with the X of another one."""
        self.pruned, self.values, self.metadata, self.scale = (
            other.pruned, other.values, other.metadata, other.scale)  # fmt: skip
        return self

    def layer(self):
        return operands.Layer(self.t, self.weight, **self.options)

    def run(self, tile=None):
        return gemm_sm90.sparse_gemm(
            self.values, self.metadata, self.scale, self.t, self.weight, **self.options, tile=tile
        )

    def exact(self, magnitudes=False):
        """The result in fp64; with `magnitudes` of the operands' absolute values, without the activation."""
        change = (lambda x: None if x is None else x.double().abs()) if magnitudes else _double
        options = {name: x if name == "activation" else change(x) for name, x in self.options.items()}
        if magnitudes:
            options["activation"] = "none"
        operands = (self.pruned, self.scale, self.t, self.weight)
        return semantics.sparse_linear(*map(change, operands), **options)

    def check(self, y):
        """One rounding to 16 bits of a result with fp32 accumulation error, element by element."""
        exact = self.exact()
        rounding = torch.finfo(self.dtype).eps / 2 * exact.abs() + torch.finfo(self.dtype).tiny
        bound = 1.01 * rounding + 4e-6 * self.exact(magnitudes=True)
        wrong = ~((y.double() - exact).abs() <= bound)
        assert not wrong.any(), (
            f"{int(wrong.sum())} of {wrong.numel()}, first at {wrong.nonzero()[0].tolist()}"
        )


def _double(x):
    return None if x is None else x.double()


@many
@given(
    m=rows,
    n=st.integers(1, 60).map(lambda i: 16 * i),
    k=st.integers(1, 24).map(lambda i: 64 * i),
    rank=st.integers(0, 16).map(lambda i: 16 * i),
    dtype=dtypes,
    tile=st.sampled_from([None, *gemm_sm90.RATES]),
    seed=seeds,
)
def test_any_shape_on_any_tile(m, n, k, rank, dtype, tile, seed):
    case = Case(m, n, splittable(k, tile), dtype, seed, rank)
    case.check(case.run(tile))


@many
@given(
    samples=st.sampled_from([0, 1, 2, 3, 7]),
    rows_per_sample=st.one_of(st.sampled_from([1, 2, 64, 129]), st.integers(1, 900)),
    n=st.integers(1, 40).map(lambda i: 16 * i),
    activation=st.sampled_from(list(semantics.ACTIVATIONS)),
    residual=st.booleans(),
    bias=st.sampled_from(["none", "one", "samples", "rows"]),
    rank=st.sampled_from([0, 16, 64]),
    dtype=dtypes,
    tile=st.sampled_from([None, None, *gemm_sm90.RATES]),
    seed=seeds,
)
def test_any_epilogue(samples, rows_per_sample, n, activation, residual, bias, rank, dtype, tile, seed):
    activation = activation if dtype == torch.bfloat16 else "none"
    m = max(samples, 1) * rows_per_sample
    bias_rows = {"none": 0, "one": 1, "samples": max(samples, 1), "rows": m}[bias]
    case = Case(m, n, 256, dtype, seed, rank, bias_rows, activation, samples, residual)
    case.check(case.run(tile))


@pytest.mark.parametrize("tile", list(gemm_sm90.RATES), ids=str)
@pytest.mark.parametrize("rows_per_sample", [256, 192, 77])
def test_a_bias_for_each_sample_on_any_tile(tile, rows_per_sample):
    """With samples that end where the rows of a warpgroup do, inside them, and several of them inside."""
    case = Case(5 * rows_per_sample, 400, 320, rank=16, bias=5, activation="gelu")
    case.check(case.run(tile))


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("tile", list(gemm_sm90.RATES), ids=str)
def test_gate_and_residual_on_any_tile(tile, samples):
    case = Case(4 * 333, 784, 320, rank=32, bias=1, activation="gelu_tanh", samples=samples, residual=True)
    case.check(case.run(tile))


@few
@given(
    m=rows,
    k=st.integers(1, 12).map(lambda i: 64 * i),
    layers=st.lists(
        st.tuples(
            st.integers(1, 40).map(lambda i: 16 * i),
            st.sampled_from([0, 16, 64, 80]),
            st.sampled_from([0, 1, 2]),
            st.sampled_from(["none", "none", "gelu"]),
            st.booleans(),
        ),
        min_size=2,
        max_size=7,
    ),
    tile=st.sampled_from([None, *gemm_sm90.RATES]),
    dtype=dtypes,
    seed=seeds,
)
def test_layers_of_one_x_share_launches(m, k, layers, tile, dtype, seed):
    """Each (n, rank, rows of the bias, activation, gate and residual) of its own."""
    m, k = m + m % 2, splittable(k, tile)
    if dtype == torch.float16:
        layers = [(n, rank, bias, "none", tail) for n, rank, bias, _, tail in layers]
    cases = [
        Case(m, n, k, dtype, seed + i, rank, bias, activation, int(tail), tail)
        for i, (n, rank, bias, activation, tail) in enumerate(layers)
    ]
    x = cases[0]
    call = gemm_sm90.prepare_all(
        x.values, x.metadata, x.scale, [case.on(x).layer() for case in cases], tile=tile
    )
    for case, y in zip(cases, call.run(), strict=True):
        case.check(y)
    alone = sum(tail for *_, tail in layers)
    activations = [activation for *_, activation, tail in layers if not tail]
    shared = sum(-(-activations.count(a) // gemm_sm90.LAYERS) for a in set(activations))
    assert len(call.launches) == alone + shared


@pytest.mark.parametrize("gemm", [gemm_sm90, gemm_mma])
@pytest.mark.parametrize("tail", [0, 1])
def test_y_may_be_columns_of_a_wider_matrix(gemm, tail):
    case = Case(300, 208, 192, rank=16, samples=tail, residual=bool(tail))
    x = case.values, case.metadata, case.scale
    (kernel, grid, packed, encode), *more = gemm.prepare_all(*x, [case.layer()], y_stride=256).launches
    assert not more
    whole = torch.full((300, 256), torch.nan, dtype=case.dtype, device="cuda")
    kernel.launch(0, grid, packed, encode(whole[:, 32:].data_ptr()))
    case.check(whole[:, 32:240])
    assert whole[:, :32].isnan().all()
    assert whole[:, 240:].isnan().all()


@few
@given(
    m=rows,
    n=st.sampled_from([16, 208, 784]),
    tile=st.sampled_from(list(gemm_sm90.RATES)),
    residual=st.booleans(),
)
def test_writes_all_of_y_and_nothing_else(m, n, tile, residual):
    case = Case(m, n, 256, rank=32, residual=residual)
    buffers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "empty", guarded_empty(buffers))
        case.check(case.run(tile))
    assert buffers[0][:GUARD].isnan().all()
    assert buffers[0][-GUARD:].isnan().all()


@pytest.mark.parametrize(("m", "n", "k"), PAPER_SHAPES)
def test_no_worse_than_cublas_on_the_pruned_matrix(m, n, k):
    case = Case(m, n, k, bias=0)
    case.scale.fill_(1.0)
    exact = case.exact()
    ours = (case.run().double() - exact).norm()
    cublas = ((case.pruned @ case.weight.T).double() - exact).norm()
    assert ours <= 1.001 * cublas


@pytest.mark.parametrize("tile", list(gemm_sm90.RATES), ids=str)
@pytest.mark.parametrize("shape", [(4608, 3072, 3072), (777, 1040, 1088)])
def test_repeats_bit_for_bit(tile, shape):
    case = Case(*shape, rank=64, activation="gelu_tanh")
    first = case.run(tile)
    case.check(first)
    for _ in range(20):
        assert torch.equal(case.run(tile), first)


@pytest.mark.parametrize("k", [3072, 12288])
@pytest.mark.parametrize("m", [77, 256, 512, 1024])
def test_few_rows_are_split_exactly(m, k):
    """As chosen: split over the blocks of a cluster where tiles are few, with everything behind it."""
    case = Case(m, 3072, k, rank=64, activation="gelu_tanh", samples=1, residual=True)
    first = case.run()
    case.check(first)
    assert all(torch.equal(case.run(), first) for _ in range(20))


@few
@given(
    m=st.integers(2, 600), dtype=dtypes, value=st.sampled_from([torch.nan, torch.inf, -torch.inf]), seed=seeds
)
def test_a_non_finite_row_poisons_no_other(m, dtype, value, seed):
    case = Case(m, 256, 512, dtype, seed, rank=32)
    clean = case.run()
    row = seed % m
    case.values[row, seed % 256] = value
    case.scale[row] = torch.nan
    case.t[row] = value
    y = case.run()
    assert not y[row].isfinite().any()
    others = torch.arange(m, device="cuda") != row
    assert torch.equal(y[others], clean[others])


def test_an_all_zero_row_is_exactly_the_bias():
    case = Case(300, 512, 640)
    case.values[7] = 0
    case.scale[7] = 0
    assert torch.equal(case.run()[7], case.options["bias"][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_huge_and_tiny_values(dtype):
    case = Case(256, 256, 256, dtype, rank=16)
    case.pruned = case.pruned * 100.0
    case.values *= 100.0
    case.weight *= torch.finfo(dtype).tiny * 8
    case.scale *= 1e3
    case.check(case.run())


def test_on_another_stream_and_in_a_cuda_graph():
    case = Case(1000, 768, 512, rank=64)
    expected = case.run()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = case.run()
    stream.synchronize()
    assert torch.equal(y, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.run()
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, expected)


def test_waits_for_the_kernel_in_front():
    """Launched early, it must not read operands before their producer is done with them."""
    case = Case(4096, 3072, 3072, rank=64, residual=True, samples=2)
    expected = case.run()
    tensors = [case.values, case.metadata, case.scale, case.t, case.options["gate"], case.options["residual"]]
    sources = [tensor.clone() for tensor in tensors]
    for _ in range(10):
        for tensor in tensors:
            tensor.zero_()
        torch.cuda._sleep(1_000_000)
        for tensor, source in zip(tensors, sources, strict=True):
            tensor.copy_(source)
        assert torch.equal(case.run(), expected)
