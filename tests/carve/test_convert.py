"""The command line from end to end on a tiny checkpoint, and all that may be wrong with one."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import carve_runtime
import numpy as np
import onnx_ir
import pytest
import tiny_models as tiny
import torch
import transformers as hf
from report_samples import Page, holds
from safetensors.torch import load_file, save_file

import carve
from carve import cli
from carve.calibration import Batch, load_tokenizer
from carve.config import target_names
from carve.errors import UserError

QUICK = [
    "--set", "convert.tokens=2000",
    "--set", "convert.eval_tokens=500",
    "--set", "convert.length=64",
    "--set", "carve.tokens=512",
]  # fmt: skip
Captured = pytest.CaptureFixture[str]


def call(*argv: str) -> int:
    return cli.main([str(a) for a in argv])


def convert(model: Path, output: Path, *more: str) -> int:
    return call("convert", str(model), "-o", str(output), "--json", *QUICK, *more)


def result(capsys: Captured) -> dict[str, Any]:
    """The only line of standard output, as JSON."""
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


def refused(model: Path, output: Path, capsys: Captured, *more: str, exit_code: int = 2) -> str:
    """Convert, and expect an error that leaves a state at the most; its message and hint."""
    capsys.readouterr()
    there = sorted(output.parent.iterdir())
    argv = more if "--budget" in more or "--ffn-active" in more else ("--budget", "0.7", *more)
    assert convert(model, output, *argv) == exit_code
    state = output.parent / f".{output.name}.state"
    assert sorted({*output.parent.iterdir()} - {state}) == there
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    error = json.loads(out)["error"]
    assert set(error) == {"code", "message", "hint"}
    assert error["code"]
    assert error["message"] in err
    assert "Traceback" not in err
    return f"{error['code']}: {error['message']} {error['hint']}"


class Done:
    def __init__(self, path: Path, answer: dict[str, Any]) -> None:
        self.path, self.answer = path, answer


@pytest.fixture(scope="module")
def done(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """One finished conversion with a shared expert, and what it printed."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("converted") / "artifact"
    text = io.StringIO()
    widths = ["--set", "convert.num_experts=6", "--set", "convert.top_k=2"]
    with contextlib.redirect_stdout(text):
        assert convert(checkpoint, out, "--budget", "0.7", "--bits", "8", *widths) == 0
    assert [p.name for p in out.parent.iterdir()] == ["artifact"]
    assert text.getvalue().count("\n") == 1
    return Done(out, json.loads(text.getvalue()))


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "source"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    return folder / "artifact"


# What works


def test_answer(done: Done) -> None:
    a = done.answer
    assert a["artifact"] == str(done.path)
    assert a["budget"]["asked"] == 0.7
    assert 0.5 < a["budget"]["realised"] <= 0.7
    assert 0 < a["ffn_active"] < a["budget"]["realised"]
    assert a["seconds"] > 0
    assert a["peak_rss_mb"] > 50
    first = ["profile", "allocate", "carve", "route_ridge", "refit", "distill"]
    assert [p["name"] for p in a["passes"]] == [*first, "quantize", "emit onnx-cpu"]
    for p in a["passes"]:
        assert p["seconds"] >= 0
        assert p["metrics"]
    assert a["passes"][-1]["metrics"]["parity"]["routings"] > 1
    emulation = a["passes"][-1]["metrics"]["emulation"]
    assert emulation["nodes"] > 10
    assert emulation["median"] < 1e-5
    assert a["quality"]["tokens"] >= 400
    assert a["quality"]["kl"] > 0


def split_of(answer: dict[str, Any], site: str = "model.layers.0.mlp") -> dict[str, int]:
    (found,) = [p for p in answer["passes"] if p["name"] == "carve"]
    split: dict[str, int] = found["metrics"]["splits"][site]
    return split


