"""The command line from end to end on a tiny checkpoint."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
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
from command_line import Captured, call, change_config, convert, folder_size, refused, result
from report_samples import Page, holds

import carve
from carve import cli
from carve.artifact import Artifact
from carve.calibration import DATA, Batch, load_tokenizer
from carve.config import target_names
from carve.emit import onnx
from carve.errors import UserError
from carve.measure import dense_artifact
from carve.passbase import silent


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
    more = ["--set", "convert.num_experts=6", "--set", "convert.top_k=2"]
    more += ["--target", "onnx-cpu,onnx-split"]
    with contextlib.redirect_stdout(text):
        assert convert(checkpoint, out, "--budget", "0.7", "--bits", "8", *more) == 0
    assert [p.name for p in out.parent.iterdir()] == ["artifact"]
    assert text.getvalue().count("\n") == 1
    return Done(out, json.loads(text.getvalue()))


# What works


def test_answer(done: Done) -> None:
    a = done.answer
    assert a["artifact"] == str(done.path)
    assert a["budget"]["asked"] == 0.7
    assert 0.5 < a["budget"]["realised"] <= 0.7
    assert 0 < a["ffn_active"] < a["budget"]["realised"]
    assert a["seconds"] > 0
    assert a["peak_rss_mb"] > 50
    first = ["profile", "allocate", "carve", "route_ridge", "refit", "distill", "finetune"]
    last = ["quantize", "emit onnx-cpu", "emit onnx-split"]
    assert [p["name"] for p in a["passes"]] == [*first, *last]
    for p in a["passes"]:
        assert p["seconds"] >= 0
        assert p["metrics"]
    assert a["passes"][-2]["metrics"]["parity"]["routings"] > 1
    emulation = a["passes"][-2]["metrics"]["emulation"]
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
    fixed += ["--set", "quantize.method=rtn"]
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
    names = ["profile", "allocate", "carve", "route_ridge", "refit", "quantize", "emit onnx-cpu"]
    assert [p["name"] for p in answer["passes"]] == names


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
        return [p["name"] for p in result(capsys)["passes"]][4:]

    assert names("--set", "convert.exact=true", "--bits", "16") == ["compensate", "emit onnx-cpu"]
    full = ["--effort", "full", "--set", "finetune.tokens=1000", "--set", "distill.steps=5"]
    full += ["--set", "quantize.method=rtn", "--until", "quantize"]
    assert names(*full) == ["refit", "distill", "finetune", "quantize"]
    assert {p.name for p in out.parent.iterdir()} == {"artifact", ".artifact.state"}


def test_mixed_widths_keep_the_size_that_is_asked(
    done: Done, checkpoint: Path, out: Path, capsys: Captured
) -> None:
    def made(*more: str) -> tuple[dict[str, Any], int]:
        assert convert(checkpoint, out, "--budget", "0.7", "--effort", "none", *more) == 0
        return result(capsys), folder_size(out / "onnx")

    def average(answer: dict[str, Any]) -> float:
        (found,) = [p["metrics"] for p in answer["passes"] if p["name"] == "choose_widths"]
        return float(found["average"])

    plain = folder_size(done.path / "onnx")
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
    assert {n: t["bits"] for n, t in manifest["targets"].items()} == {
        "onnx-cpu": 8,
        "onnx-split": 8,
    }
    report = json.loads((done.path / "report.json").read_text())
    assert report["budget"] == done.answer["budget"]


def test_recipe_gives_the_same_artifact(done: Done, checkpoint: Path, out: Path) -> None:
    """In a process of its own, in which sets and dictionaries of strings have another order."""
    recipe = done.path / "recipe.toml"
    threads = str(torch.get_num_threads())
    env = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": threads}
    argv = [sys.executable, "-m", "carve", "convert", checkpoint, "-o", out, "--recipe", recipe]
    subprocess.run(argv, env=env, check=True, capture_output=True)
    a, b = Artifact.open(out).manifest, Artifact.open(done.path).manifest
    names = {*a["files"]}
    assert names == {*b["files"]}
    same = {n for n in names if (out / n).read_bytes() == (done.path / n).read_bytes()}
    assert {n for n in names if n.startswith(("onnx/", "split/"))} <= same
    assert "recipe.toml" in same
    assert a["digest"] == b["digest"]


def test_plan_foresees_what_is_written(done: Done, checkpoint: Path, capsys: Captured) -> None:
    argv = ["--recipe", done.path / "recipe.toml", "-o", done.path.parent / "another", "--json"]
    assert call("plan", checkpoint, *argv) == 0
    plan = result(capsys)
    assert plan["output"] == pytest.approx(folder_size(done.path), rel=0.15)
    assert [s["name"] for s in plan["steps"] if s["name"].startswith("emit")] == [
        "emit onnx-cpu",
        "emit onnx-split",
    ]


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


def test_split_form_runs_within_memory_and_over_processes(done: Done, capsys: Captured) -> None:
    out = done.path
    record = json.loads((out / "report.json").read_text())["passes"][-1]
    assert record["metrics"]["locality"]["hit_rate"]["50%"]["belady"] > 0
    capsys.readouterr()

    def run(*more: str) -> tuple[int, dict[str, object], str]:
        common = ["run", str(out), "--prompt", "The ", "--max-tokens", "30", "--threads", "1"]
        code = cli.main([*common, "--json", *more])
        text, err = capsys.readouterr()
        return code, json.loads(text), err

    want = run()[1]["text"]
    code, limited, _ = run("--memory", "4MB", "--stats")
    assert (code, limited["text"]) == (0, want)
    experts = limited["experts"]
    assert isinstance(experts, dict)
    assert 0 < experts["hit_rate"] <= 1
    assert run("--shards", "3")[1]["text"] == want
    code, _, err = run("--memory", "10KB")
    assert code == 2 and "at least" in err and "Traceback" not in err
    code, both, _ = run("--memory", "4MB", "--shards", "2", "--stats")
    assert (code, both["text"]) == (0, want)
    assert isinstance(both["experts"], dict)
    assert both["experts"]["tokens"] == experts["tokens"]
    assert cli.main(["run", str(out), "--prompt", "a", "--memory", "4MB", "--stats"]) == 0
    assert "hit_rate" in capsys.readouterr().err
    with carve_runtime.load(out, target="onnx-split", threads=1) as model:
        assert model.generate("The ", max_new_tokens=30).text == want


def test_eval(done: Done, capsys: Captured) -> None:
    assert call("eval", done.path, "--tokens", "500", "--json") == 0
    answer = result(capsys)
    assert {"perplexity", "dense_perplexity", "kl", "top1_agreement", "tokens"} <= set(answer)
    assert answer["realised"]["ffn_active"] == done.answer["ffn_active"]
    assert answer["realised"]["skip"] == 0
    assert answer["kl"] > 0
    assert 0 < answer["top1_agreement"] <= 1


def test_eval_on_texts_of_the_user(done: Done, tmp_path: Path, capsys: Captured) -> None:
    """Several files are one text; lines may end as on Windows."""
    story = (DATA / "evaluation.txt").read_text(encoding="utf-8")[:4000]
    first, second, whole = (tmp_path / n for n in ("a.txt", "b.txt", "whole.txt"))
    first.write_bytes(story[:2000].replace("\n", "\r\n").encode("utf-8-sig"))
    second.write_text(story[2000:], encoding="utf-8")
    whole.write_text(f"{story[:2000]}\n\n\n{story[2000:]}", encoding="utf-8")
    answers = []
    for texts in ((first, second), (whole,), (second,)):
        named = [a for t in texts for a in ("--text", t)]
        assert call("eval", done.path, *named, "--json") == 0
        answers.append(result(capsys))
    assert answers[0] == answers[1]
    assert answers[2]["tokens"] < answers[0]["tokens"]
    assert answers[2]["perplexity"] != answers[0]["perplexity"]


def test_eval_on_what_is_no_text(done: Done, tmp_path: Path, capsys: Captured) -> None:
    short, binary, pipe = (tmp_path / n for n in ("short.txt", "binary", "pipe"))
    short.write_text("Too short.\n")
    binary.write_bytes(b"\xff\xfe\x00\xff" * 100)
    os.mkfifo(pipe)
    for file, code in ((short, "text-short"), (binary, "text"), (pipe, "text"), (tmp_path, "text")):
        assert call("eval", done.path, "--text", file, "--json") == 2
        error = result(capsys)["error"]
        assert error["code"] == code
        assert error["hint"]
        assert code == "text-short" or str(file) in error["message"]


def test_encoder(tmp_path: Path, out: Path, capsys: Captured) -> None:
    source = tiny.save_encoder(tmp_path / "bert")
    assert convert(source, out, "--budget", "0.7", "--effort", "none", "--bits", "16") == 0
    quality = result(capsys)["quality"]
    assert call("eval", out, "--tokens", "500", "--json") == 0
    answer = result(capsys)
    assert set(answer) == {"cosine_mean", "cosine_p5", "tokens", "realised"}
    assert 0.5 < answer["cosine_p5"] < answer["cosine_mean"] < 1
    assert answer["cosine_mean"] == pytest.approx(quality["cosine_mean"], abs=0.02)
    assert 0 < answer["realised"]["ffn_active"] < answer["realised"]["budget"] <= 0.7


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


def test_the_dense_side_of_a_bench_is_rounded_and_nothing_else(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    routed: Any = SimpleNamespace(manifest={"source": {"path": str(checkpoint)}}, bits=4)
    made = Artifact.open(dense_artifact(routed, None, silent))
    assert made.bits == 4
    assert [p["name"] for p in made.report["passes"]] == ["quantize", "emit onnx-cpu"]


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
        p["name"] for p in report["passes"][:-2]
    ]
    last = report["passes"][-3]["state"]
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
    settings += ["--effort", "none", "--bits", "16", "--set", "allocate.policy=uniform"]
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
        tiny.build("plain"),
        out,
        example=(rows[:2],),
        calibration=batches,
        ffn_active=0.5,
        bits=16,
        effort="none",
    )
    assert artifact.manifest["kind"] == "module"
    assert artifact.report["ffn_active"] == pytest.approx(0.5, abs=0.03)
    (name,) = carve_runtime.load(out, threads=1).input_names
    got = carve_runtime.load(out, threads=1).run({name: rows[:3].numpy()})[0]
    assert got.shape == (3, tiny.LENGTH, tiny.HIDDEN)
    assert np.isfinite(got).all()


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
    def full(program: Any, path: Path, *args: Any) -> None:
        path.write_bytes(b"half a model")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    if old:
        shutil.copytree(done.path, out)
    monkeypatch.setattr(onnx, "emit", full)
    dense = ("--budget", "1.0", "--bits", "16")
    assert refused(checkpoint, out, capsys, *dense).startswith("disk-full")
    if old:
        assert carve_runtime.load(out, threads=1).generate([5], max_new_tokens=1).token_ids


def test_interruption_leaves_a_state_only(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx, "emit", stop)
    rounded = ["--bits", "8", "--set", "quantize.method=rtn"]
    assert convert(checkpoint, out, "--budget", "1.0", *rounded) == 130
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
    dense = ("--budget", "1.0", "--bits", "16")
    message = refused(checkpoint, out, capsys, *dense, exit_code=1)
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
