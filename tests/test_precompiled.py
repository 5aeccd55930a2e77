"""Blocks kept on disk: loaded where everything is as it was, compiled anew where anything is not."""

import hashlib
import subprocess
import sys
import types

import peft
import pytest
import torch
from torch import nn

import lynx_compile
from lynx_compile import attach, precompiled

from . import switchable
from .switchable import WIDTH, Block, Kind, Model, Switched, joined

OPTIONS = {"emulate": True, "strict": True, "min_tokens": 0, "fullgraph": True, "precompile": True}


def inputs(rows=6, seed=0):
    return torch.randn(1, rows, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder in which the block has been compiled once, for six tokens."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LYNX_CACHE_DIR", str(folder))
        check(start(Model()), inputs())
    assert len(files(folder)) == 1
    return folder


@pytest.fixture(autouse=True)
def own_copy(kept, tmp_path, monkeypatch):
    """The kept files for one test."""
    (tmp_path / "blocks").mkdir(mode=0o700)
    for path in files(kept):
        (tmp_path / "blocks" / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("LYNX_CACHE_DIR", str(tmp_path))
    return tmp_path


def files(folder):
    return sorted((folder / "blocks").iterdir())


def start(model, **options):
    """What a new process would do: nothing compiled so far counts."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    lynx_compile.clear_report()
    lynx_compile.compile_blocks(model, **{**OPTIONS, **options})
    return model


def check(model, x):
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.definition(x), rtol=1e-4, atol=1e-4)


def traced():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_nothing_is_traced_and_the_report_says_what_was_decided():
    model = start(Model())
    check(model, inputs())
    assert traced() == 0
    (graph,) = lynx_compile.report().graphs
    assert [(row.name, row.decision, row.m) for row in graph.rows] == [("to_q", "sparse", 6)]


def test_a_second_process_traces_nothing(own_copy):
    for path in files(own_copy):  # of this process, whose threads and settings other tests may have changed
        path.unlink()
    code = (
        "import torch; from tests import test_precompiled as t\n"
        "model = t.start(t.Model()); t.check(model, t.inputs()); print('traced', t.traced())"
    )
    for graphs in (1, 0):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1:] == [f"traced {graphs}"], done.stderr[-2000:]


def test_weights_are_the_models_own_and_in_no_file(own_copy):
    (path,) = files(own_copy)
    assert path.stat().st_size < 4 * WIDTH * WIDTH
    model = start(Model(seed=1))
    check(model, inputs())
    model.blocks[1].to_q.weight.mul_(2)
    check(model, inputs())
    model.blocks[0].to_q.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 20, requires_grad=False)
    check(model, inputs())
    assert traced() == 0


def test_another_shape_compiles_into_the_next_file(own_copy):
    model = start(Model())
    for rows in (7, 6):
        check(model, inputs(rows))
    assert traced() == 1
    assert len(files(own_copy)) == 2
    model = start(Model())
    for rows in (7, 6):
        check(model, inputs(rows))
    assert traced() == 0


def test_more_shapes_than_files_compile_as_usual(own_copy):
    model = start(Model(), dynamic=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompiled, "GRAPHS", 1)
        for rows in (6, 5, 6, 5):
            check(model, inputs(rows))
    assert traced() == 2
    assert len(files(own_copy)) == 2  # dynamic=False has another key


def _branches(patch, model):
    for block in model.blocks:
        attach(block.to_q, down=torch.randn(16, WIDTH), up=torch.randn(WIDTH, 16))


def _adapter(patch, model):
    config = peft.LoraConfig(r=8, target_modules=["to_q"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    model.requires_grad_(False)


def _method(patch, model):
    patch.setattr(Block, "forward", lambda self, x: joined(x, self.to_q(x)) * (-1 if Switched.scale else 1))


CHANGES = {
    "enum": lambda patch, model: patch.setattr(Switched, "kind", Kind.TAKEN),
    "number": lambda patch, model: patch.setattr(Switched, "scale", 2.0),
    "function": lambda patch, model: patch.setattr(switchable, "joined", lambda x, y: x - 2 * y),
    "branches": _branches,
    "adapter": _adapter,
    "method": _method,
}


@pytest.mark.parametrize(
    ("change", "when"),
    # torch.compile does not look at methods again, nor does what is loaded
    [
        (change, when)
        for change in CHANGES
        for when in ("before", "after")
        if (change, when) != ("method", "after")
    ],
)
def test_what_has_changed_is_never_served(monkeypatch, change, when):
    model = start(Model())
    if when == "after":
        check(model, inputs())
        assert traced() == 0
    CHANGES[change](monkeypatch, model)
    with torch.no_grad():
        got = model(inputs())
        for block in model.blocks:
            block._compiled_call_impl = None
        lynx_compile.compile_blocks(model, **{**OPTIONS, "precompile": False, "rest": "eager"})
        want = model(inputs())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_hooks_run():
    model = start(Model())
    check(model, inputs())
    with torch.no_grad():
        before = model(inputs())
        model.blocks[1].register_forward_hook(lambda module, args, output: output + 1)
        torch.testing.assert_close(model(inputs()), before + 1)


def test_a_changed_option_or_source_has_no_use_for_the_file(own_copy, monkeypatch):
    model = start(Model(), skip=["*"])
    with torch.no_grad():
        got = model(inputs())
        for block in model.blocks:
            block._compiled_call_impl = None
        torch.testing.assert_close(got, model(inputs()), rtol=1e-4, atol=1e-4)
    assert traced() == 1
    monkeypatch.setattr(precompiled, "_module_digest", lambda module: "another")
    check(start(Model()), inputs())
    assert traced() == 1


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1] + b"x"])
def test_damaged_files_are_compiled_anew(own_copy, damage):
    (path,) = files(own_copy)
    path.write_bytes(damage(path.read_bytes()))
    check(start(Model()), inputs())
    assert traced() == 1
    check(start(Model()), inputs())
    assert traced() == 0


def test_what_cannot_be_read_compiles_as_usual(own_copy):
    (path,) = files(own_copy)
    content = b"no pickle"
    path.write_bytes(hashlib.sha256(content).digest() + content)
    check(start(Model()), inputs())
    assert traced() == 1


def test_gradients_and_stances_are_those_of_torch_compile():
    model = start(Model())
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        dense = model(inputs())
    for block in model.blocks:
        block._compiled_call_impl = None
    torch.testing.assert_close(dense, model(inputs()), rtol=0, atol=0)
    x = inputs().requires_grad_()
    torch.testing.assert_close(start(Model())(x), dense, rtol=1e-4, atol=1e-4)  # gradients: dense


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fullgraph": False}, "fullgraph=True"),
        ({"dynamic": True}, "fixed shapes"),
        ({"rest": "eager"}, "rest='eager'"),
        ({"mode": "reduce-overhead"}, "CUDA graphs"),
    ],
)
def test_options_that_do_not_go_with_it(options, message):
    with pytest.raises(ValueError, match=message):
        start(Model(), **options)


def test_descriptions_tell_apart_what_tracing_could():
    def one(x):
        return x + 1

    def other(x):
        return x + 2

    same = types.FunctionType(one.__code__.replace(co_firstlineno=99), {}, "one")
    same.__module__, same.__qualname__ = one.__module__, one.__qualname__
    describe = precompiled._describe
    assert describe(one) == describe(same)
    different = [
        one,
        other,
        1,
        1.0,
        True,
        "1",
        None,
        Kind.ADDED,
        Kind.TAKEN,
        torch.float16,
        torch,
        len,
        {1},
        {2},
    ]
    assert len({describe(value) for value in different}) == len(different)
    with pytest.raises(precompiled.NotKept, match="Tensor"):
        describe(torch.zeros(1))