def test_realised_budget_is_the_widths(checkpoint: Path, out: Path, capsys: Captured) -> None:
    fixed = ["--set", "route_ridge.dynamic=false", "--set", "allocate.policy=uniform"]
    assert convert(checkpoint, out, "--budget", "0.7", "--effort", "none", *fixed) == 0
    answer = result(capsys)
    attention, ffn = 3 * tiny.HIDDEN * tiny.HIDDEN, 3 * tiny.HIDDEN * tiny.FFN
    used = 0
    for layer in range(tiny.LAYERS):
        split = split_of(answer, f"model.layers.{layer}.mlp")
        active = split["shared_size"] + split["top_k"] * split["expert_size"]
        used += attention + 3 * tiny.HIDDEN * active + split["num_experts"] * tiny.HIDDEN
    want = used / (tiny.LAYERS * (attention + ffn))
    assert answer["budget"]["realised"] == pytest.approx(want)
    assert want <= 0.7


def test_dynamic_k_is_measured(done: Done) -> None:
    (route,) = [p for p in done.answer["passes"] if p["name"] == "route_ridge"]
    assert all(v > 0 for v in route["metrics"]["k_deviation"].values())
    # The share that held-out tokens use is near what was planned, and not the planned figure.
    (planned,) = [p for p in done.answer["passes"] if p["name"] == "allocate"]
    active = planned["metrics"]["active"].values()
    realised = done.answer["ffn_active"]
    assert realised == pytest.approx(sum(active) / len(active), abs=0.06)


def test_effort_and_exactness_choose_the_passes(
    checkpoint: Path, out: Path, capsys: Captured
) -> None:
    def names(*more: str) -> list[str]:
        assert convert(checkpoint, out, "--budget", "0.7", *more) == 0
        return [p["name"] for p in result(capsys)["passes"]][4:-1]

    assert names("--effort", "none") == ["refit", "quantize"]
    assert names("--effort", "none", "--bits", "16") == ["refit"]
    assert names("--set", "convert.exact=true") == ["compensate", "quantize"]
    full = ["--effort", "full", "--set", "finetune.tokens=4000", "--set", "distill.steps=10"]
    assert names(*full) == ["refit", "distill", "finetune", "quantize"]
    assert [p.name for p in out.parent.iterdir()] == ["artifact"]


def test_mixed_widths_keep_the_size_that_is_asked(
    checkpoint: Path, out: Path, capsys: Captured
) -> None:
    def made(*more: str) -> tuple[dict[str, Any], int]:
        assert convert(checkpoint, out, "--budget", "0.7", "--effort", "none", *more) == 0
        return result(capsys), sum(p.stat().st_size for p in (out / "onnx").iterdir())

    def average(answer: dict[str, Any]) -> float:
        (found,) = [p["metrics"] for p in answer["passes"] if p["name"] == "choose_widths"]
        return float(found["average"])

    _, plain = made("--bits", "8")
    answer, small = made("--size", f"{plain * 0.8:.0f}B")
    assert small <= plain * 0.8
    assert 2 <= average(answer) < 8
    answer, three = made("--bits", "3")
    assert average(answer) <= 3
    assert three <= small
    assert cli.main(["report", str(out)]) == 0
    text = capsys.readouterr().out
    assert "by carving" in text
    assert "widths chosen" in text
    assert "least bytes" in refused(checkpoint, out, capsys, "--size", "20KB")


