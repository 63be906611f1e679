"""A bundle runs by itself: the native runner gives what carve_runtime gives, text included."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import carve_runtime
import numpy as np
import pytest
from carve_runtime import ArtifactError
from tokenizers import Tokenizer

from carve.bundle import Bundle, bundle
from carve.errors import UserError
from carve.files import read_json
from carve.native import tvm_files
from carve.native_tokenizer import NAME, UnsupportedError, compact

REPOSITORY = Path(__file__).parents[2]
REFERENCE = REPOSITORY / "models/reference/tokenizer.json"
sys.path.insert(0, str(REPOSITORY / "tests/runtime"))

from tiny_artifacts import decoder, seal, write  # noqa: E402
from tiny_tvm import tensors, write_compiled, write_index, write_tensors  # noqa: E402

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler"
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_compiled(tmp_path_factory.mktemp("compiled") / "a")


@pytest.fixture(scope="module")
def made(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle(artifact, "tvm:host", tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def copy(made: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.path, tmp_path / "copy"))


def run(
    folder: str | Path, *arguments: str, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """The runner without anything of this process's environment."""
    command = [str(Path(folder) / "carve-run"), *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, env={}, timeout=60, check=False
    )


def told(folder: str | Path, *arguments: str) -> list[int]:
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return [int(n) for n in done.stdout.split()]


def test_tokens_are_those_of_the_python_runtime(made: Bundle) -> None:
    model = carve_runtime.load(made.path, engine="tvm", threads=1)
    for prompt in ([3, 4, 5], [7], list(range(40))):
        given = " ".join(map(str, prompt))
        want = model.generate(prompt, max_new_tokens=30).token_ids
        assert told(made.path, "--ids", given, "--max-tokens", "30", "--threads", "1") == list(want)
    text = "the cat sat"
    want_text = model.generate(text, max_new_tokens=20).text
    done = run(made.path, "--prompt", text, "--max-tokens", "20")
    assert done.stdout.decode() == want_text + "\n"
    assert run(made.path, "--max-tokens", "20", stdin=text.encode()).stdout == done.stdout


def test_the_cache_grows_until_the_context_is_full(made: Bundle) -> None:
    model = carve_runtime.load(made.path, engine="tvm", threads=1)
    want = model.generate([9, 8], max_new_tokens=10_000).token_ids
    assert len(want) == model.max_length - 1
    assert told(made.path, "--ids", "9 8", "--max-tokens", "10000") == list(want)
    long = " ".join(["1"] * (model.max_length + 1))
    assert b"context" in run(made.path, "--ids", long).stderr


def test_logits(made: Bundle, tmp_path: Path) -> None:
    assert run(made.path, "--ids", "3 4 5 6", "--logits", str(tmp_path / "l")).returncode == 0
    got = np.fromfile(tmp_path / "l", np.float32)
    want = carve_runtime.load(made.path, engine="tvm", threads=1).logits([3, 4, 5, 6])
    np.testing.assert_array_equal(got.reshape(want.shape), want)


def test_sampling(made: Bundle) -> None:
    def draw(*more: str) -> list[int]:
        return told(made.path, "--ids", "3", "--max-tokens", "40", "--temperature", "4", *more)

    assert draw("--seed", "1") == draw("--seed", "1") != draw("--seed", "2")
    greedy = told(made.path, "--ids", "3", "--max-tokens", "40")
    assert draw("--seed", "1", "--top-k", "1") == greedy
    assert draw("--seed", "1", "--top-p", "1e-9") == greedy
    model = carve_runtime.load(made.path, engine="tvm", threads=1)
    logits = model.logits([3])[0]
    few = set(np.argsort(-logits)[:3].tolist())
    seen = {
        told(made.path, "--ids", "3", "--max-tokens", "1", "--temperature", "9", "--top-k", "3",
             "--seed", str(seed))[0]
        for seed in range(20)
    }  # fmt: skip
    assert len(seen) > 1 and seen <= few


