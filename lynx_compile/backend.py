"""The torch.compile backend.

torch.compile(model, backend="rt_lynx", options={"skip": ["*.to_out.0"]})
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import CompileContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from . import passes, policy
from .options import Options
from .passes import Linear
from .passes.graph import expression, hint, skip_row_views, tensor
from .recompiles import warn_before_limit
from .report import GraphReport, Report, Row, record
from .report import report as reported
from .runtime import ahead

log = logging.getLogger(__name__)


def rt_lynx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Make the linear layers of a Dynamo graph sparse in their activations and compile the rest.

    Registered as `backend="rt_lynx"`. options: see `Options`. What was decided is in `lynx_compile.report()`.
    """
    settings = Options.parse(options, mode)
    rewrite(gm, settings)
    warn_before_limit()
    _build_kernels_ahead(gm.graph)
    if settings.rest == "eager":
        return gm.forward
    from torch._inductor.compile_fx import compile_fx  # a second of imports that rest="eager" does without

    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=settings.config_patches())
    return compiled


def rewrite(
    gm: fx.GraphModule,
    options: Options | Mapping[str, Any] | None = None,
    example_inputs: Sequence[Any] | None = None,
    *,
    recorded: bool = True,
) -> GraphReport:
    """Rewrite a graph in place: normalise → match → decide → rewrite. Returns what was decided.

    Graphs of Dynamo and `torch.export` (`exported.module()`) know their shapes; example_inputs tell
    those of a symbolically traced one. recorded: whether the decisions also join `lynx_compile.report()`.

    The graph is left exactly as it was when nothing in it becomes sparse, when gradients are on, and when a
    pass fails (with `strict=True`, that error is raised instead).
    """
    if not isinstance(gm, fx.GraphModule):
        raise TypeError(
            f"rewrite takes a torch.fx.GraphModule, not a {type(gm).__name__}; "
            "torch.export.export(module, args).module() is one"
        )
    settings = options if isinstance(options, Options) else Options.parse(options)
    linears: list[Linear] = []
    try:
        if example_inputs is not None:
            FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*example_inputs)
        graph = _copy(gm)  # a pass that fails half-way leaves the original alone
        passes.normalize(graph)
        linears = passes.find_linears(graph)
        note = _reason_to_leave(gm)
        decisions = policy.decide(linears, settings) if note is None else _all_dense(linears, note)
        report = GraphReport(tuple(map(_row, linears, decisions)), note, settings.globs())
        chosen = [linear for linear, decision in zip(linears, decisions, strict=True) if decision.sparse]
        for linear, decision in zip(linears, decisions, strict=True):
            linear.min_tokens = decision.min_tokens
        if chosen:
            chosen = passes.split_rows(graph, chosen)
            passes.sparsify_linears(graph, chosen, settings.compensation)
            for fuse in passes.FUSIONS:
                fuse(graph)
            passes.lower_markers(graph)
            graph.lint()
            gm.graph = graph
    except Exception as error:
        if settings.strict:
            raise
        note = f"rewriting failed, so the model runs dense: {type(error).__name__}: {error}"
        report = GraphReport(tuple(map(_row, linears, _all_dense(linears, note))), note)
        log.warning("%s (options={'strict': True} raises it)", note, exc_info=True)
    _log(report, gm)
    if recorded:
        _notify(report)
        _warn_of_idle_globs(report)
        record(report, CompileContext.current_compile_id())
    return report


def _copy(gm: fx.GraphModule) -> fx.Graph:
    graph = copy.deepcopy(gm.graph)
    graph.owning_module = gm
    for old, new in zip(gm.graph.nodes, graph.nodes, strict=True):
        for name, held in vars(old).items():
            if name not in vars(new):  # Dynamo writes a placeholder's source onto the node itself
                setattr(new, name, held)
    return graph


def _reason_to_leave(gm: fx.GraphModule) -> str | None:
    """Why the graph as a whole must stay as it is, None if it need not."""
    switches = [node for node in gm.graph.nodes if node.target is torch._C._set_grad_enabled]
    if any(switch.args[0] for switch in switches):
        return "gradients are switched on inside the graph, and sparse layers are for inference"
    if torch.is_grad_enabled():
        inputs = [tensor(node) for node in gm.graph.nodes if node.op == "placeholder"]
        if any(t is not None and t.requires_grad for t in [*inputs, *gm.parameters()]):
            return "gradients are on, and sparse layers are for inference: use torch.no_grad()"
    return None


def _all_dense(linears: Sequence[Linear], reason: str) -> list[policy.Decision]:
    return [policy.Decision(False, reason)] * len(linears)


def _row(linear: Linear, decision: policy.Decision) -> Row:
    return Row(
        name=linear.name,
        m=hint(linear.m),
        n=linear.n,
        k=linear.k,
        decision="sparse" if decision.sparse else "dense",
        reason=decision.reason,
        pattern=_pattern(linear),
        symbol=None if isinstance(linear.m, int) else str(expression(linear.m)),
        min_tokens=decision.min_tokens,
    )


def _pattern(linear: Linear) -> str | None:
    """What the rewrite of a layer covers: "layer_norm → linear"; None where nothing matches."""
    if linear.obstacle:
        return None
    producer = passes.producer_of(skip_row_views(linear.x))
    return f"{producer.name} → linear" if producer else "linear"


def _build_kernels_ahead(graph: fx.Graph) -> None:
    """Compile kernels in the background, while Inductor compiles the rest; else they build on first use."""
    try:
        ahead.prepare(graph, tensor)
    except Exception:
        log.debug("kernels are built on first use", exc_info=True)


def _log(report: GraphReport, gm: fx.GraphModule) -> None:
    """What `TORCH_LOGS=lynx_compile` (a line a graph) and `TORCH_LOGS=+lynx_compile` (all of it) show."""
    sparse = sum(row.decision == "sparse" for row in report.rows)
    log.info(
        "%d of %d linear layers sparse%s", sparse, len(report.rows), f": {report.note}" if report.note else ""
    )
    for row in report.rows:
        log.debug(
            "%s: %s (%s·%d·%d, %s)", row.name, row.decision, row.symbol or row.m, row.n, row.k, row.reason
        )
    if sparse and log.isEnabledFor(logging.DEBUG):
        log.debug("rewritten graph:\n%s", gm.graph)


def _notify(report: GraphReport) -> None:
    """One notice a process and reason when kernels are missing, so that dense never comes as a surprise."""
    missing = sorted({row.reason for row in report.rows if row.reason.startswith(policy.NO_KERNELS)})
    if missing and not any(row.decision == "sparse" for row in report.rows):
        _notify_once(missing[0])


@functools.cache
def _notify_once(reason: str) -> None:
    log.warning("the model runs dense: %s. options={'emulate': True} emulates them", reason)


def _warn_of_idle_globs(report: GraphReport) -> None:
    """Names the globs that match no layer. Of one block nothing is said: the other blocks may have them."""
    blocks = {number for row in report.rows for number in policy.REPEATED.findall(row.name)}
    if len(blocks) > 1:
        for glob in Report((*reported().graphs, report)).idle_globs:
            _warn_of_glob(glob, report.rows[-1].name)


@functools.cache
def _warn_of_glob(glob: str, example: str) -> None:
    log.warning("%s matches no linear layer of this graph, whose names are as %r", glob, example)
