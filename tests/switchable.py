"""A model of blocks whose code looks at what can be changed from outside.

Not in a test's file, whose functions pytest rewrites: another process would find other code.
"""

import enum

import torch
from torch import nn

from lynx_compile import LynxLinear
from lynx_compile.runtime import semantics

WIDTH = 512


class Kind(enum.Enum):
    ADDED = "added"
    TAKEN = "taken"


class Switched:
    kind = Kind.ADDED
    scale = 1.0


def joined(x, y):
    return x + y if Switched.kind is Kind.ADDED else x - y


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return joined(self.to_q(x), x) * Switched.scale


class Model(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.requires_grad_(False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def definition(self, x):
        for block in self.blocks:
            layer = block.to_q
            down, up = (layer.lynx_down, layer.lynx_up) if isinstance(layer, LynxLinear) else (None, None)
            s = semantics.sparsify(x.reshape(-1, WIDTH), lora_down=down)
            y = semantics.sparse_linear(s.pruned, s.scale, s.t, layer.weight, lora_up=up, bias=layer.bias)
            x = joined(y.reshape(x.shape), x) * Switched.scale
        return x
