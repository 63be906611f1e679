"""The representation: an exported graph with its weights, sites and notes.

A `Program` holds one ``torch.fx.GraphModule`` of ATen and dialect operators. Its parameters keep
the dtype of the checkpoint; `Program.run` executes it with mixed precision (see
`carve.dialect.linear`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from carve import dialect

Kind = Literal["decoder", "encoder", "module"]
FFN = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RoutedFFN:
    """Weights of one routed FFN, in the argument order of `carve.dialect.routed_ffn`."""

    shared_gate: Tensor | None
    shared_gate_bias: Tensor | None
    shared_up: Tensor | None
    shared_up_bias: Tensor | None
    shared_down: Tensor | None
    output_bias: Tensor | None
    expert_gate: Tensor | None
    expert_gate_bias: Tensor | None
    expert_up: Tensor
    expert_up_bias: Tensor | None
    expert_down: Tensor
    expert_bias: Tensor | None
    router: Tensor
    router_bias: Tensor | None
    router_gate: Tensor | None
    activation: str
    top_k: int
    dynamic: bool = False
    mean_top_k: float | None = None
    """Experts a token on calibration text, where ``dynamic`` leaves it to the token."""

    @property
    def num_experts(self) -> int:
        """Number of routed experts ``E``."""
        return self.expert_up.shape[0]

    @property
    def expert_size(self) -> int:
        """Neurons in one routed expert, ``m``."""
        return self.expert_up.shape[1]

    @property
    def shared_size(self) -> int:
        """Neurons in the shared expert, ``s``."""
        return 0 if self.shared_up is None else self.shared_up.shape[0]

    @property
    def active_size(self) -> float:
        """Neurons that one token passes through, ``s + k * m`` (``dynamic``: on average)."""
        k = self.top_k if self.mean_top_k is None else self.mean_top_k
        return self.shared_size + k * self.expert_size

    @property
    def intermediate_size(self) -> int:
        """Neurons in all, as in the dense FFN."""
        return self.shared_size + self.num_experts * self.expert_size

    @property
    def macs(self) -> int:
        """Multiply-accumulates a token, the router counted."""
        d = self.expert_up.shape[-1]
        matrices = 2 if self.expert_gate is None else 3
        return round(matrices * d * self.active_size) + self.router_macs

    @property
    def router_macs(self) -> int:
        """Multiply-accumulates a token of the router alone."""
        return self.router.numel() * (1 if self.router_gate is None else 2)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by argument name."""
        items = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in items.items() if isinstance(v, Tensor)}

    def arguments(self) -> dict[str, Any]:
        """The arguments of `carve.dialect.routed_ffn` after its input, in order."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "mean_top_k"}

    def with_top_k(self, top_k: int) -> RoutedFFN:
        """The same weights with another, fixed number of experts a token."""
        return replace(self, top_k=top_k, dynamic=False, mean_top_k=None)

    def __call__(self, x: Tensor) -> Tensor:
        """Run the specification on ``x`` ``[..., d]``."""
        return dialect.routed_ffn(x, *self.arguments().values())

    def chosen(self, x: Tensor) -> Tensor:
        """Boolean mask ``[..., E]`` of the experts that ``x`` ``[..., d]`` takes."""
        return dialect.select(self.logits(x), self.top_k, self.dynamic)

    def merged(self) -> DenseFFN:
        """All neurons as one dense FFN, the shared expert's first: what every expert on gives."""

        def rows(shared: Tensor | None, expert: Tensor | None) -> Tensor | None:
            if expert is None:
                return None
            flat = expert.flatten(0, 1)
            return flat if shared is None else torch.cat((shared, flat))

        down = self.expert_down.transpose(0, 1).flatten(1)
        bias = self.output_bias
        if self.expert_bias is not None:
            total = self.expert_bias.sum(0)
            bias = total if bias is None else bias + total
        return DenseFFN(
            rows(self.shared_gate, self.expert_gate),
            rows(self.shared_gate_bias, self.expert_gate_bias),
            rows(self.shared_up, self.expert_up),  # type: ignore[arg-type]
            rows(self.shared_up_bias, self.expert_up_bias),
            down if self.shared_down is None else torch.cat((self.shared_down, down), 1),
            bias,
            self.activation,
        )

    def logits(self, x: Tensor) -> Tensor:
        """Router scores ``[..., E]`` for ``x`` ``[..., d]``."""
        return dialect.router_logits(
            x, self.router, self.router_bias, self.router_gate, self.activation
        )


