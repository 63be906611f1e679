"""The representation: an exported graph with its weights, sites and notes.

A `Program` holds one ``torch.fx.GraphModule`` of ATen and dialect operators. Its parameters keep
the dtype of the checkpoint; `Program.run` executes it with mixed precision (see
`carve.dialect.linear`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from carve import dialect

Kind = Literal["decoder", "encoder", "module"]


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
    def active_size(self) -> int:
        """Neurons that one token passes through, ``s + top_k * m``."""
        return self.shared_size + self.top_k * self.expert_size

    @property
    def intermediate_size(self) -> int:
        """Neurons in all, as in the dense FFN."""
        return self.shared_size + self.num_experts * self.expert_size

    @property
    def macs(self) -> int:
        """Multiply-accumulates a token, the router counted."""
        d = self.expert_up.shape[-1]
        matrices = 2 if self.expert_gate is None else 3
        return matrices * d * self.active_size + self.router_macs

    @property
    def router_macs(self) -> int:
        """Multiply-accumulates a token of the router alone."""
        return self.router.numel() * (1 if self.router_gate is None else 2)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by argument name."""
        items = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in items.items() if isinstance(v, Tensor)}

    def with_top_k(self, top_k: int) -> RoutedFFN:
        """The same weights with another number of experts a token."""
        return replace(self, top_k=top_k)

    def __call__(self, x: Tensor) -> Tensor:
        """Run the specification on ``x`` ``[..., d]``."""
        return dialect.routed_ffn(x, *(getattr(self, f.name) for f in fields(self)))

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
    ``routed`` is set once the site is carved.
    """

    name: str
    input: fx.Node
    output: fx.Node
    dense: DenseFFN
    routed: RoutedFFN | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates a token as the site stands."""
        return (self.routed or self.dense).macs


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
        self, *inputs: Tensor, observe: Callable[[FFNSite, Tensor], None] | None = None
    ) -> tuple[Tensor, ...]:
        """Execute the graph without gradients.

        Args:
            inputs: tensors in the order of ``inputs``.
            observe: called with each site and the site's input as it is reached.

        Returns:
            The results in the order of ``outputs``.
        """
        with torch.no_grad():
            result = _Executor(self, observe).run(*inputs)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

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
                graph.get_attr(f"{path}.{f.name}")
                if isinstance(v := getattr(routed, f.name), Tensor)
                else v
                for f in fields(routed)
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
    """Runs a program with mixed-precision linears and a hook at every site."""

    def __init__(self, program: Program, observe: Callable[[FFNSite, Tensor], None] | None) -> None:
        super().__init__(program.module)
        self.observe = observe
        self.sites: dict[fx.Node, list[FFNSite]] = {}
        for s in program.sites:
            self.sites.setdefault(s.input, []).append(s)

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.aten.linear.default:
            args, _ = self.fetch_args_kwargs_from_env(n)
            result: Any = dialect.linear(*args)
        else:
            result = super().run_node(n)
            if n.target is torch.ops.aten.embedding.default:
                result = result.float()
        if self.observe is not None:
            for site in self.sites.get(n, ()):
                self.observe(site, result)
        return result
