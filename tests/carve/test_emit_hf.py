from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from safetensors import safe_open
from torch import Tensor

import carve
from carve import cli
from carve.config import ConvertConfig
from carve.emit.hf import emit_checkpoint, routed_in_order
from carve.emit.shards import write_shards
from carve.engine_form import GRANITE, HF, check_program, check_source, form_of
from carve.errors import CarveError, UserError
from carve.hf_parity import check_checkpoint, load_checkpoint
from carve.program import Program

Get = Callable[[str], tiny.Captured]
EXPERTS = 6
BOTH = (HF, GRANITE)


def carved(c: tiny.Captured, target: str = HF, dense: int = 0, top_k: int = 2) -> Program:
    """Random experts in the form of ``target``, scores of size 1 as the passes leave them."""
    for i, site in enumerate(c.program.sites[dense:]):
        r = tiny.random_routed(
            site, num_experts=EXPERTS, expert_size=32, top_k=top_k, compensation=False, seed=i
        )
        bias = None if form_of((target,)).unbiased_router else r.router_bias
        c.program.set_routed(site, replace(r, router=r.router / 8, router_bias=bias))
    return c.program


def written(
    program: Program, folder: Path, target: str = HF, orders: dict[str, Tensor] | None = None
) -> Path:
    folder.mkdir()
    emit_checkpoint(program, folder, target, routed_in_order(program, orders))
    return folder


