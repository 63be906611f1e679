"""Capture: every architecture becomes a program that equals the original model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from carve import capture as capture_code
from carve.capture import capture_checkpoint, capture_module, capture_transformers
from carve.checkpoint import Checkpoint
from carve.dialect import ACTIVATIONS
from carve.errors import UserError

NAMES = (*tiny.ARCHITECTURES, "plain")
Get = Callable[[str], tiny.Captured]


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_has_a_site(name: str, captured: Get) -> None:
    program = captured(name).program
    assert len(program.sites) == tiny.LAYERS
    for i, site in enumerate(program.sites):
        assert f".{i}" in site.name
        assert site.dense.activation == tiny.ACTIVATION[name]
        assert (site.dense.gate is not None) == (name in tiny.ACTIVATION and _gated(name))
        assert site.dense.up.shape == (tiny.FFN, tiny.HIDDEN)
        assert site.dense.down.shape == (tiny.HIDDEN, tiny.FFN)
    heads = 2 if name in ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2") else 4
    square = tiny.HIDDEN * tiny.HIDDEN
    assert program.attention_macs == tiny.LAYERS * (2 * square + 2 * square * heads // 4)
    matrices = 3 if _gated(name) else 2
    ffn = tiny.LAYERS * matrices * tiny.HIDDEN * tiny.FFN
    assert program.dense_macs == program.attention_macs + ffn == program.macs


def _gated(name: str) -> bool:
    return name in ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2")


@pytest.mark.parametrize("name", NAMES)
def test_dense_program_equals_the_model(name: str, captured: Get) -> None:
    c = captured(name)
    assert tiny.relative(c.program.run(*c.inputs)[0], c.want) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_every_expert_on_equals_the_model(name: str, captured: Get) -> None:
    c = captured(name)
    tiny.route(c.program, top_k=4)
    assert all(s.routed is not None and s.routed.top_k == 4 for s in c.program.sites)
    assert tiny.relative(c.program.run(*c.inputs)[0], c.want) < 1e-4
    # Half of the experts is another model: the comparison above can fail.
    tiny.route(c.program, top_k=2)
    assert tiny.relative(c.program.run(*c.inputs)[0], c.want) > 1e-2
    assert c.program.macs < c.program.dense_macs


@pytest.mark.parametrize("name", tiny.DECODERS)
@pytest.mark.parametrize("top_k", [0, 2], ids=["dense", "routed"])
def test_cache_gives_what_the_whole_prompt_gives(name: str, top_k: int, captured: Get) -> None:
    c = captured(name)
    want = c.want
    if top_k:
        tiny.route(c.program, top_k=top_k)
        want = c.program.run(*c.inputs)[0]
    ids = c.inputs[0]
    logits, *cache = c.program.run(*tiny.decoder_inputs(c.program, ids[:, :6]))
    assert tiny.relative(logits, want[:, :6]) < 1e-4
    assert {t.shape[2] for t in cache} == {6}
    for i in range(6, ids.shape[1]):
        logits, *cache = c.program.run(*tiny.decoder_inputs(c.program, ids[:, i : i + 1], cache))
        assert tiny.relative(logits, want[:, i : i + 1]) < 1e-4


class Net(nn.Module):
    """Residual FFNs, one for each function."""

    def __init__(self, *functions: Callable[[Tensor], Tensor], kind: str = "plain") -> None:
        super().__init__()
        self.functions, self.kind = functions, kind
        width = 2 * 32 if kind == "fused" else 32
        self.up = nn.ModuleList(nn.Linear(16, width) for _ in functions)
        self.gate = nn.ModuleList(nn.Linear(16, 32) for _ in functions if kind != "fused")
        self.down = nn.ModuleList(nn.Linear(32, 16) for _ in functions)

    def forward(self, x: Tensor) -> Tensor:
        for i, act in enumerate(self.functions):
            if self.kind == "plain":
                h = act(self.up[i](x))
            elif self.kind == "gated":
                h = act(self.gate[i](x)) * self.up[i](x)
            elif self.kind == "up first":
                h = self.up[i](x) * act(self.gate[i](x))
            else:
                gate, up = self.up[i](x).chunk(2, -1)
                h = act(gate) * up
            x = x + self.down[i](h)
        return x


@pytest.mark.parametrize("kind", ["plain", "gated", "up first", "fused"])
def test_activations_are_recognised(kind: str) -> None:
    torch.manual_seed(0)
    names = [n for n in ACTIVATIONS if kind != "plain" or n != "identity"]
    net = Net(*(ACTIVATIONS[n] for n in names), kind=kind)
    x = torch.randn(5, 16)
    with torch.no_grad():
        want = net(x)
    program = capture_module(net, (torch.randn(3, 16),))
    assert [s.dense.activation for s in program.sites] == names
    assert tiny.relative(program.run(x)[0], want) < 1e-5
    tiny.route(program, expert_size=4, top_k=4)
    assert tiny.relative(program.run(x)[0], want) < 1e-4


def test_activation_written_out_is_recognised() -> None:
    net = Net(
        lambda x: x * torch.sigmoid(x),
        lambda x: 0.5 * x * (1 + torch.erf(x * 0.5**0.5)),
        lambda x: torch.clamp(x, min=0.0),
    )
    program = capture_module(net, (torch.randn(3, 16),))
    assert [s.dense.activation for s in program.sites] == ["silu", "gelu", "relu"]


@pytest.mark.parametrize(
    "function",
    [
        lambda gate, up: F.silu(gate) * up.clamp(-7, 7),
        lambda gate, up: F.silu(gate.clamp(max=7)) * up,
        lambda gate, up: F.relu(gate).clamp(max=20) * up,
        lambda gate, up: F.hardtanh(gate, -8, 8) * up,
        lambda gate, up: F.silu(gate) * (up + 1),
    ],
)
def test_activation_that_differs_far_out_is_refused(
    function: Callable[[Tensor, Tensor], Tensor],
) -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(16, 32), nn.Linear(16, 32)
            self.down = nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(function(self.gate(x), self.up(x)))

    with pytest.raises(UserError) as e:
        capture_module(Clipped(), (torch.randn(3, 16),))
    assert e.value.code == "activation"


def test_unknown_activation_is_refused_by_name() -> None:
    class Block(nn.Module):
        def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.wide, self.narrow, self.act = nn.Linear(16, 32), nn.Linear(32, 16), act

        def forward(self, x: Tensor) -> Tensor:
            return x + self.narrow(self.act(self.wide(x)))

    net = nn.Sequential(Block(F.relu), Block(torch.sin))
    with pytest.raises(UserError) as e:
        capture_module(net, (torch.randn(3, 16),))
    assert e.value.code == "activation"
    assert "the activation of 1 is" in e.value.message
    assert "silu" in e.value.hint


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_mixture_of_experts_is_refused_by_name(name: str) -> None:
    model: nn.Module
    if name == "mixtral":
        sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, **tiny.GROUPED}
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes))
    else:
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        config = hf.Qwen2MoeConfig(shared_expert_intermediate_size=64, **sizes, **tiny.GROUPED)
        model = hf.Qwen2MoeForCausalLM(config)
    with pytest.raises(UserError) as e:
        capture_transformers(model)
    assert "layers.0.mlp" in e.value.message
    assert re.search("mixture.of.experts", e.value.hint)


def test_model_without_ffn_is_refused() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
            self.second = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.norm(self.first(x)))

    with pytest.raises(UserError) as e:
        capture_module(Linear(), (torch.randn(3, 16),))
    assert e.value.code == "no-ffn"


def test_data_dependent_control_flow_is_refused() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(F.relu)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum() > 0 else x

    with pytest.raises(UserError) as e:
        capture_module(Branch(), (torch.randn(3, 16),))
    assert e.value.code == "capture"
    assert "Branch" in e.value.message


@pytest.mark.parametrize("wide", [True, False], ids=["widened", "kept"])
def test_bf16_checkpoint(
    wide: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not wide:
        monkeypatch.setattr(capture_code, "_SMALL", 0)
    load = hf.LlamaForCausalLM.from_pretrained
    load(checkpoint, dtype=torch.bfloat16).save_pretrained(tmp_path)
    ids = tiny.token_ids()
    with torch.no_grad():
        want = load(tmp_path, dtype=torch.float32).eval()(input_ids=ids).logits
    program = capture_checkpoint(tmp_path)
    inputs = tiny.decoder_inputs(program, ids)
    assert {s.dense.up.dtype for s in program.sites} == {torch.float32 if wide else torch.bfloat16}
    got = program.run(*inputs)
    assert {t.dtype for t in got} == {torch.float32}
    assert tiny.relative(got[0], want) < (1e-4 if wide else 5e-2)
    tiny.route(program, top_k=4)
    assert tiny.relative(program.run(*inputs)[0], want) < (1e-4 if wide else 5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_stay_tied(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = hf.LlamaConfig(tie_word_embeddings=True, **tiny.GROUPED)
    program = capture_transformers(hf.LlamaForCausalLM(config).to(dtype))
    table = (tiny.VOCAB, tiny.HIDDEN)
    every = [*program.module.named_parameters(remove_duplicate=False)]
    assert len({p.data_ptr() for _, p in every if p.shape == table}) == 1
    apart = hf.LlamaForCausalLM(hf.LlamaConfig(tie_word_embeddings=False, **tiny.GROUPED))
    two = [*capture_transformers(apart).module.parameters()]
    assert len({p.data_ptr() for p in two if p.shape == table}) == 2


def test_checkpoint_directory(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    assert opened.is_decoder
    model = opened.load_model("eager")
    assert opened.num_parameters == sum(p.numel() for p in model.parameters())
    ids = tiny.token_ids()
    with torch.no_grad():
        want = model(input_ids=ids).logits
    program = capture_checkpoint(checkpoint)
    assert tiny.relative(program.run(*tiny.decoder_inputs(program, ids))[0], want) < 1e-4
