"""Brings the spellings of one computation into one form, so that the other passes match one form.

call_module(Linear | GELU | SiLU | ReLU | LayerNorm | RMSNorm | Dropout | Identity)  →  the function
dropout(x, p, training=False)       →  x
x.to(its own dtype and device)      →  x
addmm(b, x, w.t())                  →  linear(x, w, b)
x @ w.t() | matmul(x, w.T) | mm     →  linear(x, w)
y += z, y *= z  (y fresh, not read again)  →  y + z, y · z
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .graph import CASTS, arg, insert, kind, replace, same_shape, tensor, value
from .mutation import is_fresh, remove_dead


def normalize(graph: fx.Graph) -> int:
    """Run every rule over the graph; returns how many nodes were rewritten."""
    count = 0
    for node in list(graph.nodes):
        rewritten = (
            _inline_module(node) or _drop_identity(node) or _linear_from_matmul(node) or _functionalize(node)
        )
        count += bool(rewritten)
    if count:
        remove_dead(graph)
    _attributes_first(graph)
    return count


def _attributes_first(graph: fx.Graph) -> None:
    """Parameters of a traced module stand, like Dynamo's, in front of everything that reads them."""
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    seen = False
    for node in list(graph.nodes):
        seen = seen or node is first
        if seen and node.op == "get_attr":
            first.prepend(node)


def _inline_module(node: fx.Node) -> bool:
    """A leaf module of a symbolically traced graph becomes the function it calls."""
    if node.op != "call_module" or node.graph.owning_module is None or len(node.args) != 1 or node.kwargs:
        return False
    module = node.graph.owning_module.get_submodule(str(node.target))
    if type(module) is nn.Dropout and (not module.training or module.p == 0):
        replace(node, node.args[0])  # type: ignore[arg-type]
        return True
    call = _as_function(module)
    if call is None:
        return False
    target, parameters, rest = call
    args: list[Any] = [node.args[0]]
    with node.graph.inserting_before(node):
        for name in parameters:
            attribute = getattr(module, name, None) if isinstance(name, str) else name
            if isinstance(attribute, torch.Tensor):
                weight = node.graph.get_attr(f"{node.target}.{name}")
                weight.meta["example_value"] = attribute
                args.append(weight)
            else:
                args.append(attribute)
    new = insert(node, target, tuple(args), node, **rest)
    new.meta.setdefault("nn_module_stack", {str(node.target): (str(node.target), type(module))})
    replace(node, new)
    return True


def _as_function(module: nn.Module) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """(function, parameter names and constants, keywords) of a module whose forward is that one call."""
    if type(module) is nn.Linear:
        return torch._C._nn.linear, ("weight", "bias"), {}
    if type(module) is nn.GELU:
        return torch._C._nn.gelu, (), {"approximate": module.approximate}
    if type(module) is nn.SiLU and not module.inplace:
        return F.silu, (), {}
    if type(module) is nn.ReLU and not module.inplace:
        return F.relu, (), {}
    if type(module) is nn.LayerNorm:
        return F.layer_norm, (module.normalized_shape, "weight", "bias", module.eps), {}
    if type(module) is nn.RMSNorm:
        return F.rms_norm, (module.normalized_shape, "weight", module.eps), {}
    return None


def _drop_identity(node: fx.Node) -> bool:
    """Eval-mode dropout and casts to what the tensor already is return their input itself."""
    if kind(node) == "dropout":
        training = arg(node, "training", True) if node.target is F.dropout else arg(node, "training", False)
        identity = training is False or arg(node, "p", 0.5) == 0.0
    elif kind(node) == "raw_dropout":
        identity = arg(node, "train") is False
    else:
        identity = kind(node) in CASTS and _is_noop_cast(node)
    source = arg(node, "input") if identity else None
    if not isinstance(source, fx.Node):
        return False
    replace(node, source)
    return True


def _is_noop_cast(node: fx.Node) -> bool:
    before, after = tensor(arg(node, "input")), tensor(node)
    if before is None or after is None or node.target is torch.ops.aten._to_copy.default:
        return False
    plain = not node.kwargs.get("copy") and node.kwargs.get("memory_format") is None
    # `to` also takes non_blocking, copy and memory_format by position: only short forms are clear
    short = len(node.args) + len(node.kwargs) <= 3 and True not in node.args[2:]
    return plain and short and before.dtype == after.dtype and before.device == after.device


def _linear_from_matmul(node: fx.Node) -> bool:
    """x @ w.t() and addmm(b, x, w.t()) with a two-dimensional w are linear layers."""
    if kind(node) == "matmul":
        x, transposed, bias = arg(node, "input"), arg(node, "other"), None
    elif kind(node) == "addmm" and arg(node, "beta", 1) == 1 and arg(node, "alpha", 1) == 1:
        bias, x, transposed = arg(node, "input"), arg(node, "mat1"), arg(node, "mat2")
    else:
        return False
    weight = _untransposed(transposed)
    x_value, out = tensor(x), tensor(node)
    if weight is None or x_value is None or x_value.dim() < 2 or out is None:
        return False
    if bias is not None:
        bias_value = tensor(bias)
        if bias_value is None or not same_shape(bias_value.shape, out.shape[-1:]):
            return False
    replace(node, insert(node, torch._C._nn.linear, (x, weight, bias), node))
    return True


def _untransposed(node: Any) -> fx.Node | None:
    """w of w.t(), w.T, w.mT, w.transpose(0, 1), w.permute(1, 0)."""
    source = arg(node, "input") if kind(node) in ("t", "getattr", "transpose", "permute") else None
    shape = tensor(source)
    if shape is None or shape.dim() != 2:
        return None
    if kind(node) == "t":
        return source
    if kind(node) == "getattr":
        return source if arg(node, "name") in ("T", "mT") else None
    if kind(node) == "transpose":
        axes = (arg(node, "dim0"), arg(node, "dim1"))
    else:
        given = node.args[1:] if node.args[1:] else tuple(node.kwargs.values())
        axes = tuple(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    constant = all(isinstance(axis, int) for axis in axes) and len(axes) == 2
    moved = kind(node) == "transpose" and constant and axes[0] % 2 != axes[1] % 2
    return source if moved or (constant and tuple(a % 2 for a in axes) == (1, 0)) else None


def _functionalize(node: fx.Node) -> bool:
    """An in-place sum or product whose target nobody reads again is the plain operation."""
    if kind(node) not in ("iadd", "imul"):
        return False
    target, other = arg(node, "input"), arg(node, "other")
    before, after = tensor(target), tensor(node)
    if before is None or after is None or before.dtype != after.dtype or list(target.users) != [node]:
        return False
    addend = value(other) if isinstance(other, fx.Node) else other
    promoted = torch.result_type(before, addend) if addend is not None else None
    if promoted != before.dtype or not is_fresh(target):
        return False
    plain = torch.add if kind(node) == "iadd" else torch.mul
    extra = {"alpha": arg(node, "alpha")} if kind(node) == "iadd" and arg(node, "alpha") is not None else {}
    replace(node, insert(node, plain, (target, other), node, **extra))
    return True
