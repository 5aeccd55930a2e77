"""What every pass needs to read a graph: op kinds over their spellings, arguments by name, shapes and dtypes.

Graphs come from Dynamo (torch functions and tensor methods, fake tensors in `meta["example_value"]`), from
`torch.export` (aten overloads, `meta["val"]`) or from symbolic tracing with shapes filled in by the caller.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten

# kind → (parameter names, functions and overloads, method names)
_SPELLINGS: dict[str, tuple[tuple[str, ...], tuple[Any, ...], tuple[str, ...]]] = {
    "linear": (("input", "weight", "bias"), (F.linear, torch._C._nn.linear, aten.linear.default), ()),
    "matmul": (
        ("input", "other"),
        (torch.matmul, torch.mm, operator.matmul, aten.matmul.default, aten.mm.default),
        ("matmul", "mm", "__matmul__"),
    ),
    "addmm": (
        ("input", "mat1", "mat2", "beta", "alpha"),
        (torch.addmm, aten.addmm.default),
        ("addmm",),
    ),
    "bmm": (("input", "mat2"), (torch.bmm, aten.bmm.default), ("bmm",)),
    "baddbmm": (("input", "batch1", "batch2"), (torch.baddbmm, aten.baddbmm.default), ("baddbmm",)),
    "gelu": (("input", "approximate"), (F.gelu, torch._C._nn.gelu, aten.gelu.default), ()),
    "silu": (("input", "inplace"), (F.silu, aten.silu.default), ()),
    "relu": (("input", "inplace"), (F.relu, torch.relu, aten.relu.default), ("relu",)),
    "sigmoid": (("input",), (torch.sigmoid, F.sigmoid, aten.sigmoid.default), ("sigmoid",)),
    "tanh": (("input",), (torch.tanh, F.tanh, aten.tanh.default), ("tanh",)),
    "dropout": (
        ("input", "p", "training", "inplace"),
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout, F.alpha_dropout),
        (),
    ),
    "raw_dropout": (("input", "p", "train"), (torch.dropout, aten.dropout.default), ()),
    "layer_norm": (
        ("input", "normalized_shape", "weight", "bias", "eps"),
        (F.layer_norm, torch.layer_norm, aten.layer_norm.default),
        (),
    ),
    "rms_norm": (
        ("input", "normalized_shape", "weight", "eps"),
        (F.rms_norm, torch.rms_norm, aten.rms_norm.default),
        (),
    ),
    "add": (("input", "other", "alpha"), (operator.add, torch.add, aten.add.Tensor), ("add", "__add__")),
    "radd": (("input", "other"), (), ("__radd__",)),
    "iadd": (("input", "other", "alpha"), (operator.iadd, aten.add_.Tensor), ("add_", "__iadd__")),
    "sub": (("input", "other", "alpha"), (operator.sub, torch.sub, aten.sub.Tensor), ("sub", "__sub__")),
    "mul": (
        ("input", "other"),
        (operator.mul, torch.mul, torch.multiply, aten.mul.Tensor, aten.mul.Scalar),
        ("mul", "multiply", "__mul__", "__rmul__"),
    ),
    "imul": (("input", "other"), (operator.imul, aten.mul_.Tensor), ("mul_", "__imul__")),
    "div": (
        ("input", "other"),
        (operator.truediv, torch.div, aten.div.Tensor),
        ("div", "__truediv__"),
    ),
    "addcmul": (
        ("input", "tensor1", "tensor2", "value"),
        (torch.addcmul, aten.addcmul.default),
        ("addcmul",),
    ),
    "pow": (
        ("input", "exponent"),
        (operator.pow, torch.pow, aten.pow.Tensor_Scalar),
        ("pow", "__pow__"),
    ),
    "square": (("input",), (torch.square, aten.square.default), ("square",)),
    "mean": (("input", "dim", "keepdim"), (torch.mean, aten.mean.dim), ("mean",)),
    "rsqrt": (("input",), (torch.rsqrt, aten.rsqrt.default), ("rsqrt",)),
    "cat": (("tensors", "dim"), (torch.cat, torch.concat, torch.concatenate, aten.cat.default), ()),
    "sdpa": (
        ("query", "key", "value"),
        (
            F.scaled_dot_product_attention,
            torch._C._nn.scaled_dot_product_attention,
            aten.scaled_dot_product_attention.default,
        ),
        (),
    ),
    "neg": (("input",), (operator.neg, torch.neg, aten.neg.default), ("neg", "__neg__")),
    "stack": (("tensors", "dim"), (torch.stack, aten.stack.default), ()),
    "narrow": (("input", "dim", "start", "length"), (torch.narrow, aten.narrow.default), ("narrow",)),
    "pad": (("input", "pad"), (F.pad, aten.constant_pad_nd.default), ()),
    "mv": (("input", "vec"), (torch.mv, aten.mv.default), ("mv",)),
    "softmax": (("input", "dim"), (torch.softmax, F.softmax, aten.softmax.int), ("softmax",)),
    "conv": (
        ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
        (
            *(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d),
            *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
        ),
        (),
    ),
    # casts
    "to": (("input", "dtype"), (aten.to.dtype, aten._to_copy.default), ("to",)),
    "float": (("input",), (), ("float",)),
    "half": (("input",), (), ("half",)),
    "bfloat16": (("input",), (), ("bfloat16",)),
    "double": (("input",), (), ("double",)),
    "type_as": (("input", "other"), (aten.type_as.default,), ("type_as",)),
    # views and copies that keep the row-major order of elements
    "view": (("input",), (aten.view.default, aten._unsafe_view.default), ("view",)),
    "reshape": (("input",), (torch.reshape, aten.reshape.default), ("reshape",)),
    "flatten": (("input",), (torch.flatten, aten.flatten.using_ints), ("flatten",)),
    "unflatten": (("input",), (torch.unflatten, aten.unflatten.int), ("unflatten",)),
    "unsqueeze": (("input",), (torch.unsqueeze, aten.unsqueeze.default), ("unsqueeze",)),
    "squeeze": (
        ("input",),
        (torch.squeeze, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims),
        ("squeeze",),
    ),
    "contiguous": (("input",), (aten.contiguous.default, aten.clone.default), ("contiguous", "clone")),
    # views that move elements
    "transpose": (
        ("input", "dim0", "dim1"),
        (torch.transpose, torch.swapaxes, aten.transpose.int),
        ("transpose", "swapaxes"),
    ),
    "permute": (("input",), (torch.permute, aten.permute.default), ("permute",)),
    "t": (("input",), (torch.t, aten.t.default, aten.numpy_T.default), ("t",)),
    "getattr": (("input", "name"), (getattr,), ()),
    "getitem": (("input", "index"), (operator.getitem,), ("__getitem__",)),
    "chunk": (("input", "chunks", "dim"), (torch.chunk, aten.chunk.default), ("chunk",)),
    "split": (
        ("input", "sizes", "dim"),
        (torch.split, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes),
        ("split",),
    ),
    "unbind": (("input", "dim"), (torch.unbind, aten.unbind.int), ("unbind",)),
    # views of other elements
    "view_as_complex": (("input",), (torch.view_as_complex, aten.view_as_complex.default), ()),
    "view_as_real": (("input",), (torch.view_as_real, aten.view_as_real.default), ()),
    "size": (
        ("input", "dim"),
        (aten.sym_size.int, aten.sym_size.default),
        ("size", "dim", "numel"),
    ),
}
_KINDS = {target: kind for kind, (_, functions, _) in _SPELLINGS.items() for target in functions}
_METHODS = {method: kind for kind, (_, _, methods) in _SPELLINGS.items() for method in methods}
_PARAMETERS = {kind: parameters for kind, (parameters, _, _) in _SPELLINGS.items()}
_ALIASES = {"input": ("self",), "other": ("mat2",), "dim": ("axis",), "keepdim": ("keepdims",)}

CASTS = frozenset({"to", "float", "half", "bfloat16", "double", "type_as"})
ROW_MAJOR_VIEWS = frozenset({"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous"})


def kind(node: Any) -> str:
    """The op behind any of its spellings ("linear", "add", …); "" for what the passes do not know.

    They know nothing that writes to an `out=`: its result is not all that it does.
    """
    if not isinstance(node, fx.Node) or node.kwargs.get("out") is not None:
        return ""
    if node.op == "call_function":
        return _KINDS.get(node.target, "")
    return _METHODS.get(str(node.target), "") if node.op == "call_method" else ""


def arg(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of a node of a known kind, given by position or by keyword."""
    position = _PARAMETERS[kind(node)].index(name)
    if position < len(node.args):
        return node.args[position]
    for spelling in (name, *_ALIASES.get(name, ())):
        if spelling in node.kwargs:
            return node.kwargs[spelling]
    return default


