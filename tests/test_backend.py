"""torch.compile(model, backend="rt_lynx") as a user meets it, on a machine without kernels."""

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lynx_compile
from lynx_compile import backend, passes
from lynx_compile.runtime import semantics

OPTIONS = {"rest": "eager", "emulate": True, "strict": True}


class MLP(nn.Module):
    """Norm, up, gelu, down, residual."""

    def __init__(self, k=64, hidden=128):
        super().__init__()
        self.norm = nn.LayerNorm(k)
        self.up, self.down = nn.Linear(k, hidden), nn.Linear(hidden, k)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def mlp(*args, dtype=torch.float64):
    torch.manual_seed(0)
    return MLP(*args).to(dtype).eval().requires_grad_(False)


def emulated(model, x):
    """The model with the definition in place of its two layers."""

    def sparse(layer, h):
        s = semantics.sparsify(h.reshape(-1, h.shape[-1]))
        return semantics.sparse_linear(s.pruned, s.scale, s.t, layer.weight, bias=layer.bias).reshape(
            *h.shape[:-1], -1
        )

    return x + sparse(model.down, F.gelu(sparse(model.up, model.norm(x))))


def compiled(model, **options):
    return torch.compile(model, backend="rt_lynx", fullgraph=True, options={**OPTIONS, **options})


def rows():
    return {row.name: row for row in lynx_compile.report().rows}


X = torch.randn(2, 8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    lynx_compile.clear_report()
    backend._notify_once.cache_clear()


def test_the_backend_needs_no_import():
    code = "import torch; print('rt_lynx' in torch._dynamo.list_backends(exclude_tags=()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_without_kernels_the_model_is_dense_and_one_notice_says_so(caplog):
    model = mlp()
    with caplog.at_level(logging.WARNING, "lynx_compile"):
        for _ in range(2):
            got = torch.compile(model, backend="rt_lynx", options={"rest": "eager"})(X)
            torch._dynamo.reset()
    assert torch.equal(got, model(X))
    assert len([record for record in caplog.records if "runs dense: no kernels" in record.message]) == 1
    assert all(row.decision == "dense" and "no kernels" in row.reason for row in lynx_compile.report().rows)


def test_torch_logs_tell_what_was_decided():
    code = (
        "import torch; m = torch.nn.Linear(64, 64).requires_grad_(False)\n"
        "o = {'emulate': True, 'rest': 'eager', 'min_tokens': 0, 'only': ['*']}\n"
        "torch.compile(m, backend='rt_lynx', options=o)(torch.randn(8, 64))"
    )
    told = {}
    for switch in ("recompiles", "lynx_compile", "+lynx_compile"):
        environment = {**os.environ, "TORCH_LOGS": switch}
        command = [sys.executable, "-c", code]
        told[switch] = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        ).stderr
    assert "linear layers sparse" not in told["recompiles"]
    assert "1 of 1 linear layers sparse" in told["lynx_compile"]
    assert "rewritten graph" not in told["lynx_compile"]
    assert "rt_lynx.sparsify" in told["+lynx_compile"]


def test_emulation_is_the_definition():
    model = mlp()
    torch.testing.assert_close(compiled(model)(X), emulated(model, X))
    assert {row.pattern for row in rows().values()} == {"layer_norm → linear", "gelu → linear"}
    assert lynx_compile.report().sparse_share == 1.0


def test_inductor_compiles_the_rest():
    class Lone(nn.Linear):
        pass

    layer = Lone(64, 64).double().requires_grad_(False)
    want = compiled(layer)(X)
    torch._dynamo.reset()
    got = compiled(layer, rest="inductor", mode="max-autotune-no-cudagraphs")(X)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("options", "sparse"),
    [
        ({"skip": "up"}, {"down"}),
        ({"skip": ["*"]}, set()),
        ({"only": ["d*"]}, {"down"}),
        ({"only": ["up", "down"], "skip": "up"}, {"down"}),
        ({"min_tokens": 17}, set()),
        ({"min_tokens": 16}, {"up", "down"}),
    ],
)
def test_what_the_user_asks_for(options, sparse):
    compiled(mlp(), **options)(X)
    assert {name for name, row in rows().items() if row.decision == "sparse"} == sparse
    assert all(row.reason for row in rows().values())


