import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lynx_compile import passes
from lynx_compile.passes.rotary import fold_rotations
from lynx_compile.runtime.rotary import CHANNELS, rotary

from .graphs import function, ops_of

G = torch.Generator().manual_seed(0)
B, T, H, D = 2, 6, 3, 16
Q = torch.randn(B, T, H, D, dtype=torch.float64, generator=G)
TEXT = torch.randn(B, 4, H, D, dtype=torch.float64, generator=G)
COS, SIN = torch.randn(
    2, T + 4, D, dtype=torch.float64, generator=G
)  # both channels of a pair have their own
FREQS = torch.polar(torch.ones(T, D // 2), torch.randn(T, D // 2, generator=G)).to(torch.complex128)


def turned(x, cos, sin):
    """As diffusers spells it for FLUX."""
    real, imag = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    quarter = torch.stack([-imag, real], dim=-1).flatten(3)
    return (x.to(torch.float64) * cos + quarter.to(torch.float64) * sin).to(x.dtype)


def turned_complex(x, freqs):
    """As diffusers spells it for Qwen-Image and Z-Image."""
    numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * freqs.unsqueeze(1)).flatten(3).type_as(x)


def spelled_out(norm, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight


def norm(weighted=True):
    module = nn.RMSNorm(D, eps=1e-5, elementwise_affine=weighted, dtype=torch.float64)
    if weighted:
        module.weight.data = torch.randn(D, dtype=torch.float64, generator=G)
    return module


def folded(call, inputs, count, after, **layers):
    """Dynamo's graph, rewritten, gives what the module gives; returns the graph."""
    module = function(call, **layers).eval().requires_grad_(False)
    want = module(*[x.clone() for x in inputs])
    graphs = []

    def backend(gm, example_inputs):
        passes.normalize(gm.graph)
        assert fold_rotations(gm.graph) == count
        gm.graph.lint()
        gm.recompile()
        counts = ops_of(gm)
        assert {op: counts[op] for op in after} == after
        assert fold_rotations(gm.graph) == 0
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    got = torch.compile(module, backend=backend, fullgraph=True)(*[x.clone() for x in inputs])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    return graphs[0]


GONE = {"rms_norm": 0, "rsqrt": 0, "stack": 0, "view_as_complex": 0}


@pytest.mark.parametrize("weighted", [True, False])
def test_real(weighted):
    def forward(m, q, cos, sin):
        return turned(m.norm(q), cos[None, :, None, :], sin[None, :, None, :])

    folded(forward, (Q, COS[:T], SIN[:T]), 1, {"rotary": 1, **GONE}, norm=norm(weighted))


def test_complex_with_a_norm_spelled_out():
    folded(
        lambda m, q, f: turned_complex(spelled_out(m.norm, q), f),
        (Q, FREQS),
        1,
        {"rotary": 1, **GONE},
        norm=norm(),
    )


def test_queries_and_keys_share_their_tables():
    def forward(m, q, f):
        return turned_complex(m.q(q), f) * turned_complex(m.k(q * 2), f)

    folded(forward, (Q, FREQS), 2, {"rotary": 2, "view_as_real": 1, **GONE}, q=norm(), k=norm())


def test_a_rotation_without_norm():
    folded(lambda m, q, f: turned_complex(q, f), (Q, FREQS), 1, {"rotary": 1, **GONE})


def test_angles_of_each_sample():
    f = FREQS * torch.tensor([1, 1j], dtype=torch.complex128)[:, None, None]
    call = lambda m, q, f: torch.view_as_real(  # noqa: E731
        torch.view_as_complex(q.reshape(B, T, H, -1, 2)) * f.unsqueeze(2)
    ).flatten(3)
    folded(call, (Q, f), 1, {"rotary": 1, **GONE})


def test_text_and_image_joined_in_front():
    def forward(m, q, t, cos, sin):
        return turned(torch.cat([m.t(t), m.q(q)], dim=1), cos[None, :, None, :], sin[None, :, None, :])

    folded(forward, (Q, TEXT, COS, SIN), 1, {"rotary": 1, "cat": 0, **GONE}, t=norm(), q=norm())


def test_text_and_image_joined_behind():
    def forward(m, q, t, f):
        return torch.cat([turned_complex(m.t(t), f[:4]), turned_complex(m.q(q), f)], dim=1)

    folded(forward, (Q, TEXT, FREQS), 3, {"rotary": 1, "cat": 0, **GONE}, t=norm(), q=norm())


def half_turn(m, q, f):
    a, b = q.chunk(2, -1)  # channels i and i + D/2 turn together
    return torch.cat([-b, a], -1) * f.real.repeat(1, 2)[:, None] + q


@pytest.mark.parametrize(
    ("forward", "after"),
    [
        (half_turn, {"rotary": 0}),
        # the normed queries are read elsewhere too: they are rotated, not normed again
        (lambda m, q, f: (lambda n: turned_complex(n, f) + n)(m.norm(q)), {"rotary": 1, "rms_norm": 1}),
        (lambda m, q, f: (lambda n: n.mul_(2) + turned_complex(n, f))(m.norm(q)), {"rotary": 0}),
        (lambda m, q, f: turned_complex(q, f.repeat(1, H)[:, : D // 2] + q.sum()), {"rotary": 1}),
        (
            lambda m, q, f: torch.view_as_real(
                torch.view_as_complex(q.reshape(B, T, H, -1, 2)) + f[:, None]
            ).flatten(3),
            {"rotary": 0},
        ),
    ],
)
def test_only_rotations_of_pairs(forward, after):
    folded(forward, (Q, FREQS), after["rotary"], after, norm=norm())


def test_what_was_written_to_is_left():
    def forward(m, q, f):
        n = m.norm(q)
        r = turned_complex(n, f)
        n.add_(1)
        return r + n

    gm = folded(forward, (Q, FREQS), 1, {"rotary": 1}, norm=norm())
    assert ops_of(gm)["rms_norm"] == 1


def test_definition():
    """The rotation keeps the norm of each pair where the angles are cosines and sines."""
    angles = torch.randn(1, T, D // 2, 1, dtype=torch.float64, generator=G)
    weight = torch.randn(D, dtype=torch.float64, generator=G)
    cos, sin = ([f(part) for part in (angles[:, :2], angles[:, 2:])] for f in (torch.cos, torch.sin))
    y = rotary([Q[:, :2], Q[:, 2:]], [weight, None], [1e-6, -1.0], cos, sin)
    x = torch.cat([F.rms_norm(Q[:, :2], (D,), weight, 1e-6), Q[:, 2:]], 1)
    norms = [z.unflatten(-1, (-1, 2)).norm(dim=-1) for z in (x, y)]
    torch.testing.assert_close(*norms)
    turn = torch.view_as_complex(y.unflatten(-1, (-1, 2))) / torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    torch.testing.assert_close(
        turn, torch.polar(torch.ones_like(angles), angles)[:, :, None, :, 0].expand_as(turn)
    )


def test_tables_conjugated_lazily_are_left():
    folded(lambda m, q, f: turned_complex(m.norm(q), f.conj()), (Q, FREQS), 0, {"rotary": 0}, norm=norm())


def test_one_table_by_token_and_by_sample():
    def forward(m, q, k, cos, sin):
        by_sample = turned(q, cos[:, None, None], sin[:, None, None])
        return by_sample + turned(k, cos[None, :, None], sin[None, :, None])

    tokens = torch.randn(B, B, H, D, dtype=torch.float64, generator=G)
    folded(forward, (Q[:, :1], tokens, COS[:B], SIN[:B]), 2, {"rotary": 2}, norm=norm())


def test_a_negative_eps_is_no_missing_norm():
    def forward(m, q, f):
        return turned_complex(q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + -1e-3), f)

    folded(forward, (Q, FREQS), 1, {"rotary": 1, "rsqrt": 1})


def test_symbolic_widths_get_no_guard():
    """A picture (B, C, H, W) of any size is one graph, also where W happens to be a width of heads."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        assert fold_rotations(gm.graph) == 0
        return gm.forward

    torch._dynamo.reset()
    module = torch.compile(function(lambda m, x: x * 2 + 1), backend=backend, dynamic=True)
    for size in (CHANNELS[2], 48, CHANNELS[1]):
        module(torch.zeros(2, 3, size, size))
    assert len(graphs) == 1
