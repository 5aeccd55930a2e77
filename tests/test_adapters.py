"""PEFT adapters on a compiled model: loaded, scaled, swapped and unloaded, the sparse layer follows."""

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import lynx_compile
from lynx_compile.profile import Branch, Layer, Profile, apply_profile, fingerprint
from lynx_compile.runtime import semantics

OPTIONS = {"rest": "eager", "emulate": True, "strict": True}
X = torch.randn(2, 6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.other = nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(64, 64)

    def forward(self, x):
        return self.to_q(x), self.to_k(x), self.other(x)


def config(rank, **kwargs):
    return peft.LoraConfig(
        r=rank, lora_alpha=7, target_modules=["to_q", "to_k"], init_lora_weights=False, **kwargs
    )


def adapted(*ranks, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    model = peft.get_peft_model(Projections(), config(ranks[0], **kwargs)).eval()
    for i, rank in enumerate(ranks[1:]):
        model.add_adapter(f"adapter_{i}", config(rank))
    model.base_model.set_adapter(["default", *(f"adapter_{i}" for i in range(len(ranks) - 1))])
    return model.requires_grad_(False).to(dtype)


def definition(model, x):
    """Sparse base layers plus the dense adapters."""
    s = semantics.sparsify(x.reshape(-1, 64))
    outputs = []
    for name in ("to_q", "to_k", "other"):
        layer = getattr(model.base_model.model, name)
        base = getattr(layer, "base_layer", layer)
        y = semantics.sparse_linear(s.pruned, s.scale, s.t, base.weight, bias=base.bias)
        y = y.reshape(*x.shape[:-1], -1)
        for adapter in getattr(layer, "active_adapters", ()):
            y = y + layer.lora_B[adapter](layer.lora_A[adapter](x)) * layer.scaling[adapter]
        outputs.append(y)
    return outputs


def compiled(model):
    torch._dynamo.reset()
    lynx_compile.clear_report()
    return torch.compile(model.base_model.model, backend="rt_lynx", fullgraph=True, options=OPTIONS)


def check(function, model, x=X, tolerance=None):
    for got, want in zip(function(x), definition(model, x), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():  # PEFT gives its factors gradients again when it enables them
        yield


@pytest.mark.parametrize("ranks", [(4,), (16,), (4, 8), (4, 16, 5)])
def test_one_or_several(ranks):
    model = adapted(*ranks)
    check(compiled(model), model)
    rows = {row.name: row for row in lynx_compile.report().rows}
    assert rows["to_q"].decision == rows["to_k"].decision == rows["other"].decision == "sparse"
    assert "joined with its layer" in rows["to_q.lora_A.default"].reason


def test_scaled_unloaded_and_loaded_again():
    model = adapted(4)
    function = compiled(model)
    check(function, model)
    for layer in (model.base_model.model.to_q, model.base_model.model.to_k):
        layer.set_scale("default", 0.5)
    check(function, model)
    model.base_model.disable_adapter_layers()
    plain = [y - y2 for y, y2 in zip(function(X), definition(model, X), strict=True)]
    assert plain[2].abs().max() < 1e-12
    assert plain[0].abs().max() > 1e-3  # the adapter is gone from the compiled model
    model.base_model.enable_adapter_layers()
    check(function, model)


def test_merged_into_the_weights():
    model = adapted(4)
    function = compiled(model)
    check(function, model)
    model.merge_adapter()
    got = function(X)
    s = semantics.sparsify(X.reshape(-1, 64))
    base = model.base_model.model.to_q.base_layer
    want = semantics.sparse_linear(s.pruned, s.scale, s.t, base.weight, bias=base.bias)
    torch.testing.assert_close(got[0].reshape(-1, 64), want)


def test_hot_swapping_compiles_once(tmp_path):
    model = adapted(4)
    prepare_model_for_compiled_hotswap(model, target_rank=16, config=model.peft_config)
    function = compiled(model)
    check(function, model)
    graphs = len(lynx_compile.report().graphs)
    other = adapted(8)
    other.save_pretrained(str(tmp_path))
    hotswap_adapter(model, str(tmp_path), "default")
    check(function, model)
    assert len(lynx_compile.report().graphs) == graphs


def test_an_adapter_in_another_dtype():
    model = adapted(4, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    got = compiled(model)(X.bfloat16())
    want = definition(model.double(), X)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() / b.norm() < 0.05
    assert sum("rt_lynx" in row.reason for row in lynx_compile.report().rows) == 0


def test_dora_is_left_alone():
    model = adapted(4, use_dora=True)
    want = model(X)
    torch._dynamo.reset()
    lynx_compile.clear_report()
    got = torch.compile(model.base_model.model, backend="rt_lynx", options=OPTIONS)(
        X
    )  # PEFT breaks the graph
    torch.testing.assert_close(got[:2], want[:2])
    assert [row.name for row in lynx_compile.report().rows if row.decision == "sparse"] == ["other"]


def test_dora_in_one_graph_says_why():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(64, 64)
            self.lora_magnitude_vector = nn.ParameterDict({"default": nn.Parameter(torch.ones(64))})

        def forward(self, x):
            return self.base_layer(x) * self.lora_magnitude_vector["default"]

    lynx_compile.clear_report()
    model = nn.ModuleDict({"to_q": Adapted()}).double().requires_grad_(False)
    torch.compile(lambda x: model["to_q"](x), backend="rt_lynx", options=OPTIONS)(X)
    (row,) = lynx_compile.report().rows
    assert (row.name, row.decision) == ("to_q", "dense")
    assert "DoRA" in row.reason


def test_a_profile_follows_an_adapter_that_is_fused():
    model = adapted(8)
    base = model.base_model.model
    whole = Branch(down=torch.eye(64), up=torch.zeros(64, 64), deflate=True)  # leaves nothing to prune
    layers = {"other": Layer((64, 64), True, "", whole), "to_q": Layer((64, 64), True, "", whole)}
    profile = Profile(fingerprint(base), layers)
    apply_profile(base, profile)
    function = torch.compile(base, backend="rt_lynx", options={**OPTIONS, "only": list(layers)})
    torch._dynamo.reset()

    def moved():
        return max(
            float((got - want).norm() / want.norm()) for got, want in zip(function(X), base(X), strict=True)
        )

    assert moved() < 1e-6
    base.to_q.merge()
    assert moved() > 0.05
    apply_profile(base, profile, check_weights=False)
    graphs = len(lynx_compile.report().graphs)
    assert moved() < 1e-6
    assert len(lynx_compile.report().graphs) == graphs
    base.to_q.unmerge()
    apply_profile(base, profile, check_weights=False)  # rounding, in the last digit of a few weights
    assert moved() < 1e-6
