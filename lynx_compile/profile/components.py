"""The transformers of a pipeline. Wan 2.2 has two, each with weights of its own for its part of the steps."""

from __future__ import annotations

from typing import Any

from torch import nn


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """Component name → transformer, without the wrappers `torch.compile` puts around them.

    A component counts whose name has the word: transformer, transformer_2, unconditional_transformer.
    """
    names = dict.fromkeys(("transformer", *getattr(pipe, "components", ())))
    parts = {name: getattr(pipe, name, None) for name in names if "transformer" in name.split("_")}
    return {name: _bare(part) for name, part in parts.items() if isinstance(part, nn.Module)}


def models_of(target: Any) -> list[nn.Module]:
    """The module itself, or all transformers of a pipeline. Raises TypeError for what is neither."""
    found = [_bare(target)] if isinstance(target, nn.Module) else [*transformers_of(target).values()]
    if not found:
        raise TypeError(f"a {type(target).__name__} is neither a module nor a pipeline with a transformer")
    return found


def transformer_of(target: Any, component: str | None = None) -> nn.Module:
    """The module itself, or a pipeline's transformer: its only one, or the named component.

    Raises TypeError for what is neither, ValueError where the component is not there, or has to be named.
    """
    found = models_of(target)
    if isinstance(target, nn.Module):
        if component is not None:
            raise ValueError(
                f"component={component!r} names a part of a pipeline, not of a {type(target).__name__}; "
                "give the pipeline, or leave component out"
            )
        return found[0]
    named = transformers_of(target)
    there = " and ".join(named)
    if component is None and len(found) > 1:
        raise ValueError(
            f"{type(target).__name__} has {there}, each with weights of its own; "
            f"say which with component={next(iter(named))!r} (--component)"
        )
    if component is not None and component not in named:
        raise ValueError(
            f"{type(target).__name__} has no transformer {component!r}; component may be {there}"
        )
    return found[0] if component is None else named[component]


def _bare(model: nn.Module) -> nn.Module:
    bare = getattr(model, "_orig_mod", model)
    assert isinstance(bare, nn.Module)
    return bare
