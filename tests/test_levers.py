"""The levers of the quality study: each way to prune against brute force, and the stage as a whole."""

from itertools import combinations

import pytest
import torch
from torch import nn

from lynx_compile.calibration.statistics import Moments
from lynx_compile.evaluation import pruning
from lynx_compile.evaluation.levers import Lever, levers, native, norm
from lynx_compile.profile import Branch

from .test_evaluation import small_study


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 8, bias=True).requires_grad_(False)


def moments_of(z: torch.Tensor, restore) -> Moments:
    moments, lost = Moments.zeros(z.shape[1], z.device), z - restore(z)
    moments.rows = len(z)
    moments.gram += z.T @ z
    moments.cross += z.T @ lost
    moments.error += lost.T @ lost
    return moments


def test_a_lever_with_nothing_but_a_centre_is_the_shifted_branch(layer) -> None:
    x, mean = torch.randn(2, 5, 16), torch.randn(16)
    lever = Lever(norm, lambda _: mean)
    torch.testing.assert_close(lever(layer, x), Branch(shift=mean)(layer, x))
    text = Lever(native, dense_tokens=2)(layer, x)
    torch.testing.assert_close(text[:, :2], layer(x)[:, :2])
    torch.testing.assert_close(text[:, 2:], Branch(compensation="native")(layer, x)[:, 2:])
    last = Lever(native, dense_tokens=-2)(layer, x)
    torch.testing.assert_close(last, Branch(compensation="native", dense_tokens=-2)(layer, x))


def test_second_order_finds_the_best_pattern_and_update_of_each_group(layer) -> None:
    z, weight = torch.randn(6, 16), layer.weight.double()
    restored = pruning.second_order(layer.weight)(z)
    for row in range(6):
        for start in range(0, 16, 4):
            block, values = weight[:, start : start + 4], z[row, start : start + 4].double()
            least = min(
                float((block @ values - block[:, pair] @ solved).square().sum())
                for pair in map(list, combinations(range(4), 2))
                for solved in [torch.linalg.lstsq(block[:, pair], block @ values).solution]
            )
            found = restored[row, start : start + 4].double()
            assert int((found != 0).sum()) <= 2
            assert float((block @ (values - found)).square().sum()) == pytest.approx(
                least, rel=1e-3, abs=1e-9
            )


def test_what_is_folded_into_w_is_the_least_squares_fit(layer) -> None:
    z = torch.randn(4000, 16) @ torch.randn(16, 16)
    moments, weight = moments_of(z, norm), layer.weight
    kept = norm(z)

    def error(changed: torch.Tensor) -> float:
        return float((z @ weight.T - kept @ changed.T).norm() / (z @ weight.T).norm())

    best = error(torch.linalg.lstsq(kept, z @ weight.T).solution.T)
    assert error(pruning.folded(moments, weight)) == pytest.approx(best, rel=1e-3)
    assert error(pruning.folded_low_rank(moments, weight)) == pytest.approx(best, rel=1e-3)  # rank ≥ N
    scale = pruning.calibrated(moments, weight)
    assert best < error(pruning.folded_diagonal(moments, weight)) < error(weight)
    assert error(scale) <= min(error(weight * s) for s in (0.9, 1.0, 1.1, 1.2)) + 1e-4


def test_a_permutation_puts_two_strong_channels_in_each_group() -> None:
    energy = torch.arange(16.0)
    z = energy.sqrt().expand(3, 16).clone()
    kept = pruning.permuted(energy)(z) != 0
    assert kept[0, 8:].all()
    assert not kept[0, :8].any()


def test_partners_in_the_two_halves_are_pruned_alike() -> None:
    z = torch.randn(10, 16)
    restored = pruning.one_mask(z)
    first, second = (restored != 0).chunk(2)
    assert (first == second).all()
    assert (first.unflatten(1, (4, 4)).sum(-1) == 2).all()
    torch.testing.assert_close(restored.norm(dim=1), z.norm(dim=1))


def test_scores_rank_but_do_not_scale(layer) -> None:
    z = torch.tensor([[3.0, 2.0, 1.0, 0.5]]).repeat(1, 4)
    restored = pruning.scored(torch.tensor([1.0, 1.0, 9.0, 9.0]).repeat(4))(z)
    assert (restored[0, :4] != 0).tolist() == [False, False, True, True] or restored[0, 2] != 0
    assert float(restored.norm()) == pytest.approx(float(z.norm()), rel=1e-5)
    assert float(pruning.column_norms(layer.weight).mean()) == pytest.approx(1.0)


def test_the_stage_measures_every_lever() -> None:
    study = small_study(stages=["levers"])
    rows = {row.method.removeprefix("lever: "): row for row in study.run().rows}
    assert len(rows) == 2 + 28
    shares = {row.sparse_flops_share for name, row in rows.items() if "dense" not in name}
    assert len(shares) == 1  # all make the same layers sparse
    assert rows["norm, deflation r64"].latent_rel_err < 0.01  # K = 64: nothing is left to prune
    assert rows["norm, deflation r16"].latent_rel_err < rows["norm, mean"].latent_rel_err
    assert not study.ground.model._forward_hooks
    ground = study.ground
    stopped = levers(ground)
    next(stopped)
    stopped.close()
    assert not ground.model._forward_hooks
