import pytest
import torch
from torch import nn

from lynx_compile.options import Options


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"skp": ["a"]}, TypeError, "did you mean 'skip'"),
        ({"min_token": 3}, TypeError, "did you mean 'min_tokens'"),
        ({"zzz": 1}, TypeError, "valid are compensation"),
        ({"triton.cudagraphs": True}, TypeError, "Inductor's: give inductor={'triton.cudagraphs': …}"),
        ({"max-autotune": True}, TypeError, "Inductor's: give inductor={'max-autotune': …}"),
        ({"fullgraph": True}, TypeError, "fullgraph=… is an argument of torch.compile itself"),
        ({"options": {"emulate": True}}, TypeError, "give what is in it one by one"),
        ({"skip": 3}, TypeError, "skip=3 is a int; give a glob"),
        ({"only": ["a", 1]}, TypeError, "only="),
        ({"emulate": 1}, TypeError, "give True or False"),
        ({"strict": "yes"}, TypeError, "give True or False"),
        ({"min_tokens": "12"}, TypeError, "give an int"),
        ({"min_tokens": True}, TypeError, "give an int"),
        ({"min_tokens": -1}, ValueError, "negative"),
        ({"compensation": "nrm"}, ValueError, "did you mean 'norm'"),
        ({"rest": "eger"}, ValueError, "did you mean 'eager'"),
        ("skip", TypeError, "is a str; give a dict"),
        ({"rest": None}, TypeError, "one of 'inductor', 'eager'"),
        ({"mode": "max-autotun"}, ValueError, "did you mean 'max-autotune"),
        ({"inductor": ["x"]}, TypeError, "a dict of Inductor options"),
        ({"inductor": {"max_autotne": True}}, TypeError, "did you mean 'max_autotune'"),
    ],
)
def test_bad_options_name_the_nearest_valid_one(options, error, words):
    with pytest.raises(error, match="(?s)" + words.replace("(", r"\(")):
        Options.parse(options)


def test_the_error_reaches_the_user_of_torch_compile():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="rt_lynx has no option 'emulte'; did you mean 'emulate'"):
        torch.compile(nn.Linear(64, 64), backend="rt_lynx", options={"emulte": True})(torch.randn(1, 64))


def test_a_single_glob_is_a_list_of_one():
    assert Options.parse({"skip": "a.*", "only": ("b",)}).skip == ("a.*",)


def test_mode_expands_as_inductor_does_and_inductor_options_win():
    patches = Options.parse(
        {"mode": "max-autotune", "inductor": {"triton.cudagraphs": False}}
    ).config_patches()
    assert patches["max_autotune"] is True
    assert patches["triton.cudagraphs"] is False
    assert Options.parse(None, mode="reduce-overhead").mode == "reduce-overhead"
    assert Options.parse({"mode": "default"}).config_patches() == {}
