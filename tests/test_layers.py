import copy
import types

import pytest
import torch
from torch import nn

import lynx_compile
from lynx_compile import LynxLinear, attach, compile_blocks, detach
from lynx_compile.regional import pattern
from lynx_compile.runtime import semantics

OPTIONS = {"rest": "eager", "emulate": True, "strict": True}
G = torch.Generator().manual_seed(0)
X = torch.randn(2, 6, 64, dtype=torch.float64, generator=G)


def linear(n=64):
    return nn.Linear(64, n, dtype=torch.float64).requires_grad_(False)


def data(n=64, rank=16):
    return {
        "down": torch.randn(rank, 64, generator=G),
        "up": torch.randn(n, rank, generator=G),
        "shift": torch.randn(64, generator=G),
        "score": torch.rand(64, generator=G),
    }


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    lynx_compile.clear_report()


def test_attached_is_the_dense_layer_everywhere_else():
    module = linear()
    state, want = copy.deepcopy(module.state_dict()), module(X)
    assert attach(module, **data(), decision="sparse") is module
    assert isinstance(module, LynxLinear)
    assert module.state_dict().keys() == state.keys()
    assert torch.equal(module(X), want)
    assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(X), want)
    assert module.lynx_down.dtype == torch.float64
    detach(module)
    assert type(module) is nn.Linear
    assert not any(name.startswith("lynx") for name in [*vars(module), *dict(module.named_buffers())])
    assert torch.equal(module(X), want)


@pytest.mark.parametrize("deflated", [0, 5, 16])
def test_the_backend_uses_the_data(deflated):
    module = attach(linear(), **data(), decision="sparse", deflated=deflated)
    got = torch.compile(module, backend="rt_lynx", fullgraph=True, options=OPTIONS)(X)
    s = semantics.sparsify(
        X.reshape(-1, 64),
        shift=module.lynx_shift,
        score=module.lynx_score,
        lora_down=module.lynx_down,
        deflated=deflated,
    )
    want = semantics.sparse_linear(
        s.pruned, s.scale, s.t, module.weight, lora_up=module.lynx_up, bias=module.lynx_bias
    )
    torch.testing.assert_close(got, want.reshape(got.shape))
    folded = module.bias + module.weight @ module.lynx_shift
    torch.testing.assert_close(module.lynx_bias, folded)


@pytest.mark.parametrize(("decision", "dense"), [("dense", True), ("sparse", False)])
def test_the_decision_overrules_a_safe_default(decision, dense):
    model = nn.ModuleDict({"to_out": attach(linear(), decision=decision)})
    model.forward = types.MethodType(lambda self, x: self["to_out"](x), model)
    got = torch.compile(model, backend="rt_lynx", options=OPTIONS)(X)
    assert torch.equal(got, model(X)) == dense


def test_new_data_needs_no_compilation():
    module = attach(linear(), **data(), decision="sparse")
    compiled = torch.compile(module, backend="rt_lynx", options=OPTIONS)
    first = compiled(X)
    attach(module, **data(), decision="sparse")
    assert not torch.allclose(compiled(X), first)
    assert len(lynx_compile.report().graphs) == 1


def test_deflation_is_shared_only_with_one_down_projection():
    model, common = Two(), data()["down"]
    for down, sparsifies in ((common, 1), (common.clone(), 2)):
        attach(model.q, down=common, up=torch.randn(32, 16), decision="sparse", deflated=16)
        attach(model.k, down=down, up=torch.randn(48, 16), decision="sparse", deflated=16)
        found = []

        def backend(gm, inputs, found=found):
            lynx_compile.rewrite(gm, {"emulate": True, "strict": True})
            found += [node for node in gm.graph.nodes if "sparsify" in str(node.target)]
            return gm.forward

        torch._dynamo.reset()
        torch.compile(model, backend=backend, fullgraph=True)(X)
        assert [node.kwargs["deflated"] for node in found] == [16] * sparsifies
    with pytest.raises(ValueError, match="deflated=17"):
        attach(model.q, down=common, up=torch.randn(32, 16), deflated=17)


