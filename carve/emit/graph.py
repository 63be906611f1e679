"""Small questions and edits on an ONNX graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from carve.errors import CarveError


def replace(node: ir.Node, new: list[Any]) -> None:
    """Put ``new`` in place of the node's results, graph outputs too, and drop the node."""
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise CarveError("emit", f"{node.name} stands in no graph")
    for old, value in zip(node.outputs, new, strict=True):
        value.shape, value.type = old.shape, old.type
        if old.is_graph_output():
            value.name, old.name = old.name, f"{old.name}_replaced"
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def given(value: ir.Value | None) -> ir.Value:
    """An input that has to be there."""
    if value is None:
        raise CarveError("emit", "a placeholder lacks an input")
    return value


def produced(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node behind a value where it is of that kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def replace_uses(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old`` read ``new``."""
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new)


def value_of(value: ir.Value | None) -> Tensor:
    """The content of an initializer.

    Raises:
        CarveError: it has none.
    """
    if value is None or value.const_value is None:
        raise CarveError("emit", "a linear with a weight that is not stored")
    return torch.from_numpy(np.array(value.const_value.numpy()))