def test_native_compensation():
    layer = nn.Linear(64, 64).double().requires_grad_(False)
    got = compiled(layer, compensation="native")(X)
    s = semantics.sparsify(X.reshape(-1, 64), compensation="native")
    torch.testing.assert_close(got.reshape(-1, 64), F.linear(s.pruned, layer.weight, layer.bias))


def test_gradients_leave_the_graph_untouched():
    model = mlp().requires_grad_(True)
    x = X.clone().requires_grad_()
    got = compiled(model)(x)
    got.sum().backward()
    assert torch.equal(got, model(x))
    assert x.grad is not None
    assert lynx_compile.report().notes == [row.reason for row in rows().values()][:1]
    assert "torch.no_grad()" in lynx_compile.report().notes[0]


def test_gradients_switched_on_inside():
    model = mlp()

    def forward(x):
        with torch.enable_grad():
            return model(x)

    with torch.no_grad():
        compiled(forward)(X)
    assert "switched on inside" in lynx_compile.report().notes[0]


def test_what_a_transform_works_on_is_left_alone():
    """The ops have no batching rules: neither for a layer's own input nor for what is added to its output."""
    model = mlp()

    def forward(x, h):
        inside = torch.vmap(lambda row: model.up(row) + model.up(h))(x)
        return inside, model.up(h)

    with torch.no_grad():
        inside, sparse = compiled(forward)(X, X[0])
    definition = semantics.sparsify(X[0])
    want = semantics.sparse_linear(
        definition.pruned, definition.scale, definition.t, model.up.weight, bias=model.up.bias
    )
    torch.testing.assert_close(sparse, want)
    torch.testing.assert_close(inside, model.up(X) + want)
    decisions = [(row.decision, "torch.vmap" in row.reason) for row in lynx_compile.report().rows]
    assert decisions == [("dense", True), ("sparse", False), ("sparse", False)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_that_want_gradients_are_fine_without_them(mode):
    model = mlp().requires_grad_(True)
    with mode():
        got = compiled(model)(X)
        torch.testing.assert_close(got, emulated(model, X))


PASSES = [
    *(f.__name__ for f in passes.FUSIONS),
    "normalize",
    "find_linears",
    "sparsify_linears",
    "split_rows",
]


@pytest.mark.parametrize("name", PASSES)
def test_an_exception_in_any_pass_runs_the_model_dense(name, monkeypatch, caplog):
    def broken(*args):
        raise ZeroDivisionError("injected")

    if hasattr(passes, name) and name not in {f.__name__ for f in passes.FUSIONS}:
        monkeypatch.setattr(passes, name, broken)
    else:
        monkeypatch.setattr(
            passes, "FUSIONS", tuple(broken if f.__name__ == name else f for f in passes.FUSIONS)
        )
    model = mlp()
    assert torch.equal(compiled(model, strict=False)(X), model(X))
    assert "ZeroDivisionError: injected" in lynx_compile.report().notes[0]
    assert "strict" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(Exception, match="ZeroDivisionError: injected"):
        compiled(model, strict=True)(X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    model = mlp(dtype=dtype)
    got = compiled(model)(X.to(dtype))
    assert got.dtype == dtype
    want = emulated(model.double(), X)
    assert (got.double() - want).norm() / want.norm() < 0.05


def test_autocast():
    model, x = mlp(dtype=torch.float32), X.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, dense = compiled(model)(x), model(x)
    assert got.dtype == dense.dtype
    assert {row.decision for row in rows().values()} == {"sparse"}
    want = emulated(model, x)
    assert (got - want).norm() / want.norm() < 0.05


def test_dynamic_shapes_compile_once():
    model = mlp()
    function = torch.compile(model, backend="rt_lynx", dynamic=True, options=OPTIONS)
    x = X.clone()
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    function(x)
    for batch, tokens in ((1, 3), (4, 5), (2, 9)):
        x = torch.randn(batch, tokens, 64, dtype=torch.float64)
        torch.testing.assert_close(function(x), emulated(model, x))
    assert (
        1 <= len(lynx_compile.report().graphs) <= 2
    )  # a batch of one is its own graph, as everywhere in Dynamo


def test_two_models_at_once():
    first, second = mlp(), mlp(64, 256)
    a, b = compiled(first), compiled(second)
    for _ in range(2):
        torch.testing.assert_close(a(X), emulated(first, X))
        torch.testing.assert_close(b(X), emulated(second, X))
    assert len(lynx_compile.report().graphs) == 2


def test_compiling_from_several_threads():
    models = [mlp(64, 64 * (i + 1)) for i in range(4)]
    results: dict[int, torch.Tensor] = {}

    def work(i):
        results[i] = compiled(models[i])(X)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, model in enumerate(models):
        torch.testing.assert_close(results[i], emulated(model, X))


def test_export_of_a_rewritten_module():
    model = mlp()
    gm = torch.export.export(model, (X,)).module()
    report = lynx_compile.rewrite(gm, {"emulate": True, "strict": True})
    assert [row.decision for row in report.rows] == ["sparse", "sparse"]
    again = torch.export.export(gm, (X,))
    torch.testing.assert_close(again.module()(X), emulated(model, X))
    assert sum("rt_lynx" in str(node.target) for node in again.graph.nodes) == 4


def test_a_symbolically_traced_module_with_example_inputs():
    model = mlp()
    gm = torch.fx.symbolic_trace(model)
    lynx_compile.rewrite(gm, {"emulate": True, "strict": True}, (X,))
    torch.testing.assert_close(gm(X), emulated(model, X))


def test_stance_and_reset():
    model = mlp()
    function = compiled(model)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(function(X), model(X))
    torch.testing.assert_close(function(X), emulated(model, X))
    torch._dynamo.reset()
    torch.testing.assert_close(function(X), emulated(model, X))


def test_only_rows_with_bad_values_are_bad():
    model = mlp()
    x = X.clone()
    x[0, 3, 5], x[1, 0, 2] = float("nan"), float("inf")
    got, want = compiled(model)(x), emulated(model, X)
    bad = torch.zeros(2, 8, dtype=torch.bool)
    bad[0, 3] = bad[1, 0] = True
    assert not got[bad].isfinite().all(-1).any()
    torch.testing.assert_close(got[~bad], want[~bad])


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 1, 64, dtype=torch.float64).expand(2, 5, 64),
        torch.randn(64 + 7, dtype=torch.float64).unfold(0, 64, 1),
        torch.randn(2, 64, 5, dtype=torch.float64).transpose(1, 2),
        torch.randn(2, 1, 64, dtype=torch.float64),
    ],
    ids=["expanded", "overlapping", "transposed", "one token"],
)
def test_unusual_inputs(x):
    model = mlp()
    torch.testing.assert_close(compiled(model)(x), emulated(model, x))