def test_artifact_holds_what_is_promised(done: Done) -> None:
    manifest = json.loads((done.path / "manifest.json").read_text())
    files = {p.relative_to(done.path).as_posix() for p in done.path.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert {"recipe.toml", "report.json", "tokenizer.json", "onnx/model.onnx"} <= files
    assert {
        f"passes/0{i}-{n}.json" for i, n in enumerate(("profile", "allocate", "carve"))
    } <= files
    assert manifest["source"]["sha256"]
    assert manifest["targets"]["onnx-cpu"]["bits"] == 8
    report = json.loads((done.path / "report.json").read_text())
    assert report["budget"] == done.answer["budget"]


def test_recipe_gives_the_same_artifact(done: Done, checkpoint: Path, out: Path) -> None:
    recipe = done.path / "recipe.toml"
    assert call("convert", checkpoint, "-o", out, "--recipe", recipe, "--json") == 0
    for name in ("onnx/model.onnx", "onnx/model.onnx.data", "recipe.toml"):
        assert (out / name).read_bytes() == (done.path / name).read_bytes()


def test_artifact_generates(done: Done, capsys: Captured) -> None:
    model = carve_runtime.load(done.path, threads=1)
    text = "It was the best of times"
    first = model.generate(text, max_new_tokens=8)
    assert 1 <= len(first.token_ids) <= 8
    assert model.generate(text, max_new_tokens=8).token_ids == first.token_ids
    logits = model.logits(load_tokenizer(done.path).encode(text).ids)
    assert np.isfinite(logits).all()
    capsys.readouterr()
    argv = ["run", done.path, "--prompt", text, "--max-tokens", "8", "--threads", "1", "--json"]
    assert call(*argv) == 0
    answer = result(capsys)
    assert answer["text"] == first.text
    assert answer["tokens"] == len(first.token_ids)
    assert {"tokens_per_s", "first_token_s"} <= set(answer)


def test_eval(done: Done, capsys: Captured) -> None:
    assert call("eval", done.path, "--tokens", "500", "--json") == 0
    answer = result(capsys)
    assert {"perplexity", "dense_perplexity", "kl", "top1_agreement", "tokens"} <= set(answer)
    assert answer["realised"]["ffn_active"] == done.answer["ffn_active"]
    assert answer["realised"]["skip"] == 0
    assert answer["kl"] > 0
    assert 0 < answer["top1_agreement"] <= 1


def test_bench(
    done: Done, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = ["--tokens", "2", "--repeats", "1", "--context", "8", "--prefill", "16"]
    times = set()
    for _ in range(2):
        assert call("bench", done.path, *small, "--threads", "1", "--json") == 0
        answer = result(capsys)
        assert answer["bits"] == 8
        assert answer["threads"] == 1
        for kind in ("decode", "prefill"):
            part = answer[kind]
            assert part["ratio"] == pytest.approx(part["routed"] / part["dense"])
            assert min(part.values()) > 0
        (kept,) = (tmp_path / "carve").iterdir()  # made once, then found again
        assert (kept / "manifest.json").is_file()
        times.add((kept / "manifest.json").stat().st_mtime_ns)
        report = json.loads((done.path / "report.json").read_text())
        assert report["speed"] == answer
        assert f"{answer['decode']['routed']:.1f}" in (done.path / "report.html").read_text()
    assert len(times) == 1
    assert call("bench", done.path, "--context", "1000", "--json") == 2


def test_report(done: Done, capsys: Captured) -> None:
    assert call("report", done.path, "--json") == 0
    assert result(capsys)["passes"] == done.answer["passes"]
    assert call("report", done.path) == 0
    text = capsys.readouterr().out
    for p in done.answer["passes"]:
        assert p["name"] in text
    assert f"realised {done.answer['budget']['realised']:.3f}" in text


def test_the_page_of_a_report(done: Done) -> None:
    report = json.loads((done.path / "report.json").read_text())
    page = Page((done.path / "report.html").read_text())
    assert all(holds(report, *figure) for figure in page.figures)
    shown = {(way[0], way[2] if way[0] == "layers" else None) for way, _ in page.figures}
    for key in ("load", "entropy", "margin", "active", "loss"):
        assert ("layers", key) in shown, key
    assert [p["name"] for p in report["passes"] if p.get("state")] == [
        p["name"] for p in report["passes"][:-1]
    ]
    last = report["passes"][-2]["state"]
    # The weights are what is emitted, but for the graph around them.
    assert 0 < report["bytes"] - last["bytes"] < 150_000
    assert last["reads"] < last["bytes"] < report["dense"]["bytes"] / 3
    assert report["recipe"]["convert"]["bits"] == 8
    for layer in report["layers"].values():
        assert sum(layer["load"]) == pytest.approx(layer["experts_per_token"]["mean"], rel=1e-3)
        used = layer["shared_size"] + sum(layer["load"]) * layer["expert_size"]
        assert layer["active"] == pytest.approx(used / tiny.FFN, rel=1e-3)


def test_list(capsys: Captured) -> None:
    assert call("list", "passes", "--json") == 0
    names = result(capsys)["passes"]
    assert {p.stem for p in Path(carve.__file__).parent.glob("passes/[a-z]*.py")} == set(names)
    assert call("list", "targets") == 0
    assert tuple(capsys.readouterr().out.split()) == target_names()


def test_analytical_router_over_another_artifact(
    done: Done, checkpoint: Path, out: Path, capsys: Captured
) -> None:
    shutil.copytree(done.path, out)
    before = (out / "manifest.json").read_text()
    # Eight experts of the least width leave nothing for a shared expert.
    settings = ["--set", "convert.router=analytical", "--set", "convert.num_experts=8"]
    settings += ["--effort", "none", "--set", "allocate.policy=uniform"]
    assert convert(checkpoint, out, "--budget", "0.7", *settings) == 0
    answer = result(capsys)
    assert "route_analytical" in [p["name"] for p in answer["passes"]]
    assert split_of(answer)["shared_size"] == 0
    assert carve_runtime.load(out, threads=1).generate([5, 6], max_new_tokens=2).token_ids
    assert (out / "manifest.json").read_text() != before
    assert [p.name for p in out.parent.iterdir()] == ["artifact"]


def test_module_from_python(out: Path) -> None:
    torch.manual_seed(0)
    rows = torch.randn(64, tiny.LENGTH, tiny.HIDDEN)
    batches = [Batch((part,)) for part in rows.split(32)]
    artifact = carve.convert(
        tiny.build("plain"), out, example=(rows[:2],), calibration=batches, ffn_active=0.5, bits=16
    )
    assert artifact.manifest["kind"] == "module"
    assert artifact.report["ffn_active"] == pytest.approx(0.5, abs=0.03)
    (name,) = carve_runtime.load(out, threads=1).input_names
    got = carve_runtime.load(out, threads=1).run({name: rows[:3].numpy()})[0]
    assert got.shape == (3, tiny.LENGTH, tiny.HIDDEN)
    assert np.isfinite(got).all()


# What is refused: the source


def test_no_such_directory(tmp_path: Path, out: Path, capsys: Captured) -> None:
    message = refused(tmp_path / "nowhere", out, capsys)
    assert "not-found" in message
    assert "nowhere" in message


def test_pickled_weights(damaged: Path, out: Path, capsys: Captured) -> None:
    weights = damaged / "model.safetensors"
    torch.save(load_file(weights), damaged / "pytorch_model.bin")
    weights.unlink()
    message = refused(damaged, out, capsys)
    assert message.startswith("pickle")
    assert "pytorch_model.bin" in message


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_weights(keep: float, damaged: Path, out: Path, capsys: Captured) -> None:
    file = damaged / "model.safetensors"
    data = file.read_bytes()
    size = int(keep * len(data)) if 0 < keep < 1 else int(keep)
    file.write_bytes(data[:size])
    message = refused(damaged, out, capsys)
    assert message.startswith("bad-file")
    assert "model.safetensors" in message


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    "values, name",
    [
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"num_hidden_layers": 1}, "layers.1"),
        ({"hidden_size": 128}, "embed_tokens"),
        ({"intermediate_size": 512}, "mlp"),
        ({"architectures": ["NoSuchForCausalLM"], "model_type": "nosuch"}, "nosuch"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_config_that_disagrees(
    values: dict[str, Any], name: str, damaged: Path, out: Path, capsys: Captured
) -> None:
    change_config(damaged, **values)
    message = refused(damaged, out, capsys)
    assert message.startswith("config-mismatch")
    assert name in message


def test_config_that_is_no_json(damaged: Path, out: Path, capsys: Captured) -> None:
    (damaged / "config.json").write_text("{")
    assert "config.json" in refused(damaged, out, capsys)
    (damaged / "config.json").unlink()
    assert "config.json" in refused(damaged, out, capsys)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(
    bad: float, damaged: Path, out: Path, capsys: Captured
) -> None:
    file = damaged / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = bad
    save_file(tensors, file, {"format": "pt"})
    message = refused(damaged, out, capsys)
    assert message.startswith("not-finite")
    assert name in message


@pytest.mark.parametrize("where", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_index_that_points_outside(where: str, damaged: Path, out: Path, capsys: Captured) -> None:
    (damaged / "model.safetensors").rename(damaged.parent / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": where}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(damaged, out, capsys)
    assert "outside" in message
    assert where in message


def test_index_that_is_a_link_to_the_outside(damaged: Path, out: Path, capsys: Captured) -> None:
    (damaged / "model.safetensors").rename(damaged.parent / "elsewhere.safetensors")
    (damaged / "shard.safetensors").symlink_to(damaged.parent / "elsewhere.safetensors")
    index = {"weight_map": {"lm_head.weight": "shard.safetensors"}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside" in refused(damaged, out, capsys)


def test_model_without_ffn(damaged: Path, out: Path, capsys: Captured) -> None:
    """State-space blocks: products that are neither FFN nor attention."""
    for file in damaged.glob("*.safetensors"):
        file.unlink()
    torch.manual_seed(0)
    config = hf.MambaConfig(
        hidden_size=32, state_size=4, num_hidden_layers=1, vocab_size=300, use_mambapy=False
    )
    hf.MambaForCausalLM(config).save_pretrained(damaged)
    message = refused(damaged, out, capsys)
    assert message.startswith(("no-ffn", "architecture", "capture"))


def test_tokenizer_missing_or_of_another_model(damaged: Path, out: Path, capsys: Captured) -> None:
    tiny.make_tokenizer(320).save(str(damaged / "tokenizer.json"))
    assert "320" in refused(damaged, out, capsys)
    (damaged / "tokenizer.json").write_text("{}")
    assert refused(damaged, out, capsys).startswith("tokenizer")
    (damaged / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refused(damaged, out, capsys)


# What is refused: the request


@pytest.mark.parametrize("budget", ["0", "1.5", "-1", "nan"])
@pytest.mark.parametrize("option", ["--budget", "--ffn-active"])
def test_budget_outside(
    budget: str, option: str, checkpoint: Path, out: Path, capsys: Captured
) -> None:
    message = refused(checkpoint, out, capsys, option, budget)
    assert message.startswith("budget")
    assert option in message


def test_budget_out_of_reach(checkpoint: Path, out: Path, capsys: Captured) -> None:
    message = refused(checkpoint, out, capsys, "--budget", "0.3")
    assert message.startswith("budget")
    assert "the least is 0.606" in message


def test_both_budgets(checkpoint: Path, out: Path, capsys: Captured) -> None:
    assert "not both" in refused(checkpoint, out, capsys, "--budget", "0.7", "--ffn-active", "0.5")


@pytest.mark.parametrize(
    "setting, nearest",
    [
        ("convert.tokns=5", "'tokens'"),
        ("route_ridge.powr=1.0", "'power'"),
        ("rout_ridge.power=1.0", "'route_ridge'"),
        ("carve.iteration=3", "'iterations'"),
        ("convert.router=ridg", "'ridge'"),
        ("route_ridge.power=many", "float"),
        ("convert.length=short", "length"),
        ("convert.tokens=0", "tokens"),
        ("nonsense", "section.key=value"),
    ],
)
def test_settings(
    setting: str, nearest: str, checkpoint: Path, out: Path, capsys: Captured
) -> None:
    assert nearest in refused(checkpoint, out, capsys, "--set", setting)


@pytest.mark.parametrize(
    "more, word",
    [
        (("--bits", "1"), "--bits 1"),
        (("--size", "large"), "'large'"),
        (("--size", "1MB", "--bits", "16"), "fewer than 16"),
        (("--target", "onnx-gpu"), "'onnx-cpu'"),
        (("--calibration", "/nowhere/text.txt"), "/nowhere/text.txt"),
        (("--recipe", "/nowhere/recipe.toml"), "/nowhere/recipe.toml"),
    ],
)
def test_options(
    more: tuple[str, ...], word: str, checkpoint: Path, out: Path, capsys: Captured
) -> None:
    assert word in refused(checkpoint, out, capsys, *more)


def test_calibration_text(checkpoint: Path, tmp_path: Path, out: Path, capsys: Captured) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.\n")
    message = refused(checkpoint, out, capsys, "--calibration", str(text))
    assert message.startswith("text-short")
    assert "64" in message
    text.write_bytes(b"\xff\xfe\x00\xff" * 100)
    assert "short.txt" in refused(checkpoint, out, capsys, "--calibration", str(text))


def test_output_that_is_no_artifact(checkpoint: Path, out: Path, capsys: Captured) -> None:
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    assert refused(checkpoint, out, capsys).startswith("output")
    assert (out / "letter.txt").read_text() == "dear"
    shutil.rmtree(out)
    out.write_text("a file")
    assert refused(checkpoint, out, capsys).startswith("output")
    assert out.read_text() == "a file"


def test_output_without_a_parent(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    assert convert(checkpoint, tmp_path / "a" / "b", "--budget", "0.7") == 2
    assert not (tmp_path / "a").exists()
    assert result(capsys)["error"]["code"] == "output"


# What goes wrong on the way


def test_disk_full_is_seen_before(
    checkpoint: Path, out: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = refused(checkpoint, out, capsys)
    assert message.startswith("disk")
    assert "0 MB are free" in message


@pytest.mark.parametrize("old", [False, True], ids=["new", "over an artifact"])
def test_disk_full_at_the_end(
    old: bool,
    done: Done,
    checkpoint: Path,
    out: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(model: Any, path: str, **options: Any) -> None:
        Path(path).write_bytes(b"half a model")
        raise OSError(errno.ENOSPC, "No space left on device", path)

    if old:
        shutil.copytree(done.path, out)
    monkeypatch.setattr(onnx_ir, "save", full)
    assert refused(checkpoint, out, capsys, "--budget", "1.0").startswith("disk-full")
    if old:
        assert carve_runtime.load(out, threads=1).generate([5], max_new_tokens=1).token_ids


def test_interruption_leaves_a_state_only(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_ir, "save", stop)
    assert convert(checkpoint, out, "--budget", "1.0") == 130
    assert [p.name for p in out.parent.iterdir()] == [f".{out.name}.state"]


def test_parity_failure_leaves_nothing(
    checkpoint: Path, out: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    save: Callable[..., Any] = onnx_ir.save

    def spoil(model: Any, path: str, **options: Any) -> None:
        name = next(n for n in model.graph.initializers if n.endswith("norm/weight"))
        value = model.graph.initializers[name]
        value.const_value = onnx_ir.Tensor(-value.const_value.numpy(), name=name)
        save(model, path, **options)

    monkeypatch.setattr(onnx_ir, "save", spoil)
    message = refused(checkpoint, out, capsys, "--budget", "1.0", exit_code=1)
    assert message.startswith("parity")


# A finished artifact that was changed, or is none


@pytest.mark.parametrize("name", ["onnx/model.onnx", "onnx/model.onnx.data", "tokenizer.json"])
def test_changed_file(name: str, done: Done, tmp_path: Path, capsys: Captured) -> None:
    copy = Path(shutil.copytree(done.path, tmp_path / "copy"))
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    assert call("run", copy, "--prompt", "a", "--json") == 2
    error = result(capsys)["error"]
    assert error["code"] == "hash-mismatch"
    assert name in error["message"]


@pytest.mark.parametrize("command", ["run", "eval", "bench", "report"])
def test_no_artifact(command: str, tmp_path: Path, capsys: Captured) -> None:
    more = ["--prompt", "a"] if command == "run" else []
    assert call(command, tmp_path / "nowhere", "--json", *more) == 2
    assert "nowhere" in result(capsys)["error"]["message"]
    assert call(command, tmp_path, "--json", *more) == 2
    assert "manifest.json" in result(capsys)["error"]["message"]


def test_eval_against_another_checkpoint(
    done: Done, damaged: Path, tmp_path: Path, capsys: Captured
) -> None:
    change_config(damaged, rms_norm_eps=1e-3)
    assert call("eval", done.path, "--dense", damaged, "--json") == 2
    assert result(capsys)["error"]["code"] == "changed"
    assert call("eval", done.path, "--dense", tmp_path / "gone", "--json") == 2
    assert result(capsys)["error"]["code"] == "not-found"


def test_from_python_the_same_errors(checkpoint: Path, out: Path) -> None:
    with pytest.raises(UserError) as e:
        carve.convert(checkpoint, out, budget=2.0)
    assert e.value.code == "budget"
    with pytest.raises(UserError) as e:
        carve.convert(tiny.build("plain"), out, budget=0.7)
    assert e.value.code == "module"
    assert not out.exists()
