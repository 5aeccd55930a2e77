"""The demo: what it measures, its grid and its page, on a tiny random model; and its command line."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn
from typer.testing import CliRunner

from lynx_compile.calibration import calibrate
from lynx_compile.calibration.workload import Pipeline
from lynx_compile.cli import app
from lynx_compile.cli.demo import summary
from lynx_compile.demo import (
    ERROR_TITLE,
    VARIANTS,
    Variant,
    error_steps,
    picture_grid,
    render,
    run,
    variants_with,
)
from lynx_compile.demo.layer_error import LayerErrors
from lynx_compile.evaluation.emoji import EXAMPLE, load_emoji_pipeline
from lynx_compile.profile import ProfileError, load_profile
from lynx_compile.runtime import semantics

PROMPTS = ["a red fox, noto", "<b>pizza</b> & co, twemoji"]


@pytest.fixture(scope="module")
def tiny_pipe():
    """The real pipeline around a random model of width 64: one dual-stream and one single-stream block."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=48,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=1,
        joint_attention_dim=384,
        pooled_projection_dim=384,
        axes_dims_rope=(16, 24, 24),
    ).eval()
    return load_emoji_pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())


@pytest.fixture(scope="module")
def profile(tiny_pipe):
    return calibrate(Pipeline(tiny_pipe, PROMPTS, steps=2), rank=32, steps=2, quiet=True)


@pytest.fixture(scope="module")
def result(tiny_pipe, profile):
    told: list[tuple[str, str]] = []
    made = run(
        tiny_pipe,
        PROMPTS,
        steps=2,
        profile=profile,
        begin=lambda title: told.append(("begin", title)),
        advance=lambda title: told.append(("advance", title)),
    )
    for variant in VARIANTS:
        assert told.count(("begin", variant.title)) == 1
        assert told.count(("advance", variant.title)) == 3  # the warm-up step and two
    assert told[-3:] == [("begin", ERROR_TITLE), *[("advance", ERROR_TITLE)] * error_steps(2)]
    return made


def test_dense_last_steps_of_the_profile(result, tiny_pipe, profile):
    """The warm-up goes on to a step that is sparse, and the dense step is no part of the share."""
    ending = replace(profile, dense_last_steps=1)
    told: list[str] = []
    _, calibrated = run(
        tiny_pipe,
        PROMPTS,
        steps=2,
        profile=ending,
        variants=[v for v in VARIANTS if v.calibrated or v.title == "dense"],
        advance=told.append,
    ).outcomes
    assert told.count("dense") == 3
    assert told.count("SA-NC, calibrated") == 4
    everywhere = result.outcomes[3]
    assert calibrated.sparse_share == everywhere.sparse_share / 2
    assert 0 < calibrated.distance.error.value != everywhere.distance.error.value
    with pytest.raises(ValueError, match="none of 1 steps sparse; take more steps"):
        run(tiny_pipe, PROMPTS, steps=1, profile=ending)


def test_outcomes(result, tiny_pipe):
    dense, native, norm, calibrated, other = result.outcomes
    assert [o.variant for o in result.outcomes] == list(VARIANTS)
    assert all(o.pictures.shape == (2, 3, 64, 64) for o in result.outcomes)
    assert all(o.pictures.min() >= 0 and o.pictures.max() <= 1 for o in result.outcomes)
    assert dense.distance is None
    assert dense.sparse_share == other.sparse_share == 0.0
    assert norm.sparse_share == native.sparse_share
    assert native.sparse_share > 0.5
    assert calibrated.sparse_share > 0.5
    # sparse moves the pictures, another noise more so (the model is random), and the two compensations differ
    assert native.distance.error.value > 0
    assert norm.distance.error.value > 0
    assert other.distance.error.value > norm.distance.error.value > calibrated.distance.error.value
    assert not torch.equal(native.latents, norm.latents)
    assert isinstance(tiny_pipe.transformer, FluxTransformer2DModel)  # handed back as it was


def test_layer_errors_are_of_the_sparse_layers(result):
    rows = [row for row in result.outcomes[1].report.rows if row.decision == "sparse"]
    assert set(result.layer_errors) == {row.name for row in rows}
    assert all(set(errors) == {"native", "norm"} for errors in result.layer_errors.values())
    assert all(0.02 < error < 1 for errors in result.layer_errors.values() for error in errors.values())