def value(node: Any) -> Any:
    """The example value of a node: a tensor (fake or real), a tuple of them, a SymInt; None if unknown."""
    if not isinstance(node, fx.Node):
        return None
    return node.meta.get("example_value", node.meta.get("val"))


def tensor(node: Any) -> Tensor | None:
    """The example value of a node if it is a tensor that any op may read: none inside a vmap or the like."""
    example = value(node)
    return example if isinstance(example, Tensor) and not is_transformed(example) else None


def is_transformed(example: Any) -> bool:
    """Whether a value is one that a functorch transform works on, for which our ops have no rules."""
    return isinstance(example, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(example)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without adding a guard on a symbolic one."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return expression(a) == expression(b)


def same_shape(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether two shapes are known to be equal, without adding a guard."""
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(map(same_size, a, b))


def is_one(size: Any) -> bool:
    """Whether a size is the constant 1."""
    return isinstance(size, int) and size == 1


def expression(size: Any) -> Any:
    """The sympy expression of a SymInt, an int as it is."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def hint(size: Any) -> int:
    """The size seen while compiling, without adding a guard; 0 if none is known."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    seen = size.node.hint
    return seen if isinstance(seen, int) else 0


def bounds(size: Any) -> tuple[float, float]:
    """The least and the greatest value a size can take, as far as guards on it say already."""
    if isinstance(size, int):
        return size, size
    found = size.node.shape_env.bound_sympy(size.node.expr)
    return float(found.lower), float(found.upper)


def rows(shape: Iterable[Any]) -> Any:
    """M: the product of all sizes but the last; a SymInt for symbolic ones."""
    return math.prod(tuple(shape)[:-1])


def real_users(node: fx.Node) -> list[fx.Node]:
    """Users that read the tensor's elements; one that asks for a size, or views it to ask, does not."""
    return [
        user
        for user in node.users
        if kind(user) != "size" and (kind(user) not in ROW_MAJOR_VIEWS or not user.users or real_users(user))
    ]


def skip_row_views(node: fx.Node) -> fx.Node:
    """The tensor behind reshapes of all dimensions but the last: the same rows, the same channels."""
    while kind(node) in ROW_MAJOR_VIEWS:
        source = arg(node, "input")
        inner, outer = tensor(source), tensor(node)
        if inner is None or outer is None or not inner.dim() or not outer.dim():
            break
        if inner.dtype != outer.dtype or not same_size(inner.shape[-1], outer.shape[-1]):
            break
        node = source
    return node


def skip_casts(node: fx.Node) -> fx.Node:
    """The tensor behind casts to a wider or equal floating dtype: no value is rounded by them."""
    while kind(node) in CASTS:
        source = arg(node, "input")
        inner, outer = tensor(source), tensor(node)
        if inner is None or outer is None or not inner.is_floating_point() or inner.device != outer.device:
            break
        if outer.dtype != inner.dtype and not _holds(outer.dtype, inner.dtype):
            break
        node = source
    return node


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    return torch.promote_types(wide, narrow) == wide and wide.itemsize > narrow.itemsize


def per_sample(broadcast: Tensor, full: Tensor) -> bool:
    """Whether `broadcast` holds one row of channels per sample of `full`: (B, 1, …, C) against (B, T, …, C).

    Then row i of `full`, flattened to rows, takes row i // (M / B) of it. No sizes at all (a vector of C) and
    one row per row of `full` are the two ends.
    """
    shape = tuple(broadcast.shape)
    if not shape or len(shape) > full.dim() or not same_size(shape[-1], full.shape[-1]):
        return False
    leading = (1,) * (full.dim() - len(shape)) + shape[:-1]
    ones_from = len(leading)
    while ones_from and is_one(leading[ones_from - 1]):
        ones_from -= 1
    return all(same_size(a, b) for a, b in zip(leading[:ones_from], full.shape, strict=False))


def scalar(node_or_number: Any) -> float | None:
    """A Python number, or None for anything else."""
    if isinstance(node_or_number, (int, float)) and not isinstance(node_or_number, bool):
        return float(node_or_number)
    return None


def operands(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """The two orders of a commutative node's operands."""
    a, b = arg(node, "input"), arg(node, "other")
    yield a, b
    yield b, a


def interior(result: fx.Node, leaves: Iterable[fx.Node | None]) -> list[fx.Node]:
    """The nodes that compute `result` from `leaves`: `result` itself included, the leaves not."""
    stop, left = set(leaves), [result]
    found: dict[fx.Node, None] = {}
    while left:
        node = left.pop()
        if node not in found and node not in stop and node.op not in ("placeholder", "get_attr"):
            found[node] = None
            left += node.all_input_nodes
    return list(found)


def order(graph: fx.Graph) -> dict[fx.Node, int]:
    """Position of each node in execution order."""
    return {node: position for position, node in enumerate(graph.nodes)}


def insert(before: fx.Node, target: Any, args: tuple[Any, ...], like: fx.Node, **kwargs: Any) -> fx.Node:
    """A new call of `target` before a node, with the origin (stack trace, module stack) of `like`."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    return node


def getitem(node: fx.Node, index: int, before: fx.Node) -> fx.Node:
    """node[index]."""
    return insert(before, operator.getitem, (node, index), node)


def replace(old: fx.Node, new: fx.Node) -> None:
    """`new` takes over the users and the example value of `old`, and `old` goes."""
    for key in ("example_value", "val"):
        if key in old.meta and new is not old:
            new.meta.setdefault(key, old.meta[key])
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
