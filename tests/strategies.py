"""Random graphs as Dynamo would write them.

`random_graph` draws from any object with the interface of `random.Random`: hypothesis' `st.randoms()` in the
tests, `random.Random(seed)` in `make fuzz`. Every node is executed while the graph is built, so shapes are
always valid and each node has a real tensor as its example value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lynx_compile.runtime import ops, semantics

from .agreement import Drawn

ACTIVATIONS: tuple[tuple[Callable[..., Tensor], dict[str, Any]], ...] = (
    (torch._C._nn.gelu, {"approximate": "tanh"}),
    (torch._C._nn.gelu, {}),
    (F.silu, {}),
    (F.relu, {}),
    (torch.tanh, {}),
)


@dataclass(frozen=True)
class _Layer:
    """A linear layer as it was drawn: its name and the nodes it reads, whatever its spelling.

    dense_tokens: of each sample, as `ops.linear` takes them.
    """

    name: str
    parts: dict[str, fx.Node]
    dense_tokens: int = 0


def random_graph(draw: Any, steps: int = 8) -> Drawn:
    """A graph of up to `steps` random steps over one or two inputs, with about half of its layers chosen."""
    builder = _Builder(draw)
    for _ in range(draw.randint(1, steps)):
        try:
            draw.choice(_STEPS)(builder)
        except RuntimeError:  # an in-place operation that torch refuses (an expanded or overlapping tensor)
            builder.erase_failed()
    outputs = [node for node in builder.live if draw.random() < 0.3] or [builder.live[-1]]
    builder.graph.output(tuple(dict.fromkeys([*outputs, builder.live[-1]])))
    drawn = Drawn(builder.graph, builder.inputs, exact=builder.exact)
    drawn.chosen = {name for name in builder.names if draw.random() < 0.8}
    drawn.compensation = draw.choice(semantics.COMPENSATIONS)
    drawn.min_tokens = draw.choice((0, 0, 0, 2, 4, 1000))
    drawn.always = {name for name in builder.names if draw.random() < 0.2}
    return drawn


class _Builder:
    """Appends nodes to a graph and executes each at once."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.graph = fx.Graph()
        self.inputs: list[Tensor] = []
        self.names: list[str] = []
        self.exact = True
        self.weights: dict[tuple[int, ...], list[fx.Node]] = {}
        self._generator = torch.Generator().manual_seed(draw.randint(0, 2**31))
        self._first: fx.Node | None = None
        batch, tokens = draw.choice(((1, 3), (2, 2), (3, 1), (1, 1), (2, 0)))
        self.leading = draw.choice(((batch, tokens), (batch, tokens), (batch * tokens,), (batch, 1, tokens)))
        self.live = [self.input(self.random(*self.leading, 64)) for _ in range(draw.randint(1, 2))]

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64) / 4

    def input(self, tensor: Tensor) -> fx.Node:
        """A graph input; placeholders stand in front of everything else."""
        with self.graph.inserting_before(self._first) if self._first else self.graph.inserting_after():
            node = self.graph.placeholder(f"input_{len(self.inputs)}")
        node.meta["example_value"] = tensor.clone()
        self.inputs.append(tensor)
        return node

    def parameter(self, *shape: int) -> fx.Node:
        """A weight: a new one, or one that another layer has already."""
        known = self.weights.setdefault(shape, [])
        if not known or self.draw.random() < 0.8:
            known.append(self.input(self.random(*shape)))
        return self.draw.choice(known)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call of a function, or of a method given by name, and execute it."""
        create = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = create(target, args, kwargs)
        self._first = self._first or node
        values = fx.map_arg((args, kwargs), lambda n: n.meta["example_value"])
        function = getattr(values[0][0], target) if isinstance(target, str) else target
        node.meta["example_value"] = function(
            *(values[0][1:] if isinstance(target, str) else values[0]), **values[1]
        )
        return node

    def erase_failed(self) -> None:
        """Drop the nodes of a step that raised."""
        for node in reversed(list(self.graph.nodes)):
            if "example_value" not in node.meta:
                self.graph.erase_node(node)

    def pick(self, channels: int | None = None) -> fx.Node:
        """A tensor to go on from: mostly a recent one, of the given width."""
        fits = [node for node in self.live if channels is None or self.width(node) == channels]
        return self.draw.choice(fits[-3:]) if fits else self.live[0]

    @staticmethod
    def value(node: fx.Node) -> Tensor:
        return node.meta["example_value"]

    def width(self, node: fx.Node) -> int:
        return self.value(node).shape[-1]

    def keep(self, node: fx.Node) -> fx.Node:
        self.live.append(node)
        return node

    def linear(
        self,
        x: fx.Node,
        n: int,
        name: str | None = None,
        bias: bool | None = None,
        dense_tokens: int | None = None,
    ) -> fx.Node:
        """A linear layer in one of its spellings; dense_tokens are only said in one."""
        k, draw = self.width(x), self.draw
        weight = self.parameter(n, k)
        with_bias = draw.random() < 0.5 if bias is None else bias
        parts = {"x": x, "weight": weight}
        if with_bias:
            parts["bias"] = self.parameter(n)
        b = parts.get("bias")
        spelling = 0
        if dense_tokens:
            spelling = 4
        elif self.value(x).dtype == self.value(weight).dtype:
            spelling = draw.randint(0, 6)
        if spelling == 1:
            node = self.call(F.linear, input=x, weight=weight, bias=b)
        elif spelling == 2 and b is None and self.value(x).dim() > 1:
            transposed = self.call(draw.choice(("t", torch.t)), weight)
            node = self.call(draw.choice((torch.matmul, operator.matmul, "matmul")), x, transposed)
        elif spelling == 3 and b is not None and self.value(x).dim() == 2:
            node = self.call(torch.addmm, b, x, self.call(getattr, weight, "T"))
        elif spelling == 4:
            data = {}
            often = 0.15 if dense_tokens else 0.5  # what has data of its own shares no X
            if draw.random() < often:
                rank = draw.choice((16, 5))
                data = {"down": self.parameter(rank, k), "up": self.parameter(n, rank)}
            if draw.random() < often:
                data |= {"shift": self.parameter(k), "folded": self.parameter(n)}
            if draw.random() < 0.6 * often:
                data["score"] = self.parameter(k)
            order = [data.get(part) for part in ("down", "up", "shift", "score", "folded")]
            if dense_tokens is None and draw.random() < 0.4:
                dense_tokens = draw.choice((-3, -1, 1, 2))
            decision = draw.choice(("", "sparse", "dense"))
            node = self.call(ops.linear, x, weight, b, *order, decision, dense_tokens or 0)
            parts |= data
        else:
            node = self.call(torch._C._nn.linear, x, weight, *([b] if b is not None else []))
        name = name or f"layer_{len(self.names)}"
        self.names.append(name)
        node.meta["layer"] = _Layer(name, parts, dense_tokens or 0)
        node.meta["nn_module_stack"] = {name: (name, nn.Linear)}
        return node


def _step_linear(b: _Builder) -> None:
    b.keep(b.linear(b.pick(), b.draw.choice((64, 64, 128, 16, 20))))


def _step_shared(b: _Builder) -> None:
    x, dense_tokens = b.pick(64), b.draw.choice((None, None, -1, 2))
    for _ in range(b.draw.randint(2, 3)):
        b.keep(b.linear(x, b.draw.choice((64, 128)), dense_tokens=dense_tokens))


def _step_activation(b: _Builder) -> None:
    function, kwargs = b.draw.choice(ACTIVATIONS)
    b.keep(b.call(function, b.pick(), **kwargs))


def _step_mlp(b: _Builder) -> None:
    h = b.linear(b.pick(64), 128)
    function, kwargs = b.draw.choice(ACTIVATIONS)
    h = b.call(function, h, **kwargs)
    if b.draw.random() < 0.5:
        h = b.call(F.dropout, h, 0.0, False, False)
    if b.draw.random() < 0.2:
        b.keep(h)
    b.keep(b.linear(h, 64))


def _step_gated(b: _Builder) -> None:
    function, kwargs = b.draw.choice(ACTIVATIONS[:4])
    x = b.pick(64)
    if b.draw.random() < 0.5:
        halves = b.call("chunk", b.linear(x, 128), 2, -1)
        up, gate = (b.call(operator.getitem, halves, i) for i in range(2))
    else:
        gate, up = b.linear(x, 64), b.linear(x, 64)
    pair = [b.call(function, gate, **kwargs), up]
    b.draw.shuffle(pair)
    b.keep(b.linear(b.call(operator.mul, *pair), 64))


def _modulation(b: _Builder, x: fx.Node) -> fx.Node:
    """A tensor that broadcasts over x: per sample, per token or for all."""
    shape = list(b.value(x).shape)
    for axis in range(b.draw.randint(0, len(shape) - 1), len(shape) - 1):
        shape[axis] = 1
    node = b.input(b.random(*shape))
    if len(shape) == 3 and shape[1] == 1 and b.draw.random() < 0.5:
        flat = b.input(b.random(shape[0], shape[2]))
        node = b.call(operator.getitem, flat, (slice(None), None))
    return node


def _norm(b: _Builder, x: fx.Node) -> fx.Node:
    k = b.width(x)
    weight = b.parameter(k) if b.draw.random() < 0.5 else None
    kind = b.draw.randint(0, 2)
    if kind == 0:
        bias = b.parameter(k) if weight is not None and b.draw.random() < 0.5 else None
        return b.call(F.layer_norm, x, (k,), weight, bias, 1e-5)
    if kind == 1:
        return b.call(torch.rms_norm, x, (k,), weight, b.draw.choice((1e-6, None)))
    square = b.call("pow", b.call("to", x, torch.float64), 2)
    variance = b.call(operator.add, b.call("mean", square, -1, keepdim=True), 1e-6)
    y = b.call(operator.mul, x, b.call(torch.rsqrt, variance))
    return y if weight is None else b.call(operator.mul, y, weight)


def _step_norm(b: _Builder) -> None:
    x = b.pick(64)
    y = _norm(b, x)
    if b.draw.random() < 0.7:
        scale = _modulation(b, x)
        if b.draw.random() < 0.7:
            scale = b.call(operator.add, *b.draw.choice(((1, scale), (scale, 1.0))))
        y = b.call(operator.mul, y, scale)
    if b.draw.random() < 0.7:
        y = b.call(operator.add, y, _modulation(b, x))
    if b.draw.random() < 0.2:
        b.keep(y)
    for _ in range(b.draw.randint(1, 3)):
        b.keep(b.linear(y, 64))


def _step_cat(b: _Builder) -> None:
    first, second = b.pick(), b.pick()
    if b.value(first).shape[:-1] != b.value(second).shape[:-1]:
        return
    if b.draw.random() < 0.7:
        function, kwargs = b.draw.choice(ACTIVATIONS)
        second = b.call(function, second, **kwargs)
    x = b.call(torch.cat, [first, second], dim=b.draw.choice((-1, b.value(first).dim() - 1)))
    b.keep(b.linear(x, 64))


def _step_sandwich(b: _Builder) -> None:
    """A norm, perhaps gated, of what a layer or another step yields, onto a residual."""
    x = b.pick(64)
    y = _norm(b, b.linear(x, 64) if b.draw.random() < 0.7 else b.pick(64))
    if b.draw.random() < 0.7:
        gate = _modulation(b, y)
        if b.draw.random() < 0.5:
            gate = b.call(operator.add, 1, gate) if b.draw.random() < 0.5 else b.call(torch.tanh, gate)
        y = b.call(operator.mul, *b.draw.choice(((gate, y), (y, gate))))
    if b.draw.random() < 0.2:
        b.call("mul_", b.draw.choice((x, y)), 0.5)
    b.keep(b.call(operator.add, *b.draw.choice(((x, y), (y, x)))))


def _step_beside(b: _Builder) -> None:
    """A concatenation that a layer writes a part of, along any axis, on either side, or of itself."""
    y = b.linear(b.pick(64), b.draw.choice((64, 16)))
    if b.draw.random() < 0.3:
        y = b.call(*b.draw.choice(((F.silu, y), (operator.mul, y, _modulation(b, y)))))
    shape = list(b.value(y).shape)
    axis = b.draw.randint(0, len(shape) - 1)
    fits = [x for x in b.live if _but(axis, b.value(x).shape) == _but(axis, shape)]
    shape[axis] = b.draw.choice((8, 4, 1, 0, 3))
    other = b.draw.choice(fits) if fits and b.draw.random() < 0.7 else b.input(b.random(*shape))
    parts = b.draw.choice(([other, y], [other, y], [other, y], [y, other], [y, y], [other, y, other]))
    whole = b.keep(b.call(torch.cat, parts, dim=b.draw.choice((axis, axis - len(shape)))))
    if b.draw.random() < 0.2:
        b.keep(whole)
        b.keep(y)


def _but(axis: int, shape: Sequence[int]) -> list[int]:
    return [size for i, size in enumerate(shape) if i != axis] + [len(shape)]


def _step_write_weight(b: _Builder) -> None:
    """A weight, a bias or an adapter changes between two layers."""
    known = [node for nodes in b.weights.values() for node in nodes]
    if known:
        b.call("mul_", b.draw.choice(known), 0.5)


def _step_residual(b: _Builder) -> None:
    x = b.pick(64)
    y = b.linear(x, 64)
    if b.draw.random() < 0.4:  # a norm behind the layer too
        y = _norm(b, y)
        if b.draw.random() < 0.2:
            b.keep(y)
    if b.draw.random() < 0.6:
        gate = _modulation(b, x)
        if b.draw.random() < 0.2:
            b.keep(b.call(torch.addcmul, x, gate, y))
            return
        y = b.call(operator.mul, *b.draw.choice(((gate, y), (y, gate))))
    other = b.pick(64)
    other = other if b.value(other).shape == b.value(y).shape else x
    b.keep(b.call(b.draw.choice((operator.add, operator.iadd)), *b.draw.choice(((y, other), (other, y)))))


def _step_lora(b: _Builder) -> None:
    x = b.pick(64)
    n = b.draw.choice((64, 128))
    y = b.linear(x, n)
    for _ in range(b.draw.randint(1, 2)):
        rank = b.draw.choice((4, 16))
        t = b.call(torch._C._nn.linear, x, b.parameter(rank, 64))
        branch = b.call(torch._C._nn.linear, t, b.parameter(n, rank))
        scale = b.draw.choice((0.5, 1, None))
        scale = b.input(b.random(1).squeeze(0)) if scale is None else scale
        branch = b.call(operator.mul, branch, scale)
        y = b.call(operator.add, y, branch)
    b.keep(y)


def _step_view(b: _Builder) -> None:
    x = b.pick()
    value = b.value(x)
    way = b.draw.randint(0, 5)
    if way == 0:
        b.keep(b.call("reshape", x, -1, value.shape[-1]) if value.numel() else x)
    elif way == 1:
        b.keep(b.call("unsqueeze", x, 0))
    elif way == 2 and value.dim() > 2:
        b.keep(b.call("flatten", x, 0, 1))
    elif way == 3:
        b.keep(b.call("contiguous", x))
    elif way == 4 and value.dim() > 2:
        b.keep(b.call("transpose", x, 0, 1))
    elif value.shape[0] > 1:
        b.keep(b.call(operator.getitem, x, slice(0, 1)))


def _step_inplace(b: _Builder) -> None:
    x = b.pick()
    way = b.draw.randint(0, 5)
    if way == 0:
        b.call("add_", x, 1)
    elif way == 1:
        b.call("mul_", x, 0.5)
    elif way == 2:
        b.keep(b.call(operator.iadd, x, 0.25))
    elif way == 3:
        b.keep(b.call(F.relu, x, inplace=True))
    elif way == 4:
        b.call(operator.setitem, x, (Ellipsis, slice(0, 2)), 0.0)
    else:
        b.call("copy_", x, b.call(torch.neg, x))


def _step_narrow(b: _Builder) -> None:
    """A stretch in fp32, as fp32 islands in half-precision models."""
    x = b.call("float", b.pick(64))
    b.exact = False
    weight = b.input(b.random(64, 64).float())
    y = b.call(torch._C._nn.linear, x, weight)
    name = f"layer_{len(b.names)}"
    b.names.append(name)
    y.meta["layer"] = _Layer(name, {"x": x, "weight": weight})
    y.meta["nn_module_stack"] = {name: (name, nn.Linear)}
    b.keep(b.call("to", b.call(F.silu, y) if b.draw.random() < 0.5 else y, torch.float64))


def _step_wide(b: _Builder) -> None:
    """Casts that change nothing."""
    x = b.pick()
    b.keep(
        b.call(b.draw.choice(("double", "contiguous")), x)
        if b.draw.random() < 0.5
        else b.call("type_as", x, x)
    )


_STEPS: tuple[Callable[[_Builder], None], ...] = (
    *(
        _step_linear,
        _step_shared,
        _step_activation,
        _step_mlp,
        _step_mlp,
        _step_gated,
        _step_norm,
        _step_norm,
    ),
    *(
        _step_cat,
        _step_beside,
        _step_beside,
        _step_sandwich,
        _step_residual,
        _step_residual,
        _step_write_weight,
        _step_lora,
        _step_view,
        _step_inplace,
        _step_wide,
        _step_narrow,
    ),
)
