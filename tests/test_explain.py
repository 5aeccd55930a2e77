"""The dry run: known models on meta tensors, tables, JSON, the command line, bad input."""

import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import lynx_compile
from lynx_compile import cost, models
from lynx_compile.cli import app
from lynx_compile.cli.explain import at_resolution
from lynx_compile.explanation import explain
from lynx_compile.report import clear_report, report
from tests import zoo

TINY = {"in_channels": 16, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 64,
        "num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 64,
        "axes_dims_rope": [16, 24, 24], "guidance_embeds": True}  # fmt: skip
run = CliRunner().invoke


@pytest.fixture
def tiny_folder(tmp_path):
    """A pipeline folder with a small FLUX transformer's config and no weights."""
    folder = tmp_path / "tiny-flux"
    (folder / "transformer").mkdir(parents=True)
    config = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.36.0", **TINY}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", models.KNOWN)
def test_known_configs_have_the_published_size(name):
    model = models.resolve(name).build("meta")
    held = sum(tensor.numel() for tensor in model.state_dict().values()) / 1e9
    assert held == pytest.approx(models.KNOWN[name].parameters_b, abs=0.051)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", models.KNOWN)
def test_known_models_take_their_inputs(name):
    known = models.resolve(name)
    step = models.Step(256, 256, batch=2, frames=known.step.frames, text_tokens=32)
    with torch.no_grad():
        output = known.build("meta")(**known.inputs(step), return_dict=False)[0]
    leaves = output if isinstance(output, list) else [output]
    assert sum(leaf.shape[0] for leaf in leaves if not isinstance(output, list)) == (
        0 if leaves is output else 2
    )
    assert all(leaf.is_meta for leaf in leaves)


def test_every_linear_has_one_row_with_its_shape(tiny_folder):
    explanation = explain(str(tiny_folder), step=models.Step(256, 256, text_tokens=64))
    model = models.resolve(str(tiny_folder)).build()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    rows = {layer.row.name: layer.row for layer in explanation.layers}
    assert rows.keys() == linears.keys()
    assert len(explanation.layers) == len(linears)
    for name, module in linears.items():
        assert (rows[name].n, rows[name].k) == (module.out_features, module.in_features)
        assert rows[name].reason
    assert rows["transformer_blocks.0.attn.to_q"].m == 16 * 16
    assert rows["single_transformer_blocks.0.proj_mlp"].m == 16 * 16 + 64
    assert rows["transformer_blocks.1.ff.net.2"].decision == "sparse"
    assert rows["transformer_blocks.1.norm1.linear"].decision == "dense"


def test_totals_add_up(tiny_folder):
    explanation = explain(str(tiny_folder), device="h200", rank=16)
    totals, rows = explanation.totals(), [layer.row for layer in explanation.layers]
    assert totals["linear_flops"] == sum(2 * r.m * r.n * r.k for r in rows)
    sparse = sum(r.flops for r in rows if r.decision == "sparse")
    assert totals["sparse_share"] == pytest.approx(sparse / totals["linear_flops"])
    assert totals["linears"] == len(rows)
    assert sum(entry["flops"] for entry in explanation.report.by_pattern().values()) == totals["linear_flops"]
    for layer in explanation.layers:
        r = layer.row
        expected = cost.predict("h200", max(r.m, 1), r.n, r.k, 16)
        assert layer.ms == (expected.sparse_ms if r.decision == "sparse" else expected.dense_ms)
    assert totals["decided_ms"] == pytest.approx(sum(layer.ms for layer in explanation.layers))
    document = json.loads(explanation.to_json())
    assert [row["name"] for row in document["rows"]] == [r.name for r in rows]
    assert sum(row["flops"] for row in document["rows"]) == document["totals"]["linear_flops"]


def test_break_even_of_the_device_decides(tiny_folder):
    wide = {"attention_head_dim": 128, "num_attention_heads": 8, "axes_dims_rope": [32, 48, 48]}
    path = tiny_folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wide))
    rows = [layer.row for layer in explain(str(path), options={"only": ["*_blocks.*"]}, device="h200").layers]
    below = [row for row in rows if "below" in row.reason]
    sparse = [row for row in rows if row.decision == "sparse"]
    assert below
    assert sparse
    readers = {"to_q": 3, "to_k": 3, "to_v": 3, "add_q_proj": 3, "add_k_proj": 3, "add_v_proj": 3}
    for row in below + sparse:
        shared = readers.get(row.name.split(".")[-1], 1)
        if row.name.startswith("single") and "proj_out" not in row.name:
            shared = 4  # Q, K, V and proj_mlp read one X
        least = cost.break_even_tokens("h200", row.n, row.k, 0, shared)
        assert (least is None or row.m < least) == (row.decision == "dense"), row


def test_options_reach_the_policy(tiny_folder):
    explanation = explain(str(tiny_folder), options={"skip": ["transformer_blocks.0.*"], "only": ["*.to_q"]})
    decided = {layer.row.name: layer.row for layer in explanation.layers}
    assert decided["transformer_blocks.0.attn.to_q"].reason == "skip='transformer_blocks.0.*'"
    assert {name for name, row in decided.items() if row.decision == "sparse"} == {
        "transformer_blocks.1.attn.to_q",
        "single_transformer_blocks.0.attn.to_q",
    }


