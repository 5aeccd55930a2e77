"""The options of `torch.compile(model, backend="rt_lynx", options={...})`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from . import cost
from .runtime.semantics import COMPENSATIONS

RESTS = ("inductor", "eager")


@dataclass(frozen=True)
class Options:
    """What a user may set; every field has a default that is safe.

    skip: globs on layer names ("transformer_blocks.0.*", or the last parts: "to_out.0"); these stay dense.
    only: globs; only these become sparse, also where a safe default would keep them dense.
    compensation: "norm" (rows are rescaled to their norm before pruning) or "native" (they are not).
    min_tokens: layers with fewer tokens stay dense; None asks the cost model of the device.
    cost_table: whose measured times that is (`lynx_compile.cost.devices()`); None: the model's own device.
    emulate: run the method's plain PyTorch definition where there are no kernels. Slower than dense.
    strict: raise what goes wrong while rewriting, instead of running the model dense.
    mode: a mode of `torch.compile` for the rest of the graph, as "max-autotune".
    inductor: options of Inductor for the rest of the graph.
    rest: "inductor", or "eager" to leave the rest uncompiled (quick tests).
    """

    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    compensation: str = "norm"
    min_tokens: int | None = None
    cost_table: str | None = None
    emulate: bool = False
    strict: bool = False
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    rest: str = "inductor"

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
        """Options from what `torch.compile` hands over.

        Raises TypeError for an unknown option (naming the nearest valid one) or one of the wrong type, and
        ValueError for a value outside its choices.
        """
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(f"options={options!r} is a {type(options).__name__}; give a dict")
        given = dict(options or {})
        if mode is not None:
            given.setdefault("mode", mode)
        known = {f.name for f in fields(cls)}
        for name in given:
            if name not in known:
                raise TypeError(f"rt_lynx has no option {name!r}; {_remedy(str(name), known)}")
        for name in ("skip", "only"):
            if name in given:
                given[name] = _globs(name, given[name])
        for name in ("emulate", "strict"):
            if name in given and not isinstance(given[name], bool):
                raise TypeError(_wrong_type(name, given[name], "True or False"))
        tokens = given.get("min_tokens")
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int)):
            raise TypeError(_wrong_type("min_tokens", tokens, "an int, or None for the cost model's figure"))
        if tokens is not None and tokens < 0:
            raise ValueError(f"min_tokens={tokens} is negative; 0 makes every layer eligible")
        if not isinstance(given.get("inductor", {}), Mapping):
            raise TypeError(_wrong_type("inductor", given["inductor"], "a dict of Inductor options"))
        if given.get("cost_table") is not None:
            _check_choice(given, "cost_table", cost.devices())
        _check_choice(given, "compensation", COMPENSATIONS)
        _check_choice(given, "rest", RESTS)
        if given.get("mode") is not None:
            _check_choice(given, "mode", tuple(_modes()))
        if given.get("inductor"):
            _check_inductor(given["inductor"])
        return cls(**given)

    def globs(self) -> tuple[str, ...]:
        """The user's globs as reports name them: "skip='*.to_out.0'"."""
        named = (("skip", self.skip), ("only", self.only))
        return tuple(f"{name}={glob!r}" for name, globs in named for glob in globs)

    def config_patches(self) -> dict[str, Any]:
        """`mode` expanded as Inductor does, then `inductor` on top."""
        return {**(_modes()[self.mode] if self.mode else {}), **self.inductor}


def _remedy(name: str, known: set[str]) -> str:
    """Where an option that is somebody else's belongs, else the nearest of ours."""
    if name in ("fullgraph", "dynamic", "backend", "disable"):
        return f"{name}=… is an argument of torch.compile itself"
    if name == "options":
        return "give what is in it one by one"
    if name.replace("-", "_") in _inductor_options():
        return f"it is Inductor's: give inductor={{{name!r}: …}}"
    return _suggest(name, known)


def _suggest(name: str, known: Sequence[str] | set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    listed = (
        f"valid are {', '.join(sorted(known))}" if len(known) < 20 else "see torch._inductor.list_options()"
    )
    return f"did you mean {near[0]!r}?" if near else listed


def _wrong_type(name: str, value: Any, wanted: str) -> str:
    return f"option {name}={value!r} is a {type(value).__name__}; give {wanted}"


def _globs(name: str, value: Any) -> tuple[str, ...]:
    globs = (value,) if isinstance(value, str) else value
    if not isinstance(globs, (list, tuple, set, frozenset)) or not all(isinstance(g, str) for g in globs):
        raise TypeError(_wrong_type(name, value, "a glob on layer names, or a list of globs"))
    return tuple(globs)


def _check_choice(given: Mapping[str, Any], name: str, choices: Sequence[str]) -> None:
    if name not in given:
        return
    value = given[name]
    if not isinstance(value, str):
        raise TypeError(_wrong_type(name, value, f"one of {', '.join(map(repr, choices))}"))
    if value not in choices:
        raise ValueError(f"option {name}={value!r} is unknown; {_suggest(value, choices)}")


def _modes() -> dict[str, dict[str, Any]]:
    from torch._inductor import list_mode_options  # Inductor takes a second to import: not for rest="eager"

    return {"default": {}, **list_mode_options()}


def _inductor_options() -> set[str]:
    from torch._inductor import list_options

    return set(list_options())


def _check_inductor(patches: Mapping[str, Any]) -> None:
    known = _inductor_options()
    for name in patches:
        if str(name).replace("-", "_") not in known:
            raise TypeError(f"Inductor has no option {name!r}; {_suggest(str(name), known)}")
