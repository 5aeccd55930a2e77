"""A dry run: what the backend would make of a model, layer by layer, on meta tensors and without a GPU.

    lynx_compile.explain("flux")                       # a known name, a folder, a config.json, a hub id
    lynx_compile.explain(model, {"hidden_states": …})  # any module with the inputs of one call

Dynamo traces the model as `torch.compile` would; every graph goes through the backend's own rewrite, and the
times come from the cost model of the device asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import fx, nn

from . import cost
from .backend import rewrite
from .models import Step, resolve
from .options import Options
from .passes.site import META
from .report import GraphReport, Report, Row
from .runtime import ops

TRACE_LIMIT = 64  # graphs one frame may be traced to: explaining must not eat a later compilation's limit


@dataclass(frozen=True)
class Layer:
    """One linear layer: what was decided, and its predicted time where the device is known."""

    row: Row
    predicted: cost.Prediction | None = None

    @property
    def ms(self) -> float | None:
        """Predicted milliseconds as decided."""
        if self.predicted is None:
            return None
        return self.predicted.sparse_ms if self.row.decision == "sparse" else self.predicted.dense_ms


@dataclass(frozen=True)
class Explanation:
    """The layers of a model in the order of execution. device: the cost table, None without times."""

    title: str
    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = ()
    device: str | None = None
    rank: int = 0

    @property
    def report(self) -> Report:
        return Report((GraphReport(tuple(layer.row for layer in self.layers)),))

    def totals(self) -> dict[str, Any]:
        """The report's totals, and predicted milliseconds of all linear layers: dense and as decided."""
        totals = {key: value for key, value in self.report.totals().items() if key != "graphs"}
        if self.device is not None:
            predicted = [layer for layer in self.layers if layer.predicted]
            totals["dense_ms"] = sum(layer.predicted.dense_ms for layer in predicted if layer.predicted)
            totals["decided_ms"] = sum(layer.ms or 0.0 for layer in predicted)
        return totals

    def to_json(self, indent: int | None = 2) -> str:
        """{model, device, rank, totals, patterns, notes, rows: [{name, m, n, k, flops, …}]}."""
        rows = [
            asdict(layer.row) | {"flops": layer.row.flops} | ({} if layer.ms is None else {"ms": layer.ms})
            for layer in self.layers
        ]
        return json.dumps(
            {
                "model": self.title,
                "device": self.device,
                "rank": self.rank,
                "totals": self.totals(),
                "patterns": self.report.by_pattern(),
                "notes": list(self.notes),
                "rows": rows,
            },
            indent=indent,
        )

    def table(self, short: bool = False) -> RenderableType:
        """One row a linear layer, or (short) one for layers that differ only in the number of their block."""
        table = Table(title=self.title)
        table.add_column("layer", overflow="fold")
        for column in ("M·N·K", "GFLOP", "ms"):
            table.add_column(column, justify="right")
        for column in ("pattern", "decision", "reason"):
            table.add_column(column, overflow="fold")
        for layer, count in self._collapsed() if short else [(layer, 1) for layer in self.layers]:
            row = layer.row
            table.add_row(
                row.name + (f" (×{count})" if count > 1 else ""),
                f"{row.m} · {row.n} · {row.k}",
                f"{row.flops * count / 1e9:.1f}",
                "" if layer.ms is None else f"{layer.ms * count:.3f}",
                row.pattern or "",
                Text(row.decision, style="green" if row.decision == "sparse" else ""),
                row.reason,
            )
        return Group(table, self._pattern_table(), self.summary(), *self.notes)

    def _collapsed(self) -> list[tuple[Layer, int]]:
        groups: dict[Row, list[Layer]] = {}
        for layer in self.layers:
            name = re.sub(r"\.\d+\.", ".*.", layer.row.name, count=1)
            groups.setdefault(replace(layer.row, name=name), []).append(layer)
        return [
            (Layer(row if len(layers) > 1 else layers[0].row, layers[0].predicted), len(layers))
            for row, layers in groups.items()
        ]

    def _pattern_table(self) -> Table:
        table = Table(title="by pattern")
        for column in ("pattern", "layers", "sparse", "share of FLOPs"):
            table.add_column(column, justify="left" if column == "pattern" else "right")
        total = self.report.flops
        for pattern, entry in self.report.by_pattern().items():
            table.add_row(
                pattern, str(entry["linears"]), str(entry["sparse"]), f"{entry['flops'] / total:.1%}"
            )
        return table

    def summary(self) -> str:
        """One sentence: layers, matched and sparse share of the FLOPs, and the predicted times."""
        totals = self.totals()
        said = (
            f"{totals['linears']} linear layers, {totals['linear_flops'] / 1e12:.2f} TFLOP: "
            f"{totals['matched_share']:.1%} matched by a pattern, {totals['sparse_share']:.1%} sparse."
        )
        if self.device is not None:
            dense, decided = totals["dense_ms"], totals["decided_ms"]
            said += (
                f" On {self.device}, LoRA rank {self.rank}: {dense:.1f} ms dense, {decided:.1f} ms as decided"
                f" ({dense / decided:.2f}×)."
            )
        return said

    def __rich__(self) -> RenderableType:
        return self.table()