def test_one_dimension_is_one_row():
    model = mlp()
    assert torch.equal(compiled(model)(X[0, 0]), model(X[0, 0]))
    assert {row.reason for row in rows().values()} == {"safe default: modulation: one row a sample"}
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(model, only=["*"])(X[0, 0]), emulated(model, X[0, 0]))


def test_no_tokens():
    model = mlp()
    assert compiled(model)(X[:, :0]).shape == (2, 0, 64)


def test_a_graph_without_a_linear_layer():
    assert torch.equal(compiled(nn.ReLU())(X), X.relu())
    assert lynx_compile.report().rows == []


def test_meta_device():
    model = mlp().to("meta")
    assert compiled(model)(X.to("meta")).shape == X.shape
    assert {row.decision for row in rows().values()} == {"sparse"}


def test_integer_weights():
    class Integers(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64, 64, dtype=torch.int32), requires_grad=False)

        def forward(self, x):
            return F.linear(x, self.weight)

    x = torch.ones(2, 64, dtype=torch.int32)
    assert torch.equal(compiled(Integers())(x), Integers()(x))
    assert [row.reason for row in lynx_compile.report().rows] == ["the input is torch.int32"]


class Quantized(torch.Tensor):
    """A weight as quantisation libraries store it: a wrapper that computes on its dequantised values."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, meta, size, stride):
        return cls(tensors["codes"], tensors["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain = [a.codes.to(a.scale.dtype) * a.scale if isinstance(a, cls) else a for a in args]
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        return function(*plain, **(kwargs or {}))


def test_quantised_weights_stay_dense():
    model = mlp()
    codes = torch.randint(-8, 8, (128, 64), dtype=torch.int8)
    model.up.weight = nn.Parameter(Quantized(codes, torch.tensor(0.1).double()), requires_grad=False)
    compiled(model)(X)
    assert rows()["up"].reason == "the weight is a Quantized, not a plain tensor"
    assert rows()["down"].decision == "sparse"


def test_dtensor_weights_stay_dense():
    from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        layer = nn.Linear(64, 64, bias=False).double().requires_grad_(False)
        layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [Replicate()]), requires_grad=False)
        x = distribute_tensor(X, mesh, [Replicate()])
        compiled(layer)(x)
        assert "DTensor, not a plain tensor" in lynx_compile.report().rows[0].reason
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_artifact_loads_in_a_second_process(tmp_path):
    script = """
