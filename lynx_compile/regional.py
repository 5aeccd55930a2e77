"""Regional compilation: the repeated blocks of a model, one compile for each distinct pattern of decisions.

    lynx_compile.compile_blocks(transformer, skip=["transformer_blocks.0.*"], fullgraph=True)

`model.compile_repeated_blocks(backend="rt_lynx")` works too, with two limits that this call has not: all
blocks of a class share one code object, so Dynamo stops after eight patterns, shapes or sets of adapters and
leaves what comes then eager; and blocks do not know their names, so globs can only speak of names within a
block.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .layers import LynxLinear, attach
from .options import Options
from .passes.linear import normalize_name
from .policy import first_match
from .profile.components import models_of
from .recompiles import SharedCode, own_code

if TYPE_CHECKING:
    from .precompiled import Precompiled

log = logging.getLogger(__name__)


def compile_blocks(
    model: Any,
    *,
    blocks: str | Sequence[str] | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    precompile: bool = False,
    **options: Any,
) -> int:
    """Compile each repeated block of a model in place with the rt_lynx backend.

    model: a module, or a pipeline for its transformers. blocks: class names of the blocks, or one; by default
    each model's `_repeated_blocks`. fullgraph, dynamic: as in `torch.compile`. options: those of the backend;
    `skip` and `only` speak of full names here. precompile: keep what is compiled on disk with its guards, so
    that a later process loads it in place of tracing (`lynx_compile.precompiled`; needs fullgraph=True).
    Returns the number of distinct patterns, each of which is compiled once, on its first call.
    Raises TypeError for what is neither, ValueError when the model has no such blocks or `precompile` does
    not go with the other arguments.
    """
    settings = Options.parse(options)
    if precompile:
        _check_precompile(settings, fullgraph, dynamic)
    models = models_of(model)
    found = [_blocks_of(one, [blocks] if isinstance(blocks, str) else blocks) for one in models]
    others: set[nn.Module] = set()
    for one in models:
        others |= _decide_by_name(one, settings.skip, settings.only)
        if (settings.mode or settings.inductor) and settings.config_patches().get("triton.cudagraphs"):
            _mark_steps(one)
    rest = {name: value for name, value in options.items() if name not in ("skip", "only")}
    compiled: dict[Hashable, SharedCode | Precompiled] = {}
    for block in chain.from_iterable(found):
        skip = tuple(normalize_name(name) for name, module in block.named_modules() if module in others)
        key = pattern(block), skip
        if key not in compiled:
            own = {**rest, "skip": skip}
            shared = SharedCode(own, fullgraph, dynamic)
            compiled[key] = _on_disk(shared, key, own, dynamic) if precompile else shared
        block._compiled_call_impl = functools.partial(compiled[key], block)
    return len(compiled)


def _check_precompile(settings: Options, fullgraph: bool, dynamic: bool | None) -> None:
    if not fullgraph:
        raise ValueError("precompile=True keeps whole graphs; give fullgraph=True, too")
    if dynamic:
        raise ValueError("precompile=True keeps graphs of fixed shapes; leave out dynamic=True")
    if settings.rest != "inductor":
        raise ValueError(
            f"precompile=True keeps what Inductor compiled; rest={settings.rest!r} compiles nothing"
        )
    if settings.config_patches().get("triton.cudagraphs"):
        raise ValueError(
            "precompile=True keeps no CUDA graphs; use mode='max-autotune-no-cudagraphs' or none"
        )


def _on_disk(
    otherwise: SharedCode, key: Hashable, options: Mapping[str, Any], dynamic: bool | None
) -> Precompiled:
    from .backend import rt_lynx
    from .precompiled import Precompiled  # torch's ahead-of-time compilation, which nothing else here needs

    identity = repr(key), sorted(options.items()), dynamic
    compiler = functools.partial(rt_lynx, options=dict(options))
    return Precompiled(own_code(), compiler, otherwise, repr(identity), dynamic)


def _blocks_of(model: nn.Module, classes: Sequence[str] | None) -> list[nn.Module]:
    names: tuple[str, ...] = tuple(classes or getattr(model, "_repeated_blocks", None) or ())
    found = [module for module in model.modules() if _class_name(module) in names]
    if not found:
        wanted = f"no block of class {', '.join(names)}" if names else "no `_repeated_blocks`"
        raise ValueError(f"{type(model).__name__} has {wanted}; name the classes with blocks=[...]")
    return found


def _class_name(module: nn.Module) -> str:
    """That of the block: `fully_shard` makes Block an FSDPBlock."""
    name = type(module).__name__
    return name.removeprefix("FSDP") if isinstance(module, FSDPModule) else name


def _mark_steps(model: nn.Module) -> None:
    """All blocks of one call of the model belong to one generation of CUDA graphs.

    Each compiled call would begin a generation of its own otherwise, in which the output of the block before
    it, its input, counts as overwritten.
    """
    if _mark_step not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_mark_step)


def _mark_step(model: nn.Module, args: Any) -> None:
    torch.compiler.cudagraph_mark_step_begin()


def pattern(block: nn.Module) -> Hashable:
    """What makes two blocks compile to different graphs: class, decisions, what layers carry and share."""
    first: dict[int, int] = {}  # tensor → number of distinct ones before it
    layers = tuple(
        (
            name,
            module.lynx_decision,
            module.lynx_dense_tokens,
            module.lynx_deflated,
            module.lynx_switch is not None,
            tuple(
                None if buffer is None else first.setdefault(id(buffer), len(first))
                for buffer in (module.lynx_down, module.lynx_shift, module.lynx_score)
            ),
        )
        for name, module in block.named_modules()
        if isinstance(module, LynxLinear)
    )
    return type(block), layers


def _decide_by_name(model: nn.Module, skip: Sequence[str], only: Sequence[str]) -> set[nn.Module]:
    """Write what the globs say onto the layers, where regional compilation can see it.

    What an earlier call wrote is undone first: the globs of the last call alone decide. Returns the layers
    that stay dense and that this cannot be written onto: of subclasses of `nn.Linear`, as GGUF's are.
    """
    for module in model.modules():
        if isinstance(module, LynxLinear) and module.lynx_before is not None:
            module.lynx_decision, module.lynx_reason = module.lynx_before
            module.lynx_before = None
    others: set[nn.Module] = set()
    if not skip and not only:
        return others
    linears = {
        normalize_name(path): module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    for option, globs in (("skip", skip), ("only", only)):
        for idle in globs:
            if not any(first_match(name, (idle,)) for name in linears):
                log.warning("%s=%r matches no linear layer of %s", option, idle, type(model).__name__)
    for name, module in linears.items():
        if type(module) not in (nn.Linear, LynxLinear):
            if first_match(name, skip) or (only and not first_match(name, only)):
                others.add(module)
        elif glob := first_match(name, skip):
            _decide(module, "dense", f"skip={glob!r}")
        elif only:
            glob = first_match(name, only)
            _decide(
                module, "sparse" if glob else "dense", f"only={glob!r}" if glob else "matches no glob of only"
            )
    return others


def _decide(module: nn.Module, decision: str, reason: str) -> None:
    if not isinstance(module, LynxLinear):
        module = attach(module)
    module.lynx_before = (module.lynx_decision, module.lynx_reason)
    module.lynx_decision, module.lynx_reason = decision, reason
