"""From the captured graph to Relax: kernels where the work is, TVM's own operators elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tvm import relax, te
from tvm.relax import op

from carve.emit.tvm import patterns
from carve.emit.tvm.arranging import Arranging
from carve.emit.tvm.gating import Gating
from carve.emit.tvm.layers import Layers
from carve.emit.tvm.params import Parameters
from carve.emit.tvm.patterns import Node
from carve.emit.tvm.products import Products
from carve.emit.tvm.reading import ATTENTION, GATED, LAYER_NORM, ROUTED, Projections, Reading
from carve.emit.tvm.routed import routed
from carve.errors import CarveError
from carve.match import LINEAR
from carve.program import EMBEDDING

aten = torch.ops.aten
Converter = Callable[[Node], Any]


class _Values(dict[Node, Any]):
    """Values by node; what only stands as another arrangement of axes is made when asked for."""

    def __init__(self, make: Callable[[Node], Any]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, node: Node) -> Any:
        value = self[node] = self.make(node)
        return value


class Translator(Arranging):
    """Translates one function of a program.

    Args:
        reading: the program's graph.
        params: takes the stored tensors.
        bb: takes the function.
    """

    def __init__(
        self, reading: Reading, params: Parameters, bb: relax.BlockBuilder, products: Products
    ) -> None:
        super().__init__()
        self.reading, self.stored, self.block_builder = reading, params, bb
        self.layers, self.products = Layers(products), products
        self.gating: Gating | None = None
        self.env: Any = _Values(self._arranged)
        self.swapped: dict[Node, relax.Expr] = {}
        """By node ``[B, H, S, D]``: the same values as ``[B, S, H, D]``."""
        self._normed: set[Node] = set()
        self._pieces: dict[Any, Converter] = {}
        self.present: dict[Node, tuple[relax.Expr, relax.Expr]] = {}
        self.position: relax.Expr | None = None
        self.keep: Any = None
        """Rows of logits that are wanted, the last ones; None for all."""
        self.ours: dict[Any, Converter] = {
            LINEAR: self._our_linear,
            EMBEDDING: self._our_embedding,
            ROUTED: self._our_routed,
            ATTENTION: self._our_attention,
            LAYER_NORM: self._our_layer_norm,
            aten.scaled_dot_product_attention.default: self._our_sdpa,
            aten.transpose.int: self._our_transpose,
            aten.chunk.default: self._our_split,
            aten.split.Tensor: self._our_split,
            aten.split_with_sizes.default: self._our_split,
            aten.slice.Tensor: self._our_slice,
            aten.view.default: self._our_reshape,
            aten.reshape.default: self._our_reshape,
            aten.to.device: self._to_device,
            aten.sym_size.int: self._our_size,
            aten.new_ones.default: self._our_ones,
            aten.index.Tensor: self._our_index,
            aten.gather.default: self._our_gather,
        }

    # Values

    def _arranged(self, node: Node) -> Any:
        if node in self.swapped:
            return self.emit(op.permute_dims(self.swapped[node], [0, 2, 1, 3]))
        if node in self.reading.constants:
            name = str(node.target) if node.op == "get_attr" else f"constant.{node.name}"
            return self.stored.tensor(name, self.reading.constants[node])
        raise CarveError("emit", f"{node.name} is used before it is computed")

    def heads(self, node: Node) -> relax.Expr:
        """``[B, S, H, D]`` of a node ``[B, H, S, D]``."""
        if node not in self.swapped:
            self.swapped[node] = self.emit(op.permute_dims(self.env[node], [0, 2, 1, 3]))
        return self.swapped[node]

    def tensor_of(self, node: Any) -> Tensor | None:
        """The stored tensor behind an argument."""
        return self.reading.constants.get(node)

    # Nodes

    def run(self, nodes: Sequence[Node]) -> None:
        """Translate nodes in order."""
        for n in nodes:
            self.node(n)

    def node(self, n: Node) -> None:
        """Translate one node."""
        if n in self._normed:
            return
        if n in self.reading.sums:
            self._sum(n, self.reading.sums[n])
        elif n in self.reading.norms:
            norm = self.reading.norms[n]
            weight = self.env[norm.weight]
            self.env[n] = self.layers.rms_norm(self.env[norm.x], weight, norm.epsilon)
        elif n in self.reading.rotaries:
            r = self.reading.rotaries[n]
            self.swapped[n] = self.layers.rotary(
                self.heads(r.x), self.env[r.cos], self.env[r.sin], r.width
            )
        elif n.target in self.ours:
            value = self.ours[n.target](n)
            if value is not None:
                self.env[n] = value
        elif patterns.passes_through(n):
            self._alias(n, n.args[0])
        elif n.target is GATED and self.gating is not None:
            self.gating.node(n, self.reading.blocks[n])
        elif getattr(n.target, "__name__", "") == "getitem" and n.args[0].target is ATTENTION:
            if n.args[1] == 0:
                self._alias(n, n.args[0])
        elif getattr(n.target, "__name__", "") == "getitem" and n.args[0] in self._pieces:
            self._pieces[n.args[0]](n)
        else:
            self._theirs(n)

    def _sum(self, n: Node, norm: Node) -> None:
        """A sum and its norm in one."""
        a, b = (self.env[v] for v in n.args)
        known = self.reading.norms.get(norm)
        if known is not None:
            weight, bias, epsilon = self.env[known.weight], None, known.epsilon
        else:
            weight, bias, epsilon = self._layer_norm_of(norm)
        self.env[n], self.env[norm] = self.layers.sum_norm(a, b, weight, bias, epsilon)
        self._normed.add(norm)

    def _theirs(self, n: Node) -> None:
        name = getattr(n.target, "__name__", str(n.target))
        if name not in self.convert_map:
            raise CarveError(
                "emit",
                f"{n.target} has no translation to TVM",
                "leave the tvm target out, or report the architecture",
            )
        try:
            self.env[n] = self.convert_map[name](n)
        except (AssertionError, AttributeError, NotImplementedError, TypeError, ValueError) as e:
            raise CarveError("emit", f"{n.target} could not be translated to TVM: {e}") from e

    def _alias(self, n: Node, source: Any) -> None:
        if source in self.swapped:
            self.swapped[n] = self.swapped[source]
        else:
            self.env[n] = self.env[source]

    # Arrangements of heads

    def _our_transpose(self, n: Node) -> Any:
        source: Any = n.args[0]
        if not patterns.is_head_swap(n):
            return self._transpose(n)
        if source in self.swapped:
            return self.swapped[source]
        self.swapped[n] = self.env[source]
        return None

    def _last_axis_slice(self, value: relax.Expr, start: int, stop: int) -> relax.Expr:
        axis = len(value.ty.shape) - 1
        return self.emit(op.strided_slice(value, [axis], [start], [stop]))

    def _our_slice(self, n: Node) -> Any:
        if patterns.passes_through(n):
            self._alias(n, n.args[0])
            return None
        source: Any = n.args[0]
        if source in self.swapped and n.args[1] in (-1, 3) and len(n.args) == 4:
            width = int(self.swapped[source].ty.shape[3])
            start, stop = (min(int(a), width) for a in n.args[2:4])
            self.swapped[n] = self._last_axis_slice(self.swapped[source], start, stop)
            return None
        return self._cut(n)

    def _our_split(self, n: Node) -> Any:
        """Parts along the last axis are cut where they are taken."""
        source: Any = n.args[0]
        values = n.meta["val"]
        axis = n.args[2] if len(n.args) > 2 else 0
        if axis not in (-1, values[0].ndim - 1):
            raise CarveError("emit", f"{n.target} along axis {axis} has no translation to TVM")
        widths = [int(v.shape[-1]) for v in values]

        def part(item: Node) -> None:
            i = int(item.args[1])
            start = sum(widths[:i])
            if source in self.swapped:
                self.swapped[item] = self._last_axis_slice(
                    self.swapped[source], start, start + widths[i]
                )
            else:
                self.env[item] = self._last_axis_slice(self.env[source], start, start + widths[i])

        self._pieces[n] = part
        return None

    # Kernels

    def _our_linear(self, n: Node) -> Any:
        weight = self.tensor_of(n.args[1])
        bias = self.tensor_of(n.args[2]) if len(n.args) > 2 else None
        if weight is None:
            raise CarveError("emit", f"{n.name}: a linear whose weight is computed, not stored")
        x = self.env[n.args[0]]
        if n is self.reading.head and self.keep is not None:
            x = self._last_rows(x)
        return self.products.linear(x, str(n.args[1].target), [weight], bias)

    def _last_rows(self, x: relax.Expr) -> relax.Expr:
        width = int(x.ty.shape[2])
        keep = self.keep

        def last(x: te.Tensor) -> te.Tensor:
            return te.compute((1, keep, width), lambda b, i, j: x[b, x.shape[1] - keep + i, j])

        return self.block_builder.emit_te(last, x)

    def _our_embedding(self, n: Node) -> Any:
        table = self.tensor_of(n.args[0])
        if table is None:
            raise CarveError("emit", f"{n.name}: an embedding whose table is computed")
        return self.products.lookup(self.env[n.args[1]], str(n.args[0].target), table)

    def _our_routed(self, n: Node) -> Any:
        site = self.reading.sites[n]
        assert site.routed is not None
        return routed(self.products, self.env[n.args[0]], site.name, site.routed)

    def _our_layer_norm(self, n: Node) -> Any:
        return self.layers.layer_norm(self.env[n.args[0]], *self._layer_norm_of(n))

    def _layer_norm_of(self, n: Node) -> tuple[relax.Expr, relax.Expr, float]:
        """Weight, bias and epsilon of a LayerNorm."""
        args = [*n.args, *[None] * (5 - len(n.args))]
        if len(args[1]) != 1:
            raise CarveError("emit", f"{n.name}: a norm over several axes")
        width = int(args[1][0])
        weight = self.env[args[2]] if args[2] is not None else self._filled(width, 1.0)
        bias = self.env[args[3]] if args[3] is not None else self._filled(width, 0.0)
        return weight, bias, 1e-5 if args[4] is None else float(args[4])

    def _filled(self, width: int, value: float) -> relax.Var:
        return self.stored.tensor(f"constant.{value}.{width}", torch.full((width,), value))

    def _our_sdpa(self, n: Node) -> Any:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        a = {**dict(zip(names, n.args, strict=False)), **n.kwargs}
        if a.get("is_causal") or a.get("enable_gqa") or a.get("dropout_p"):
            raise CarveError("emit", f"{n.name}: this form of attention has no translation to TVM")
        q, k, v = (self.env[a[name]] for name in names[:3])
        scale = a.get("scale") or float(int(q.ty.shape[-1])) ** -0.5
        scores = self.emit(op.matmul(q, self.emit(op.permute_dims(k, [0, 1, 3, 2]))))
        scores = self.emit(op.multiply(scores, relax.const(float(scale), "float32")))
        mask = a.get("attn_mask")
        if mask is not None:
            m = self.env[mask]
            if m.ty.dtype.dtype == "bool":
                m = self.emit(
                    op.where(m, relax.const(0.0, "float32"), relax.const(-1e30, "float32"))
                )
            scores = self.emit(op.add(scores, m))
        return self.emit(op.matmul(self.emit(op.nn.softmax(scores, -1)), v))

    def _our_attention(self, n: Node) -> Any:
        if n in self.reading.projections:
            self._enter(n, self.reading.projections[n])
        else:
            self.append(n)
            self.attend(n, self.position)

    def _enter(self, n: Node, p: Projections) -> None:
        """Attention whose queries, keys and values are one product."""
        weights = [self.reading.constants[f.args[1]] for f in p.linears]
        biases = [self.tensor_of(f.args[2]) for f in p.linears if len(f.args) > 2]
        stored = [b for b in biases if b is not None]
        bias = torch.cat([b.float() for b in stored]) if stored else None
        name = f"{p.linears[0].args[1].target}.qkv"
        packed = self.products.linear(self.env[p.x], name, weights, bias)
        caches = (self.env[n.args[3]], self.env[n.args[4]])
        cos, sin = self.env[p.rotary.cos], self.env[p.rotary.sin]
        q, key, value = self.layers.enter(packed, cos, sin, p.rotary.width, self.position, caches)
        self.present[n] = (key, value)
        self._over_cache(n, q, self.position)

    def append(self, n: Node) -> None:
        """New keys and values into the cache."""
        _, k, v, past_key, past_value = n.args[:5]
        self.present[n] = (
            self.layers.append(self.heads(k), self.position, self.env[past_key]),
            self.layers.append(self.heads(v), self.position, self.env[past_value]),
        )

    def attend(self, n: Node, position: relax.Expr | None) -> None:
        """Attention over the cache, for queries at ``position`` ``[1, R]``."""
        self._over_cache(n, self.heads(n.args[0]), position)

    def _over_cache(self, n: Node, q: relax.Expr, position: relax.Expr | None) -> None:
        scale, window, softcap = n.args[5:8]
        key, value = self.present[n]
        self.swapped[n] = self.layers.attend(
            q,
            position,
            key,
            value,
            float(scale),
            int(window),
            float(softcap),
        )

    # Scopes

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Values that are computed inside do not leave it."""
        env, swapped = dict(self.env), dict(self.swapped)
        try:
            yield
        finally:
            self.env.clear()
            self.env.update(env)
            self.swapped = swapped
