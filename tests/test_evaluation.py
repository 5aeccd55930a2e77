"""Quality metrics against small worked cases, and the table on a small model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lynx_compile.calibration import Inputs
from lynx_compile.evaluation.emoji import prompts, to_pictures
from lynx_compile.evaluation.features import kid
from lynx_compile.evaluation.ground import Ground, Settings, placed, speed_of
from lynx_compile.evaluation.methods import Method, weight_methods
from lynx_compile.evaluation.metrics import MAX_PSNR, Mean, psnr, relative_error, ssim
from lynx_compile.evaluation.recipe import output_errors, reached
from lynx_compile.evaluation.run import STAGES, Study
from lynx_compile.evaluation.table import Table, draw_pictures
from lynx_compile.evaluation.weight_sparsity import (
    InputStatistics,
    bawa,
    magnitude,
    output_error,
    ria,
    slim,
    wanda,
)
from lynx_compile.profile import Branch
from tests.test_calibration import Model


def statistics(x: torch.Tensor) -> InputStatistics:
    return InputStatistics(x.T @ x, x.abs().mean(0), len(x))


ROOT = Path(__file__).parent.parent
WEIGHT = torch.tensor([[4.0, -3.0, 2.0, 1.0], [1.0, 1.5, -2.0, 3.0]])
INPUT = torch.diag(torch.tensor([1.0, 1.0, 4.0, 2.0]))  # channel norms 1, 1, 4, 2


def kept(pruned: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in pruned]


def test_magnitude_keeps_the_largest() -> None:
    assert kept(magnitude(WEIGHT)) == [[0, 1], [2, 3]]


def test_wanda_counts_the_channel_norm() -> None:
    # |W|·norm: 4 3 8 2 and 1 1.5 8 6
    assert kept(wanda(WEIGHT, statistics(INPUT))) == [[0, 2], [2, 3]]


def test_ria_is_relative_to_row_and_column() -> None:
    # columns sum to 5, 4.5, 4, 4; rows to 10, 7.5; norms to the ½: 1, 1, 2, √2
    # row 0: (4/5 + .4)·1 = 1.2, (3/4.5 + .3)·1 = .967, (.5 + .2)·2 = 1.4, (.25 + .1)·√2 = .495
    # row 1: (.2 + .133)·1 = .333, (.333 + .2)·1 = .533, (.5 + .267)·2 = 1.53, (.75 + .4)·√2 = 1.63
    assert kept(ria(WEIGHT, statistics(INPUT))) == [[0, 2], [2, 3]]
    weight = torch.tensor([[3.0, 2.9, 1.0, 1.0], [9.0, 0.1, 0.1, 5.0]])
    # columns sum to 12, 3, 1.1, 6; norms are 1: .25 + .38, .967 + .367, .909 + .127, .167 + .127 in row 0
    assert kept(ria(weight, statistics(torch.eye(4)))) == [[1, 2], [0, 3]]


def test_bawa_is_at_least_as_good_as_what_its_grid_holds() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 32) * torch.linspace(0.1, 4, 32)
    weight, seen = torch.randn(24, 32) * torch.rand(24, 1), statistics(x)
    best = output_error(weight, bawa(weight, seen), seen)
    assert best <= output_error(weight, wanda(weight, seen), seen)
    direct = (x @ (weight - wanda(weight, seen)).T).square().sum()
    assert output_error(weight, wanda(weight, seen), seen) == pytest.approx(float(direct), rel=1e-4)


def test_slim_repairs_the_salient_loss() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 32) * torch.linspace(0.1, 4, 32)
    weight, seen = torch.randn(24, 32), statistics(x)
    pruned, down, up = slim(weight, seen, 24)
    assert torch.equal(pruned, wanda(weight, seen))
    torch.testing.assert_close(pruned + up @ down, weight, rtol=1e-3, atol=1e-3)  # full rank repairs it all
    _, down, up = slim(weight, seen, 4)
    assert output_error(weight, pruned + up @ down, seen) < output_error(weight, pruned, seen)


def test_psnr_error_and_mean() -> None:
    reference = torch.full((2, 3, 16, 16), 0.5)
    shifted = reference + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(shifted, reference), torch.tensor([20.0, 40.0]), rtol=1e-3, atol=1e-3)
    assert psnr(reference, reference).tolist() == [MAX_PSNR] * 2
    torch.testing.assert_close(relative_error(1.1 * reference, reference), torch.tensor([0.1, 0.1]))
    assert ssim(reference, reference).tolist() == pytest.approx([1.0, 1.0])
    mean = Mean.of(torch.tensor([1.0, 3.0, 1.0, 3.0]))
    assert mean.value == 2.0
    assert mean.high - 2.0 == pytest.approx(1.96 * (4 / 3) ** 0.5 / 2)


def test_kid_is_zero_for_one_distribution_and_grows_with_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    real, same, far = (torch.randn(300, 16, generator=generator) for _ in range(3))
    near = kid(same, real, subsets=50, size=100)
    assert near.low < 0 < near.high
    assert kid(far + 1, real, subsets=50, size=100).low > near.high
    assert kid(same, real, seed=3) == kid(same, real, seed=3)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 64)
        self.blocks = nn.ModuleList([nn.Linear(64, 64)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](self.embed(x))


def test_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    workload = Inputs(Tiny().eval(), [torch.randn(2, 16, 64) for _ in range(2)])
    tokens, shapes = {"embed": 16, "blocks.0": 16}, {"embed": (64, 64), "blocks.0": (64, 64)}
    table = Table(
        workload, tokens, shapes, 1, lambda s: s.reshape(-1, 1, 32, 32).expand(-1, 3, -1, -1).sigmoid()
    )
    row = table.add(Method("NC", {"blocks.0": Branch()}))
    assert row.sparse_flops_share == 0.5
    assert 0 < row.latent_rel_err < 1
    assert row.latent_rel_err_ci[0] <= row.latent_rel_err <= row.latent_rel_err_ci[1]
    for method in weight_methods(workload, ["blocks.0"], [8]):
        table.add(method)
    names = [r.method for r in table.rows]
    assert names[0] == "dense"
    assert table.rows[0].psnr_db == MAX_PSNR
    errors = {r.method: r.latent_rel_err for r in table.rows}
    assert errors["2:4 weights, SLiM r8"] < errors["2:4 weights, Wanda"]
    draw_pictures(tmp_path / "grid.png", table.pictures, table.rows)
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_emoji_prompts_do_not_repeat() -> None:
    texts = prompts(1900)
    assert len(set(texts)) == 1900
    assert prompts(10, 100) == texts[100:110]
    assert not {text.rsplit(", ", 1)[0] for text in texts[:900]} & {
        text.rsplit(", ", 1)[0] for text in texts[900:]
    }
    assert to_pictures(torch.zeros(2, 256, 48)).shape == (2, 3, 64, 64)
    assert to_pictures(torch.zeros(1, 256, 48)).unique().tolist() == [0.5]


def test_share_and_speed_agree() -> None:
    assert speed_of(0.0) == 1.0
    assert speed_of(1.0) == 2.0


def test_committed_results_name_their_source() -> None:
    for path in (Path(__file__).parent.parent / "docs" / "results").glob("quality_*.json"):
        data = json.loads(path.read_text())
        assert {"device", "command", "commit", "prompts", "steps", "rows"} <= data.keys()
        for row in data["rows"]:
            assert {"method", "sparse_flops_share", "psnr_db", "latent_rel_err"} <= row.keys()


class SmallPipe:
    """A pipeline in miniature: prompts are seeds' companions, steps move the latents along the velocity."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer = Model().eval().requires_grad_(False)

    def __call__(
        self,
        prompts: list[str],
        *,
        num_inference_steps: int,
        generator: list[torch.Generator],
        output_type: str,
    ) -> tuple[torch.Tensor]:
        assert output_type == "latent"
        x = torch.stack(
            [torch.randn(24, 64, generator=g) + len(p) / 50 for p, g in zip(prompts, generator, strict=True)]
        )
        for _ in range(num_inference_steps):
            x = x - self.transformer(x) / num_inference_steps
        return (x,)


