from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import carve_runtime
import numpy as np
import pytest
from carve_runtime import CarveRuntimeError, Model, RequestError
from carve_runtime import model as model_module
from tiny_artifacts import (
    MAX_LENGTH,
    SCRIPT,
    VOCAB,
    plain_ids,
    read_manifest,
    write_manifest,
    write_scripted,
)

Loaded = dict[str, Model]
BOTH = pytest.mark.parametrize("name", ["growing", "shared"])


def recomputed(model: Model, ids: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache: the whole sequence again for every token."""
    ids, start = list(ids), len(ids)
    for _ in range(count):
        ids.append(int(np.argmax(model.logits(ids)[-1])))
    return ids[start:]


@BOTH
def test_greedy_equals_recomputation(loaded: Loaded, name: str) -> None:
    model = loaded[name]
    prompt = plain_ids("the cat sat")
    seen: list[int] = []
    generation = model.generate(prompt, max_new_tokens=40, on_token=seen.append)
    assert list(generation.token_ids) == seen == recomputed(model, prompt, 40)
    assert len(set(seen)) > 5  # a stuck model would prove nothing
    assert generation.finish_reason == "length"
    assert generation.prompt_tokens == len(prompt)
    assert generation.first_token_s > 0 and generation.tokens_per_s > 0


def test_shared_equals_growing(loaded: Loaded) -> None:
    """Past the first capacity of the shared buffer, with steps of several sizes."""
    ids = np.random.default_rng(2).integers(0, VOCAB, MAX_LENGTH).tolist()
    sessions = [loaded[name].start() for name in ("growing", "shared")]
    at = 0
    for size in (1, 3, 1, 250, 1, 1, 1, 300, 1, 41):
        growing, shared = (session.step(ids[at : at + size]) for session in sessions)
        at += size
        assert growing.shape == shared.shape == (size, VOCAB)
        np.testing.assert_allclose(growing, shared, atol=2e-4)
        assert [session.length for session in sessions] == [at, at]
    assert at == MAX_LENGTH
    np.testing.assert_allclose(shared[-1], loaded["growing"].logits(ids)[-1], atol=2e-4)


def test_shared_buffer_is_neither_copied_nor_whole(loaded: Loaded) -> None:
    session = loaded["shared"].start()
    first = session.step([5, 6])
    kept = first.copy()
    values = list(session._values)
    assert values[0].shape()[2] == 256 < MAX_LENGTH
    for token in range(20):
        session.step([token])
    assert all(a is b for a, b in zip(values, session._values, strict=True))
    keys = values[0].numpy()
    assert np.any(keys[:, :, 21]) and not np.any(keys[:, :, 22:])
    session.step([7] * 300)
    assert session._values[0].shape()[2] == 512
    session.step([7] * 250)
    assert session._values[0].shape()[2] == MAX_LENGTH
    np.testing.assert_array_equal(first, kept)


@BOTH
def test_context_length(loaded: Loaded, name: str) -> None:
    model = loaded[name]
    session = model.start()
    session.step([5] * MAX_LENGTH)
    with pytest.raises(RequestError, match="600") as caught:
        session.step([5])
    assert caught.value.code == "context-length"
    assert session.length == MAX_LENGTH
    with pytest.raises(RequestError) as caught:
        model.stream([5] * (MAX_LENGTH + 1))
    assert caught.value.code == "context-length"
    generation = model.generate([5] * (MAX_LENGTH - 2), max_new_tokens=50)
    assert len(generation.token_ids) == 3 and generation.finish_reason == "length"


@BOTH
def test_long_prompts_in_parts(loaded: Loaded, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = np.random.default_rng(3).integers(0, VOCAB, 400).tolist()
    whole = loaded[name].generate(prompt, max_new_tokens=5)
    monkeypatch.setattr(model_module, "_PREFILL_LOGITS_BYTES", 0)
    assert loaded[name].generate(prompt, max_new_tokens=5).token_ids == whole.token_ids


@BOTH
def test_eight_threads(loaded: Loaded, name: str) -> None:
    model = loaded[name]
    prompts = [plain_ids("the cat sat on the mat"[n:]) for n in range(8)]

    def work(prompt: list[int]) -> tuple[int, ...]:
        return model.generate(prompt, max_new_tokens=40, temperature=0.8, seed=3).token_ids

    alone = [work(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, prompts)) == alone


def test_sampling_is_reproducible(loaded: Loaded) -> None:
    def work(seed: int, **options: Any) -> tuple[int, ...]:
        generation = loaded["shared"].generate(
            "the cat", max_new_tokens=30, temperature=1.5, seed=seed, **options
        )
        return generation.token_ids

    assert work(1) == work(1) != work(2)
    greedy = loaded["shared"].generate("the cat", max_new_tokens=30).token_ids
    assert work(1, top_k=1) == work(2, top_p=1e-6) == greedy


def test_scripted_text_and_utf8(loaded: Loaded) -> None:
    """Characters of two to four bytes, each byte a token, come whole."""
    model = loaded["scripted"]
    assert len(plain_ids("😀")) == 4
    pieces = list(model.stream("hi", max_new_tokens=200))
    assert "".join(pieces) == SCRIPT
    assert "😀" in pieces and "é" in pieces and "\ufffd" not in "".join(pieces)
    generation = model.generate("hi", max_new_tokens=200)
    assert generation.text == SCRIPT
    assert generation.finish_reason == "stop"
    assert list(generation.token_ids) == plain_ids(SCRIPT)
    assert generation.prompt_tokens == 1 + len(plain_ids("hi"))  # with <s>, not truncated to 4


def test_utf8_that_stays_incomplete(loaded: Loaded) -> None:
    count = len(plain_ids("héllo ")) + 2  # two of the three bytes of €
    assert loaded["scripted"].generate("hi", max_new_tokens=count).text == "héllo \ufffd"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["END"], "héllo € wörld 😀 "),
        (["rld 😀 E"], "héllo € wö"),
        (["€"], "héllo "),
        (["zzz", "ENDX", "END m"], "héllo € wörld 😀 "),
        (["END more text and on"], SCRIPT),
        (["text", "tex"], "héllo € wörld 😀 END more "),
        (["h"], ""),
    ],
)
def test_stop_strings(loaded: Loaded, stop: list[str], text: str) -> None:
    generation = loaded["scripted"].generate("hi", max_new_tokens=200, stop=stop)
    assert generation.text == text
    assert "".join(loaded["scripted"].stream("hi", max_new_tokens=200, stop=stop)) == text
    assert generation.finish_reason == "stop"


def test_special_tokens_are_not_text(tmp_path: Path) -> None:
    folder = write_scripted(tmp_path / "a", "ab<s>cd", eos_token_ids=[1, 9])
    assert carve_runtime.load(folder).generate("hi").text == "abcd"


def test_empty_prompts(tmp_path: Path, loaded: Loaded) -> None:
    model = loaded["growing"]
    assert model.generate([]).token_ids == model.generate([0]).token_ids  # the BOS token
    model = carve_runtime.load(write_scripted(tmp_path / "a", "x", bos_token_id=None))
    with pytest.raises(RequestError) as caught:
        model.generate([])
    assert caught.value.code == "empty-prompt"


@pytest.mark.parametrize(
    ("prompt", "options", "code"),
    [
        ([VOCAB], {}, "token-id"),
        ([-1], {}, "token-id"),
        ([1.5], {}, "token-id"),
        ("hi", {"max_new_tokens": 0}, "argument"),
        ("hi", {"temperature": -1.0}, "argument"),
        ("hi", {"temperature": float("nan")}, "argument"),
        ("hi", {"top_k": -1}, "argument"),
        ("hi", {"top_p": 0.0}, "argument"),
        ("hi", {"stop": "END"}, "argument"),
        ("hi", {"stop": [""]}, "argument"),
        ("hi", {"seed": -1}, "argument"),
    ],
)
def test_bad_requests(loaded: Loaded, prompt: Any, options: dict[str, Any], code: str) -> None:
    with pytest.raises(RequestError) as caught:
        loaded["growing"].stream(prompt, **options)
    assert caught.value.code == code


def test_bad_threads(artifacts: dict[str, Path]) -> None:
    with pytest.raises(RequestError):
        carve_runtime.load(artifacts["module"], threads=0)


def test_command_line(artifacts: dict[str, Path]) -> None:
    def shell(*args: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-X", "utf8", "-m", "carve_runtime", *args]
        return subprocess.run(command, capture_output=True, check=False)

    done = shell(str(artifacts["scripted"]), "--prompt", "hi", "--stop", "END")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == "héllo € wörld 😀 \n"
    done = shell(str(artifacts["encoder"]), "--prompt", "hi")
    assert done.returncode == 2 and b"encoder" in done.stderr and not done.stdout


def test_failures_inside_onnxruntime(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """A growing graph that claims a shared cache is stopped, and not by memory it overruns."""
    folder = Path(shutil.copytree(artifacts["growing"], tmp_path / "copy"))
    manifest = read_manifest(folder)
    manifest["model"]["shared_cache"] = True
    write_manifest(folder, manifest)
    model = carve_runtime.load(folder)
    with pytest.raises(CarveRuntimeError) as caught:
        model.generate("the cat")
    assert caught.value.code == "run"
