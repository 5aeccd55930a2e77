"""Many adapters on blocks compiled before: never dense in silence, and the user's limits stay."""

import logging

import peft
import pytest
import torch
from torch import nn

import lynx_compile
from lynx_compile import recompiles
from lynx_compile.runtime import semantics

OPTIONS = {"rest": "eager", "emulate": True, "strict": True, "min_tokens": 0}
X = torch.randn(2, 6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(64, 64)

    def forward(self, x):
        return self.to_q(x) + x


class Model(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def definition(self, x):
        """Sparse base layers plus the dense adapters."""
        for block in self.blocks:
            layer = block.to_q
            base = getattr(layer, "base_layer", layer)
            s = semantics.sparsify(x.reshape(-1, 64))
            y = semantics.sparse_linear(s.pruned, s.scale, s.t, base.weight, bias=base.bias).reshape(x.shape)
            for name in getattr(layer, "active_adapters", ()):
                y = y + layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
            x = y + x
        return x

    def load(self, name, rank=16):
        config = peft.LoraConfig(r=rank, target_modules=["to_q"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, self, adapter_name=name)
        self.double().requires_grad_(False)
        self.use(name)

    def use(self, name, scale=1.0):
        for block in self.blocks:
            block.to_q.set_adapter([name], inference_mode=True)
            block.to_q.set_scale(name, scale)

    def check(self):
        torch.testing.assert_close(self(X), self.definition(X))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval().double().requires_grad_(False)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    lynx_compile.clear_report()
    recompiles._warn_of_many.cache_clear()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        yield
        assert torch._dynamo.config.recompile_limit == 3
    torch._dynamo.reset()


@pytest.fixture(params=[True, False], ids=["torch takes a limit", "torch takes none"])
def _ways(request, monkeypatch):
    if request.param and not recompiles._TAKES_LIMIT:
        pytest.skip("this torch.compile takes no recompile_limit")
    monkeypatch.setattr(recompiles, "_TAKES_LIMIT", request.param)


def graphs():
    return len(lynx_compile.report().graphs)


@pytest.mark.usefixtures("_ways")
def test_ten_adapters_and_back_without_compiling_again(model):
    lynx_compile.compile_blocks(model, fullgraph=True, **OPTIONS)
    model.check()
    names = [f"style_{i}" for i in range(10)]
    for name in names:
        model.load(name)
        model.check()
    for name in names[::-1]:  # all are known but for how many there are, which PEFT's layers count
        model.use(name)
        model.check()
    made = graphs()
    for name in names:
        model.use(name)
        model.check()
    assert graphs() == made
    assert all(row.decision == "sparse" for row in lynx_compile.report().rows if row.name == "to_q")


@pytest.mark.usefixtures("_ways")
def test_a_full_cache_starts_over(model, monkeypatch):
    monkeypatch.setattr(recompiles, "GRAPHS", 5)
    lynx_compile.compile_blocks(model, fullgraph=True, **OPTIONS)
    needed = []
    for i in range(12):
        before = graphs()
        model.load(f"style_{i}")
        model.check()
        model.check()
        needed.append(graphs() - before)
    assert set(needed) == {1, 2}  # the second where the cache was full
    assert needed.count(2) == 3


def test_weights_and_scales_need_no_graph(model):
    lynx_compile.compile_blocks(model, fullgraph=True, **OPTIONS)
    model.load("style")
    model.check()
    model.use("style", 0.5)
    model.check()
    made = graphs()
    for scale in (0.7, 0.2, 1.0):
        model.use("style", scale)
        for parameter in model.blocks[0].to_q.lora_A.parameters():
            parameter.mul_(1.5)
        model.check()
    assert graphs() == made


def test_what_costs_the_time_is_said_once(model, caplog):
    lynx_compile.compile_blocks(model, fullgraph=True, **OPTIONS)
    with caplog.at_level(logging.WARNING, logger="lynx_compile"):
        for i in range(recompiles.MANY - 1):
            model.load(f"style_{i}")
            model.check()
        assert caplog.messages == []
        for i in range(4):
            model.load(f"more_{i}")
            model.check()
    (message,) = caplog.messages
    assert f"compiled {recompiles.MANY} times" in message
    assert "enable_lora_hotswap" in message


def test_the_last_graph_that_dynamo_allows_is_told(model, caplog):
    function = torch.compile(model, backend="rt_lynx", options=OPTIONS)
    with caplog.at_level(logging.WARNING, logger="lynx_compile"):
        for i in range(3):
            assert caplog.messages == []
            model.load(f"style_{i}")
            torch.testing.assert_close(function(X), model.definition(X))
    (message,) = caplog.messages
    assert "compiled 3 times, all that torch._dynamo.config.recompile_limit allows" in message
    assert "compile_blocks" in message


def test_calls_within_calls_restore_the_limit_last():
    config = torch._dynamo.config
    first, second = recompiles._raised_limit(), recompiles._raised_limit()
    first.__enter__()
    second.__enter__()
    assert config.recompile_limit == recompiles.GRAPHS
    first.__exit__(None, None, None)
    assert config.recompile_limit == recompiles.GRAPHS
    second.__exit__(None, None, None)
    assert config.recompile_limit == 3


class Joint(Block):
    """Reads text and image as one sequence and returns the image's rows of it."""

    def forward(self, x):
        joint = torch.cat([x[:, :2], x], 1)
        return (self.to_q(joint) + joint)[:, 2:]


class JointModel(Model):
    _repeated_blocks = ("Joint",)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Joint() for _ in range(3))


@pytest.mark.parametrize(("samples", "graphs"), [(1, 1), (2, 2)])
def test_rows_cut_out_of_a_joint_sequence_take_no_graph_more_for_one_sample(samples, graphs):
    model = JointModel().double().requires_grad_(False)
    whole = torch.compile(JointModel.forward, backend="rt_lynx", options=OPTIONS)
    with torch.no_grad():
        want = whole(model, X[:samples])
        lynx_compile.clear_report()
        lynx_compile.compile_blocks(model, fullgraph=True, **OPTIONS)
        got = model(X[:samples])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert len(lynx_compile.report().graphs) == graphs