def explain(
    model: str | nn.Module,
    inputs: Mapping[str, Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    step: Step | None = None,
    device: str | None = None,
    rank: int = 64,
) -> Explanation:
    """What `torch.compile(model, backend="rt_lynx", options=options)` would decide, layer by layer.

    model: a name, path or hub id (see `models.resolve`), built on meta tensors; or a module, which is called
    once with `inputs` where it is. step: resolution and batch for a named model. device: a cost table
    (`cost.devices()`) for predicted times and the tokens from which on sparse pays. rank: of the LoRA branch
    in those times. Layers that share one sparsify share its time.
    Raises ValueError for an unknown model or device, TypeError for a module without inputs.
    """
    if device is not None:
        cost.model(device)  # an unknown device is an error before the work, not after it
    if isinstance(model, nn.Module):
        if inputs is None:
            raise TypeError("explain(module) needs the keyword inputs of one call: explain(module, inputs)")
        title = type(model).__name__
    else:
        resolved = resolve(model)
        title = resolved.title
        inputs = inputs or resolved.inputs(step)
        model = resolved.build()
    settings = Options.parse({**(options or {}), "cost_table": device, "emulate": True, "rest": "eager"})
    layers, notes = [], []
    for report, sharing in _trace(model, inputs, settings):
        layers += [Layer(row, _predict(row, device, rank, sharing.get(row.name, 1))) for row in report.rows]
        notes += [report.note] if report.note else []
    return Explanation(title, tuple(layers), tuple(dict.fromkeys(notes)), device, rank)


def _trace(
    model: nn.Module, inputs: Mapping[str, Any], settings: Options
) -> list[tuple[GraphReport, dict[str, int]]]:
    """Each graph of one call: its report, and by layer how many share its sparsify."""
    traced: list[tuple[GraphReport, dict[str, int]]] = []

    def dry_run(gm: fx.GraphModule, example_inputs: Any) -> Any:
        dense = gm.graph
        report = rewrite(gm, settings, recorded=False)
        traced.append((report, _sharing(gm.graph)))
        gm.graph = dense
        return gm.forward

    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=TRACE_LIMIT):
        torch.compile(model, backend=dry_run, dynamic=False)(**inputs)
    return traced


def _sharing(graph: fx.Graph) -> dict[str, int]:
    """Layer name → how many layers read the values of the same sparsify."""
    readers: dict[fx.Node, list[str]] = {}
    for node in graph.nodes:
        if node.target in (ops.sparse_linear, ops.sparse_linears):
            notes = node.meta[META] if node.target is ops.sparse_linears else [node.meta[META]]
            readers.setdefault(node.args[0], []).extend(note.name for note in notes)
    return {name: len(names) for names in readers.values() for name in names}


def _predict(row: Row, device: str | None, rank: int, shared: int) -> cost.Prediction | None:
    if device is None:
        return None
    return cost.predict(device, max(row.m, 1), row.n, row.k, rank, shared)