@pytest.mark.parametrize("deflated", [(16, 0), (0, 16), (16, 8), (16, 16)])
def test_layers_of_one_down_projection_deflate_each_as_it_says(deflated):
    model, common = Two(), data()["down"].double()
    want = []
    for layer, count in zip((model.q, model.k), deflated, strict=True):
        up = torch.randn(layer.out_features, 16, dtype=torch.float64, generator=G)
        attach(layer, down=common, up=up, decision="sparse", deflated=count)
        s = semantics.sparsify(X.reshape(-1, 64), lora_down=common, deflated=count)
        y = semantics.sparse_linear(s.pruned, s.scale, s.t, layer.weight, lora_up=up, bias=layer.bias)
        want.append(y.reshape(2, 6, -1))
    got = torch.compile(model, backend="rt_lynx", fullgraph=True, options=OPTIONS)(X)
    torch.testing.assert_close(got, torch.cat(want, -1))


def test_layers_moved_to_two_dtypes_get_one_tensor_each_in_their_own():
    down, up = data()["down"].double(), data()["up"].double()
    layers = [attach(linear(), down=down, up=up) for _ in range(3)]
    dtypes = [torch.float32, torch.float16, torch.float32]
    for layer, dtype in zip(layers, dtypes, strict=True):
        layer.to(dtype)
    assert [layer.lynx_down.dtype for layer in layers] == dtypes
    assert layers[0].lynx_down is layers[2].lynx_down


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = linear(32), linear(48)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x)], -1)


@pytest.mark.parametrize("moved", [lambda m: m, lambda m: m.to("cpu", torch.float32), copy.deepcopy])
def test_layers_given_one_tensor_share_one_sparsify_and_one_down_projection(moved):
    common = {name: data()[name] for name in ("down", "shift", "score")}
    model = Two()
    for layer in (model.q, model.k):
        attach(layer, **common, up=torch.randn(layer.out_features, 16, generator=G), decision="sparse")
    model = moved(model)
    for name in ("lynx_down", "lynx_shift", "lynx_score"):
        assert getattr(model.q, name) is getattr(model.k, name)
    graphs = []

    def backend(gm, inputs):
        lynx_compile.rewrite(gm, {"emulate": True, "strict": True})
        graphs.append([node for node in gm.graph.nodes if "sparsify" in str(node.target)])
        return gm.forward

    x = X.to(model.q.weight.dtype)
    got = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert [node.kwargs["lora_down"].op for nodes in graphs for node in nodes] == ["placeholder"]
    torch._dynamo.reset()
    for layer in (model.q, model.k):  # the same values, each layer its own
        attach(layer, **{n: t.clone() for n, t in common.items()}, up=layer.lynx_up, decision="sparse")
    assert model.q.lynx_down is not model.k.lynx_down
    torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), got)
    assert len(graphs[-1]) == 2


@pytest.mark.parametrize("written", [lambda t: t.mul_(2), lambda t: t.data.mul_(2)])
def test_a_tensor_written_to_between_two_layers_is_two(written):
    down, up = data()["down"], data()["up"]
    q = attach(linear(), down=down, up=up)
    written(down)
    k = attach(linear(), down=down, up=up)
    assert q.lynx_up is k.lynx_up
    torch.testing.assert_close(k.lynx_down, 2 * q.lynx_down)


def test_a_tensor_written_to_between_two_moves_is_two():
    down, up = data()["down"].double(), data()["up"].double()
    q, k = (attach(linear(), down=down, up=up) for _ in "qk")
    assert q.lynx_down is k.lynx_down
    q.float()
    k.lynx_down.mul_(2)
    k.float()
    assert q.lynx_up is k.lynx_up
    torch.testing.assert_close(k.lynx_down, 2 * q.lynx_down)


