"""Linear layers: finding them in a graph, and making those that were chosen sparse.

    y = linear(x, w, b)                      s = sparsify("identity", [x], …)
    z = linear(x, v, c)             →        y = sparse_linear(*s, w, bias=b).reshape(…)
                                             z = sparse_linear(*s, v, bias=c).reshape(…)

All linear layers that read the same X share one `sparsify`; LoRA down-projections are stacked and each layer
takes its columns of t. `rt_lynx::linear` is a linear layer with per-layer data (`lynx_compile.layers`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..runtime import layout, ops
from .graph import (
    arg,
    getitem,
    insert,
    is_one,
    is_transformed,
    kind,
    replace,
    rows,
    skip_row_views,
    tensor,
    value,
)
from .mutation import Mutations, remove_dead
from .site import META, Note, arrange_branches, cast, padded_branch, shaped

CHANNEL_MULTIPLE = 16
_LORA_FACTOR = re.compile(r"\.(lora_[AB]|lora_(up|down)|lora_layer)(\.|$)")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass
class Linear:
    """One linear layer of a graph: y (…, N) = x (…, K) · W (N, K)ᵀ + b.

    down (R, K), up (N, R), shift (K), score (K), folded_bias (N): the layer's own data, graph inputs or None.
    wish: the decision attached to the layer ("sparse", "dense" or None).
    obstacle: why it cannot be sparse whatever is wished, None if it can.
    min_tokens: with fewer it runs dense, which for a symbolic M is decided at run time.
    dense_tokens: leading tokens of each sample that stay dense, below 0 its last (`rows` splits them off).
    deflated: leading rows of `down` taken out of X before pruning; such layers share a `sparsify` only with
    one `down`.
    """

    node: fx.Node
    name: str
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    m: Any
    n: int
    k: int
    dtype: torch.dtype
    device: torch.device
    obstacle: str | None = None
    wish: str | None = None
    down: fx.Node | None = None
    up: fx.Node | None = None
    shift: fx.Node | None = None
    score: fx.Node | None = None
    folded_bias: fx.Node | None = None
    min_tokens: int = 0
    dense_tokens: int = 0
    deflated: int = 0


def find_linears(graph: fx.Graph) -> list[Linear]:
    """Every linear layer, in execution order, also those that cannot be sparse (with the reason)."""
    linears = [found for node in graph.nodes if (found := match_linear(node)) is not None]
    dora = {
        normalize_name(name).rsplit(".lora_magnitude_vector", 1)[0]
        for node in graph.nodes
        if "lora_magnitude_vector" in (name := _parameter_name(node) or "")
    }
    for linear in linears:
        if linear.name in dora:
            linear.obstacle = "a DoRA adapter rescales this layer by the norms of its weight"
        elif _LORA_FACTOR.search(linear.name):
            linear.obstacle = "factor of a LoRA adapter: joined with its layer where that is sparse"
        elif linear.obstacle is None and _is_computed_from_data(linear.weight):
            linear.obstacle = "the weight is computed from the inputs: a product of two activations"
    return [*linears, *_within_operators(graph)]


def _within_operators(graph: fx.Graph) -> list[Linear]:
    """The layers of graphs that operators such as checkpoint, cond and invoke_subgraph call: all dense."""
    found: list[Linear] = []
    for node in graph.nodes:
        body = getattr(graph.owning_module, node.target, None) if node.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            callers = [getattr(user.target, "__name__", user.name) for user in node.users]
            for linear in find_linears(body.graph):
                linear.obstacle = f"inside {', '.join(callers)}, whose graph is left as it is"
                found.append(linear)
    return found


def match_linear(node: fx.Node) -> Linear | None:
    """The linear layer a node is, or is in disguise (1×1 convolution, grouped product); None for the rest."""
    if kind(node) == "linear":
        x, weight, bias = arg(node, "input"), arg(node, "weight"), arg(node, "bias")
        data: dict[str, Any] = {}
    elif is_marker(node):
        x, weight, bias, down, up, shift, score, folded, wish = node.args[:9]
        data = {"down": down, "up": up, "shift": shift, "score": score, "folded_bias": folded}
        data["wish"] = wish or None
        data["dense_tokens"] = node.args[9] if len(node.args) > 9 else 0
        data["deflated"] = node.args[10] if len(node.args) > 10 else 0
    else:
        return _match_disguised(node)
    x_value, w_value, out = value(x), value(weight), value(node)
    if not all(isinstance(example, Tensor) for example in (x_value, w_value, out)):
        return None
    if w_value.dim() != 2 or not x_value.dim():
        return None
    n, k = (int(size) if isinstance(size, int) else 0 for size in w_value.shape)
    found = Linear(
        node, layer_name(node, weight), x, weight, bias, rows(x_value.shape), n, k, out.dtype, x_value.device
    )
    found.obstacle = _obstacle(found, x_value, w_value, out)
    for name, source in data.items():
        setattr(found, name, source)
    return found


def is_marker(node: Any) -> bool:
    """Whether a node is `rt_lynx::linear`."""
    return isinstance(node, fx.Node) and node.target in (torch.ops.rt_lynx.linear, ops.linear)


def lower_markers(graph: fx.Graph) -> int:
    """rt_lynx::linear(x, w, b, …) → linear(x, w, b): the exact dense layer of the original weights."""
    markers = [node for node in graph.nodes if is_marker(node)]
    for node in markers:
        replace(node, insert(node, torch._C._nn.linear, tuple(node.args[:3]), node))
    return len(markers)


def sparsify_linears(graph: fx.Graph, linears: Sequence[Linear], compensation: str = "norm") -> int:
    """Make the given layers sparse, one `sparsify` for those that read the same X; returns how many."""
    mutations = Mutations(graph)
    groups: list[_Group] = []
    for linear in linears:
        source = _source(linear, mutations)
        group = next((g for g in groups if g.takes(linear, source, mutations)), None)
        if group is None:
            groups.append(_Group(source, [linear]))
        else:
            group.members.append(linear)
    for group in groups:
        group.rewrite(compensation, mutations)
    remove_dead(graph)
    return len(linears)


def _source(linear: Linear, mutations: Mutations) -> fx.Node:
    """X before reshapes of its rows, unless it is written to after one of them (which may have copied)."""
    source = skip_row_views(linear.x)
    return linear.x if mutations.between(source, source, linear.node) else source


@dataclass
class _Group:
    """Layers that share one `sparsify`: the same rows of X, shift, score and deflation."""

    source: fx.Node
    members: list[Linear]

    def takes(self, linear: Linear, source: fx.Node, mutations: Mutations) -> bool:
        first = self.members[0]
        same_x = source is self.source and linear.dtype == first.dtype
        same_data = linear.shift is first.shift and linear.score is first.score
        same_data &= linear.deflated == first.deflated
        same_data &= not linear.deflated or linear.down is first.down
        return same_x and same_data and not mutations.between(source, first.node, linear.node)

    def rewrite(self, compensation: str, mutations: Mutations) -> None:
        # what was matched may by now read, in place of another layer, the sparse one
        members = [refreshed(linear) for linear in self.members]
        first = members[0]
        source = first.x if self.source is self.members[0].x else skip_row_views(first.x)
        data = {name: node for name in ("shift", "score") if (node := getattr(first, name)) is not None}
        if first.deflated:  # its rows come first in the stack: they are the first member's first branch
            data["deflated"] = first.deflated
        x = cast(source, first.dtype, first.node)
        sparsified = insert(
            first.node, ops.sparsify, ("identity", [x]), first.node, **data, compensation=compensation
        )
        values, metadata, scale, t = (getitem(sparsified, i, first.node) for i in range(4))
        for linear in members:
            node, folded = linear.node, linear.folded_bias is not None
            bias = linear.folded_bias if folded else linear.bias
            extra = {} if bias is None else {"bias": cast(bias, linear.dtype, node)}
            weight = cast(linear.weight, linear.dtype, node)
            y = insert(node, ops.sparse_linear, (values, metadata, scale, t, weight), node, **extra)
            own = []
            if linear.down is not None and linear.up is not None:
                own = [padded_branch(linear.down, linear.up, sparsified, y, linear.dtype, own=True)]
            y.meta[META] = Note(linear.name, linear.min_tokens, own, folded, linear.bias)
            out = restore_shape(y, linear.x, node)
            mutations.stand_in(out, node)
            replace(node, out)
        arrange_branches(sparsified)


def refreshed(linear: Linear) -> Linear:
    """The same layer as its node reads it now."""
    found = match_linear(linear.node)
    assert found is not None
    found.min_tokens = linear.min_tokens
    return found


def restore_shape(y: fx.Node, x: fx.Node, like: fx.Node) -> fx.Node:
    """y (M, N) in the leading dimensions of X; symbolic sizes are asked from X."""
    x_value, out = tensor(x), tensor(like)
    assert x_value is not None
    assert out is not None
    if x_value.dim() == 2:
        return y
    size_of = torch.ops.aten.sym_size.int
    sizes: list[Any] = [
        size if isinstance(size, int) else insert(like, size_of, (x, axis), like)
        for axis, size in enumerate(x_value.shape[:-1])
    ]
    return shaped(y, [*sizes, out.shape[-1]], like)


def _obstacle(linear: Linear, x: Tensor, weight: Tensor, out: Tensor) -> str | None:
    """Why the layer cannot be sparse on any device, in words for the report."""
    if any(is_transformed(example) for example in (x, weight, out)):
        return "it is inside a transform such as torch.vmap"
    for role, example in (("input", x), ("weight", weight)):
        if is_traceable_wrapper_subclass(example):
            return f"the {role} is a {type(example).__name__}, not a plain tensor"
        if example.layout != torch.strided:
            return f"the {role} has layout {example.layout}"
        if example.dtype not in _DTYPES:
            return f"the {role} is {example.dtype}"
    autocast = out.dtype in (torch.bfloat16, torch.float16)  # nothing else makes the dtypes differ
    if not autocast and not out.dtype == x.dtype == weight.dtype:
        return f"the weight is {weight.dtype}, the input {x.dtype} and the output {out.dtype}"
    if weight.device != x.device:
        return f"the weight is on {weight.device} and the input on {x.device}"
    if not linear.k or linear.k % layout.BLOCK_COLUMNS:
        return f"K = {weight.shape[1]} is not a multiple of {layout.BLOCK_COLUMNS}"
    if not linear.n or linear.n % CHANNEL_MULTIPLE:
        return f"N = {weight.shape[0]} is not a multiple of {CHANNEL_MULTIPLE}"
    if weight.stride() != (linear.k, 1):
        return "the weight is not stored row by row, as (N, K)"
    return None


def _match_disguised(node: fx.Node) -> Linear | None:
    """Convolutions that are linear layers, and products with a stored weight that is not a plain (N, K)."""
    if kind(node) == "conv":
        return _match_convolution(node)
    names = {"matmul": ("input", "other"), "bmm": ("input", "mat2"), "baddbmm": ("batch1", "batch2")}
    if kind(node) in names:
        x, weight = (arg(node, name) for name in names[kind(node)])
        x_value, w_value = tensor(x), tensor(weight)
        if x_value is None or w_value is None or w_value.dim() < 2 or not _is_parameter(weight):
            return None
        grouped = w_value.dim() > 2
        k, n = (int(size) if isinstance(size, int) else 0 for size in w_value.shape[-2:])
        why = "grouped linear: one weight a group" if grouped else "the weight is stored as (K, N)"
        return Linear(
            node, layer_name(node, weight), x, weight, None, rows(x_value.shape), n, k, x_value.dtype,
            x_value.device, obstacle=why,
        )  # fmt: skip
    return None


def _match_convolution(node: fx.Node) -> Linear | None:
    """A convolution whose windows do not overlap: kernel size 1, or equal to the stride without padding."""
    x, weight = arg(node, "input"), arg(node, "weight")
    x_value, w_value, out = tensor(x), tensor(weight), tensor(node)
    if x_value is None or w_value is None or out is None:
        return None
    kernel = tuple(w_value.shape[2:])
    stride = arg(node, "stride", 1)
    stride = (stride,) * len(kernel) if isinstance(stride, int) else tuple(stride)
    if any(not is_one(size) for size in kernel) and kernel != stride:
        return None
    groups = arg(node, "groups", 1)
    n, k = int(w_value.shape[0]), int(w_value[0].numel())
    m = rows(out.movedim(1, -1).shape)
    what = f"grouped convolution ({groups} groups)" if groups != 1 else "convolution"
    why = f"{what}: its channels are not the last dimension"
    return Linear(
        node, layer_name(node, weight), x, weight, arg(node, "bias"), m, n, k, out.dtype, x_value.device, why
    )


def layer_name(node: fx.Node, weight: Any) -> str:
    """The layer's fully qualified name in one spelling: "transformer_blocks.0.attn.to_q"."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path, module = list(stack.values())[-1]
        if (
            isinstance(module, type)
            and issubclass(module, nn.Module)
            and (issubclass(module, (nn.Linear, nn.modules.conv._ConvNd)) or "Linear" in module.__name__)
        ):
            return normalize_name(path) or node.name
    source = _parameter_name(weight)
    if source:
        return re.sub(r"(^|\.)weight$", "", normalize_name(source)) or node.name
    return (normalize_name(list(stack.values())[-1][0]) if stack else "") or node.name


