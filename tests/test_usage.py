"""Models as users write, wrap and change them: what a layer is, what it is called, and that it is right."""

import copy
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

import lynx_compile
from lynx_compile.passes.linear import normalize_name
from tests.zoo.reference import OPTIONS, SparseLinears

X = torch.randn(2, 40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ENDS = {"proj_out": "safe default: final projection"}
LAYERS = [f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self, call=lambda block, x: block(x)):
        super().__init__()
        self.blocks, self.proj_out = nn.ModuleList([Block(), Block()]), nn.Linear(64, 64)
        self.call = call

    def forward(self, x):
        for block in self.blocks:
            x = self.call(block, x)
        return self.proj_out(x)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    lynx_compile.clear_report()


def ready(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.double().eval().requires_grad_(False)


def compiled(model, **options):
    return torch.compile(model, backend="rt_lynx", options={**OPTIONS, **options})


def decided(decision):
    return {row.name: row.reason for row in lynx_compile.report().rows if row.decision == decision}


def by_definition(model, x=X, skip=()):
    """The model with its blocks' layers sparse, nothing compiled."""
    weights = {id(model.get_submodule(name).weight) for name in LAYERS if not name.startswith(tuple(skip))}
    with SparseLinears(weights):
        return model(x)


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.transformer = model

    def forward(self, x):
        return self.transformer(x)


def in_peft(model):
    return ready(get_peft_model(model, LoraConfig(r=8, target_modules=["up"])))


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda model: model, ""),
        (nn.DataParallel, ""),
        (Wrapper, "transformer."),
        (lambda model: Wrapper(Wrapper(model)), "transformer.transformer."),
        (in_peft, "base_model.model."),
    ],
)
def test_a_model_inside_another_module_keeps_its_ends_dense(wrap, prefix):
    compiled(wrap(ready(Model())))(X)
    assert list(decided("sparse")) == [prefix + name for name in LAYERS]
    assert decided("dense")[f"{prefix}proj_out"] == ENDS["proj_out"]


def test_layers_called_through_getattr_have_plain_names():
    assert normalize_name("getattr(L['m'].blocks, '0').up") == "blocks.0.up"
    model = ready(Model())
    by_name = torch.compile(
        lambda p, x: torch.func.functional_call(model, p, (x,)), backend="rt_lynx", options=OPTIONS
    )
    torch.testing.assert_close(by_name(dict(model.named_parameters()), X), by_definition(model))
    assert list(decided("sparse")) == LAYERS