def test_a_module_is_explained_where_it_is_without_a_trace_in_the_report():
    model, inputs = zoo.build("QwenImageTransformer2DModel")
    clear_report()
    before = [p.clone() for p in model.parameters()]
    explanation = lynx_compile.explain(model, inputs)
    assert explanation.title == "QwenImageTransformer2DModel"
    assert explanation.report.matched_share > 0.9
    assert report().graphs == ()
    for parameter, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, was, rtol=0, atol=0)


def test_tables_show_every_layer_or_one_row_a_kind(tiny_folder):
    explanation = explain(str(tiny_folder), device="h200")

    def lines(short: bool) -> list[str]:
        console = Console(width=200)
        with console.capture() as captured:
            console.print(explanation.table(short))
        return captured.get().splitlines()

    full, short = lines(False), lines(True)
    assert sum("transformer_blocks.1.attn.to_q" in line for line in full) == 1
    assert sum("transformer_blocks.*.attn.to_q (×2)" in line for line in short) == 1
    assert len(short) < len(full)
    assert "matched by a pattern" in short[-1]
    assert "h200" in short[-1]


def test_command_line(tiny_folder, tmp_path):
    coverage = tmp_path / "results" / "coverage.json"
    answer = run(
        app, ["explain", str(tiny_folder), "--json", "--resolution", "512x256", "--coverage", str(coverage)]
    )
    assert answer.exit_code == 0, answer.output
    document = json.loads(answer.stdout)
    tokens = {row["name"]: row["m"] for row in document["rows"]}
    assert tokens["transformer_blocks.0.attn.to_q"] == 32 * 16
    written = json.loads(coverage.read_text())
    assert set(written["rows"][0]) == {
        "model",
        "linear_flops",
        "matched_share",
        "sparse_share",
        "linears",
        "matched",
    }
    assert written["rows"][0]["linears"] == len(document["rows"])
    assert {"device", "command", "commit"} <= written.keys()
    assert "flux" in run(app, ["explain"]).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["flux-dev"], "did you mean 'flux'?"),
        (["flux", "--batch", "0"], "--batch"),
        (["flux", "--rank", "-1"], "--rank"),
        (["nope"], "no known model"),
        ([""], "'' is no known model, no path and no hub id"),
        (["flux", "--resolution", "big"], "'big'"),
        (["flux", "--resolution", "1000"], "multiples of 16"),
        (["flux", "--device", "h300"], "h300"),
        (["flux", "--coverage", "/"], "--coverage /: is a folder; give a file"),
        (["--fit", "missing.json"], "missing.json: No such file or directory; give a JSON file"),
        (["/"], "no transformer/config.json"),
    ],
)
def test_bad_arguments_say_what_is_wrong(arguments, said):
    answer = run(app, ["explain", *arguments], env={"COLUMNS": "400"})
    assert answer.exit_code == 2
    assert said in answer.output


def test_bad_configs(tmp_path):
    path = tmp_path / "config.json"
    for content, said in (
        (b"{bad", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[]", "holds a list"),
    ):
        path.write_bytes(content)
        for arguments in ([str(path)], [str(tmp_path)], ["--fit", str(path)]):
            answer = run(app, ["explain", *arguments], env={"COLUMNS": "400"})
            assert answer.exit_code == 2
            assert f"config.json: {said}" in answer.output
    path.write_text("{}")
    with pytest.raises(ValueError, match="no _class_name"):
        models.resolve(str(path))
    path.write_text('{"_class_name": "NoSuchTransformer"}')
    with pytest.raises(ValueError, match="no class NoSuchTransformer"):
        models.resolve(str(path)).build()
    path.write_text('{"_class_name": "PriorTransformer"}')
    with pytest.raises(ValueError, match=r"no example inputs for PriorTransformer.*pass your own"):
        models.resolve(str(path)).inputs()
    with pytest.raises(TypeError, match="needs the keyword inputs"):
        explain(torch.nn.Linear(64, 64))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": "two"}, "does not fit FluxTransformer2DModel (TypeError"),
        ({"attention_head_dim": None}, "does not fit FluxTransformer2DModel (TypeError"),
        ({"joint_attention_dim": 1.5}, "does not fit FluxTransformer2DModel (TypeError"),
        ({"in_channels": -1}, "does not fit FluxTransformer2DModel (RuntimeError"),
        ({"axes_dims_rope": 16}, "does not fit FluxTransformer2DModel (TypeError"),
        ({"layers": 1}, "unexpected keyword argument 'layers'"),
        ({"_class_name": ["FluxTransformer2DModel"]}, "_class_name is ['FluxTransformer2DModel']"),
    ],
)
def test_configs_of_wrong_types(tiny_folder, change, said):
    path = tiny_folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    answer = run(app, ["explain", str(tiny_folder)], env={"COLUMNS": "400"})
    assert answer.exit_code == 2
    assert said in answer.output


def test_resolution():
    assert at_resolution(models.Step(), "1360x768", 2) == models.Step(1360, 768, batch=2)
    assert at_resolution(models.Step(832, 480, frames=81), None, 1) == models.Step(832, 480, frames=81)