def test_layer_error_by_hand():
    layer = nn.Sequential(nn.Linear(8, 16))
    x = torch.randn(32, 8)
    errors = LayerErrors()
    with errors.observing(layer):
        layer(x)
        layer(x.clone())
    layer(torch.randn(4, 8))  # outside the block: not observed
    exact = x @ layer[0].weight.T
    for compensation in semantics.COMPENSATIONS:
        made = semantics.sparsify(x, compensation=compensation)
        wrong = semantics.sparse_linear(made.pruned, made.scale, made.t, layer[0].weight) - exact
        assert errors.relative()["0"][compensation] == pytest.approx(
            (wrong.norm() / exact.norm()).item(), rel=1e-4
        )


def test_layer_error_of_a_sparse_input_is_zero():
    layer = nn.Linear(8, 16)
    errors = LayerErrors()
    with errors.observing(layer):
        layer(torch.tensor([[1.0, 0, 2, 0, 0, -3, 4, 0]]))
    assert errors.relative()[""]["native"] == 0.0
    assert errors.relative()[""]["norm"] < 1e-4


def test_page_is_self_contained(result):
    page = render(result)
    assert page.count("data:image/png;base64,") == len(PROMPTS) * len(VARIANTS)
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "@import" not in page
    assert "<b>pizza" not in page
    assert "&lt;b&gt;pizza&lt;/b&gt; &amp; co, twemoji" in page
    assert all(f"<code>{name}</code>" in page for name in result.layer_errors)
    assert f"{100 * result.outcomes[1].sparse_share:.1f}%" in page
    assert f"{result.outcomes[2].distance.psnr.value:.2f}" in page
    for row in result.outcomes[1].report.rows:  # the rows of both decisions, with their reasons
        assert row.reason in page
    assert "were emulated" in page


def test_grid_holds_the_pictures(result):
    grid = picture_grid(result)
    assert grid.width > 2 * 128
    assert grid.height > 4 * 128
    assert grid.getcolors(maxcolors=2**24) is not None
    centre = grid.crop((130, 60, 230, 140))  # within the first picture, which is random and so not white
    assert len(centre.getcolors(maxcolors=2**24)) > 100


def test_summary_table(result):
    table = summary(result)
    assert table.row_count == len(VARIANTS)
    assert [column.header for column in table.columns] == [
        "variant",
        "PSNR, dB",
        "SSIM",
        "linear FLOPs sparse",
        "seconds",
    ]