def test_a_bundle_is_an_artifact_with_hashes_and_runs_in_python(made: Bundle) -> None:
    folder = Path(made.path)
    manifest = read_json(folder / "manifest.json")
    assert list(manifest["targets"]) == ["tvm:host"]
    assert manifest["files"].keys() == {
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()
    } - {"manifest.json"}
    assert len((folder / "README.md").read_text().splitlines()) == 3
    assert made.program_bytes < 15_000_000
    code = (
        "import sys, carve_runtime\n"
        "m = carve_runtime.load('.', engine='tvm', threads=1)\n"
        "print(*m.generate([3, 4, 5], max_new_tokens=8).token_ids)\n"
        "heavy = [m for m in ('tvm', 'torch', 'onnxruntime') if m in sys.modules]\n"
        "print(carve_runtime.__file__, *heavy)\n"
        "print([l.split()[-1] for l in open('/proc/self/maps') if 'libtvm_runtime' in l][0])\n"
    )
    env = {**os.environ, "PYTHONPATH": "python"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    ids, where, library = done.stdout.splitlines()
    assert [int(n) for n in ids.split()] == told(folder, "--ids", "3 4 5", "--max-tokens", "8")
    assert Path(where.split()[0]).is_relative_to(folder.resolve()) and len(where.split()) == 1
    assert library == str(folder.resolve() / "lib/libtvm_runtime.so")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--ids", "3 99999"), b"not in the vocabulary"),
        (("--ids", "3 -1"), b"not in the vocabulary"),
        (("--ids", "3 x"), b"takes a number"),
        (("--nothing",), b"unknown option"),
        (("--ids", "3", "--prompt", "a"), b"one too many"),
        (("--ids", "3", "--max-tokens", "0"), b">= 1"),
        (("--ids", "3", "--temperature", "-1"), b"finite"),
        (("--ids", "3", "--top-p", "0"), b"top-p"),
        (("--ids", "3", "--gates", "some"), b"token or off"),
        (("--prompt", b"\xff".decode("utf-8", "surrogateescape")), b"UTF-8"),
    ],
)
def test_requests_that_cannot_be_served(
    made: Bundle, arguments: tuple[str, ...], match: bytes
) -> None:
    done = run(made.path, *arguments)
    assert done.returncode == 2 and match in done.stderr


def _spoil(folder: Path, name: str, data: bytes, *, sealed: bool = True) -> bytes:
    """What the runner says where a file is another."""
    (folder / name).write_bytes(data)
    if sealed:
        seal(folder)
    done = run(folder, "--ids", "3")
    assert done.returncode == 1 and not done.stdout, (done.returncode, done.stderr)
    return done.stderr


def test_nothing_unchecked_is_loaded(copy: Path) -> None:
    library = copy / "tvm/host/model.so"
    changed = library.read_bytes() + b"\0"
    assert b"SHA-256" in _spoil(copy, "tvm/host/model.so", changed, sealed=False)
    assert b"carve-run" in _spoil(copy, "tvm/host/model.so", b"no library")
    for changes, match in (
        ({"library": "../../../evil.so"}, b"does not list"),
        ({"library": "other.so"}, b"does not list"),
        ({"flags": ["avx1024"]}, b"no avx1024"),
        ({"machine": "riscv64"}, b"no riscv64"),
        ({"device": {"kind": "cuda"}}, b"GPU"),
        ({"schema": 2}, b"out of range"),
        ({"outputs": []}, b"does not match"),
        ({"functions": {"decode": ["lost"], "prefill": []}}, b"carve-run"),
    ):
        write_index(copy, **changes)
        assert match in _spoil(copy, "README.md", b""), changes


def test_unsound_records(copy: Path) -> None:
    for text in (b"{", b"[" * 100_000, b"[]", b'{"a": 1, "a": 2}', b"\xff", b'{"schema": 1e999}'):
        assert _spoil(copy, "tvm/host/index.json", text)
    write_index(copy)
    manifest = (copy / "manifest.json").read_bytes()
    for text in (
        b"",
        b"{}",
        b"3",
        manifest[:-9],
        manifest.replace(b'"head_dim": 16', b'"head_dim": 17'),
    ):
        assert _spoil(copy, "manifest.json", text, sealed=False)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F64", "shape": [], "data_offsets": [0, 0]}},
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 0]}},
        {"a": {"dtype": "U8", "shape": [-1], "data_offsets": [1, 0]}},
        {"a": {"dtype": "U8", "shape": [0], "data_offsets": [-8, -8]}},
        {"a": {"dtype": "U8", "shape": [0], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}},
        {"a": 3},
    ],
)
def test_unsound_tensors(copy: Path, header: Any) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    for length in (len(text), 2**63):
        _spoil(copy, "tvm/host/model.safetensors", length.to_bytes(8, "little") + text)


