"""Eight threads on one loaded artifact: the same tokens as alone, and no memory that stays."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import carve_runtime
import pytest
import tiny_artifacts as tiny
import tiny_split

THREADS, CALLS = 8, 4
PROMPTS = ["the cat", "sat on", "the mat and then", "a", "hat the", "on the", "mat", "cat cat"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("threads")
    split = tiny_split.write_split(base / "split", 4)
    info = {"eos_token_ids": [], "shared_cache": True}
    shared = tiny.write(base / "shared", "decoder", tiny.decoder(True), **info)
    growing = tiny.write(base / "growing", "decoder", tiny.decoder(False), eos_token_ids=[])
    return {"whole": split, "split": split, "shared": shared, "growing": growing}


@pytest.fixture(params=["whole", "split", "budget", "shared", "growing"])
def model(
    request: pytest.FixtureRequest, folders: dict[str, Path]
) -> Iterator[carve_runtime.Model]:
    options = {
        "split": {"target": "onnx-split"},
        "budget": {"target": "onnx-split", "memory": "1MB"},
    }.get(request.param, {})
    folder = folders["split" if request.param == "budget" else request.param]
    with carve_runtime.load(folder, threads=1, **options) as loaded:  # type: ignore[arg-type]
        yield loaded


def tokens(model: carve_runtime.Model, prompt: str) -> tuple[int, ...]:
    return model.generate(prompt, max_new_tokens=16).token_ids


def test_the_same_tokens_as_alone(model: carve_runtime.Model) -> None:
    want = {p: tokens(model, p) for p in PROMPTS}
    assert len(set(want.values())) > 1

    def work(number: int) -> list[tuple[str, tuple[int, ...]]]:
        mine = [PROMPTS[(number + i * 3) % len(PROMPTS)] for i in range(CALLS)]
        return [(p, tokens(model, p)) for p in mine]

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # as many switches in a second as in minutes otherwise
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for results in pool.map(work, range(THREADS)):
                for prompt, got in results:
                    assert got == want[prompt]
    finally:
        sys.setswitchinterval(switch)


def test_memory_stays_flat(folders: dict[str, Path]) -> None:
    """The 0.35 MB of a sequence's cache and logits would be 56 MB if they stayed."""

    def resident() -> int:
        return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) << 10

    prompt = list(range(2, 250))
    with (
        carve_runtime.load(folders["shared"], threads=1) as model,
        ThreadPoolExecutor(THREADS) as pool,
    ):

        def call(_: int) -> int:
            return len(model.generate(prompt, max_new_tokens=2).token_ids)

        assert list(pool.map(call, range(2 * THREADS))) == [2] * 2 * THREADS
        before = resident()
        list(pool.map(call, range(160)))
        assert resident() - before < 24 << 20
