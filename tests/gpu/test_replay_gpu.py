"""Training as a CUDA graph gives what it gives step by step."""

import pytest
import torch

from lynx_compile.calibration import Inputs, refine
from lynx_compile.calibration.refine import distill_layers, random_branches, record
from lynx_compile.profile import Branch
from tests.test_calibration import make_workload


def trained(monkeypatch: pytest.MonkeyPatch, graph: bool) -> dict[str, Branch]:
    if not graph:
        monkeypatch.setattr(refine, "replayed", lambda run, examples: run)
    workload = make_workload(8)
    model = workload.model.to("cuda", torch.bfloat16)
    calls = record(Inputs(model, [x.to("cuda", torch.bfloat16) for x in workload.inputs]), quiet=True)
    start = random_branches(model, {name: Branch() for name in ("blocks.0.to_q", "blocks.1.to_out")}, 16)
    return distill_layers(model, calls, start, steps=40, quiet=True)


@pytest.mark.gpu
def test_distillation_replayed_is_distillation(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed, plain = trained(monkeypatch, graph=True), trained(monkeypatch, graph=False)
    for name, branch in plain.items():
        wanted, found = (b.up @ b.down for b in (branch, replayed[name]))
        assert wanted.norm() > 0
        # the warm-up runs take no step of the optimiser, so both see the same calls in the same order
        assert (found - wanted).norm() < 0.05 * wanted.norm()
