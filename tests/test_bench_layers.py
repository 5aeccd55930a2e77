"""The layer and start benchmarks without a GPU: which layers belong together, what is averaged and shown."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import lynx_compile
from lynx_compile import models
from lynx_compile.bench import layers, layers_report, start
from lynx_compile.cli import app
from lynx_compile.runtime import semantics


@pytest.fixture
def small_flux(monkeypatch):
    known = models.KNOWN["flux"]
    config = {"num_attention_heads": 1, "joint_attention_dim": 64, "num_layers": 2, "num_single_layers": 3}
    monkeypatch.setitem(models.KNOWN, "flux", replace(known, config={**known.config, **config}))


def test_layers_that_read_one_x_are_one_kind(small_flux):
    found = layers.kinds("flux", 256)
    width, tokens, text = 128, 256, 512
    assert found == {
        layers.Kind("FluxTransformerBlock", names, m, ns, k): 2
        for names, m, ns, k in [
            (("attn.to_q", "attn.to_k", "attn.to_v"), tokens, (width,) * 3, width),
            (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), text, (width,) * 3, width),
            (("attn.to_out.0",), tokens, (width,), width),
            (("attn.to_add_out",), text, (width,), width),
            (("ff.net.0.proj",), tokens, (4 * width,), width),
            (("ff.net.2",), tokens, (width,), 4 * width),
            (("ff_context.net.0.proj",), text, (4 * width,), width),
            (("ff_context.net.2",), text, (width,), 4 * width),
        ]
    } | {
        layers.Kind("FluxSingleTransformerBlock", names, tokens + text, ns, k): 3
        for names, ns, k in [
            (("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"), (4 * width, *(width,) * 3), width),
            (("proj_out",), (width,), 5 * width),
        ]
    }


def test_a_kind_runs_as_one_sparsify_and_its_layers():
    torch.manual_seed(0)
    shared = layers.SharedInput((64, 128), 64, "cpu", torch.float64)
    x = torch.randn(1, 8, 64, dtype=torch.float64)
    layers.attach_branches(shared, 16)
    torch._dynamo.reset()
    lynx_compile.clear_report()
    options = {"only": ["*"], "rest": "eager", "strict": True, "emulate": True}
    with torch.no_grad():
        lynx_compile.compile_blocks(torch.nn.ModuleList([shared]), blocks=["SharedInput"], **options)
        found = shared(x)
    first, second = shared.layers
    assert torch.equal(first.lynx_down, second.lynx_down)
    s = semantics.sparsify(x[0], lora_down=first.lynx_down)
    for y, layer in zip(found, shared.layers, strict=True):
        expected = semantics.sparse_linear(
            s.pruned, s.scale, s.t, layer.weight, lora_up=layer.lynx_up, bias=layer.bias
        )
        torch.testing.assert_close(y[0], expected)


def row(**changes):
    return {
        "model": "flux", "block": "Block", "layers": ["attn.to_q", "attn.to_k"], "count": 10, "m": 4096,
        "n": 6144, "k": 3072, "lora_rank": 64, "decision": "sparse", "dense_ms": 0.3, "total_ms": 0.2,
        "total_no_lora_ms": 0.15, "speedup": 1.5,
    } | changes  # fmt: skip


def test_average_weighs_by_time_and_leaves_dense_layers_out():
    rows = [
        row(),
        row(count=5, dense_ms=0.8, total_ms=0.4),
        row(decision="dense", dense_ms=9.0, total_ms=9.0),
        row(model="z-image", decision="dense"),
    ]
    assert layers.averages(rows) == {"flux": round((3.0 + 4.0) / (2.0 + 2.0), 4)}


def test_table_and_plot(tmp_path):
    result = {"averages": {"flux": 1.5}, "rows": [row(), row(layers=["proj"], decision="dense")]}
    console = Console(record=True, width=160)
    layers_report.show(result, console)
    text = console.export_text()
    for shown in ("attn.to_q, to_k", "0.3000", "0.1500", "1.50×", "dense", "1.500× faster"):
        assert shown in text
    layers_report.plot(result, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_two_processes_share_caches_of_their_own(monkeypatch, capsys):
    seen = []

    def process(command, env, **options):
        asked = json.loads(command[-1])
        seen.append((asked["backend"], env["TORCHINDUCTOR_CACHE_DIR"], env["LYNX_CACHE_DIR"]))
        seconds = 8.0 if [name for name, *_ in seen].count(asked["backend"]) == 1 else 2.0
        hits = {"aot": 2, "inductor": 0}
        said = json.dumps({"compile_s": seconds, "tracing_s": 0.5, "step_ms": 10.0, "cache_hits": hits})
        return subprocess.CompletedProcess(command, 0, f"a warning\n{said}\n", "")

    monkeypatch.setattr(subprocess, "run", process)
    rows = start.run("flux", ["inductor", "rt_lynx"], rank=64, blocks=1)
    assert [(row["backend"], row["cold_s"], row["warm_s"], row["faster"]) for row in rows] == [
        ("inductor", 8.0, 2.0, 4.0),
        ("rt_lynx", 8.0, 2.0, 4.0),
    ]
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert len({folder for _, *folders in seen for folder in folders}) == 4
    layers_report.show_start(rows, Console())
    assert "4.0×" in capsys.readouterr().out


def test_tracing_is_told_from_the_rest():
    torch._dynamo.reset()
    before = start.tracing_s()
    torch.compile(torch.nn.Linear(4, 4), backend="eager")(torch.randn(2, 4))
    assert start.tracing_s() > before


def test_a_process_that_fails_says_why(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no CUDA device")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(RuntimeError, match="backend inductor failed:\nTraceback\nRuntimeError: no CUDA"):
        start.run("flux", ["inductor"], rank=64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so where there is nothing to measure")
@pytest.mark.parametrize("command", ["layers", "step", "start"])
def test_without_a_gpu_it_says_why(command):
    outcome = CliRunner().invoke(app, ["bench", command])
    assert outcome.exit_code == 1
    assert "nothing to measure here" in outcome.output