SMALL = Settings(
    prompts=6,
    steps=4,
    ranks=(8, 16),
    calibration_prompts=16,
    calibration_steps=2,
    validation_prompts=4,
    distill_prompts=16,
    distill_samples=8,
    recipe_steps=20,
    joint_steps=4,
    shares=(0.5, 0.4),
    main_share=0.5,
    batch_size=8,
)


def small_study(**options: object) -> Study:
    return Study(
        SmallPipe(),
        lambda count, start: [f"{i} {'x' * (i % 7)}" for i in range(start, start + count)],
        SMALL,
        lambda s: s.reshape(-1, 1, 24, 64).expand(-1, 3, -1, -1).sigmoid(),
        **options,
    )


def test_study_fills_the_table() -> None:
    study = small_study()
    rows = {row.method: row for row in study.run().rows}
    assert rows["dense"].latent_rel_err == 0
    chosen = rows["shift + deflation r16 + SL end to end, 50%"]
    assert chosen.sparse_flops_share >= 0.5 - 1e-9
    assert chosen.latent_rel_err < rows["shift + deflation r16"].latent_rel_err
    assert rows["shift + deflation r16 + SL end to end, 40%"].sparse_flops_share >= 0.4 - 1e-9
    recipe = rows["SA-NC-LoRA r16, paper's recipe"]
    assert chosen.details["dense_last_steps"] == 1
    assert "dense_last_steps" not in rows[f"{chosen.method}, no last step dense"].details
    assert recipe.calibration_s > 0
    assert recipe.details["rank_share_of_k"] == [0.25]
    assert any("joint distillation" in name for name in rows)
    assert sum("2:4 weights" in name for name in rows) == 6
    assert set(recipe.to_json()) == {
        "method",
        "sparse_flops_share",
        "psnr_db",
        "ssim",
        "latent_rel_err",
        "latent_rel_err_ci",
        "kid",
        "kid_ci",
        "calibration_s",
    }
    found = study.ground.studies["sensitivity"]
    assert set(found["layers"]) == set(study.ground.names)
    assert set(found["class"]) == {"q", "k", "out"}
    assert set(found["block"]) == {"blocks.0", "blocks.1"}
    assert -1 <= found["spearman"]["output"] <= found["spearman"]["velocity"] <= 1
    watched = study.ground.studies["recipe_against_closed_form"]["r16"]
    assert [step for step, _, _ in watched["history"]] == list(range(21))
    assert watched["history"][-1][2] < watched["history"][0][2]
    assert watched["refined"]["training_steps"] == 2
    assert watched["refined"]["seconds"] > 0
    assert watched["refined"]["error"] == pytest.approx(watched["refined"]["error_before"], rel=0.05)
    profile = study.profile()
    assert 0 < len(profile.sparse_layers()) < len(profile.layers)
    assert all("sample" in layer.sensitivity for layer in profile.layers.values())