_DATA = re.compile(r"L(\[[^\]]*\])+")  # Dynamo's name of what a function was called with, or of a part of it


def _is_computed_from_data(weight: fx.Node) -> bool:
    """Whether a weight is made from what the model is called with, as K in Q · Kᵀ is."""
    if weight.op in ("placeholder", "get_attr"):
        return False
    left, seen = [weight], {weight}
    stored = any(node.op == "get_attr" and tensor(node) is not None for node in weight.graph.nodes)
    while left:
        node = left.pop()
        if node.op == "placeholder" and isinstance(value(node), Tensor) and not _is_parameter(node):
            source = getattr(node.meta.get("grapharg"), "source", None)
            if stored if source is None else _DATA.fullmatch(_spelled(source)):
                return True
        new = [source for source in node.all_input_nodes if source not in seen]
        left += new
        seen.update(new)
    return False


def _spelled(source: Any) -> str:
    return str(source.name() if callable(source.name) else source.name)


def _is_parameter(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return isinstance(node, fx.Node) and node.op == "get_attr"
    return isinstance(tensor(node), nn.Parameter) or "_parameters_" in str(node.target)


def _parameter_name(weight: Any) -> str | None:
    if not isinstance(weight, fx.Node):
        return None
    if weight.op == "get_attr":
        return str(weight.target)
    source = getattr(weight.meta.get("grapharg"), "source", None)
    if source is None:
        return None
    name = _spelled(source)
    return name if "_parameters" in name or "_buffers" in name else None


def normalize_name(path: str) -> str:
    """One spelling for L['self']._modules['blocks']._modules['0'] and _orig_mod.blocks.0.base_layer."""
    path = re.sub(r"getattr\(([^()]*), '([^']*)'\)", r"\1.\2", path)
    path = re.sub(r"^[LG]\['[^']*'\]", "", path)
    path = re.sub(r"\.?__dict__\['_modules'\]|\._modules\b|\._parameters\b|\._buffers\b", "", path)
    path = re.sub(r"\['?([^'\]]*)'?\]", r".\1", path)
    path = re.sub(r"@\d+$", "", path)
    hidden = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "module"}
    return ".".join(part for part in path.split(".") if part and part not in hidden)
