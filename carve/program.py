"""The representation: an exported graph with its weights, sites and notes.

A `Program` holds one ``torch.fx.GraphModule`` of ATen and dialect operators. Its parameters keep
the dtype of the checkpoint; `Program.run` executes it with mixed precision (see
`carve.dialect.linear`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from carve_runtime.heap import Trimmer
from torch import Tensor, fx

from carve.codec import settled
from carve.executor import Executor, Pauses
from carve.ffn import RoutedFFN
from carve.grid import Grid
from carve.match import LINEAR, get_tensor
from carve.sites import FFN, AtSite, AttentionSite, Block, FFNSite, Gate, Linear, Lookup
from carve.storable import storable

EMBEDDING = torch.ops.aten.embedding.default
Kind = Literal["decoder", "encoder", "module"]
_trim = Trimmer()


@storable
@dataclass(frozen=True)
class Owned:
    """An argument of a node that passes have replaced.

    ``node``: the node's name; ``index`` of the argument; ``target``: the parameter that holds
    ``value``, on ``grid``.
    """

    node: str
    index: int
    target: str
    value: Tensor
    grid: Grid | None


@dataclass
class Program:
    """An exported graph, its weights, sites and the notes that passes leave for later ones.

    ``inputs`` and ``outputs`` are the names of the graph's inputs and results in order; for a
    decoder the cache tensors follow the logits. ``dynamic`` gives the dynamic axes of each input.
    ``attention_macs`` counts the attention projections of all blocks for one token;
    ``attention`` are those that a gate may skip. ``grids`` are what the weights of linears were
    rounded to, by parameter; ``owned`` are the parameters that passes have put in place of others.
    Tensors of routed FFNs, gates and owned parameters are contiguous and aligned, see
    `carve.codec.settled`.
    """

    module: fx.GraphModule
    kind: Kind
    inputs: list[str]
    outputs: list[str]
    example: tuple[Tensor, ...]
    dynamic: tuple[dict[int, Any], ...]
    sites: list[FFNSite]
    attention_macs: int
    config: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    attention: list[AttentionSite] = field(default_factory=list)
    grids: dict[str, Grid] = field(default_factory=dict)
    owned: set[str] = field(default_factory=set)

    @property
    def blocks(self) -> list[Block]:
        """Attention and FFNs in the order of the graph."""
        order = {n: i for i, n in enumerate(self.module.graph.nodes)}
        return sorted([*self.attention, *self.sites], key=lambda b: order[b.output])

    @property
    def gated(self) -> list[Block]:
        """The blocks with a gate, in the order of the graph."""
        return [b for b in self.blocks if b.gate is not None]

    @property
    def carved(self) -> list[FFNSite]:
        """The sites with routed weights."""
        return [s for s in self.sites if s.routed is not None]

    @property
    def linears(self) -> list[Linear]:
        """The products with stored weights outside routed FFNs, in the order of the graph."""
        found = []
        for n in self.module.graph.find_nodes(op="call_function", target=LINEAR):
            weight = get_tensor(self.module, n.args[1])
            if weight is not None:
                bias = get_tensor(self.module, n.args[2]) if len(n.args) > 2 else None
                grid = self.grids.get(str(n.args[1].target))
                found.append(Linear(self._path(n, n.args[1]), n, weight, bias, grid))
        return found

    @property
    def lookups(self) -> list[Lookup]:
        """The embeddings with a stored table, in the order of the graph."""
        found = []
        for n in self.module.graph.find_nodes(op="call_function", target=EMBEDDING):
            weight = get_tensor(self.module, n.args[0])
            if weight is not None:
                grid = self.grids.get(str(n.args[0].target))
                found.append(Lookup(self._path(n, n.args[0]), n, weight, grid))
        return found

    def _path(self, node: fx.Node, weight: fx.Node) -> str:
        """Module path of a node, or the name of its weight."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return (str(stack[-1][0]) if stack else str(weight.target)).removeprefix("model.")

    @property
    def max_length(self) -> int:
        """Longest sequence the source configuration allows, 2,048 where it names none."""
        for key in ("max_position_embeddings", "n_positions"):
            if isinstance(self.config.get(key), int):
                # RoBERTa keeps two positions for its padding index.
                roberta = self.config.get("model_type") in ("roberta", "xlm-roberta")
                return int(self.config[key]) - (2 if roberta else 0)
        return 2048

    @property
    def num_parameters(self) -> int:
        """Weights of the program as it stands; tied ones count once."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of the dense program's blocks for one token."""
        return self.attention_macs + sum(s.dense.macs for s in self.sites)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the blocks for one token as the program stands."""
        saved = sum(a.query_macs - a.gated_macs for a in self.attention)
        return self.attention_macs - saved + sum(s.gated_macs for s in self.sites)

    def run(
        self,
        *inputs: Tensor,
        observe: Callable[[FFNSite, Tensor], None] | None = None,
        replace: Mapping[str, FFN] | None = None,
        gates: bool = True,
    ) -> tuple[Tensor, ...]:
        """Execute the graph without gradients.

        Args:
            inputs: tensors in the order of ``inputs``.
            observe: called with each site and the site's input as it is reached.
            replace: by site name, what to run in place of the site's FFN.
            gates: whether skip gates are heard; else every token runs through every block.

        Returns:
            The results in the order of ``outputs``.
        """
        with torch.no_grad():
            found = self.differentiable(*inputs, observe=observe, replace=replace, gates=gates)
        _trim()
        return found

    def differentiable(
        self,
        *inputs: Tensor,
        observe: Callable[[FFNSite, Tensor], None] | None = None,
        replace: Mapping[str, FFN] | None = None,
        only_first: bool = False,
        gates: bool = True,
    ) -> tuple[Tensor, ...]:
        """As `run`, with gradients to whatever in ``replace`` asks for them; see also `steps`."""
        ffns = replace or {}
        sites = [s for s in self.sites if s.name in ffns]
        pauses = Pauses(sites, gates=gates)
        return self.answered(
            *inputs,
            pauses=pauses,
            answer=lambda at: ffns[at.site.name](at.x),
            observe=observe,
            only_first=only_first,
        )

    def answered(
        self,
        *inputs: Tensor,
        pauses: Pauses,
        answer: Callable[[AtSite], Tensor],
        observe: Callable[[FFNSite, Tensor], None] | None = None,
        only_first: bool = False,
    ) -> tuple[Tensor, ...]:
        """Execute the graph with ``answer`` giving the result at every pause; see `steps`."""
        steps = self.steps(*inputs, pauses=pauses, observe=observe, only_first=only_first)
        try:
            at = next(steps)
            while True:
                at = steps.send(answer(at))
        except StopIteration as stop:
            return tuple(stop.value)

    def steps(
        self,
        *inputs: Tensor,
        pauses: Pauses,
        observe: Callable[[FFNSite, Tensor], None] | None = None,
        only_first: bool = False,
    ) -> Generator[AtSite, Tensor, tuple[Tensor, ...]]:
        """Execute the graph with pauses for results to be sent in.

        Args:
            inputs: tensors in the order of ``inputs``.
            pauses: where to pause; before a site, the graph's own FFN is not computed.
            observe: called with each site and the site's input as it is reached.
            only_first: compute the first result only (a decoder's cache is dropped as it is made).

        Returns:
            A generator that yields `AtSite`, takes the block's result (behind its gate, where it
            has one), and returns the results.
        """
        return Executor(self, pauses, observe).steps(inputs, only_first)

    def empty_cache(self, batch: int) -> list[Tensor]:
        """Cache inputs of length zero for a decoder."""
        return [t.new_zeros((batch, t.shape[1], 0, t.shape[3])) for t in self.example[2:]]

    def copy(self) -> Program:
        """A copy that passes may rewrite; weights are shared, for none is changed in place."""
        shared = (*self.module.parameters(), *self.module.buffers())
        with warnings.catch_warnings():  # torch's own, about how it copies a graph
            warnings.simplefilter("ignore", FutureWarning)
            module = copy.deepcopy(self.module, {id(t): t for t in shared})
        nodes = dict(zip(self.module.graph.nodes, module.graph.nodes, strict=True))

        def own(block: Any, **more: fx.Node) -> Any:
            gate = None if block.gate_node is None else nodes[block.gate_node]
            ends = {"input": nodes[block.input], "output": nodes[block.output]}
            return replace(block, **ends, gate_node=gate, **more)

        return replace(
            self,
            module=module,
            sites=[own(s) for s in self.sites],
            attention=[own(a, attention=nodes[a.attention]) for a in self.attention],
            config=dict(self.config),
            notes=dict(self.notes),
            grids=dict(self.grids),
            owned=set(self.owned),
        )

    def set_routed(self, site: FFNSite, routed: RoutedFFN) -> None:
        """Put ``routed`` in place of the site's FFN, or in place of its former routed weights."""
        routed = settled(routed)
        call = self._insert(site, "", torch.ops.carve.routed_ffn.default, routed.tensors())
        args = self._arguments(call, routed.arguments())
        site.output.replace_all_uses_with(call)
        call.args = (site.input, *args)
        site.output, site.routed = call, routed
        self.clean()

    def set_gate(self, block: Block, gate: Gate | None) -> None:
        """Let ``gate`` choose which tokens run through the block; None takes its gate away.

        Raises:
            ValueError: the program has no positions, which a gate needs (only decoders have), or
                the block mixes rows and positions.
        """
        if block.gate_node is not None:
            block.gate_node.replace_all_uses_with(block.output)
            self.module.graph.erase_node(block.gate_node)
            block.gate = block.gate_node = None
            self.clean()
        if gate is None:
            return
        if "position_ids" not in self.inputs or not block.gateable:
            raise ValueError(f"{block.name}: a gate needs positions, and [batch, length, width]")
        gate = settled(gate)
        inputs = self.module.graph.find_nodes(op="placeholder")
        position = inputs[self.inputs.index("position_ids")]
        call = self._insert(block, "_gate", torch.ops.carve.gated.default, gate.tensors())
        args = self._arguments(call, gate.arguments())
        block.output.replace_all_uses_with(call)
        call.args = (block.output, block.input, position, *args)
        block.gate, block.gate_node = gate, call
        self.clean()

    def _insert(
        self, block: Block, suffix: str, target: Callable[..., Any], tensors: Mapping[str, Tensor]
    ) -> fx.Node:
        """A node after the block's output, still without arguments, and a home for its weights."""
        path = "carve_" + block.name.replace(".", "_") + suffix
        if hasattr(self.module, path):  # the former weights stay until their node is gone
            path += "_next"
        holder = torch.nn.Module()
        for name, tensor in tensors.items():
            holder.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        self.module.add_submodule(path, holder)
        with self.module.graph.inserting_after(block.output):
            call = self.module.graph.call_function(target)
        kept = ("val", "nn_module_stack")
        call.meta.update({k: v for k, v in block.output.meta.items() if k in kept})
        call.meta["carve_path"] = path
        return call

    def _arguments(self, call: fx.Node, arguments: Mapping[str, Any]) -> list[Any]:
        """Arguments with every tensor as a node that reads it."""
        graph, path = self.module.graph, call.meta["carve_path"]
        with graph.inserting_before(call):
            return [
                graph.get_attr(f"{path}.{name}") if isinstance(v, Tensor) else v
                for name, v in arguments.items()
            ]

    def set_linear(
        self, linear: Linear, weight: Tensor, bias: Tensor | None, grid: Grid | None
    ) -> Linear:
        """Give a linear another weight, on ``grid``, and bias; what else read them keeps its own.

        Returns:
            The linear as it is now.
        """
        weight, bias, grid = settled((weight, bias, grid))
        given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        node = linear.output
        node.args = (node.args[0], *self._own(node, f"{linear.name}.quantized", given, grid))
        self.clean()
        return Linear(linear.name, node, weight, bias, grid)

    def set_lookup(self, lookup: Lookup, weight: Tensor, grid: Grid) -> None:
        """Give an embedding another table, on ``grid``; what else read it keeps its own."""
        weight, grid = settled((weight, grid))
        node = lookup.output
        node.args = (
            *self._own(node, f"{lookup.name}.quantized", {"weight": weight}, grid),
            *node.args[1:],
        )
        self.clean()

    def set_argument(self, node: fx.Node, index: int, name: str, value: Tensor) -> None:
        """Give a node another stored tensor as an argument; what else read it keeps its own."""
        (new,) = self._own(node, name, {"weight": settled(value)}, None)
        node.update_arg(index, new)
        self.clean()

    def _own(
        self, node: fx.Node, name: str, tensors: Mapping[str, Tensor], grid: Grid | None
    ) -> list[fx.Node]:
        """Parameters that only ``node`` reads, ``weight`` on ``grid``, as nodes before it."""
        path = f"model.{name}"
        readers = {
            user
            for n in self.module.graph.find_nodes(op="get_attr")
            if n.target == f"{path}.weight"
            for user in n.users
        }
        if readers - {node}:  # another node's stays
            path += "_again"
        return [
            self._hold(node, f"{path}.{key}", tensor, grid if key == "weight" else None)
            for key, tensor in tensors.items()
        ]

    def _hold(self, node: fx.Node, target: str, tensor: Tensor, grid: Grid | None) -> fx.Node:
        """A parameter ``target`` on ``grid`` that only ``node`` reads, as a node before it."""
        path, _, leaf = target.rpartition(".")
        try:
            holder = self.module.get_submodule(path)
        except AttributeError:
            holder = torch.nn.Module()
            self.module.add_submodule(path, holder)
        holder.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
        self.owned.add(target)
        self.grids.pop(target, None)
        if grid is not None:
            self.grids[target] = grid
        with self.module.graph.inserting_before(node):
            return self.module.graph.get_attr(target)

    def arguments_owned(self) -> list[Owned]:
        """The arguments that passes have put in place of others, in the order of the graph."""
        found = []
        for node in self.module.graph.nodes:
            for i, arg in enumerate(node.args):
                if isinstance(arg, fx.Node) and arg.op == "get_attr" and arg.target in self.owned:
                    target = str(arg.target)
                    value = get_tensor(self.module, arg)
                    assert value is not None
                    found.append(Owned(node.name, i, target, value, self.grids.get(target)))
        return found

    def set_owned(self, owned: Sequence[Owned]) -> None:
        """Put arguments as `arguments_owned` gave them into a program without any.

        Raises:
            KeyError: the graph has no such node.
        """
        nodes = {n.name: n for n in self.module.graph.nodes}
        for each in owned:
            node = nodes[each.node]
            args = [*node.args, *[None] * (each.index + 1 - len(node.args))]
            args[each.index] = self._hold(node, each.target, each.value, each.grid)
            node.args = tuple(args)
        self.clean()

    def clean(self) -> None:
        """Drop dead nodes and the weights that no node uses any more."""
        graph = self.module.graph
        graph.eliminate_dead_code()
        used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        for name, _ in [*self.module.named_parameters(remove_duplicate=False)]:
            if name not in used:
                owner, _, leaf = name.rpartition(".")
                delattr(self.module.get_submodule(owner), leaf)
        self.owned &= used
        self.module.delete_all_unused_submodules()
        graph.lint()
        self.module.recompile()