def test_tensors_that_vectors_cannot_be_loaded_from(copy: Path) -> None:
    table = {n: np.zeros((4, 4), np.float32) for n in ("table", "head")}
    write_tensors(copy / "tvm/host/model.safetensors", table, shift=4)
    assert b"where kernels can read it" in _spoil(copy, "README.md", b"")


def test_tensors_that_fill_up_may_lie_anywhere(copy: Path) -> None:
    small = {n: np.zeros(1, np.float32) for n in ("_.1", "_.2")}
    write_tensors(copy / "tvm/host/model.safetensors", tensors() | small)
    seal(copy)
    assert len(told(copy, "--ids", "3", "--max-tokens", "4")) == 4


def test_unsound_tokenizers(copy: Path) -> None:
    whole = (copy / NAME).read_bytes()
    for data in (
        b"",
        whole[:-1],
        whole + b"\0",
        b"x" + whole[1:],
        whole[:20],
        whole[:16] + b"\xff" * 64,
    ):
        (copy / NAME).write_bytes(data)
        seal(copy)
        done = run(copy, "--prompt", "a")
        assert done.returncode == 1 and b"tokenizer" in done.stderr


# Text

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _variant(name: str) -> dict[str, Any]:
    """The reference tokenizer, or one that splits text otherwise and has more tokens."""
    raw = read_json(REFERENCE)
    own = raw["pre_tokenizer"]
    split = {"type": "Split", "behavior": "Isolated", "invert": False}

    def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
        return {"type": "Sequence", "pretokenizers": list(parts)}

    if name == "llama 3":
        split["pattern"] = {"Regex": LLAMA}
        raw["pre_tokenizer"] = sequence(split, {**own, "use_regex": False})
        raw["model"]["ignore_merges"] = True
    if name == "single digits":
        digits = {"type": "Digits", "individual_digits": True}
        raw["pre_tokenizer"] = sequence(digits, {**own, "add_prefix_space": True})
    if name == "added tokens":
        split["pattern"] = {"Regex": LLAMA.replace("{1,3}", "")}
        raw["pre_tokenizer"] = sequence(split, {**own, "use_regex": False})
        raw["post_processor"] = {**own, "trim_offsets": False}
        more = [("<tool>", 0, 1), ("<tool>x", 0, 0), ("é", 0, 1), ("<|end|>", 1, 0), ("the", 0, 1)]
        raw["added_tokens"] += [
            {"id": 4096 + n, "content": c, "special": bool(s), "normalized": bool(m),
             "single_word": False, "lstrip": False, "rstrip": False}
            for n, (c, s, m) in enumerate(more)
        ]  # fmt: skip
    return raw


def _texts() -> list[str]:
    r = random.Random(0)
    parts = ["'s", "'S", "'ſ", "'re", "'LL", "'", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2003",
             "\u3000", "é", "É", "日本", "ا", "a", "Z", "the", " the", "123", "4", "٣", "Ⅷ", "½",
             "!", "...", "—", "😀", "👨\u200d👩", "\u0301", "\U00031350", "<|endoftext|>", "<tool>",
             "<tool>x", "<|end|>", "\x01", "\u0085", "\u2028", "ǅ", "word", "ing",
             "<|endof"]  # fmt: skip
    spans = ((1, 0x250), (0x250, 0xD800), (0xE000, 0x110000))
    mixed = ["".join(r.choices(parts, k=r.randrange(1, 25))) for _ in range(600)]
    drawn = ["".join(chr(r.randrange(*r.choice(spans))) for _ in range(20)) for _ in range(200)]
    prose = (REPOSITORY / "carve/data/evaluation.txt").read_text(encoding="utf-8")
    return ["", " ", "a" * 3000, *mixed, *drawn, prose[:50_000]]


