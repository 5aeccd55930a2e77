"""Joint distillation: its forward is the branch's, its loss falls on unseen calls, nothing becomes NaN."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lynx_compile.calibration import Inputs, emulate
from lynx_compile.calibration.amplification import amplification
from lynx_compile.calibration.factors import Factors
from lynx_compile.calibration.joint import Pool, Trained, distill_jointly, velocity_judge
from lynx_compile.calibration.refine import record
from lynx_compile.profile import Branch


class Model(nn.Module):
    """Two layers of one X, as Q and K, then one more."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor, txt_ids: torch.Tensor | None = None) -> torch.Tensor:
        return self.out(torch.tanh(self.q(x)) * self.k(x))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def inputs(count: int, rows: int = 4) -> list[torch.Tensor]:
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(9)) * 0.85 ** torch.arange(64)[:, None]
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 12, 64, generator=generator) @ mix + 0.5 for _ in range(count)]


def branches(deflate: bool, **data: object) -> dict[str, Branch]:
    """Q and K share A and shift."""
    torch.manual_seed(1)
    basis, shift = torch.linalg.qr(torch.randn(64, 16))[0].T.contiguous(), torch.full((64,), 0.5)
    one = replace(Branch(basis, torch.zeros(64, 16), shift, deflate=deflate), **data)
    return {"q": one, "k": replace(one, up=torch.zeros(64, 16))}


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("dense_tokens", [0, 5, -5])
@pytest.mark.parametrize("compensation", ["norm", "native"])
def test_the_forward_of_training_is_the_branchs(model, deflate, dense_tokens, compensation) -> None:
    x = inputs(1)[0]
    branch = branches(deflate, dense_tokens=dense_tokens, compensation=compensation)["q"]
    branch = replace(branch, up=torch.randn(64, 16), score=torch.rand(64) + 0.5)
    torch.testing.assert_close(Trained(branch)(model.q, x), branch(model.q, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("deflate", [False, True])
def test_loss_falls_on_calls_never_seen_and_the_best_is_kept(model, deflate) -> None:
    calls = record(Inputs(model, inputs(34)), quiet=True)
    start = branches(deflate)
    found = distill_jointly(
        model, calls[:30], velocity_judge(model, calls[30:]), start,
        steps=100, batch=16, lr=1e-2, check_every=20, quiet=True,
    )  # fmt: skip
    losses = [held_out for _, _, held_out in found.history]
    assert min(losses) < 0.9 * losses[0]
    assert found.branches["q"].down is found.branches["k"].down  # as shared as it was
    assert found.branches["q"].shift is found.branches["k"].shift
    assert found.branches["q"].up is not found.branches["k"].up
    with torch.no_grad(), emulate(model, found.branches):  # the best ones, not those of the last step
        held_out = [
            ((model(*args) - v).square().sum((1, 2)) / v.square().sum((1, 2))).mean().item()
            for args, _, v in calls[30:]
        ]
    assert sum(held_out) / len(held_out) == pytest.approx(min(losses), rel=1e-3)


def test_no_gradient_is_lost_in_an_all_zero_row(model) -> None:
    """The row scale is 0 / 0 there, and its root has an infinite slope."""
    start = {name: replace(branch, shift=None) for name, branch in branches(True).items()}
    factors = Factors(start, "cpu")
    x = inputs(1)[0]
    x[0, 3] = 0
    with emulate(model, {name: Trained(branch) for name, branch in factors.trained.items()}):
        model(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in factors.parameters)


def test_stops_when_the_judge_sees_no_improvement_and_keeps_what_it_liked_best(model) -> None:
    calls = record(Inputs(model, inputs(2)), quiet=True)
    judged = []

    def judge(branches) -> float:
        judged.append(branches)
        return [5.0, 4.0, 3.0, 3.5, 3.5, 3.5, 1.0][len(judged) - 1]

    found = distill_jointly(
        model, calls, judge, branches(True), steps=100, check_every=1, patience=3, quiet=True
    )
    assert [entry[2] for entry in found.history] == [5.0, 4.0, 3.0, 3.5, 3.5, 3.5]
    assert found.branches is judged[2]
    assert not torch.equal(judged[1]["q"].down, judged[2]["q"].down)


def test_weights_count_whole_runs_and_scale_the_loss(model) -> None:
    calls = record(Inputs(model, inputs(4)), quiet=True)
    losses = [velocity_judge(model, [call])(branches(True)) for call in calls]
    weighted = velocity_judge(model, calls, weights=[0.5, 1.5])(branches(True))
    expected = (0.5 * (losses[0] + losses[2]) + 1.5 * (losses[1] + losses[3])) / 4
    assert weighted == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="4 calls are no whole number of runs of 3"):
        Pool(calls, weights=[1.0, 1.0, 1.0])


class Loop(Inputs):
    """Two steps of x ← x + v, the first v grown fourfold on its way."""

    @torch.no_grad()
    def run(self, batch: int) -> torch.Tensor:
        x = self.inputs[batch]
        return 4 * self.model(x) + self.model(x * 0.5)


def test_amplification_is_what_errors_of_a_step_do_to_the_sample(model) -> None:
    start = branches(True)
    found = amplification(Loop(model, inputs(3)), start)
    assert sum(found) / 2 == pytest.approx(1.0)
    parts = []
    for factor, scale in ((4.0, 1.0), (1.0, 0.5)):
        x = [value * scale for value in inputs(3)]
        with torch.no_grad():
            dense = [model(v) for v in x]
            with emulate(model, start):
                apart = [model(v) - d for v, d in zip(x, dense, strict=True)]
        relative = torch.cat(
            [a.square().sum((1, 2)) / d.square().sum((1, 2)) for a, d in zip(apart, dense, strict=True)]
        )
        parts.append(sum(float((factor * a).square().sum()) for a in apart) / float(relative.mean()))
    assert found[0] / found[1] == pytest.approx(parts[0] / parts[1], rel=1e-3)


def test_guided_pairs_stay_together(model) -> None:
    """Loss of the guided velocity, drawn by pairs: negative half first, as pipelines call the model."""
    calls = record(Inputs(model, [(x, torch.zeros(4, 3)) for x in inputs(2)]), quiet=True)
    pool = Pool(calls, guidance=3.0)
    assert pool.count == 4
    drawn = pool.static(2)
    pool.draw(torch.tensor([1, 2]), drawn)
    with emulate(model, branches(True)):
        got = pool.loss(model, drawn)
        apart, wanted = [], []
        for args, _, velocity in calls:
            for value, kept in ((model(args[0]) - velocity, apart), (velocity, wanted)):
                negative, positive = value.chunk(2)
                kept += list(negative + 3 * (positive - negative))
    expected = [apart[i].square().sum() / wanted[i].square().sum() for i in (1, 2)]
    torch.testing.assert_close(got, sum(expected) / 2, rtol=1e-4, atol=1e-6)


def test_calls_that_do_not_fit_are_refused(model) -> None:
    mixed = record(Inputs(model, [*inputs(1), inputs(1)[0][:, :5]]), quiet=True)
    with pytest.raises(ValueError, match="one resolution"):
        Pool(mixed)
    with pytest.raises(ValueError, match="no recorded calls"):
        Pool([])
    with pytest.raises(ValueError, match="even"):
        Pool(record(Inputs(model, inputs(1, rows=3)), quiet=True), guidance=2.0)
