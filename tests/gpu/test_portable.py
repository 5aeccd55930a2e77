"""The portable GEMM on `mma.sp` against the fp64 definition, on whatever GPU is here."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lynx_compile.runtime import semantics
from lynx_compile.runtime.gemm_mma import sparse_gemm

from .conftest import Operands, assert_rounded

pytestmark = pytest.mark.gpu


def run(operands):
    return sparse_gemm(*operands.inputs(), **operands.options())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    m=st.one_of(st.integers(1, 400), st.sampled_from([63, 64, 65, 127, 128, 129, 1024, 1025])),
    n=st.integers(1, 40).map(lambda i: 16 * i),
    k=st.integers(1, 20).map(lambda i: 64 * i),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    rank=st.sampled_from([0, 16, 64, 80, 256]),
    bias=st.booleans(),
    activation=st.sampled_from(sorted(semantics.ACTIVATIONS)),
    samples=st.sampled_from([0, 1, 3]),
    residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_epilogue(m, n, k, dtype, rank, bias, activation, samples, residual, seed):
    operands = Operands(
        m * max(samples, 1), n, k, dtype=dtype, rank=rank, bias=bias, activation=activation, samples=samples,
        residual=residual, seed=seed,
    )  # fmt: skip
    assert_rounded(run(operands), operands)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(4096, 3072, 3072), (4608, 3072, 15360), (20000, 1536, 1536), (8192, 8192, 3072)]
)
def test_model_shapes(m, n, k):
    operands = Operands(m, n, k, rank=64, bias=True)
    y = run(operands)
    exact = operands.exact()
    assert (y.double() - exact).norm() / exact.norm() < 1.7e-3  # one rounding to bf16


def test_no_worse_than_cublas_on_the_pruned_matrix():
    operands = Operands(2048, 2048, 12288)
    operands.scale.fill_(1.0)
    exact = operands.exact()
    ours, cublas = run(operands), operands.pruned @ operands.weight.T
    assert (ours.double() - exact).norm() <= 1.01 * (cublas.double() - exact).norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_stays_alone(value):
    def edit(x):
        x[70, 5] = value

    good, bad = Operands(200, 64, 256, rank=16), Operands(200, 64, 256, rank=16, edit=edit)
    y, poisoned = run(good), run(bad)
    others = torch.arange(200, device="cuda") != 70
    assert torch.equal(y[others], poisoned[others])
    assert not poisoned[70].isfinite().any()


def test_a_row_of_zeros_gives_bias_and_lora_exactly():
    def edit(x):
        x[3] = 0

    operands = Operands(130, 48, 128, rank=16, bias=True, edit=edit)
    operands.t[3] = operands.t[4]
    exact = (operands.t[3].double() @ operands.lora_up.double().T + operands.bias.double()).float()
    torch.testing.assert_close(run(operands)[3].float(), exact, rtol=2**-8, atol=1e-5)
    operands.t[3] = 0
    assert torch.equal(run(operands)[3], operands.bias)


def test_extreme_magnitudes():
    def edit(x):
        x[::3] *= 1e15
        x[1::3] *= 1e-36

    operands = Operands(100, 32, 192, edit=edit)
    assert_rounded(run(operands), operands)


def test_runs_are_bit_identical():
    operands = Operands(1111, 1040, 2048, rank=64, bias=True, activation="gelu", samples=1, residual=True)
    first = run(operands)
    assert all(torch.equal(run(operands), first) for _ in range(20))