class Attention(nn.Module):
    """One head without a batch: both products look like linear layers."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in "qkv")

    def forward(self, x):
        weights = torch.softmax(self.q(x) @ self.k(x).t(), -1)
        return F.linear(weights, self.v(x).t().contiguous())


class Hyper(nn.Module):
    """A layer whose weight another layer makes."""

    def __init__(self):
        super().__init__()
        self.make, self.out = nn.Linear(64, 64 * 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.out(F.linear(x, self.make(x[0]).view(64, 64)))


@pytest.mark.parametrize(
    ("model", "layers", "products"), [(Attention, {"q", "k", "v"}, 2), (Hyper, {"make", "out"}, 1)]
)
@pytest.mark.parametrize("exported", [False, True])
def test_products_of_activations_are_no_layers(model, layers, products, exported):
    model, x = ready(model()), X.reshape(-1, 64)[:64]
    if exported:
        lynx_compile.rewrite(torch.export.export(model, (x,)).module(), {**OPTIONS, "only": ["*"]})
    else:
        compiled(model, only=["*"])(x)
    reason = "the weight is computed from the inputs: a product of two activations"
    assert list(decided("dense").values()) == [reason] * products
    assert set(decided("sparse")) == layers


class Merged(nn.Module):
    """A weight that is computed from stored tensors alone."""

    def __init__(self):
        super().__init__()
        self.base, self.a = nn.Linear(64, 64), nn.Parameter(torch.zeros(4, 64))
        self.b = nn.Parameter(torch.zeros(64, 4))
        self.register_buffer("scale", torch.full((), 0.5))

    def forward(self, x):
        return F.linear(x, self.base.weight + self.scale * (self.b @ self.a), self.base.bias)


def test_a_weight_computed_from_stored_tensors_is_one():
    compiled(ready(Merged()), only=["*"])(X)
    assert len(decided("sparse")) == 1


def conditional(block, x):
    return torch.cond(x.sum() > 0, block, lambda x: x, (x,))


@pytest.mark.parametrize(
    ("call", "operator"),
    [
        (lambda block, x: checkpoint(block, x, use_reentrant=False), "tag_activation_checkpoint"),
        (conditional, "cond"),
    ],
)
def test_layers_that_an_operator_calls_are_reported(call, operator):
    model = ready(Model(call))
    with torch.no_grad():
        assert torch.equal(compiled(model)(X), model(X))
    reason = f"inside {operator}, whose graph is left as it is"
    assert decided("dense") == {**dict.fromkeys(LAYERS, reason), **ENDS}


def test_a_nested_region_is_reported():
    class Region(Block):
        forward = torch.compiler.nested_compile_region(Block.forward)

    model = ready(Model())
    for block in model.blocks:
        block.__class__ = Region
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(X), model(X))
    inside = [row for row in lynx_compile.report().rows if "inside invoke_subgraph" in row.reason]
    assert len(inside) == 4


def normed(model):
    parametrizations.weight_norm(model.blocks[0].up)


def pruned(model):
    prune.l1_unstructured(model.blocks[0].up, "weight", 0.5)


def tied(model):
    model.blocks[1].up.weight = model.blocks[0].up.weight


def hooked(model):
    model.blocks[0].up.register_forward_hook(lambda module, args, y: y * 2)
    model.blocks[1].down.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def assigned(model):
    torch.manual_seed(1)
    other = {name: torch.randn_like(value) / 8 for name, value in model.state_dict().items()}
    model.load_state_dict(other, assign=True)


def exchanged(model):
    torch.manual_seed(1)
    model.blocks[0].up = nn.Linear(64, 128, bias=False).double()


@pytest.mark.parametrize(
    ("change", "when"),
    [
        (change, when)
        for change in (normed, pruned, tied, hooked, assigned, exchanged)
        for when in ("before", "after")
        if (change, when) != (hooked, "after")  # Dynamo, told of hooks by no guard, does not see them
    ],
)
def test_changes_to_a_model_are_followed(change, when):
    model = ready(Model())
    call, want = compiled(model), copy.deepcopy(model)
    if when == "after":
        with torch.no_grad():
            call(X)
    for changed in (model, want):
        if changed is model or change is not normed:  # the same weight, computed
            change(changed)
    if change is pruned:
        prune.remove(want.blocks[0].up, "weight")
    with torch.no_grad():
        torch.testing.assert_close(call(X), by_definition(want))
    assert {*LAYERS} <= {*decided("sparse")}


class OwnLinear(nn.Linear):
    """As GGUF's layers, which make their weight in each call."""

    def forward(self, x):
        return F.linear(x, self.weight * 1.0, self.bias)


@pytest.mark.parametrize(
    "globs", [{"skip": ["blocks.0.*"]}, {"only": ["blocks.1.*"]}, {"skip": ["blocks.0.up", "blocks.0.down"]}]
)
def test_globs_of_blocks_reach_layers_of_other_classes(globs, caplog):
    model = ready(Model())
    want = by_definition(model, skip=("blocks.0.",))
    for block in model.blocks:
        block.up.__class__ = OwnLinear
    assert lynx_compile.compile_blocks(model, **globs, **OPTIONS) == 2
    torch.testing.assert_close(model(X), want)
    assert not [record for record in caplog.records if "matches no" in record.getMessage()]
    lynx_compile.compile_blocks(model, **OPTIONS)
    assert not torch.allclose(model(X), want)


class Codes(torch.Tensor):
    """A weight as torchao keeps it: it knows `F.linear` and nothing that `F.linear` is made of."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float64)

    def __init__(self, codes):
        self.codes = codes

    def __tensor_flatten__(self):
        return ["codes"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, meta, size, stride):
        return cls(tensors["codes"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], args[1].codes / 64, *args[2:])
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(func)


@pytest.mark.parametrize("attached", ["before", "after"])
def test_quantised_layers_take_decisions(attached):
    model = ready(Model())
    for block in model.blocks:
        if attached == "before":
            lynx_compile.attach(block.up, decision="dense")
        codes = torch.randint(-8, 8, (128, 64)).double()
        block.up.weight = nn.Parameter(Codes(codes), requires_grad=False)
        block.up.extra_repr = types.MethodType(functools.partial(str), block.up)  # as torchao does
    want = model(X)
    lynx_compile.compile_blocks(model, skip=["blocks.*.up", "blocks.*.down"], fullgraph=True, **OPTIONS)
    assert torch.equal(model(X), want)
    reasons = {row.name: row.reason for row in lynx_compile.report().rows}
    assert reasons["up"] == "the weight is a Codes, not a plain tensor"


def test_sharded_blocks_are_found():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        model = ready(Model())
        want, mesh = by_definition(model), init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        assert lynx_compile.compile_blocks(model, **OPTIONS) == 1
        with torch.no_grad():
            torch.testing.assert_close(model(X), want)
        assert list(decided("sparse")) == ["up", "down"]
    finally:
        torch.distributed.destroy_process_group()
