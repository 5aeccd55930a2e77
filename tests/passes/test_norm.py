import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lynx_compile.passes.norm import fold_norms

from .graphs import check_fusion, deflating, function

G = torch.Generator().manual_seed(0)
X, SCALE, SHIFT = (torch.randn(shape, generator=G) for shape in ((2, 5, 64), (2, 64), (2, 64)))


class SpelledOut(nn.Module):
    """RMS norm as diffusers writes it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64, generator=G) + 0.5)

    def forward(self, x):
        variance = x.to(torch.float64).pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(variance + 1e-6) * self.weight


def ada_layer_norm(m, x, scale, shift):
    return m.q(m.norm(x) * (1 + scale[:, None]) + shift[:, None])


FORMS = {
    "layer_norm": (lambda m, x, scale, shift: m.q(m.norm(x)), nn.LayerNorm(64), 0.0, 2),
    "adaLN": (ada_layer_norm, nn.LayerNorm(64, elementwise_affine=False, eps=1e-6), 1.0, 2),
    "adaLN, 1 + scale before the view": (
        lambda m, x, scale, shift: m.q(m.norm(x) * (scale + 1).unsqueeze(1) + shift.unsqueeze(1)),
        nn.LayerNorm(64),
        1.0,
        4,
    ),
    "rms_norm without 1 +": (lambda m, x, s, t: m.q(m.norm(x) * s.unsqueeze(1)), nn.RMSNorm(64), 0.0, 2),
    "rms_norm spelled out": (lambda m, x, s, t: m.q(m.norm(x) * (1.0 + s[:, None])), SpelledOut(), 1.0, 2),
}


@pytest.mark.parametrize("form", FORMS)
def test_form(form):
    forward, norm, offset, _ = FORMS[form]
    name = "rms_norm" if "rms" in form else "layer_norm"
    after = {f"sparsify:{name}": 1, "sparsify:identity": 0, name: 0, "mul": 0, "add": 0}
    gm = check_fusion(
        function(forward, norm=norm, q=nn.Linear(64, 64)),
        [X, SCALE, SHIFT],
        fold_norms,
        {"sparsify:identity": 1},
        after,
    )
    node = next(node for node in gm.graph.nodes if getattr(node.target, "_opname", "") == "sparsify")
    assert node.kwargs.get("mult_offset", 0.0) == offset


def test_one_fold_feeds_every_layer_that_reads_it():
    def forward(m, x, scale, shift):
        h = m.norm(x) * (1 + scale[:, None]) + shift[:, None]
        return m.q(h), m.k(h), m.v(h)

    layers = {name: nn.Linear(64, 64) for name in "qkv"}
    module = function(forward, norm=nn.LayerNorm(64), **layers)
    after = {"sparsify:layer_norm": 1, "sparse_linear": 3, "layer_norm": 0}
    check_fusion(module, [X, SCALE, SHIFT], fold_norms, {"sparsify:identity": 1}, after)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.q(F.layer_norm(x, (5, 64))),  # over two dimensions
        lambda m, x: m.q(F.layer_norm(x, (64,)) * x[..., :1]),  # one factor a token, not a row of channels
        lambda m, x: m.q(F.layer_norm(x.transpose(0, 1), (64,)).transpose(0, 1)),  # tokens change places
    ],
)
def test_left_alone(forward):
    unchanged = {"sparsify:identity": 1, "layer_norm": 1}
    check_fusion(function(forward, q=nn.Linear(64, 64)), [X], fold_norms, unchanged, unchanged, count=0)


def test_kept_in_front_of_a_layer_that_deflates():
    unchanged = {"sparsify:identity": 1, "layer_norm": 1}
    module = function(lambda m, x: m.q(m.norm(x)), norm=nn.LayerNorm(64), q=deflating())
    check_fusion(module, [X], fold_norms, unchanged, unchanged, count=0)