@dataclass(frozen=True)
class DenseFFN:
    """Weights of one dense FFN site: ``down(hidden(x)) + down_bias``.

    Shapes: ``gate``/``up`` ``[m, d]``, ``down`` ``[d_out, m]``, biases ``[m]`` and ``[d_out]``.
    """

    gate: Tensor | None
    gate_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activation: str

    @property
    def intermediate_size(self) -> int:
        """Number of neurons ``m``."""
        return self.up.shape[0]

    @property
    def macs(self) -> int:
        """Multiply-accumulates a token."""
        return self.up.numel() * (1 if self.gate is None else 2) + self.down.numel()

    def hidden(self, x: Tensor) -> Tensor:
        """Hidden activations ``[..., m]`` for ``x`` ``[..., d]``."""
        return dialect.hidden(x, self.gate, self.gate_bias, self.up, self.up_bias, self.activation)

    def __call__(self, x: Tensor) -> Tensor:
        """Run the FFN on ``x`` ``[..., d]``."""
        return dialect.linear(self.hidden(x), self.down, self.down_bias)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        items = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in items.items() if isinstance(v, Tensor)}


@dataclass
class FFNSite:
    """An FFN that passes may rewrite.

    ``name`` is the module path, ``input`` and ``output`` the FX nodes of its input and result;
    ``routed`` is set once the site is carved; ``tuned`` once its weights are no longer the dense
    FFN's.
    """

    name: str
    input: fx.Node
    output: fx.Node
    dense: DenseFFN
    routed: RoutedFFN | None = None
    tuned: bool = False

    @property
    def residual(self) -> fx.Node | None:
        """The stream that the FFN's result is added to, where it is added at once."""
        users = list(self.output.users)
        if len(users) != 1 or users[0].target is not torch.ops.aten.add.Tensor:
            return None
        others = [a for a in users[0].args if a is not self.output]
        return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None

    @property
    def macs(self) -> int:
        """Multiply-accumulates a token as the site stands."""
        return (self.routed or self.dense).macs


@dataclass(frozen=True)
class AtSite:
    """A program that waits at a site: the FFN's input, and the stream its result is added to."""

    site: FFNSite
    x: Tensor
    residual: Tensor | None