def test_tables_of_the_documentation() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    study = small_study(stages=["ladder", "chosen", "recipe"])
    rows = [row.to_json() for row in study.run().rows]
    made = {"device": "a GPU", "command": "rt-lynx eval", "commit": "c0", "prompts": 6, "steps": 4}
    result = json.loads(json.dumps({**made, "rows": rows, "studies": study.ground.studies}))
    methods = tables.quality(result)
    assert len(methods) == len(rows) + 4
    low, high = rows[-1]["latent_rel_err_ci"]
    assert f"{rows[-1]['latent_rel_err']:.3f} ({low:.3f}–{high:.3f})" in methods[-3]
    assert "6 held-out prompts, 4 steps; a GPU; `rt-lynx eval`; at c0" in methods[-1]
    assert len(tables.quality_race(result)) == 2 + 2 * 5 + 2  # two ranks, four sizes and the refined one
    rungs = tables.quality_rungs(result)
    assert len(rungs) == 2 + 3 + 2  # three classes
    assert rungs[0].split(" | ")[2:5] == ["norm", "norm, LoRA r8", "shift, deflation r8"]
    assert len(tables.quality_classes(result)) == 2 + 5 + 2  # three classes and two blocks
    assert len(tables.quality_steps(result)) == 2 + 3 + 2  # none, one or two of the three before the last


def test_layers_keep_what_they_share_when_placed() -> None:
    model = Model().double()
    down, shift = torch.randn(8, 64), torch.randn(64)
    given = {f"blocks.0.to_{name}": Branch(down, torch.randn(64, 8), shift) for name in "qk"}
    first, second = placed(given, model).values()
    assert first.down is second.down
    assert first.shift is second.shift
    assert first.up is not second.up
    assert first.down.dtype is first.up.dtype is torch.float64
    torch.testing.assert_close(first.down, down.double())


def test_stages_are_named() -> None:
    with pytest.raises(ValueError, match="stage 'wights' is unknown; stages are ladder"):
        small_study(stages=["wights"])


def test_a_time_limit_keeps_what_is_measured() -> None:
    told: list[str] = []
    study = small_study(log=told.append, limit_s=0.0)
    assert [row.method for row in study.run().rows] == ["dense", "dense, another seed"]
    assert told[-1] == "the time limit cut the study short"
    assert study.profile() is None
    assert list(study.table.pictures) == ["dense", "dense, another seed"]


def test_a_failing_stage_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_ground: Ground) -> None:
        raise ArithmeticError("no such method")

    monkeypatch.setitem(STAGES, "weights", fails)
    study = small_study(stages=["weights", "ladder"])
    rows: list[str] = []
    study.note = lambda row: rows.append(row.method)
    with pytest.raises(ArithmeticError, match="no such method"):
        study.run()
    assert rows[-1] == "shift + deflation r16"


def test_race_reads_off_when_training_gets_there() -> None:
    history = [[0, 1.0, 0.5], [10, 2.0, 0.208], [20, 3.0, 0.2]]
    assert reached(0.2, history) == {
        "0%": {"step": 20, "seconds": 3.0},
        "1%": {"step": 20, "seconds": 3.0},
        "5%": {"step": 10, "seconds": 2.0},
        "10%": {"step": 10, "seconds": 2.0},
    }
    assert reached(0.1, history)["10%"] is None


def test_output_errors_are_those_of_the_layer() -> None:
    ground = Ground(SmallPipe(), lambda count, start: ["x"] * count, SMALL)
    errors = output_errors(ground.model, ground.checks, {"blocks.0.to_q": Branch()})
    seen: list[torch.Tensor] = []
    module = ground.model.blocks[0].to_q
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for args, kwargs, _ in ground.checks:
            ground.model(*args, **kwargs)
        handle.remove()
        x = torch.cat(seen)
        wanted = (Branch()(module, x) - module(x)).norm() / module(x).norm()
    assert errors == {"blocks.0.to_q": pytest.approx(float(wanted), rel=1e-4)}
