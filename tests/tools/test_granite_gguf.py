"""The GGUF of a granitemoeshared checkpoint holds its weights under llama.cpp's names."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
import tiny_models as tiny
import torch
from gguf.quants import dequantize

from carve.emit.hf import emit_checkpoint, routed_in_order
from carve.engine_form import GRANITE
from carve.ffn import RoutedFFN


def _load() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "granite_gguf.py"
    spec = importlib.util.spec_from_file_location("carve_tools_granite_gguf", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


granite = _load()


@pytest.mark.parametrize("qtype", ["F32", "Q8_0"])
def test_tensors_and_facts(tmp_path: Path, qtype: str) -> None:
    c = tiny.capture("qwen2")
    program, routed = c.program, {}
    for i, site in enumerate(program.sites):
        r = tiny.random_routed(site, num_experts=6, compensation=False, seed=i)
        program.set_routed(site, replace(r, router_bias=None))
    routed = routed_in_order(program)
    folder = tmp_path / "x"
    folder.mkdir()
    emit_checkpoint(program, folder, GRANITE, routed)
    reader = gguf.GGUFReader(granite.write_granite(folder, tmp_path / "m.gguf", qtype))
    found = {t.name: t for t in reader.tensors}
    r: RoutedFFN = routed["model.layers.1.mlp"]

    def same(name: str, want: torch.Tensor) -> None:
        t = found[name]
        have = dequantize(t.data, t.tensor_type).reshape(want.shape)
        exact = t.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.allclose(have, want.numpy(), atol=0 if exact else 1e-2 * float(want.abs().max()))

    assert r.expert_gate is not None and r.shared_gate is not None
    same("blk.1.ffn_gate_exps.weight", r.expert_gate)
    same("blk.1.ffn_up_exps.weight", r.expert_up)
    same("blk.1.ffn_down_exps.weight", r.expert_down * r.top_k)
    same("blk.1.ffn_gate_shexp.weight", r.shared_gate)
    same("blk.1.ffn_up_shexp.weight", r.shared_up)
    same("blk.1.ffn_down_shexp.weight", r.shared_down)
    assert found["blk.1.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert found["blk.1.ffn_up_exps.weight"].tensor_type == gguf.GGMLQuantizationType[qtype]
    # Rope turns pairs there, halves here: weight and bias rows move together.
    params = dict(program.module.named_parameters(remove_duplicate=False))
    q = params["model.model.layers.1.self_attn.q_proj.bias"].view(4, 2, 8).transpose(1, 2)
    same("blk.1.attn_q.bias", q.reshape(-1).detach())
    assert "blk.1.attn_output.bias" in found
    facts = {k: f.contents() for k, f in reader.fields.items()}
    assert facts["general.architecture"] == "granitemoe"
    assert facts["granitemoe.expert_count"] == 6
    assert facts["granitemoe.expert_used_count"] == 2
    assert facts["granitemoe.feed_forward_length"] == 32
    assert facts["granitemoe.expert_shared_feed_forward_length"] == r.shared_size
    assert facts["granitemoe.attention.scale"] == pytest.approx(16**-0.5)