@dataclass
class Program:
    """An exported graph, its weights, sites and the notes that passes leave for later ones.

    ``inputs`` and ``outputs`` are the names of the graph's inputs and results in order; for a
    decoder the cache tensors follow the logits. ``dynamic`` gives the dynamic axes of each input.
    ``attention_macs`` counts the attention projections of all blocks for one token.
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

    @property
    def carved(self) -> list[FFNSite]:
        """The sites with routed weights."""
        return [s for s in self.sites if s.routed is not None]

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
    def dense_macs(self) -> int:
        """Multiply-accumulates of the dense program's blocks for one token."""
        return self.attention_macs + sum(s.dense.macs for s in self.sites)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the blocks for one token as the program stands."""
        return self.attention_macs + sum(s.macs for s in self.sites)

    def run(
        self,
        *inputs: Tensor,
        observe: Callable[[FFNSite, Tensor], None] | None = None,
        replace: Mapping[str, FFN] | None = None,
    ) -> tuple[Tensor, ...]:
        """Execute the graph without gradients.

        Args:
            inputs: tensors in the order of ``inputs``.
            observe: called with each site and the site's input as it is reached.
            replace: by site name, what to run in place of the site's FFN.

        Returns:
            The results in the order of ``outputs``.
        """
        with torch.no_grad():
            return self.differentiable(*inputs, observe=observe, replace=replace)

    def differentiable(
        self,
        *inputs: Tensor,
        observe: Callable[[FFNSite, Tensor], None] | None = None,
        replace: Mapping[str, FFN] | None = None,
        only_first: bool = False,
    ) -> tuple[Tensor, ...]:
        """As `run`, with gradients to whatever in ``replace`` asks for them; see also `steps`."""
        ffns = replace or {}
        sites = [s for s in self.sites if s.name in ffns]
        steps = self.steps(*inputs, sites=sites, observe=observe, only_first=only_first)
        try:
            at = next(steps)
            while True:
                at = steps.send(ffns[at.site.name](at.x))
        except StopIteration as stop:
            return tuple(stop.value)

    def steps(
        self,
        *inputs: Tensor,
        sites: Sequence[FFNSite],
        observe: Callable[[FFNSite, Tensor], None] | None = None,
        only_first: bool = False,
    ) -> Generator[AtSite, Tensor, tuple[Tensor, ...]]:
        """Execute the graph with a pause at each of ``sites`` for the FFN's result to be sent in.

        Args:
            inputs: tensors in the order of ``inputs``.
            sites: where to pause; the graph's own FFN is not computed there.
            observe: called with each site and the site's input as it is reached.
            only_first: compute the first result only (a decoder's cache is dropped as it is made).

        Returns:
            A generator that yields `AtSite`, takes the FFN's output, and returns the results.
        """
        return _Executor(self, sites, observe).steps(inputs, only_first)

    def empty_cache(self, batch: int) -> list[Tensor]:
        """Cache inputs of length zero for a decoder."""
        return [t.new_zeros((batch, t.shape[1], 0, t.shape[3])) for t in self.example[2:]]

    def set_routed(self, site: FFNSite, routed: RoutedFFN) -> None:
        """Put ``routed`` in place of the site's FFN, or in place of its former routed weights."""
        graph, module = self.module.graph, self.module
        path = "carve_" + site.name.replace(".", "_")
        if hasattr(module, path):  # the former weights stay until their node is gone
            path += "_next"
        holder = torch.nn.Module()
        for name, tensor in routed.tensors().items():
            holder.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        module.add_submodule(path, holder)
        with graph.inserting_after(site.output):
            call = graph.call_function(torch.ops.carve.routed_ffn.default)
        call.meta.update(
            {k: v for k, v in site.output.meta.items() if k in ("val", "nn_module_stack")}
        )
        with graph.inserting_before(call):
            args = [
                graph.get_attr(f"{path}.{name}") if isinstance(v, Tensor) else v
                for name, v in routed.arguments().items()
            ]
        site.output.replace_all_uses_with(call)
        call.args = (site.input, *args)
        site.output, site.routed = call, routed
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
        self.module.delete_all_unused_submodules()
        graph.lint()
        self.module.recompile()


class _Executor(fx.Interpreter):
    """Runs a program with mixed-precision linears, hooks at every site and stand-ins for FFNs."""

    def __init__(
        self,
        program: Program,
        paused: Sequence[FFNSite],
        observe: Callable[[FFNSite, Tensor], None] | None,
    ) -> None:
        # Values are let go by this class's own schedule.
        super().__init__(program.module, garbage_collect_values=False)
        self.observe = observe
        self.sites: dict[fx.Node, list[FFNSite]] = {}
        for s in program.sites:
            self.sites.setdefault(s.input, []).append(s)
        self.paused = {s.output: s for s in paused}

    def steps(
        self, inputs: Sequence[Tensor], only_first: bool
    ) -> Generator[AtSite, Tensor, tuple[Tensor, ...]]:
        """See `Program.steps`."""
        graph: fx.Graph = self.module.graph  # type: ignore[assignment]
        results: Any = graph.output_node().args[0]
        wanted = tuple(results) if isinstance(results, (tuple, list)) else (results,)
        order, last_use = self._schedule(graph, wanted[:1] if only_first else wanted)
        given = iter(inputs)
        for n in graph.find_nodes(op="placeholder"):
            self.env[n] = next(given)
        for n in order:
            if n in self.paused:
                site = self.paused[n]
                residual = None if site.residual is None else self.env[site.residual]
                self.env[n] = yield AtSite(site, self.env[site.input], residual)
                # The caller may have rewritten the site: its result has another name then.
                self.env[site.output] = self.env[n]
            elif n.op != "placeholder":
                self.env[n] = self.run_node(n)
            if self.observe is not None:
                for site in self.sites.get(n, ()):
                    self.observe(site, self.env[n])
            for done in last_use[n]:
                self.env.pop(done, None)
                if done in self.paused:
                    self.env.pop(self.paused[done].output, None)
        return tuple(self.env[n] if isinstance(n, fx.Node) else n for n in wanted if n in self.env)

    def _schedule(
        self, graph: fx.Graph, wanted: Sequence[Any]
    ) -> tuple[list[fx.Node], dict[fx.Node, list[fx.Node]]]:
        """The nodes that ``wanted`` needs, in order, and which values each uses for the last time.

        Both are of the graph with the paused sites' FFNs left out, so nothing of them is computed.
        """
        last_use: dict[fx.Node, list[fx.Node]] = {}
        seen = {n for n in wanted if isinstance(n, fx.Node)}
        needed = set(seen)
        order: list[fx.Node] = []
        for n in reversed(graph.nodes):
            if n not in needed and n.op != "placeholder":
                continue
            order.append(n)
            if n in self.paused:
                site = self.paused[n]
                used = [site.input] if site.residual is None else [site.input, site.residual]
            else:
                used = n.all_input_nodes
            needed.update(used)
            last_use[n] = [u for u in dict.fromkeys(used) if u not in seen]
            if n not in seen:  # an input that nothing reads
                last_use[n].append(n)
            seen.update(used)
        return order[::-1], last_use

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.aten.linear.default:
            args, _ = self.fetch_args_kwargs_from_env(n)
            return dialect.linear(*args)
        result: Any = super().run_node(n)
        if n.target is torch.ops.aten.embedding.default:
            result = result.float()
        return result
