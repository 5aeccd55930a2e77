"""What users hand to `calibrate`: compiled or offloaded models, state of another model, nothing to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lynx_compile
from lynx_compile.calibration import Inputs, Pipeline, calibrate, emulate
from lynx_compile.calibration.collect import Collector
from lynx_compile.calibration.sensitivity import Sensitivity
from lynx_compile.profile import Branch, Profile

from .test_calibration import Attention, Model, make_workload, same
from .test_evaluation import SmallPipe

OPTIONS: dict[str, Any] = {"rest": "eager", "emulate": True, "strict": True}


def by_blocks(workload: Inputs) -> Inputs:
    lynx_compile.compile_blocks(workload.model, blocks=["Attention"], **OPTIONS)
    return workload


def whole(workload: Inputs) -> Inputs:
    compiled = torch.compile(workload.model, backend="rt_lynx", options=OPTIONS)
    assert isinstance(compiled, nn.Module)
    return Inputs(compiled, workload.inputs)


def quick(workload: Inputs, **options: Any) -> Profile:
    return calibrate(workload, rank=8, quiet=True, **options)


@pytest.mark.parametrize("compiled", [by_blocks, whole])
def test_a_compiled_model_is_calibrated_as_the_dense_one(compiled: Any) -> None:
    torch._dynamo.reset()
    workload = compiled(make_workload())
    with torch.no_grad():
        sparse = workload.model(workload.inputs[0])
        assert not torch.equal(sparse, make_workload().run(0))
    profile = quick(workload)
    assert same(profile, quick(make_workload()))
    branches = {"blocks.0.to_q": profile.layers["blocks.0.to_q"].branch}
    effects = [Sensitivity(w, quiet=True).measure(branches, "layer") for w in (workload, make_workload())]
    assert effects[0] == effects[1]
    with torch.no_grad():
        assert torch.equal(workload.model(workload.inputs[0]), sparse)


@pytest.mark.parametrize("change", ["weights", "blocks"])
def test_state_of_another_model_is_not_used(tmp_path: Path, change: str) -> None:
    quick(make_workload(), state=tmp_path)
    other = make_workload()
    if change == "weights":
        other.model.blocks[0].to_q.weight.mul_(2)
    else:
        other.model.blocks.append(Attention().requires_grad_(False))
    assert same(quick(other, state=tmp_path), quick(other))


def test_damaged_state_is_gathered_anew(tmp_path: Path) -> None:
    wanted = quick(make_workload(), state=tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert same(quick(make_workload(), state=tmp_path), wanted)


def test_two_calibrations_in_one_folder_but_not_at_once(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\n"
        "from tests.test_calibration import make_workload\n"
        "from lynx_compile.calibration import Inputs, calibrate\n"
        "workload = make_workload()\n"
        "def run(batch):\n"
        "    print('running', flush=True)\n"
        "    time.sleep(600)\n"
        "workload.run = run\n"
        "calibrate(workload, rank=8, quiet=True, state=sys.argv[1])\n"
    )
    state = tmp_path / "state"
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(script), str(state)]
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "running\n"
            with pytest.raises(
                BlockingIOError, match=r"state holds the state of another calibration.*give each"
            ):
                quick(make_workload(), state=state)
            assert not list(state.glob("*.safetensors"))
        finally:
            other.kill()
    assert same(quick(make_workload(), state=state), quick(make_workload()))


def test_processes_of_one_group_share_a_state_folder(tmp_path: Path) -> None:
    first, second = (Collector(make_workload(), state=tmp_path, quiet=True) for _ in range(2))
    with first._alone():
        with pytest.raises(BlockingIOError), second._alone():
            pass
        second.rank = 1
        with second._alone():
            pass
    second.rank = 0
    with second._alone():  # let go by the first
        pass


def test_a_model_with_nothing_to_run_sparse_is_refused() -> None:
    for model in (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Linear(64, 30)), Model().embed):
        with pytest.raises(ValueError, match="has no linear layer that can run sparse"):
            quick(Inputs(model, [torch.randn(2, 24, 64)]))


def test_what_is_no_workload_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a Model is no workload; give calibration\.Pipeline"):
        quick(Model())  # type: ignore[arg-type]


def test_inputs_that_are_no_numbers_name_the_layer() -> None:
    workload = make_workload(1)
    workload.inputs[0][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the inputs of blocks\.0\.to_q hold NaN"):
        quick(workload)


def test_emulation_leaves_the_forward_that_offloading_put_there() -> None:
    workload = make_workload()
    layer = workload.model.blocks[0].to_q
    layer.forward = moved = lambda x: nn.Linear.forward(layer, x)
    with emulate(workload.model, {"blocks.0.to_q": Branch()}):
        assert layer.forward is not moved
    assert layer.forward is moved


def test_batches_may_be_cut_anywhere() -> None:
    whole, cut = (
        Pipeline(SmallPipe(), ["a", "bb", "ccc", "dd"], steps=2, batch_size=size, seed=5) for size in (4, 1)
    )
    torch.testing.assert_close(torch.cat([cut.run(i) for i in range(4)]), whole.run(0))
