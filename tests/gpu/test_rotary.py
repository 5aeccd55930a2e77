"""The rotary kernel against its definition in fp64, to one rounding."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lynx_compile.runtime import kernels, rotary_kernel  # noqa: F401 (importing kernels registers them)
from lynx_compile.runtime.rotary import rotary

pytestmark = pytest.mark.gpu


def normal(seed, *shape, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def exact(parts, weights, eps, cos, sin):
    lists = ([None if t is None else t.double() for t in given] for given in (parts, weights, cos, sin))
    parts, weights, cos, sin = lists
    return rotary([p.cpu() for p in parts], [None if w is None else w.cpu() for w in weights], eps,
                  [c.cpu() for c in cos], [s.cpu() for s in sin])  # fmt: skip


def assert_close(got, want):
    """One rounding of the exact result, and what fp32 leaves of two products that may cancel."""
    eps = torch.finfo(got.dtype).eps
    scale = want.abs().amax(-1, keepdim=True)
    error = (got.cpu().double() - want).abs()
    assert (error <= 0.51 * eps * want.abs() + 1e-5 * scale).all()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    channels=st.sampled_from(rotary_kernel.CHANNELS),
    heads=st.integers(1, 30),
    samples=st.integers(1, 3),
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=2),
    normed=st.booleans(),
    weight=st.sampled_from(["none", "own", "fp32"]),
    pair=st.integers(1, 2),
    angles_of_each=st.booleans(),
    layout=st.sampled_from(["plain", "in a wider projection", "heads first", "misaligned"]),
    seed=st.integers(0, 2**31),
)
def test_is_the_definition(
    dtype, channels, heads, samples, lengths, normed, weight, pair, angles_of_each, layout, seed
):
    parts, weights, cos, sin = [], [], [], []
    for i, length in enumerate(lengths):
        shape = samples, length, heads, channels
        x = normal(seed + i, *shape, dtype=dtype)
        if layout == "in a wider projection":
            wide = normal(seed + i, samples, length, 3 * heads * channels, dtype=dtype)
            x = wide[..., heads * channels : 2 * heads * channels].unflatten(-1, (heads, channels))
        elif layout == "heads first":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "misaligned":
            x = normal(seed + i, x.numel() + 1, dtype=dtype)[1:].view(shape)
        vector = normal(seed + 7, channels, dtype=torch.float32 if weight == "fp32" else dtype)
        numbers = normal(seed + 9 + i, samples if angles_of_each else 1, length, channels // 2, 2)
        parts.append(x)
        weights.append(None if weight == "none" else vector)
        if pair == 1:  # as the parts of complex numbers
            cos.append(numbers[..., :1])
            sin.append(numbers[..., 1:])
        else:
            cos.append(numbers)
            sin.append(numbers.flip(-1))
    eps = [1e-6 if normed else -1.0] * len(parts)
    for _ in range(2):  # the second call is one that came before
        got = rotary(parts, weights, eps, cos, sin)
        assert got.shape == (samples, sum(lengths), heads, channels)
        assert_close(got, exact(parts, weights, eps, cos, sin))


def test_flux_sizes_and_cuda_graphs():
    parts = [normal(i, 1, length, 24, 128, dtype=torch.bfloat16) for i, length in enumerate((512, 4096))]
    weights = [normal(5 + i, 128, dtype=torch.bfloat16) for i in range(2)]
    tables = [[normal(9 + i, 1, length, 64, 2) for length in (512, 4096)] for i in range(2)]
    arguments = parts, weights, [1e-6, 1e-6], *tables
    want = rotary(*arguments)
    assert_close(want, exact(*arguments))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = rotary(*arguments)
    for part in parts:
        part.copy_(-part)
    graph.replay()
    assert torch.equal(got, -want)


def test_wrong_operands_are_named():
    x, table = normal(0, 1, 8, 2, 64, dtype=torch.bfloat16), normal(1, 1, 8, 32, 1)
    with pytest.raises(ValueError, match="cos is"):
        rotary([x], [None], [1e-6], [table[:, :4]], [table])
    with pytest.raises(TypeError, match=r"sin is torch\.float64"):
        rotary([x], [None], [1e-6], [table], [table.double()])
    with pytest.raises(ValueError, match="a part is"):
        rotary([x[..., :48]], [None], [1e-6], [table[:, :, :24]], [table[:, :, :24]])