def logits_of(folder: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = load_checkpoint(folder)(input_ids=ids, use_cache=False).logits
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            found |= {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(
    ("name", "target"),
    [("llama", HF), ("qwen2", HF), ("qwen3", HF), ("llama", GRANITE), ("qwen2", GRANITE)],
)
def test_transformers_gives_the_same_logits(
    captured: Get, tmp_path: Path, name: str, target: str
) -> None:
    c = captured(name)
    program = carved(c, target)
    ids = tiny.token_ids(4, 24)
    want = program.run(*tiny.decoder_inputs(program, ids))[0]
    have = logits_of(written(program, tmp_path / "x", target), ids)
    # Two scores that tie in the stored precision may give a token another expert.
    assert float(((have - want).abs().amax(-1) < 1e-2).float().mean()) > 0.97
    assert float((have.argmax(-1) == want.argmax(-1)).float().mean()) > 0.98


@pytest.mark.parametrize("target", BOTH)
def test_all_experts_on_are_the_dense_model(captured: Get, tmp_path: Path, target: str) -> None:
    c = captured("llama")
    program = carved(c, target, top_k=EXPERTS)
    have = logits_of(written(program, tmp_path / "x", target), c.inputs[0])
    assert float((have - c.want).abs().max()) < 1e-2
    fewer = carved(captured("llama"), target)
    far = logits_of(written(fewer, tmp_path / "y", target), c.inputs[0])
    assert float((far - c.want).abs().max()) > 0.1


def test_first_layers_may_stay_dense(captured: Get, tmp_path: Path) -> None:
    program = carved(captured("llama"), dense=1)
    ids = tiny.token_ids(2, 20)
    folder = written(program, tmp_path / "x")
    assert json.loads((folder / "config.json").read_text())["first_k_dense_replace"] == 1
    want = program.run(*tiny.decoder_inputs(program, ids))[0]
    assert float((logits_of(folder, ids) - want).abs().max()) < 1e-2
    plain = carved(captured("llama"), GRANITE, dense=1)
    with pytest.raises(CarveError, match="first layers"):
        check_program(plain, GRANITE)


def test_order_of_experts_changes_nothing_but_their_places(captured: Get, tmp_path: Path) -> None:
    program = carved(captured("qwen2"))
    names = [s.name for s in program.sites]
    orders = {
        names[0]: torch.tensor([3, 0, 5, 1, 4, 2]),
        names[1]: torch.tensor([5, 4, 3, 2, 1, 0]),
    }
    plain = written(program, tmp_path / "plain")
    moved = written(program, tmp_path / "moved", orders=orders)
    ids = tiny.token_ids(3, 20)
    assert torch.allclose(logits_of(plain, ids), logits_of(moved, ids), atol=1e-4)
    a, b = tensors_of(plain), tensors_of(moved)
    for layer, name in enumerate(names):
        at = f"model.layers.{layer}.mlp"
        for new, old in enumerate(orders[name].tolist()):
            for part in ("gate", "up", "down"):
                leaf = f"{part}_proj.weight"
                assert torch.equal(b[f"{at}.experts.{new}.{leaf}"], a[f"{at}.experts.{old}.{leaf}"])
        assert torch.equal(b[f"{at}.gate.weight"], a[f"{at}.gate.weight"][orders[name]])


def test_bf16_sources_stay_bf16_but_for_the_routers(tmp_path: Path) -> None:
    model = tiny.build("llama")
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    program = carved(tiny.capture("llama", model))
    program.config["dtype"] = "bfloat16"
    folder = written(program, tmp_path / "x")
    for name, t in tensors_of(folder).items():
        routing = ".mlp.gate." in name
        assert t.dtype == (torch.float32 if routing else torch.bfloat16), name
    prompt = tiny.decoder_inputs(program, tiny.token_ids(3, 20))
    found = check_checkpoint(program, folder, HF, routed_in_order(program), [prompt])
    assert found.worst_logit < 1e-3
    assert found.own_median_logit < 1e-2
    assert found.same_experts == found.top1_agreement == 1.0


def test_parity_sees_a_damaged_checkpoint(captured: Get, tmp_path: Path) -> None:
    program = carved(captured("llama"))
    routed = routed_in_order(program)
    prompts = [tiny.decoder_inputs(program, tiny.token_ids(3, 20))]
    folder = written(program, tmp_path / "x")
    assert check_checkpoint(program, folder, HF, routed, prompts).same_experts > 0.99
    other = {n: replace(r, expert_up=r.expert_up.roll(1, 0)) for n, r in routed.items()}
    with pytest.raises(CarveError, match="differ: logits"):
        check_checkpoint(program, folder, HF, other, prompts)
    same = [tuple(t[:1, :1] if i < 2 else t[:1] for i, t in enumerate(prompts[0]))]
    with pytest.raises(CarveError, match="routing"):
        check_checkpoint(program, folder, HF, routed, same)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(CarveError, match="finds other weights"):
        load_checkpoint(folder)


def test_shards(tmp_path: Path) -> None:
    whole, split = tmp_path / "whole", tmp_path / "split"
    tensors = {f"t{i}": torch.randn(10, 10) for i in range(7)} | {"large": torch.randn(50, 50)}
    for folder, limit in ((whole, 1 << 20), (split, 1000)):
        folder.mkdir()
        where = write_shards(folder, iter(tensors.items()), limit)
        assert {*where} == {*tensors}
        found = tensors_of(folder)
        assert all(torch.equal(found[k], t) for k, t in tensors.items())
    assert [p.name for p in whole.iterdir()] == ["model.safetensors"]
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (700 + 2500)
    assert {*index["weight_map"].values()} == {p.name for p in split.glob("*.safetensors")}
    assert len(list(split.glob("*-of-00005.safetensors"))) == 5
    with pytest.raises(CarveError, match="not finite"):
        write_shards(tmp_path, iter({"bad": torch.tensor([1e6]).half()}.items()))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"skip": 0.25}, "skip gates"),
        ({"skip": "auto"}, "skip gates"),
        ({"budget": 1.0}, "without routed"),
        ({"router": "analytical", "effort": "none"}, "analytical"),
        ({"passes": {"route_ridge": {"dynamic": True}}}, "depends on the token"),
        ({"exact": True, "passes": {"compensate": {}}}, "compensation"),
        ({"bits": 3}, "quantization"),
        ({"size": "1MB"}, "quantization"),
    ],
)
def test_settings_that_the_engines_cannot_hold(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        ConvertConfig(**{"budget": 0.6, "targets": (HF,), **settings})


def test_checkpoints_alone_are_not_quantized() -> None:
    for targets, bits in (((HF,), 16), (BOTH, 16), ((HF, "onnx-cpu"), 4), (("tvm:host",), 4)):
        assert ConvertConfig(budget=0.6, targets=targets).nominal_bits == bits


@pytest.mark.parametrize(
    ("name", "target", "what"),
    [
        ("gpt2", HF, "gpt2"),
        ("gemma2", HF, "gemma2"),
        ("mistral", HF, "sliding window"),
        ("qwen3", GRANITE, "normalised"),
    ],
)
def test_sources_that_the_engines_cannot_hold(
    captured: Get, name: str, target: str, what: str
) -> None:
    with pytest.raises(UserError, match=what):
        check_source(captured(name).program, ("onnx-cpu", target))
    check_source(captured("llama").program, ("onnx-cpu", target))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda r: replace(r, dynamic=True), "depends on the token"),
        (lambda r: replace(r, output_bias=torch.zeros(tiny.HIDDEN)), "a bias"),
        (lambda r: replace(r, top_k=1), "widths of its own"),
        (lambda r: replace(r, router_gate=r.router), "not linear"),
        (lambda r: replace(r, shared_up=r.shared_up[:-1]), "no whole number"),
    ],
)
def test_programs_that_the_engines_cannot_hold(
    captured: Get, change: Callable[[Any], Any], what: str
) -> None:
    program = carved(captured("llama"))
    check_program(program, HF)
    for site in program.sites[1:] if "own" in what else program.sites:
        site.routed = change(site.routed)
    with pytest.raises(CarveError, match=what):
        check_program(program, HF)


