"""What was decided: one row a linear layer, one entry a compiled graph.

import lynx_compile
model(...)                      # compiles
print(lynx_compile.report())    # or rich.print(...), .rows, .to_json()
"""

from __future__ import annotations

import ast
import io
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Row:
    """One linear layer. m: tokens (for a symbolic count the size seen while compiling, `symbol` its name).

    pattern: the rewrite that matches the layer, None if none does. decision: "sparse" or "dense".
    min_tokens: a sparse layer runs dense below it, where a graph serves any number of tokens.
    """

    name: str
    m: int
    n: int
    k: int
    decision: str
    reason: str
    pattern: str | None = None
    symbol: str | None = None
    min_tokens: int = 0

    @property
    def flops(self) -> int:
        """2·M·N·K, multiplications and additions of the dense layer."""
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph. note: why the graph as a whole was left alone, None if it was not.

    globs: the user's, as "skip='*.to_out.0'".
    """

    rows: tuple[Row, ...]
    note: str | None = None
    globs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """Every graph compiled since the start or the last `clear_report()`."""

    graphs: tuple[GraphReport, ...]

    @property
    def rows(self) -> list[Row]:
        """The rows of all graphs in the order of compilation."""
        return [row for graph in self.graphs for row in graph.rows]

    @property
    def notes(self) -> list[str]:
        """Why graphs were left alone as a whole."""
        return [graph.note for graph in self.graphs if graph.note]

    @property
    def idle_globs(self) -> list[str]:
        """The globs of `skip` and `only` that matched no layer in any graph: most likely misspelt."""
        from .policy import first_match

        names = {row.name for row in self.rows}
        globs = dict.fromkeys(glob for graph in self.graphs for glob in graph.globs)
        quoted = {glob: (ast.literal_eval(glob.partition("=")[2]),) for glob in globs}
        return [glob for glob in globs if not any(first_match(name, quoted[glob]) for name in names)]

    @property
    def flops(self) -> int:
        """FLOPs of all linear layers, dense."""
        return sum(row.flops for row in self.rows)

    @property
    def sparse_share(self) -> float:
        """Share of the linear FLOPs in layers that run sparse, 0 to 1."""
        return self._share([row for row in self.rows if row.decision == "sparse"])

    @property
    def matched_share(self) -> float:
        """Share of the linear FLOPs in layers that a pattern matches, before any decision to skip."""
        return self._share([row for row in self.rows if row.pattern is not None])

    def _share(self, rows: Sequence[Row]) -> float:
        return sum(row.flops for row in rows) / self.flops if self.flops else 0.0

    def totals(self) -> dict[str, Any]:
        """Counts, FLOPs and shares, as in the last line of the table."""
        rows = self.rows
        return {
            "graphs": len(self.graphs),
            "linears": len(rows),
            "matched": sum(row.pattern is not None for row in rows),
            "sparse": sum(row.decision == "sparse" for row in rows),
            "linear_flops": self.flops,
            "matched_share": self.matched_share,
            "sparse_share": self.sparse_share,
        }

    def by_pattern(self) -> dict[str, dict[str, Any]]:
        """Layers and FLOPs of each pattern ("unmatched" for none)."""
        totals: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            entry = totals.setdefault(row.pattern or "unmatched", {"linears": 0, "sparse": 0, "flops": 0})
            entry["linears"] += 1
            entry["sparse"] += row.decision == "sparse"
            entry["flops"] += row.flops
        return totals

    def to_json(self, indent: int | None = None) -> str:
        """{"totals": …, "graphs": [{"note": …, "rows": [{name, m, n, k, decision, …}]}]}."""
        graphs = [asdict(graph) for graph in self.graphs]
        return json.dumps({"totals": self.totals(), "graphs": graphs}, indent=indent)

    def __rich__(self) -> RenderableType:
        totals = self.totals()
        table = Table(title="rt_lynx")
        for column in ("graph", "layer", "M·N·K", "decision", "pattern", "reason"):
            table.add_column(column, overflow="fold")
        for index, graph in enumerate(self.graphs):
            if graph.note:
                table.add_row(str(index), "(whole graph)", "", "dense", "", graph.note)
            for row in graph.rows:
                m = f"{row.symbol} ({row.m})" if row.symbol else str(row.m)
                style = "green" if row.decision == "sparse" else ""
                decision = Text(row.decision, style=style)
                table.add_row(
                    str(index), row.name, f"{m} × {row.n} × {row.k}", decision, row.pattern or "", row.reason
                )
        summary = (
            f"{totals['sparse']} of {totals['linears']} linear layers sparse: "
            f"{totals['sparse_share']:.1%} of the linear FLOPs ({totals['matched_share']:.1%} matched)"
        )
        idle = [Text(f"{glob} matches no layer", style="yellow") for glob in self.idle_globs]
        return Group(table, summary, *idle)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=160)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()


_lock = threading.Lock()
_graphs: list[GraphReport] = []
_last_id: list[Any] = [None]


def record(graph: GraphReport, compile_id: Any = None) -> None:
    """Add one compiled graph (any thread).

    compile_id: Dynamo's. It may start a compilation over (with dynamic shapes it usually does); the second
    attempt then takes the place of the first.
    """
    with _lock:
        again = compile_id is not None and _graphs and _last_id[0] == compile_id
        if again and [row.name for row in _graphs[-1].rows] == [row.name for row in graph.rows]:
            _graphs.pop()
        _graphs.append(graph)
        _last_id[0] = compile_id


def report() -> Report:
    """What the rt_lynx backend decided in every graph compiled so far."""
    with _lock:
        return Report(tuple(_graphs))


def clear_report() -> None:
    """Forget the graphs compiled so far; the compiled code stays."""
    with _lock:
        _graphs.clear()
        _last_id[0] = None
