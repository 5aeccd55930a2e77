"""Profiles: what is saved loads, anything else is refused; PEFT reads the adapter; apply, diff, merge."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lynx_compile import rules
from lynx_compile.layers import LynxLinear
from lynx_compile.profile import (
    Branch,
    Layer,
    Profile,
    ProfileError,
    apply_profile,
    diff,
    fingerprint,
    load_profile,
    merge,
    remove_profile,
    save_profile,
    seal,
)
from lynx_compile.profile.format import UNDECIDED

FILES = ("lynx.json", "adapter_config.json", "adapter_model.safetensors", "lynx_vectors.safetensors")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def make_model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model().eval()


def make_profile(model: nn.Module, seed: int = 0, dense_steps: int = 0, last: int = 0) -> Profile:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for index in range(2):
        for name, n, k in ((f"blocks.{index}.down", 64, 128), (f"blocks.{index}.up", 128, 64)):
            branch = Branch(
                (torch.randn(16, k, generator=generator) / k**0.5).bfloat16().float(),
                torch.randn(n, 16, generator=generator).bfloat16().float(),
                torch.randn(k, generator=generator),
                deflate=".down" in name,
            )
            layers[name] = Layer(
                (n, k), name != "blocks.1.up", "chosen", branch, 8, 0.3, 0.2, {"sample": 0.1}
            )
    return Profile(
        fingerprint(model),
        layers,
        dense_steps=dense_steps,
        dense_last_steps=last,
        steps=4,
        provenance={"tokens": 100 + seed},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_profile(make_profile(make_model()), tmp_path / "profile")
    return tmp_path / "profile"


def test_round_trip(folder: Path) -> None:
    saved, loaded = make_profile(make_model()), load_profile(folder)
    assert loaded.model == saved.model
    assert loaded.provenance == saved.provenance
    for name, layer in saved.layers.items():
        found = loaded.layers[name]
        assert (found.shape, found.sparse, found.reason) == (layer.shape, layer.sparse, layer.reason)
        assert found.sensitivity == layer.sensitivity
        assert torch.equal(found.branch.shift, layer.branch.shift)
        assert found.branch.deflate == layer.branch.deflate == (".down" in name)
        for kind in ("down", "up"):
            expected = getattr(layer.branch, kind).bfloat16()
            assert torch.equal(getattr(found.branch, kind), expected)


def test_saving_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    save_profile(make_profile(make_model()), tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_peft_loads_the_adapter(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model, profile = make_model(), load_profile(folder)
    wrapped = peft.PeftModel.from_pretrained(model, str(folder))
    layer = wrapped.base_model.model.blocks[0].up
    branch = profile.layers["blocks.0.up"].branch
    x = torch.randn(3, 64)
    expected = layer.base_layer(x) + x @ branch.down.float().T @ branch.up.float().T
    torch.testing.assert_close(layer(x), expected)


def edit(folder: Path, **changes: object) -> None:
    data = json.loads((folder / "lynx.json").read_text())
    data.update(changes)
    (folder / "lynx.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 4}, "upgrade lynx-compile"),
        ({"schema": 2}, "calibrate again"),
        ({"format": "other"}, "not a Lynx profile"),
        ({"compensation": "magic"}, "compensation"),
        ({"dense_steps": -1}, "dense_steps"),
        ({"dense_last_steps": True}, "dense_last_steps"),
        ({"steps": 10**400}, "steps"),
        ({"layers": []}, "layers"),
        ({"provenance": {"changed": 1}}, "digest"),
        ({"files": {"../../etc/passwd": "0"}}, "files"),
    ],
)
def test_refuses_a_changed_description(folder: Path, change: dict[str, object], message: str) -> None:
    edit(folder, **change)
    with pytest.raises(ProfileError, match=message):
        load_profile(folder)


@pytest.mark.parametrize("name", FILES)
def test_refuses_truncated_and_missing_files(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ProfileError, match=name):
        load_profile(folder)
    (folder / name).unlink()
    with pytest.raises(ProfileError, match=name):
        load_profile(folder)


def test_refuses_another_rank_until_it_fits(folder: Path) -> None:
    data = json.loads((folder / "lynx.json").read_text())
    data["layers"]["blocks.0.up"]["rank"] = 8
    edit(folder, layers=data["layers"])
    with pytest.raises(ProfileError, match=r"blocks\.0\.up\.lora_A"):
        seal(folder)


def test_seal_accepts_a_trained_adapter(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor * 2 for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ProfileError, match="seal"):
        load_profile(folder)
    doubled = seal(folder).layers["blocks.0.up"].branch.down
    assert torch.equal(doubled, make_profile(make_model()).layers["blocks.0.up"].branch.down.bfloat16() * 2)


def mutate(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    kind = rng.randrange(5)
    at = rng.randrange(len(data))
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 3:
        del data[at : at + rng.randrange(1, 9)]
    else:
        end = rng.randrange(at, len(data)) + 1
        data[at:end] = data[at:end][::-1]
    return bytes(data)


def fuzz(folder: Path, rounds: int, seed: int) -> tuple[int, int]:
    """Load mutated profiles; how many were refused, and how many loaded and equal the saved one."""
    rng = random.Random(seed)
    contents = {name: (folder / name).read_bytes() for name in FILES}
    saved = load_profile(folder)
    refused = loaded = 0
    for _ in range(rounds):
        name = rng.choice(FILES)
        (folder / name).write_bytes(mutate(contents[name], rng))
        try:
            found = load_profile(folder)
        except ProfileError:
            refused += 1
        else:
            loaded += 1
            assert found.model == saved.model
            for layer, other in zip(saved.layers.values(), found.layers.values(), strict=True):
                assert torch.equal(layer.branch.down, other.branch.down)
                assert (layer.sparse, layer.sensitivity) == (other.sparse, other.sensitivity)
                assert layer.branch.deflate == other.branch.deflate
        (folder / name).write_bytes(contents[name])
    return refused, loaded


def test_fuzz(folder: Path) -> None:
    refused, loaded = fuzz(folder, 600, seed=1)
    assert refused + loaded == 600
    assert refused > 550


def test_apply_and_remove(folder: Path) -> None:
    model = make_model()
    x = torch.randn(2, 8, 64)
    before = model(x)
    profile = apply_profile(model, folder)
    layers = dict(model.named_modules())
    assert isinstance(layers["blocks.0.up"], LynxLinear)
    assert layers["blocks.0.up"].lynx_decision == "sparse"
    assert layers["blocks.1.up"].lynx_decision == "dense"
    assert torch.equal(layers["blocks.0.up"].lynx_down, profile.layers["blocks.0.up"].branch.down.float())
    assert torch.equal(model(x), before)
    remove_profile(model)
    assert not any(isinstance(module, LynxLinear) for module in model.modules())


def test_where_nothing_was_chosen_the_policy_decides(tmp_path: Path) -> None:
    model = make_model()
    profile = make_profile(model)
    profile.layers["blocks.0.up"].reason = UNDECIDED
    save_profile(profile, tmp_path / "undecided")
    apply_profile(model, tmp_path / "undecided")
    up = model.get_submodule("blocks.0.up")
    assert up.lynx_decision is None
    assert up.lynx_down is not None
    assert model.get_submodule("blocks.0.down").lynx_decision == "sparse"


@pytest.mark.parametrize("sparse", [True, False])
def test_a_merged_layer_is_as_the_profile_says_that_chose(sparse: bool) -> None:
    model = make_model()
    chosen, open_ = make_profile(model), make_profile(model, seed=1)
    for layer in open_.layers.values():
        layer.sparse, layer.reason = True, UNDECIDED
    chosen.layers["blocks.0.up"].sparse = sparse
    for first, second in ((chosen, open_), (open_, chosen)):
        merged = merge(first, second).layers["blocks.0.up"]
        assert merged.decision == ("sparse" if sparse else "dense")
    assert merge(open_, open_).layers["blocks.0.up"].decision is None
    row = next(row for row in diff(chosen, open_) if row.name == "blocks.0.up")
    assert row.changed
    assert row.decisions[1] == "default"


def test_layers_with_equal_data_share_it_once_applied(tmp_path: Path) -> None:
    model = make_model()
    profile = make_profile(model)
    ups = profile.layers["blocks.0.up"], profile.layers["blocks.1.up"]
    ups[1].sparse = True
    ups[1].branch = replace(ups[1].branch, down=ups[0].branch.down, shift=ups[0].branch.shift)
    save_profile(profile, tmp_path / "shared")
    apply_profile(model, tmp_path / "shared")
    up, other, down = (model.get_submodule(f"blocks.{name}") for name in ("0.up", "1.up", "0.down"))
    assert up.lynx_down is other.lynx_down
    assert up.lynx_shift is other.lynx_shift
    assert up.lynx_up is not other.lynx_up
    assert up.lynx_down is not down.lynx_down


def test_compiled_profile_is_the_branches(folder: Path) -> None:
    from lynx_compile.calibration import emulate

    model, x = make_model(), torch.randn(2, 40, 64)
    profile = load_profile(folder)
    with torch.no_grad():
        with emulate(model, {n: b.to("cpu", torch.float32) for n, b in profile.sparse_layers().items()}):
            expected = model(x)
        assert (expected - model(x)).norm() > 0.01 * expected.norm()
        apply_profile(model, profile)
        torch._dynamo.reset()
        options = {"emulate": True, "rest": "eager", "strict": True}
        compiled = torch.compile(model, backend="rt_lynx", options=options, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


def test_dense_steps_switch_between_two_graphs(folder: Path) -> None:
    from lynx_compile.calibration import emulate

    model, x = make_model(), torch.randn(2, 40, 64)
    profile = make_profile(model, dense_steps=1, last=1)
    with torch.no_grad():
        dense = model(x)
        with emulate(model, {n: b.to("cpu", torch.float32) for n, b in profile.sparse_layers().items()}):
            sparse = model(x)
        apply_profile(model, profile)
        torch._dynamo.reset()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        options = {"emulate": True, "rest": "eager", "strict": True}
        compiled = torch.compile(model, backend="rt_lynx", options=options, fullgraph=True)
        for _ in range(3):
            for step, time in enumerate((1.0, 0.75, 0.5, 0.25)):
                expected = dense if step in (0, 3) else sparse
                torch.testing.assert_close(compiled(x, timestep=torch.tensor([time, time])), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == 2


class Scheduler:
    step_index: int | None = None
    num_inference_steps: int = 8
    begin_index = 0
    timesteps = range(8)


class Pipe:
    def __init__(self, transformer: nn.Module) -> None:
        self.transformer, self.scheduler = transformer, Scheduler()


def test_dense_steps_follow_the_scheduler_and_scale_with_its_steps() -> None:
    pipe = Pipe(make_model())
    apply_profile(pipe, make_profile(pipe.transformer, dense_steps=1, last=1))  # of 4, so 2 of 8
    switch = pipe.transformer.blocks[0].up.lynx_switch
    seen = []
    for index in (None, 1, 2, 3, 5, 6, 7, None):
        pipe.scheduler.step_index = index
        pipe.transformer(torch.randn(1, 4, 64))
        seen.append(switch.dense)
    assert seen == [True, True, False, False, False, True, True, True]
    pipe.scheduler.timesteps = range(15)  # as Heun's for 8 steps: it counts calls, two a step but the last
    seen = []
    for index in range(15):
        pipe.scheduler.step_index = index
        pipe.transformer(torch.randn(1, 4, 64))
        seen.append(switch.dense)
    assert seen == [True] * 4 + [False] * 7 + [True] * 4


def test_refuses_other_models(folder: Path) -> None:
    with pytest.raises(ProfileError, match="other weights"):
        apply_profile(make_model(seed=1), folder)
    apply_profile(make_model(seed=1), folder, check_weights=False)
    with pytest.raises(ProfileError, match="no such linear layer"):
        apply_profile(nn.Sequential(nn.Linear(64, 64)), folder)


def test_diff_and_merge(folder: Path, tmp_path: Path) -> None:
    model = make_model()
    first, second = make_profile(model), make_profile(model, seed=300)
    assert not any(row.changed for row in diff(first, first))
    assert all(row.changed for row in diff(first, second))
    same = merge(first, first)
    for name, layer in first.layers.items():
        product = layer.branch.up @ layer.branch.down
        merged = same.layers[name].branch
        torch.testing.assert_close(merged.up @ merged.down, product, rtol=1e-4, atol=1e-4)
    both = merge(first, second)
    assert both.provenance["tokens"] == 500
    expected = (
        0.2 * first.layers["blocks.0.up"].branch.shift + 0.8 * second.layers["blocks.0.up"].branch.shift
    )
    torch.testing.assert_close(both.layers["blocks.0.up"].branch.shift, expected)
    save_profile(both, tmp_path / "merged")
    assert load_profile(tmp_path / "merged").layers["blocks.0.up"].branch.rank == 16
    first.dense_steps, second.dense_last_steps, second.steps = 1, 3, 8
    set_tokens = lambda profile, tokens: setattr(  # noqa: E731
        profile.layers["blocks.0.up"],
        "branch",
        replace(profile.layers["blocks.0.up"].branch, dense_tokens=tokens),
    )
    set_tokens(first, -32), set_tokens(second, -64)
    both = merge(first, second)
    assert (both.dense_steps, both.dense_last_steps, both.steps) == (1, 2, 4)
    save_profile(both, tmp_path / "last")
    assert load_profile(tmp_path / "last").layers["blocks.0.up"].branch.dense_tokens == -64
    set_tokens(second, 64)
    with pytest.raises(ProfileError, match=r"blocks\.0\.up\.dense_tokens: is -32 in one and 64 in the other"):
        merge(first, second)
    with pytest.raises(ProfileError, match="different models"):
        merge(first, make_profile(make_model(seed=1)))


def test_push_checks_before_it_uploads(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from lynx_compile.profile import hub as profile_hub

    store = tmp_path / "store"
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, *a, **k: None)
    monkeypatch.setattr(
        hub.HfApi, "upload_folder", lambda self, folder_path, **k: shutil.copytree(folder_path, store)
    )
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **k: str(store))
    profile_hub.push(folder, "someone/profile")
    assert load_profile(profile_hub.pull("someone/profile")).model == fingerprint(make_model())
    edit(folder, schema=9)
    with pytest.raises(ProfileError, match="schema"):
        profile_hub.push(folder, "someone/profile")


@pytest.mark.parametrize("action", ["push", "pull", "apply"])
def test_a_hub_out_of_reach_is_named(action: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from lynx_compile.profile import hub as profile_hub

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host\nand more lines")

    monkeypatch.setattr(hub.HfApi, "create_repo", unreachable)
    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    actions = {
        "push": lambda: profile_hub.push(folder, "someone/profile"),
        "pull": lambda: profile_hub.pull("someone/profile"),
        "apply": lambda: apply_profile(make_model(), "someone/profile"),
    }
    with pytest.raises(ProfileError, match=r"someone/profile.*OSError: no route to host\).*check the name"):
        actions[action]()


@pytest.mark.parametrize("given", [None, 3, {"layers": {}}])
def test_what_is_no_profile_is_said_so(given: object) -> None:
    with pytest.raises(TypeError, match="a profile is a Profile, a folder or a hub id, not"):
        apply_profile(make_model(), given)


def test_rules_know_their_models() -> None:
    assert "*.to_out.0" in rules.options("black-forest-labs/FLUX.1-dev")["skip"]
    assert rules.options("qwen-image", skip="mine", emulate=True)["skip"][-1] == "mine"
    with pytest.raises(ValueError, match=r"flux\.1-dev"):
        rules.options("flux")
