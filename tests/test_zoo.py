"""Every diffusers transformer under the rt_lynx backend, whole and by blocks.

    dense      without kernels the graph that Inductor gets is the graph that Dynamo made
    emulated   equals the method's definition applied to one layer after the other in eager mode

Models run in fp64, where the rounding that a fused rewrite saves cannot flip a top-2 choice.
"""

import logging

import pytest
import torch

from tests import zoo
from tests.zoo.reference import OPTIONS, Recorded, SparseLinears, assert_close, call

BY_BLOCKS = [
    name for name, cls in zoo.transformer_classes().items() if getattr(cls, "_repeated_blocks", None)
]

# models that cast to fp32 by name or autocast and then refuse fp64
DTYPES = dict.fromkeys(
    ["CosmosTransformer3DModel", "Kandinsky5Transformer3DModel", "MotifVideoTransformer3DModel"],
    torch.float32,
)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="module")
def _quiet_diffusers():
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def test_the_zoo_holds_every_class():
    assert set(zoo.ZOO) == set(zoo.transformer_classes())
    assert len(zoo.ZOO) > 50


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_whole_model(name):
    model, inputs = zoo.build(name, DTYPES.get(name, torch.float64))
    dense = call(model, inputs)
    recorded = Recorded()
    actual = call(torch.compile(model, backend=recorded.backend(OPTIONS | {"only": "*"})), inputs)
    reference = SparseLinears(recorded.weights)
    with reference:
        expected = call(model, inputs)
    assert len(reference.used) > 0
    assert reference.used == recorded.weights
    assert_close(actual, expected)
    assert any((a - d).abs().max() > 1e-3 * d.abs().max() for a, d in zip(actual, dense, strict=True))
    if len(recorded.graphs) == 1:
        names = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
        assert {row.name for row in recorded.graphs[0].rows} <= names


@pytest.mark.parametrize("name", BY_BLOCKS)
def test_by_blocks(name):
    model, inputs = zoo.build(name, DTYPES.get(name, torch.float64))
    recorded = Recorded()
    model.compile_repeated_blocks(backend=recorded.backend(OPTIONS))
    actual = call(model, inputs)
    for block in model.modules():
        block._compiled_call_impl = None
    reference = SparseLinears(recorded.weights)
    with reference:
        expected = call(model, inputs)
    assert_close(actual, expected)