def test_a_gpu_shows_its_name_and_step_times(result, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU {device}")
    on_gpu = replace(result, device="cuda:1", emulated=False)
    table = summary(on_gpu)
    assert table.columns[-1].header == "ms a step"
    assert list(table.columns[-1].cells) == [f"{outcome.step_ms:.2f}" for outcome in result.outcomes]
    page = render(on_gpu)
    assert "GPU cuda:1" in page
    assert "ms a step" in page
    assert "were emulated" not in page


def test_without_a_profile_nothing_is_calibrated(tiny_pipe):
    assert not any(variant.calibrated for variant in variants_with(None))
    with pytest.raises(ValueError, match="needs a profile"):
        run(tiny_pipe, PROMPTS[:1], steps=1, variants=VARIANTS)


def test_another_models_profile_is_refused_before_the_work(tiny_pipe):
    told = []
    shipped = load_profile(EXAMPLE / "profile")
    with pytest.raises(ProfileError, match="another size"):
        run(tiny_pipe, PROMPTS[:1], steps=1, profile=shipped, begin=told.append)
    assert not told


def test_what_cannot_be_compared_is_an_error(tiny_pipe):
    with pytest.raises(ValueError, match="has to be dense"):
        run(tiny_pipe, PROMPTS[:1], steps=1, variants=[Variant("sparse", compensation="norm")])


def test_a_variant_without_sparse_layers_is_an_error(tiny_pipe):
    """Nothing of the model can be sparse: the demo says so instead of showing dense pictures as sparse."""

    class Narrow(nn.Module):
        device = torch.device("cpu")
        dtype = torch.float32
        config = tiny_pipe.transformer.config

        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(48, 48)

        def forward(self, hidden_states, **_):
            return (self.proj(hidden_states),)

    pipe = load_emoji_pipeline(transformer=tiny_pipe.transformer, scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.transformer = Narrow()
    with pytest.raises(RuntimeError, match=r"no layer became sparse \(K = 48 is not a multiple of 64\)"):
        run(pipe, PROMPTS[:1], steps=1)
    assert isinstance(pipe.transformer, Narrow)


def test_missing_model_is_named(tmp_path):
    made = CliRunner().invoke(app, ["demo", "--model", str(tmp_path), "--out", str(tmp_path / "out")])
    assert made.exit_code == 1
    assert "error:" in made.output
    assert "model_index.json" in made.output
    assert not (tmp_path / "out").exists()


def _fails(*arguments: object) -> str:
    """The one line that `rt-lynx demo` says when it stops at an error."""
    made = CliRunner().invoke(app, ["demo", *map(str, arguments)])
    assert made.exit_code == 1, made.output
    assert isinstance(made.exception, SystemExit)  # said, not raised
    assert made.output.startswith("error: ")
    assert made.output.count("\n") == 1
    return made.output


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("meta", "runs on cpu, cuda or one GPU by number"),
        ("gpu", "runs on cpu, cuda or one GPU by number"),
        ("", "runs on cpu, cuda or one GPU by number"),
        ("cpu:3", "runs on cpu, cuda or one GPU by number"),
        ("cuda", "sees no NVIDIA GPU; use --device cpu"),
    ],
)
def test_a_device_that_cannot_be_used_is_named(device, said, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert said in (output := _fails("--device", device, "--out", tmp_path / "out"))
    assert f"--device {device}:" in output
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert "--device cuda:2: the GPUs here are cuda:0 to cuda:1" in _fails("--device", "cuda:2")


@pytest.mark.parametrize("prompt", ["", "   ", "\t\n"])
def test_an_empty_prompt_is_an_error(prompt, tmp_path):
    assert "--prompt is empty" in _fails("--prompt", "frog, noto", "--prompt", prompt, "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_prompt_of_undecodable_bytes_is_an_error(tmp_path):
    assert r"--prompt '\udcff fox' is no text" in _fails("--prompt", "\udcff fox", "--out", tmp_path)


def test_a_prompt_that_the_encoder_would_cut_is_an_error(tmp_path, monkeypatch, tiny_pipe):
    monkeypatch.setattr("lynx_compile.cli.demo._load", lambda model, device: tiny_pipe)
    prompt = "[red]frog[/red] " * 30
    output = _fails("--prompt", prompt, "--out", tmp_path / "out")
    assert "and the text encoder reads 32" in output
    assert "[red]frog[/red]" in output  # the user's brackets, not markup
    assert not (tmp_path / "out").exists()
    tokens = tiny_pipe.count_tokens("frog " * 30)
    assert tokens == tiny_pipe.max_text_tokens  # with the two that mark begin and end: still whole


def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch, tiny_pipe):
    monkeypatch.setattr("lynx_compile.cli.demo._load", lambda model, device: tiny_pipe)
    monkeypatch.setattr("lynx_compile.cli.demo._run", lambda *_: pytest.fail("the work began"))
    file = tmp_path / "file"
    file.touch()
    assert f"--out {file}: File exists; give a folder" in _fails("--out", file)
    assert f"--out {file / 'out'}: Not a directory" in _fails("--out", file / "out")

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert f"--out {tmp_path}: Permission denied; give a folder" in _fails("--out", tmp_path)


def test_a_file_that_cannot_be_replaced_is_named(tmp_path, monkeypatch, tiny_pipe):
    monkeypatch.setattr("lynx_compile.cli.demo._load", lambda model, device: tiny_pipe)
    monkeypatch.setattr("lynx_compile.cli.demo._profile", lambda model: None)
    (tmp_path / "report.html").mkdir()
    arguments = ["demo", "--prompt", "frog, noto", "--steps", "1", "--out", str(tmp_path)]
    made = CliRunner().invoke(app, arguments)
    assert made.exit_code == 1
    assert f"error: {tmp_path / 'report.html'}: Is a directory; give another --out" in made.output


def test_command_writes_grid_and_page(tmp_path, monkeypatch, tiny_pipe, profile):
    monkeypatch.setattr("lynx_compile.cli.demo._load", lambda model, device: tiny_pipe)
    monkeypatch.setattr("lynx_compile.cli.demo._profile", lambda model: profile)
    out = tmp_path / "out"
    arguments = ["demo", "--prompt", "frog, noto", "--steps", "1", "--out", str(out)]
    made = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert made.exit_code == 0, made.output
    assert (out / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert "frog, noto" in (out / "report.html").read_text()
    for said in ("SA-native", "SA-NC, calibrated", "PSNR", "emulated"):
        assert said in made.output