import sys, torch, lynx_compile
from torch._dynamo.utils import counters
layer = torch.nn.Linear(64, 64, dtype=torch.float64).requires_grad_(False)
if sys.argv[1] == "load":
    torch.compiler.load_cache_artifacts(open(sys.argv[2], "rb").read())
torch.compile(layer, backend="rt_lynx", options={"emulate": True, "strict": True})(torch.ones(2, 64).double())
if sys.argv[1] == "save":
    open(sys.argv[2], "wb").write(torch.compiler.save_cache_artifacts()[0])
print(counters["aot_autograd"]["autograd_cache_hit"], lynx_compile.report().totals()["sparse"])
"""
    for way, want in (("save", "0 1"), ("load", "1 1")):
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / way),
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
        }
        done = subprocess.run(
            [sys.executable, "-c", script, way, str(tmp_path / "artifact")],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == want


def test_users_inductor_configuration_is_untouched():
    from torch._inductor import config

    before = config.save_config_portable()
    layer = nn.Linear(64, 64).double().requires_grad_(False)
    compiled(layer, rest="inductor", inductor={"epilogue_fusion": False})(X)
    assert config.save_config_portable() == before


def test_nothing_is_computed_from_weights_while_compiling():
    """What is compiled reads the weights of the call: other values, same graph."""
    model = mlp()
    function = compiled(model)
    function(X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(function(X), emulated(model, X))
    assert len(lynx_compile.report().graphs) == 1


def test_a_compilation_that_starts_over_is_reported_once():
    """Inductor makes Dynamo trace once more for dynamic shapes."""
    layer = nn.Linear(64, 64).double().requires_grad_(False)
    options = {"emulate": True, "strict": True}
    function = torch.compile(layer, backend="rt_lynx", dynamic=True, options=options)
    for tokens in (8, 5):
        function(torch.randn(2, tokens, 64, dtype=torch.float64))
    assert len(lynx_compile.report().graphs) == 1


def test_rewrite_of_what_is_no_graph_says_what_to_pass():
    with pytest.raises(TypeError, match=r"takes a torch.fx.GraphModule, not a Linear; .*export"):
        backend.rewrite(nn.Linear(64, 64))