@pytest.mark.parametrize("name", ["reference", "llama 3", "single digits", "added tokens"])
def test_text_is_what_the_tokenizers_library_makes_of_it(
    made: Bundle, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(_variant(name)), encoding="utf-8")
    library = Tokenizer.from_file(str(path))
    shutil.copyfile(Path(made.path) / "manifest.json", tmp_path / "manifest.json")
    (tmp_path / NAME).write_bytes(compact(path))
    seal(tmp_path)
    texts = _texts()
    coded = run(made.path, "--model", str(tmp_path), "--encode", stdin="\0".join(texts).encode())
    got = [[int(n) for n in line.split()] for line in coded.stdout.split(b"\n")[:-1]]
    want = [e.ids for e in library.encode_batch(texts)]
    assert len(got) == len(want)
    for text, a, b in zip(texts, got, want, strict=True):
        assert a == b, text
    r = random.Random(1)
    null = library.token_to_id("Ā")  # the byte that ends a text here
    ids = [i for i in range(library.get_vocab_size() + 3) if i != null]
    rows = [r.choices(ids, k=r.randrange(1, 30)) for _ in range(600)]
    lines = "".join(" ".join(map(str, row)) + "\n" for row in rows)
    back = run(made.path, "--model", str(tmp_path), "--decode", stdin=lines.encode())
    for row, text in zip(rows, back.stdout.decode().split("\0")[:-1], strict=True):
        assert text == library.decode(row), row


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r | {"normalizer": {"type": "NFC"}}, "normalizes text"),
        (lambda r: r | {"pre_tokenizer": {"type": "Whitespace"}}, "into bytes"),
        (lambda r: r | {"decoder": None}, "decoder"),
        (lambda r: r | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False},
            {**r["pre_tokenizer"], "use_regex": False}]}}, "pattern"),
        (lambda r: r | {"model": {**r["model"], "dropout": 0.1}}, "dropout"),
        (lambda r: r | {"added_tokens": [{**r["added_tokens"][0], "lstrip": True}]}, "lstrip"),
        (lambda r: r | {"post_processor": {"type": "BertProcessing", "sep": ["<|endoftext|>", 0],
                                           "cls": ["<|endoftext|>", 0]}}, "BertProcessing"),
    ],
)  # fmt: skip
def test_tokenizers_that_the_runner_cannot_do_are_refused(
    tmp_path: Path, change: Any, match: str
) -> None:
    (tmp_path / "t.json").write_text(json.dumps(change(read_json(REFERENCE))), encoding="utf-8")
    with pytest.raises(UnsupportedError, match=match):
        compact(tmp_path / "t.json")


# What a bundle is made of


def test_what_cannot_be_bundled(artifact: Path, made: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        bundle(artifact, "tvm:aarch64", tmp_path / "x")
    assert caught.value.hint.startswith("it has tvm:host;")
    with pytest.raises(UserError, match="artifact itself"):
        bundle(artifact, "host", artifact)
    damaged = Path(shutil.copytree(artifact, tmp_path / "damaged"))
    (damaged / "tvm/host/model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="SHA-256"):
        bundle(damaged, "host", tmp_path / "x")
    with pytest.raises(UserError, match="no wheel of apache-tvm=="):
        bundle(artifact, "host", tmp_path / "x", wheels=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


def test_wheels_that_are_none(tmp_path: Path) -> None:
    for name in ("apache_tvm-0.27.0.post1", "apache_tvm_ffi-0.1.14.post0"):
        (tmp_path / f"{name}-py3-none-manylinux_2_28_aarch64.whl").write_bytes(b"no wheel")
    with pytest.raises(UserError, match="cannot be unpacked"):
        tvm_files("aarch64", tmp_path, tmp_path / "scratch")


def test_a_bundle_for_onnxruntime(tmp_path: Path) -> None:
    source = write(tmp_path / "a", "decoder", decoder(True), eos_token_ids=[], shared_cache=True)
    folder = source / "onnx"
    if not folder.is_dir():
        pytest.skip("the tiny artifact keeps its graph beside the manifest")
    made = bundle(source, "onnx", tmp_path / "b")
    assert not made.runner and not (tmp_path / "b/lib").exists()
    lines = (tmp_path / "b/requirements.txt").read_text().splitlines()
    assert [line.split("==")[0] for line in lines] == ["numpy", "tokenizers", "onnxruntime"]
    want = carve_runtime.load(source, threads=1).generate([3, 4], max_new_tokens=5)
    got = carve_runtime.load(tmp_path / "b", threads=1).generate([3, 4], max_new_tokens=5)
    assert got.token_ids == want.token_ids
