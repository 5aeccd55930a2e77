"""The `rt_lynx::` ops: layout round trip, contract of the fakes, and equality with the semantics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx_compile.runtime import layout, ops, semantics

dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


@given(m=st.integers(0, 200), blocks=st.integers(1, 3), dtype=dtypes)
@settings(max_examples=60, deadline=None)
def test_pack_then_unpack_is_exact(m, blocks, dtype):
    x = torch.randn(m, 64 * blocks).to(dtype)
    pruned, keep, _, _ = semantics.sparsify(x)
    values, metadata = layout.pack(pruned, keep)
    assert values.shape == (m, 32 * blocks)
    assert tuple(metadata.shape) == layout.metadata_shape(m, 64 * blocks)
    assert torch.equal(layout.unpack(values, metadata), pruned)


def test_metadata_words_are_where_wgmma_reads_them():
    """Thread 32w + l holds rows 16w + l//4 (low half) and + 8 (high half), columns 16·(l % 4) … +15."""
    m, k = 70, 128
    x = torch.randn(m, k)
    pruned, keep, _, _ = semantics.sparsify(x)
    words = layout.pack(pruned, keep)[1].to(torch.int64) & 0xFFFFFFFF
    for row in range(layout.BLOCK_ROWS * 2):
        block, inner = divmod(row, 64)
        warp, high, quad_row = inner // 16, inner % 16 // 8, inner % 8
        for column in range(0, k, 4):
            thread = 32 * warp + 4 * quad_row + column % 64 // 16
            shift = 16 * high + 4 * (column % 16 // 4)
            nibble = words[block, column // 64, thread].item() >> shift & 0xF
            kept = keep[row, column : column + 4].nonzero().flatten().tolist() if row < m else [0, 1]
            assert nibble == kept[0] | kept[1] << 2


@given(
    m=st.integers(1, 130),
    k=st.sampled_from([64, 128, 192]),
    n=st.sampled_from([16, 48]),
    rank=st.sampled_from([0, 16, 48]),
    dtype=dtypes,
    compensation=st.sampled_from(semantics.COMPENSATIONS),
    with_vectors=st.booleans(),
    samples=st.sampled_from([1, 2]),
    deflate=st.booleans(),
    activation=st.sampled_from(list(semantics.ACTIVATIONS)),
)
@settings(max_examples=60, deadline=None)
def test_the_two_ops_compose_to_the_semantics(
    m, k, n, rank, dtype, compensation, with_vectors, samples, deflate, activation
):
    m *= samples
    x, w, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(samples, n).to(dtype)
    down = torch.randn(rank, k).to(dtype) if rank else None
    up = torch.randn(n, rank).to(dtype) if rank else None
    vectors = {"shift": torch.randn(samples, k), "score": torch.rand(k)} if with_vectors else {}
    vectors |= {"deflated": min(rank, 16) if deflate else 0, "compensation": compensation}
    got = ops.sparsify("identity", [x], lora_down=down, **vectors)
    y = ops.sparse_linear(*got, w, lora_up=up, bias=bias, activation=activation)
    expected = semantics.sparsify(x, lora_down=down, **vectors)
    reference = semantics.sparse_linear(
        expected.pruned, expected.scale, expected.t, w, lora_up=up, bias=bias, activation=activation
    )
    assert torch.equal(y, reference)


@pytest.mark.parametrize("producer", list(semantics.PRODUCERS))
def test_opcheck_sparsify(producer):
    x, y = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    extra = {"layer_norm": [torch.randn(64), None, torch.randn(2, 64), torch.randn(2, 1, 64)]}
    extra["rms_norm"] = extra["layer_norm"]
    inputs = [x, *extra.get(producer, [y] if len(semantics.PRODUCERS[producer]) == 2 else [])]
    kwargs = {
        "eps": 1e-6,
        "mult_offset": 1.0,
        "lora_down": torch.randn(16, 64 * (1 + producer.startswith("cat"))),
    }
    torch.library.opcheck(ops.sparsify, (producer, inputs), kwargs)
    per_sample = torch.randn(2, 1, kwargs["lora_down"].shape[1])
    torch.library.opcheck(ops.sparsify, (producer, inputs), {**kwargs, "shift": per_sample, "deflated": 16})
    values, _, scale, t = ops.sparsify(producer, inputs, **kwargs)
    assert scale.shape == (10,)
    assert t.shape == (10, 16)
    reference = semantics.sparsify(
        semantics.produce(producer, inputs, 1e-6, 1.0), lora_down=kwargs["lora_down"]
    )
    assert torch.equal(layout.unpack(values, ops.sparsify(producer, inputs, **kwargs)[1]), reference.pruned)


def test_opcheck_sparse_linear():
    x, w = torch.randn(6, 64), torch.randn(32, 64)
    got = ops.sparsify("identity", [x], lora_down=torch.randn(16, 64))
    kwargs = {
        "lora_up": torch.randn(32, 16),
        "bias": torch.randn(2, 32),
        "activation": "silu",
        "gate": torch.randn(2, 32),
        "residual": torch.randn(2, 3, 32),
    }
    torch.library.opcheck(ops.sparse_linear, (*got, w), kwargs)


def test_fakes_are_pure_arithmetic_on_symbolic_tokens():
    """A dynamic token count must stay one symbol: no guard, no specialisation."""

    def f(x, w):
        values, metadata, scale, t = ops.sparsify("gelu", [x])
        return ops.sparse_linear(values, metadata, scale, t, w).reshape(*x.shape[:-1], -1)

    compiled = torch.compile(f, backend="eager", dynamic=True, fullgraph=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    w = torch.randn(16, 64)
    for tokens in (3, 64, 130):
        x = torch.randn(2, tokens, 64)
        torch.testing.assert_close(compiled(x, w), f(x, w))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_another_version_and_bad_k_are_refused():
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match="version 999"):
        ops.sparsify("identity", [x], version=999)
    with pytest.raises(ValueError, match="K = 32"):
        ops.sparsify("identity", [torch.randn(2, 32)])
    with pytest.raises(ValueError, match="unknown producer 'gellu'"):
        ops.sparsify("gellu", [x])