_QUICK = (
    "--budget",
    "0.7",
    "--set",
    "convert.tokens=1500",
    "--set",
    "convert.eval_tokens=300",
    "--set",
    "convert.length=64",
    "--set",
    "carve.tokens=512",
    "--set",
    "quantize.method=rtn",
)


def test_conversion_writes_what_was_not_rounded(checkpoint: Path, tmp_path: Path) -> None:
    """Both targets in one conversion, and the checkpoint alone: the same checkpoint.

    The second is made in a process of its own, where sets of strings have another order.
    """
    common = [str(a) for a in ("convert", checkpoint, *_QUICK, "--effort", "none", "--json")]
    first, second = (["-o", str(tmp_path / n), "--target"] for n in ("both", "alone"))
    assert cli.main([*common, *first, "onnx-cpu,hf"]) == 0
    env = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    argv = [sys.executable, "-m", "carve", *common, *second, "hf"]
    subprocess.run(argv, env=env, check=True, capture_output=True)
    both, alone = (carve.Artifact.open(tmp_path / n) for n in ("both", "alone"))
    a, b = (tensors_of(x.path / "hf") for x in (both, alone))
    assert {*a} == {*b}
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert both.bits == 4
    with pytest.raises(UserError, match="no target that carve runs"):
        _ = alone.bits
    assert alone.manifest["targets"]["hf"] == {"model": "hf/config.json", "bits": 32}
    assert (alone.path / "hf" / "tokenizer.json").is_file()
    assert "quantize" not in [p["name"] for p in alone.report["passes"]]
    assert alone.report["budget"]["realised"] <= 0.7


_LINK = '[[link]]\nbetween = ["*", "*"]\npreset = "ethernet"\n'


@pytest.mark.parametrize("effort", ["layer", "full"])
def test_passes_keep_to_the_form_of_every_target(
    checkpoint: Path, tmp_path: Path, effort: str
) -> None:
    short = ["--set", "distill.steps=2", "--set", "finetune.tokens=600"]
    if effort == "layer":
        devices = tmp_path / "devices.toml"
        devices.write_text('[[device]]\nname = "a"\npreset = "laptop"\n' * 2)
        devices.write_text(devices.read_text().replace('"a"', '"b"', 1) + _LINK)
        short += ["--devices", devices, "--set", "place.objective=exflow"]
    argv = ["convert", checkpoint, "-o", tmp_path / "x", *_QUICK, "--target", "hf-granite,hf"]
    assert cli.main([str(a) for a in (*argv, *short, "--effort", effort, "--json")]) == 0
    report = carve.Artifact.open(tmp_path / "x").report
    found = [p["metrics"]["parity"] for p in report["passes"] if p["name"].startswith("emit")]
    assert len(found) == 2
    assert all(p["top1_agreement"] == 1.0 and p["worst_logit"] < 1e-3 for p in found)
    facts = tmp_path / "x" / "hf" / "handover" / "handover.json"
    assert facts.is_file() == (effort == "layer")
    assert effort != "layer" or json.loads(facts.read_text())["baked"]
