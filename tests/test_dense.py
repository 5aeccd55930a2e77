"""Layers below the break-even: the definition's numbers, in a few launches."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lynx_compile.runtime import dense, semantics

M, K, N = 12, 64, 32
G = torch.Generator().manual_seed(0)


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=G, dtype=torch.float64).to(dtype)


def inputs_of(producer, samples, dtype):
    shapes = {"weight?": (K,), "bias?": (K,), "mult?": (samples, 1, K), "add?": (samples, K)}
    return [normal(*shapes.get(name, (2, M // 2, K)), dtype=dtype) for name in semantics.PRODUCERS[producer]]


@pytest.mark.parametrize("samples", [1, 2, M])
@pytest.mark.parametrize("producer", semantics.PRODUCERS)
def test_x_is_the_definitions(producer, samples):
    inputs = inputs_of(producer, samples, torch.float64)
    for given in (inputs, [inputs[0].transpose(0, 1).contiguous().transpose(0, 1), *inputs[1:]]):
        got, want = (produce(producer, given, 1e-6, 1.0) for produce in (dense.produce, semantics.produce))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("missing", range(1, 5))
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("producer", ["layer_norm", "rms_norm"])
def test_norms_without_some_of_their_tensors(producer, offset, missing):
    inputs = inputs_of(producer, 2, torch.float64)
    inputs[missing] = None
    got, want = (produce(producer, inputs, 1e-6, offset) for produce in (dense.produce, semantics.produce))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vectors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("producer", ["layer_norm", "rms_norm"])
def test_narrow_dtypes_round_twice(producer, vectors):
    """Behind the norm and behind the modulation, whatever the vectors' dtype; X keeps its own."""
    x, *others = inputs_of(producer, 2, torch.bfloat16)
    given = [x, *(other.to(vectors) for other in others)]
    got = dense.produce(producer, given, 1e-6, 1.0)
    want = semantics.produce(producer, [t.double() for t in given], 1e-6, 1.0)
    assert got.dtype == torch.bfloat16
    magnitude = semantics.produce(producer, [x.double(), None, None, None, None], 1e-6, 0.0).abs() * 8 + 8
    assert ((got - want).abs() <= 2.0**-8 * magnitude).all()


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_y_is_the_layer_and_its_epilogue(gate, residual, samples):
    x, weight, bias = normal(M, K), normal(N, K), normal(N)
    down, up = normal(4, K), normal(N, 4)
    gates = normal(samples, 1, N) if gate else None
    kept = normal(2, M // 2, N) if residual else None
    got = dense.linear(
        x, weight, branches=[(down, up)], bias=bias, activation="silu", gate=gates, residual=kept
    )
    want = torch.nn.functional.silu(x @ weight.T + bias + x @ down.T @ up.T)
    if gate:
        want = want * gates.reshape(samples, N).repeat_interleave(M // samples, 0)
    if residual:
        want = want + kept.reshape(M, N)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


class Launches(TorchDispatchMode):
    """Ops that launch something, on CUDA as here: no views and no allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"):
            returns = op._schema.returns
            if not any(value.alias_info for value in returns) and "reshape" not in op.name():
                self.names.append(op.name())
        return op(*args, **(kwargs or {}))


def test_few_launches():
    given = inputs_of("layer_norm", 2, torch.bfloat16)
    weight, gate = normal(N, K, dtype=torch.bfloat16), normal(1, N, dtype=torch.bfloat16)
    with torch.no_grad(), Launches() as seen:
        x = dense.produce("layer_norm", given, 1e-6, 1.0)
        dense.linear(x, weight, gate=gate, residual=normal(M, N, dtype=torch.bfloat16))
    kept = [name for name in seen.names if "randn" not in name and "_to_copy" not in name]
    assert len(kept) <= 6, kept


@pytest.mark.parametrize("samples", [5, 7])
def test_uneven_samples_are_refused(samples):
    given = inputs_of("layer_norm", samples, torch.float64)
    with pytest.raises(ValueError, match=f"{samples} samples cannot share"):
        dense.produce("layer_norm", given, 1e-6, 1.0)


def test_unknown_producers_are_refused():
    with pytest.raises(ValueError, match="gellu"):
        dense.produce("gellu", [normal(M, K), normal(M, K)], 1e-6, 1.0)


@pytest.mark.parametrize("rows", [(2, 0), (0, 3)])
def test_no_rows_have_no_modulation(rows):
    """Neither one a sample, nor one a token, of which there are none."""
    x = normal(*rows, K)
    for mult in (normal(rows[0], 1, K), normal(*rows, K)):
        assert dense.produce("layer_norm", [x, None, None, mult, mult], 1e-6, 1.0).shape == (0, K)
        assert dense.linear(x.reshape(0, K), normal(K, K), gate=mult).shape == (0, K)


@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (2, M), (M, 2), (M, 1)])
def test_modulations_of_different_samples(counts):
    """One row a token beside one a sample, say."""
    mult, add = (normal(n, K, dtype=torch.float64) for n in counts)
    x = normal(M, K, dtype=torch.float64)
    rows = [t.repeat_interleave(M // len(t), 0) for t in (mult, add)]
    torch.testing.assert_close(dense.scaled(x, mult, add), x * rows[0] + rows[1])
