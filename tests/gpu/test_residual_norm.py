"""The kernel of norm, gate and residual against its definition in fp64, to one rounding."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lynx_compile.runtime import kernels  # noqa: F401 (importing it registers them)
from lynx_compile.runtime.residual_norm import CHANNELS, residual_norm

pytestmark = pytest.mark.gpu


def normal(seed, *shape, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def exact(*arguments):
    return residual_norm(*[a.double().cpu() if isinstance(a, torch.Tensor) else a for a in arguments])


def assert_close(got, want, residual):
    """One rounding of the exact result, and what fp32 leaves of a sum that may cancel."""
    error = (got.cpu().double() - want).abs()
    allowed = 0.51 * torch.finfo(got.dtype).eps * want.abs()
    assert (error <= allowed + 1e-5 * (1 + want.abs() + residual.cpu().double().abs())).all()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    columns=st.sampled_from([CHANNELS[0], 64, 1024, 1032, 2304, 3072, 3840, 5120, CHANNELS[-1]]),
    samples=st.integers(1, 3),
    tokens=st.integers(0, 70),
    weight=st.sampled_from(["none", "own", "fp32"]),
    gate=st.sampled_from(["none", "own", "fp32", "one of four"]),
    gate_a_token=st.booleans(),
    layout=st.sampled_from(["plain", "in a wider matrix", "every other row", "misaligned"]),
    seed=st.integers(0, 2**31),
)
def test_is_the_definition(dtype, columns, samples, tokens, weight, gate, gate_a_token, layout, seed):
    shape = samples, tokens, columns
    x, residual = normal(seed, *shape, dtype=dtype), normal(seed + 1, *shape, dtype=dtype)
    if layout == "in a wider matrix":
        x = normal(seed, samples, tokens, 2 * columns, dtype=dtype)[..., columns:]
    elif layout == "every other row":
        residual = normal(seed, samples, 2 * tokens, columns, dtype=dtype)[:, ::2]
    elif layout == "misaligned":
        x = normal(seed, x.numel() + 1, dtype=dtype)[1:].view(shape)
    vector = normal(seed + 2, columns, dtype=torch.float32 if weight == "fp32" else dtype)
    mult = normal(
        seed + 3,
        samples,
        tokens if gate_a_token else 1,
        columns,
        dtype=torch.float32 if gate == "fp32" else dtype,
    )
    if gate == "one of four":
        mult = normal(seed + 3, samples, 1, 4 * columns, dtype=dtype).chunk(4, 2)[1]
    arguments = (
        x, None if weight == "none" else vector, None if gate == "none" else mult, residual, 1e-5, 0.5,
    )  # fmt: skip
    for _ in range(2):  # the second call is one that came before
        got = residual_norm(*arguments)
        assert got.shape == shape
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert_close(got, exact(*arguments), residual)


def test_z_image_sizes_and_cuda_graphs():
    x, residual = (normal(i, 1, 4224, 3840, dtype=torch.bfloat16) for i in range(2))
    weight, gate = normal(2, 3840, dtype=torch.bfloat16), normal(3, 1, 1, 3840, dtype=torch.bfloat16)
    arguments = x, weight, gate, residual, 1e-5
    want = residual_norm(*arguments)
    assert_close(want, exact(*arguments), residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = residual_norm(*arguments)
    x.neg_(), residual.neg_()
    graph.replay()
    assert torch.equal(got, -want)


def test_wrong_operands_are_named():
    x, weight = normal(0, 2, 8, 64, dtype=torch.bfloat16), normal(1, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="x is"):
        residual_norm(x, None, None, x[:, :4], 1e-5)
    with pytest.raises(ValueError, match="weight is"):
        residual_norm(x, weight[:32], None, x, 1e-5)
    with pytest.raises(ValueError, match="mult is"):
        residual_norm(x, None, normal(2, 3, 64, dtype=torch.bfloat16), x, 1e-5)
    with pytest.raises(TypeError, match=r"residual is torch\.float32"):
        residual_norm(x, weight, None, x.float(), 1e-5)
