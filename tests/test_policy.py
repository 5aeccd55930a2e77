"""The safe defaults, on the names and graphs of real models."""

import pytest
import torch
from torch import nn

import lynx_compile
from lynx_compile.policy import _NAMED_DEFAULTS, _wrapper

NAMES = {
    "modulation": [
        "transformer_blocks.3.norm1.linear",
        "single_transformer_blocks.0.norm.linear",
        "transformer_blocks.0.img_mod.1",
        "double_stream_modulation_img.linear",
        "layers.0.adaLN_modulation.0",
        "adaln_single.emb.timestep_embedder.linear_1",
        "distilled_guidance_layer.layers.2.linear_1",
        "single_stream_modulations.txt.linear",
        "time_mod_proj",
        "decoders.0.layer.0.FiLMLayer.scale_bias",
    ],
    "embedder": [
        "x_embedder",
        "img_in",
        "time_text_embed.timestep_embedder.linear_2",
        "caption_projection.linear_1",
    ],
    "text stream of a dual-stream block": [
        "transformer_blocks.0.attn.add_k_proj",
        "transformer_blocks.0.ff_context.net.0.proj",
        "transformer_blocks.0.txt_mlp.net.2",
        "attn.to_add_out",
        "context_refiner.0.attn.to_q",
        "block.ff_t.w1",
        "video_text_transformer_blocks.0.attn.to_query",
        "transformer_blocks.1.encoder_proj",
    ],
    "attention output": [
        "blocks.0.attn1.to_out.0",
        "attn.to_out.0",
        "attention.o_proj",
        "blocks.2.attn.proj",
        "attn.img_attn_proj",
    ],
    None: [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.ff.net.0.proj",
        "transformer_blocks.0.ff.net.2",
        "transformer_blocks.0.ff.linear_in",
        "single_transformer_blocks.0.proj_mlp",
        "single_transformer_blocks.0.proj_out",
        "transformer_blocks.0.img_mlp.net.2",
        "layers.0.feed_forward.w1",
        "blocks.0.ffn.net.2",
        "attn.to_qkv_mlp_proj",
        "blocks.0.attention.img_qkv_proj",
        "visual_transformer_blocks.0.feed_forward.out_layer",
        "layers.0.mlp.gate_proj",
    ],
}


@pytest.mark.parametrize(
    ("wanted", "name"), [(wanted, name) for wanted, names in NAMES.items() for name in names]
)
def test_named_defaults(wanted, name):
    found = next((reason for reason, pattern in _NAMED_DEFAULTS if pattern.search(name)), None)
    assert found == wanted


class Parallel(nn.Module):
    """Attention and MLP side by side, joined by one layer, as in FLUX.2's single-stream blocks."""

    def __init__(self):
        super().__init__()
        self.to_qkv, self.up = nn.Linear(64, 192), nn.Linear(64, 128)
        self.to_out, self.proj_out = nn.Linear(192, 64), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        attention = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj_out(x + self.to_out(torch.cat([attention, nn.functional.silu(self.up(x))], -1)))


def test_a_layer_that_joins_attention_and_mlp_is_no_attention_output():
    torch._dynamo.reset()
    lynx_compile.clear_report()
    model = Parallel().eval().requires_grad_(False)
    options = {"rest": "eager", "emulate": True, "strict": True}
    torch.compile(model, backend="rt_lynx", options=options)(torch.randn(2, 5, 64))
    rows = {row.name: row for row in lynx_compile.report().rows}
    assert rows["to_out"].decision == "sparse"
    assert rows["to_out"].pattern == "cat_silu → linear"
    assert rows["proj_out"].reason == "safe default: final projection"


def test_attention_output_is_found_by_what_it_reads():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_qkv, self.last = nn.Linear(64, 192), nn.Linear(64, 64)

        def forward(self, x):
            q, k, v = self.to_qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
            return self.last(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch._dynamo.reset()
    lynx_compile.clear_report()
    options = {"rest": "eager", "emulate": True, "strict": True}
    torch.compile(Attention().requires_grad_(False), backend="rt_lynx", options=options)(
        torch.randn(2, 5, 64)
    )
    assert [row.decision for row in lynx_compile.report().rows] == ["sparse", "dense"]
    assert lynx_compile.report().rows[1].reason == "safe default: attention output"


class Whole(nn.Module):
    """A stack of blocks, a condition of one row a sample, and a projection at the end that is scaled."""

    def __init__(self):
        super().__init__()
        self.conditioning = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(nn.ModuleDict({"ff": nn.Linear(64, 64)}) for _ in range(2))
        self.proj_out = nn.Linear(64, 64)

    def forward(self, x, condition):
        x = x + self.conditioning(condition)
        for block in self.blocks:
            x = x + block["ff"](x)
        return self.proj_out(x) * 2


@pytest.mark.parametrize("condition", [torch.randn(2, 1, 64), torch.randn(64)], ids=["(B, 1, C)", "(C,)"])
def test_the_ends_of_a_model_and_its_conditions(condition):
    torch._dynamo.reset()
    lynx_compile.clear_report()
    options = {"rest": "eager", "emulate": True, "strict": True}
    model = Whole().requires_grad_(False)
    torch.compile(model, backend="rt_lynx", options=options)(torch.randn(2, 5, 64), condition)
    reasons = {row.name: row.reason for row in lynx_compile.report().rows}
    assert reasons["conditioning"] == "safe default: modulation: one row a sample"
    assert reasons["proj_out"] == "safe default: final projection"
    assert reasons["blocks.0.ff"] == reasons["blocks.1.ff"] == "chosen by default"


@pytest.mark.parametrize(("least", "decision"), [(17, "sparse"), (18, "sparse"), (19, "dense")])
def test_exactly_as_many_tokens_as_it_takes_are_enough(least, decision):
    torch._dynamo.reset()
    lynx_compile.clear_report()
    options = {"rest": "eager", "emulate": True, "strict": True, "min_tokens": least}
    with torch.no_grad():
        torch.compile(nn.Linear(64, 64), backend="rt_lynx", options=options, dynamic=False)(
            torch.ones(2, 9, 64)
        )
    (row,) = lynx_compile.report().rows
    assert (row.decision, row.min_tokens) == (decision, 0)  # known: nothing is left to the run time


@pytest.mark.parametrize(
    ("names", "wrapper"),
    [
        (["blocks.0.up", "proj_out"], ""),
        (["a.b.blocks.0.up", "a.b.proj_out"], "a.b."),
        (["a.blocks.0.up", "a.blocks.1.up"], "a."),  # the list of blocks is the model's own
        (["blocks.0.up", "blocks.0.proj_out"], ""),
        (["a.embed", "a.blocks.0.up"], "a."),
        (["linear", "a.blocks.0.up"], ""),
    ],
)
def test_what_wraps_a_model_ends_before_its_blocks(names, wrapper):
    assert _wrapper(names) == wrapper


def test_the_last_layer_of_a_block_alone_is_no_final_projection():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.ModuleDict({"up": nn.ModuleList([nn.Linear(64, 64)])})
            self.attn["proj_out"] = nn.Linear(64, 64)

        def forward(self, x):
            return x + 2 * torch.tanh(self.attn["proj_out"](torch.relu(self.attn["up"][0](x))))

    lynx_compile.clear_report()
    torch._dynamo.reset()
    options = {"emulate": True, "rest": "eager", "strict": True}
    torch.compile(Block().requires_grad_(False), backend="rt_lynx", options=options)(torch.randn(2, 40, 64))
    assert {row.name: row.decision for row in lynx_compile.report().rows}["attn.proj_out"] == "sparse"