def test_a_switch_runs_the_layers_dense_meanwhile():
    switch = types.SimpleNamespace(dense=True)
    module = attach(linear(), decision="sparse", switch=switch)
    compiled = torch.compile(
        module, backend="rt_lynx", options={**OPTIONS, "min_tokens": 0, "skip": ["none"]}
    )
    want = module(X)
    for _ in range(2):
        switch.dense = False
        assert not torch.allclose(compiled(X), want)
        switch.dense = True
        assert torch.equal(compiled(X), want)
    assert len(lynx_compile.report().graphs) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"down": torch.zeros(16, 64)}, ValueError, "both or none"),
        ({"shift": torch.zeros(65)}, ValueError, r"shift is \(65,\)"),
        ({"down": torch.zeros(16, 64), "up": torch.zeros(64, 8)}, ValueError, r"up is \(64, 8\)"),
        ({"decision": "sprase"}, ValueError, "sprase"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, words):
    module = linear()
    with pytest.raises(error, match=words):
        attach(module, **arguments)
    assert type(module) is nn.Linear


def test_only_plain_linear_layers_take_data():
    with pytest.raises(TypeError, match="cannot attach to a Conv1d"):
        attach(nn.Conv1d(4, 4, 1))


def test_hooks_that_hold_the_old_forward_follow():
    module = linear()
    module._old_forward = module.forward  # as accelerate does
    module.forward = lambda x: module._old_forward(x)
    attach(module, decision="sparse")
    assert module._old_forward.__func__ is LynxLinear.forward
    torch.compile(module, backend="rt_lynx", options=OPTIONS)(X)
    assert [row.decision for row in lynx_compile.report().rows] == ["sparse"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (linear() for _ in "abcd")

    def forward(self, x):
        return x + self.d(torch.relu(self.a(x) + self.b(x) * self.c(x)))


class Model(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_with_one_pattern_share_one_graph_and_keep_their_own_data():
    model = Model(6)
    for block in model.blocks:
        attach(block.a, **data(), decision="sparse")
    for block in model.blocks:
        block.compile(backend="rt_lynx", fullgraph=True, options={**OPTIONS, "skip": ["[bcd]"]})
    got = model(X)
    assert len(lynx_compile.report().graphs) == 1
    torch._dynamo.reset()
    whole = torch.compile(Model.forward, backend="rt_lynx", options={**OPTIONS, "skip": ["*.[bcd]"]})
    uncompiled = copy.copy(model)
    for block in model.blocks:
        block._compiled_call_impl = None
    torch.testing.assert_close(got, whole(uncompiled, X))


def test_one_compile_for_each_pattern_and_no_block_is_eager():
    """Twelve patterns: four more than Dynamo compiles for one code object."""
    model = Model(24)
    for i, block in enumerate(model.blocks):
        for j, name in enumerate("abcd"):
            attach(getattr(block, name), decision="sparse" if (i % 12 + 1) >> j & 1 else "dense")
    dense = model(X)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert compile_blocks(model, fullgraph=True, **OPTIONS) == 12
        got = model(X)
        model(X)
    graphs = lynx_compile.report().graphs
    assert len(graphs) == 12
    assert {tuple(row.decision for row in graph.rows) for graph in graphs} == {
        tuple(sorted_decisions(block)) for block in model.blocks
    }
    assert not torch.allclose(got, dense)


def sorted_decisions(block):
    order = {"a": 0, "b": 1, "c": 2, "d": 3}  # execution order
    return [getattr(block, name).lynx_decision for name in sorted("abcd", key=order.get)]


def test_globs_speak_of_full_names():
    model = Model(3)
    patterns = compile_blocks(model, skip=["blocks.0.*"], only=["blocks.*.a", "blocks.2.d"], **OPTIONS)
    model(X)
    assert patterns == len(lynx_compile.report().graphs) == 3
    decided = {
        name: module.lynx_decision for name, module in model.named_modules() if isinstance(module, LynxLinear)
    }
    assert [name for name, decision in decided.items() if decision == "sparse"] == [
        "blocks.1.a",
        "blocks.2.a",
        "blocks.2.d",
    ]
    assert model.blocks[0].a.lynx_reason == "skip='blocks.0.*'"


def test_the_globs_of_the_last_call_decide():
    model = Model(2)
    attach(model.blocks[0].a, decision="dense", reason="profile")

    def decisions(**globs):
        compile_blocks(model, **globs, **OPTIONS)
        return [getattr(block.a, "lynx_decision", None) for block in model.blocks]

    assert decisions(only=["blocks.0.*"]) == ["sparse", "dense"]
    assert decisions(skip=["blocks.1.*"]) == ["dense", "dense"]
    assert decisions(skip=["blocks.0.b"]) == decisions() == ["dense", None]
    assert model.blocks[0].a.lynx_reason == "profile"
    attach(model.blocks[1].a, decision="sparse")
    assert decisions() == ["dense", "sparse"]


def test_a_glob_that_matches_nothing_is_named(caplog):
    compile_blocks(Model(1), skip=["blocks.0.*", "blocks.7.*"], only=["to_out"], **OPTIONS)
    assert [record.getMessage() for record in caplog.records] == [
        "skip='blocks.7.*' matches no linear layer of Model",
        "only='to_out' matches no linear layer of Model",
    ]


def test_blocks_with_cuda_graphs_are_told_where_a_step_begins(monkeypatch):
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(len(begun)))
    model = Model(2)
    for _ in range(2):
        compile_blocks(model, mode="reduce-overhead", **OPTIONS)
    model(X)
    model(X)
    assert begun == [0, 1]
    compile_blocks(model := Model(2), **OPTIONS)
    model(X)
    assert begun == [0, 1]
    pipe = types.SimpleNamespace(transformer=Model(1), transformer_2=Model(1))
    pipe.components = vars(pipe).copy()
    compile_blocks(pipe, mode="reduce-overhead", **OPTIONS)
    pipe.transformer(X)
    pipe.transformer_2(X)
    assert begun == [0, 1, 2, 3]


def test_a_model_without_repeated_blocks_says_what_to_give():
    with pytest.raises(ValueError, match=r"name the classes with blocks=\[...\]"):
        compile_blocks(nn.Sequential(linear()))
    with pytest.raises(ValueError, match="no block of class Missing"):
        compile_blocks(Model(1), blocks="Missing")


def test_a_pipeline_stands_for_its_transformer():
    pipe = types.SimpleNamespace(transformer=Model(2))
    assert compile_blocks(pipe, **OPTIONS) == 1
    pipe.transformer(X)
    assert len(lynx_compile.report().graphs) == 1
    with pytest.raises(TypeError, match="neither a module nor a pipeline with a transformer"):
        compile_blocks(types.SimpleNamespace(unet=Model(2)))


def test_one_class_of_blocks_may_be_named_alone():
    assert compile_blocks(nn.Sequential(Block(), Block()), blocks="Block", **OPTIONS) == 1


def test_pattern_tells_what_is_shared():
    common, blocks = data(), [Two(), Two(), Two()]
    for block, shift in zip(blocks, [common["shift"], common["shift"], common["shift"].clone()], strict=True):
        attach(block.q, shift=common["shift"])
        attach(block.k, shift=shift)
    assert pattern(blocks[0]) == pattern(blocks[1]) != pattern(blocks[2])


def test_pattern_is_the_same_for_blocks_that_differ_in_values_only():
    first, second = Block(), Block()
    attach(first.a, **data(), decision="sparse")
    attach(second.a, **data(), decision="sparse")
    assert pattern(first) == pattern(second)
    attach(second.a, decision="sparse")
    assert pattern(first) != pattern(second)
