"""Split models: whole, within a budget, and over processes; always the same numbers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import carve_runtime
import numpy as np
import pytest
from carve_runtime import ArtifactError, CarveRuntimeError, Model, RequestError
from carve_runtime.experts import LocalExperts
from carve_runtime.index import Key
from carve_runtime.placement import Copies
from carve_runtime.residency import Residency
from tiny_artifacts import VOCAB, plain_ids, seal
from tiny_split import EXPERTS, write_split

LENGTH = 256
Index = dict[str, Any]


@pytest.fixture(scope="session")
def split(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    base = tmp_path_factory.mktemp("split")
    return {bits: write_split(base / str(bits), bits) for bits in (4, 16)}


@pytest.fixture
def damaged(split: dict[int, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(split[4], tmp_path / "damaged"))


def load(path: Path, **options: Any) -> Model:
    return carve_runtime.load(path, **{"target": "onnx-split", "threads": 1} | options)


def steps(model: Model, count: int = LENGTH) -> np.ndarray:
    """Logits of a prompt and of tokens one by one."""
    ids = np.random.default_rng(8).integers(0, VOCAB, count).tolist()
    session = model.start()
    return np.concatenate([session.step(ids[:20]), *(session.step([i]) for i in ids[20:])])


def least(path: Path, **options: Any) -> int:
    """The least budget, as the error says it."""
    with pytest.raises(RequestError) as caught:
        load(path, memory=1000, **options)
    assert caught.value.code == "memory"
    found = re.search(r"at least (\d+)MB", caught.value.hint)
    assert found
    return int(found[1]) * 1_000_000


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    for _ in range(200):
        if not any(map(alive, pids)):
            return
        time.sleep(0.05)
    raise AssertionError(f"still there: {[p for p in pids if alive(p)]}")


@pytest.mark.parametrize("bits", [4, 16])
def test_split_equals_the_whole_model(split: dict[int, Path], bits: int) -> None:
    whole = carve_runtime.load(split[bits], threads=1)
    assert whole.expert_stats is None
    with load(split[bits]) as model:
        prompt = plain_ids("the cat sat on")
        want = whole.generate(prompt, max_new_tokens=60).token_ids
        assert model.generate(prompt, max_new_tokens=60).token_ids == want
        assert len(set(want)) > 10
        np.testing.assert_allclose(steps(model), steps(whole), atol=2e-5)
        assert model.expert_stats is not None
        assert model.expert_stats.misses == model.expert_stats.evictions == 0
        assert model.expert_stats.hit_rate == 1
    with pytest.raises(CarveRuntimeError) as caught:
        model.generate(prompt)
    assert caught.value.code == "closed"


def test_threads_give_the_same(split: dict[int, Path]) -> None:
    with load(split[4]) as one, load(split[4], threads=3) as three:
        want = steps(one, 60)
        np.testing.assert_array_equal(steps(three, 60), want)
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda _: steps(three, 60), range(4)):
                np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("policy", ["lfu", "lru"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_limited_memory_changes_no_number(
    split: dict[int, Path], bits: int, policy: str, prefetch: bool
) -> None:
    with load(split[bits]) as model:
        want = steps(model, 120)
    budget = least(split[bits]) + 400_000  # some six of 16 experts
    with load(split[bits], memory=budget, policy=policy, prefetch=prefetch) as model:
        np.testing.assert_array_equal(steps(model, 120), want)
        stats = model.expert_stats
    assert stats is not None
    assert stats.evictions > 10
    assert stats.misses > 10
    assert 0 < stats.resident_bytes < budget
    assert stats.tokens == 120
    assert stats.bytes_read > 0
    assert (stats.expected > 0) == prefetch
    assert 0.1 < stats.hit_rate < 1
    if prefetch:  # the router itself predicts, which is much better than chance
        assert stats.recall > 1.5 * 2 / EXPERTS


def decode(residency: Residency, steps: int, guess: Callable[[int], int]) -> None:
    """One layer that takes expert 0, 1, 2, 3, 0 ... in turn, and what was guessed of each step."""
    for t in range(steps):
        if residency.asks(0):
            residency.prefetch(0, [(0, guess(t))])
        key = (0, t % 4)
        residency.want(0, [key], 1)
        with residency.use(key):
            pass
        residency.done()


@pytest.mark.parametrize("right", [True, False])
def test_reading_ahead_ends_where_it_does_not_pay(right: bool) -> None:
    """A guess that is right comes of every step; one that never is, of every eighth."""
    loads: list[Key] = []

    def load(key: Key) -> Key:
        loads.append(key)
        return key

    every = {(0, e): 1 for e in range(8)}
    residency = Residency(
        load, every, every, budget=2, policy="lru", hotness=dict.fromkeys(every, 0.5)
    )
    decode(residency, 200, lambda t: t % 4 if right else 4 + t % 4)
    residency.close()
    stats = residency.stats
    if right:
        assert stats.expected == stats.right == stats.late + stats.hits == 200
        assert len(loads) == 200
    else:
        assert stats.right == 0 and 25 <= stats.expected < 32
        assert len(loads) < 210


def test_nothing_is_guessed_where_all_is_there() -> None:
    every = {(0, e): 1 for e in range(4)}
    residency = Residency(
        lambda key: key, every, every, budget=4, policy="lfu", hotness=dict.fromkeys(every, 0.5)
    )
    residency.fill(list(every))
    assert not residency.asks(0)
    decode(residency, 8, lambda _: 0)
    assert residency.stats.expected == 0 and residency.stats.hits == 8
    residency.close()


def test_sessions_in_threads_share_a_budget(split: dict[int, Path]) -> None:
    with load(split[4]) as model:
        want = steps(model, 60)
    with (
        load(split[4], memory=least(split[4]) + 400_000, threads=2) as model,
        ThreadPoolExecutor(4) as pool,
    ):
        for got in pool.map(lambda _: steps(model, 60), range(4)):
            np.testing.assert_array_equal(got, want)


_LIMITED = """
import resource, sys
import carve_runtime
path, budget, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
used = sum(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("VmData"))
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
options = {"memory": budget} if budget else {}
with carve_runtime.load(path, target="onnx-split", threads=1, **options) as model:
    print(*model.generate([3, 4, 5], max_new_tokens=16).token_ids)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
def test_under_a_real_limit(tmp_path: Path) -> None:
    """16 experts of 4 MB: all of them do not fit below the limit, the budget does."""
    path = write_split(tmp_path / "a", 16, size=16 * 1024)

    def run(budget: int, limit: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _LIMITED, str(path), str(budget), str(limit)]
        env = {**os.environ, "MALLOC_ARENA_MAX": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env)

    free = run(0, 0)
    assert free.returncode == 0, free.stderr
    # Beside the budget: stacks of threads, and two experts on their way.
    limited = run(20_000_000, 64_000_000)
    assert limited.returncode == 0, limited.stderr
    assert limited.stdout == free.stdout
    assert len(limited.stdout.split()) == 16
    assert run(0, 64_000_000).returncode != 0


def test_four_processes_give_the_same_bits(split: dict[int, Path]) -> None:
    for bits in (4, 16):
        with load(split[bits]) as model:
            want = steps(model)
        with load(split[bits], shards=4) as model:
            pids = model._engine.experts.pids  # type: ignore[attr-defined]
            assert len(pids) == 3 and all(map(alive, pids))
            np.testing.assert_array_equal(steps(model), want)
        wait_until_gone(pids)
        with pytest.raises(CarveRuntimeError) as caught:
            model.generate([3])
        assert caught.value.code == "closed"


def placement(**more: Any) -> dict[str, Any]:
    mixed = [[(e * 5 + 1) % 3] for e in range(EXPERTS)]
    return {"devices": ["a", "b", "c"], "assignment": {"l0": mixed, "l1": mixed[::-1]}} | more


def runners(model: Model) -> dict[int, set[int]]:
    """By device, the first layer's experts that it would run of all of them alone."""
    experts = model._engine.experts  # type: ignore[attr-defined]
    found: dict[int, set[int]] = {}
    for e in range(EXPERTS):
        for d in experts._parts(0, [(e, np.arange(1))], keep=False):
            found.setdefault(d, set()).add(e)
    return found


def test_placement_is_followed(damaged: Path, tmp_path: Path) -> None:
    with load(damaged) as model:
        want = steps(model, 40)
    outside = tmp_path / "placement.json"
    outside.write_text(json.dumps(placement()))
    with load(damaged, shards=outside) as model:
        np.testing.assert_array_equal(steps(model, 40), want)
        assert runners(model) == {1: {0, 3, 6}, 0: {1, 4, 7}, 2: {2, 5}}
    shutil.copyfile(outside, damaged / "placement.json")
    seal(damaged)
    with load(damaged, shards=3) as model:
        assert runners(model) == {1: {0, 3, 6}, 0: {1, 4, 7}, 2: {2, 5}}
    with load(damaged, shards=2) as model:
        assert runners(model) == {0: {0, 1, 2, 3}, 1: {4, 5, 6, 7}}


def test_copies_share_the_work() -> None:
    copies = Copies([[(0,), (1, 0), (2, 0), (0, 1, 2)]])
    # Two on the host would be twice the time of one on each.
    assert copies.choose(0, [(0, 1), (1, 1), (3, 1)]) == [0, 1, 2]
    # Served by the same copy as before where that is as good, though its home is another.
    assert copies.choose(0, [(3, 1)]) == [2]
    # Those with most rows choose first; one without copies is where it is.
    assert copies.choose(0, [(0, 9), (1, 4), (2, 3), (3, 8)]) == [0, 1, 2, 2]
    assert copies.choose(0, [(3, 1), (2, 1)], keep=False) == [2, 0]
    assert copies.choose(0, [(2, 1)]) == [2]


def test_replicas_change_no_number_and_level_the_load(
    split: dict[int, Path], tmp_path: Path
) -> None:
    """All experts have their home on one process; copies of them take half of its work."""

    def served(holders: list[list[int]]) -> tuple[np.ndarray, list[int]]:
        path = tmp_path / "p.json"
        path.write_text(json.dumps(placement(assignment={"l0": holders, "l1": holders})))
        counts = [0, 0, 0]
        with load(split[4], shards=path) as model:
            experts = model._engine.experts  # type: ignore[attr-defined]
            inner = experts._ask

            def ask(layer: int, x: np.ndarray, parts: dict[int, Any]) -> Any:
                for d, part in parts.items():
                    counts[d] += sum(len(rows) for _, rows in part)
                return inner(layer, x, parts)

            experts._ask = ask
            return steps(model, 60), counts

    with load(split[4]) as model:
        want = steps(model, 60)
    got, alone = served([[1]] * EXPERTS)
    np.testing.assert_array_equal(got, want)
    assert alone[0] == alone[2] == 0 < alone[1]
    got, shared = served([[1, 2]] * EXPERTS)
    np.testing.assert_array_equal(got, want)
    assert shared[0] == 0 and sum(shared) == sum(alone)
    assert abs(shared[1] - shared[2]) < 0.1 * sum(shared)


@pytest.mark.parametrize("prefetch", [True, False])
def test_memory_over_processes(split: dict[int, Path], tmp_path: Path, prefetch: bool) -> None:
    """The budget is for all of them together; none goes beyond its share."""
    with load(split[4]) as model:
        want = steps(model, 120)
    path = tmp_path / "p.json"
    copied = [[e % 3, (e + 1) % 3] for e in range(EXPERTS)]
    path.write_text(json.dumps(placement(assignment={"l0": copied, "l1": copied})))
    for shards in (3, path):
        budget = least(split[4], shards=shards) + 200_000
        options = {"memory": budget, "shards": shards, "prefetch": prefetch}
        with load(split[4], **options) as model:
            np.testing.assert_array_equal(steps(model, 120), want)
            stats = model.expert_stats
        assert stats is not None
        assert stats.tokens == 120
        assert stats.evictions > 10 and stats.misses > 10
        assert 0 < stats.resident_bytes < budget
        assert (stats.expected > 0) == prefetch
        if prefetch:
            assert stats.recall > 1.5 * 2 / EXPERTS
    assert least(split[4], shards=3) > least(split[4])


@pytest.mark.parametrize(
    "raw",
    [
        [],
        {},
        placement(devices=[]),
        placement(devices=["x"] * 5000),
        placement(devices=["a", "b"]),
        placement(assignment={"l0": [[0]] * EXPERTS}),
        placement(assignment={"l0": [[0]] * 3, "l1": [[0]] * EXPERTS}),
        placement(assignment={"l0": [[]] * EXPERTS, "l1": [[0]] * EXPERTS}),
        placement(assignment={"l0": [[-1]] * EXPERTS, "l1": [[0]] * EXPERTS}),
        placement(assignment={"l0": [[True]] * EXPERTS, "l1": [[0]] * EXPERTS}),
        placement(assignment={"l0": ["0"] * EXPERTS, "l1": [[0]] * EXPERTS}),
        placement(assignment={"l0": [[1, 1]] * EXPERTS, "l1": [[0]] * EXPERTS}),
    ],
)
def test_hostile_placements(split: dict[int, Path], tmp_path: Path, raw: Any) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ArtifactError) as caught:
        load(split[4], shards=path)
    assert caught.value.code == "placement"


def test_killed_process_is_said_clearly(split: dict[int, Path]) -> None:
    model = load(split[4], shards=3)
    pids = model._engine.experts.pids  # type: ignore[attr-defined]
    stream = model.stream(plain_ids("the cat"), max_new_tokens=400)
    next(stream)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(CarveRuntimeError, match=r"shard \d ended") as caught:
        list(stream)
    assert caught.value.code == "shard"
    wait_until_gone(pids)
    with pytest.raises(CarveRuntimeError) as caught:  # and again, at once
        model.generate([3])
    assert caught.value.code == "shard"
    model.close()


_HOLDER = """
import signal, sys, time
import carve_runtime
# Where the tests run behind a shell's ``&``, interrupts come ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
model = carve_runtime.load(sys.argv[1], shards=3, threads=1)
print(*model._engine.experts.pids, flush=True)
for _ in model.stream([3], max_new_tokens=500): pass
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_first(split: dict[int, Path], how: int) -> None:
    command = [sys.executable, "-c", _HOLDER, str(split[4])]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        pids = [int(p) for p in process.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        process.send_signal(how)
    wait_until_gone(pids)


def _expert(number: int, **more: Any) -> Callable[[Index], None]:
    return lambda index: index["experts"][number].update(more)


def _tensor(number: int, **more: Any) -> Callable[[Index], None]:
    return lambda index: index["forms"][0]["tensors"][number].update(more)


def _top(**more: Any) -> Callable[[Index], None]:
    return lambda index: index.update(more)


def _layer(**more: Any) -> Callable[[Index], None]:
    return lambda index: index["layers"][1].update(more)


@pytest.mark.parametrize(
    "damage",
    [
        _expert(0, offset=1 << 40),
        _expert(0, offset=-4096),
        _expert(0, offset=100),
        _expert(0, offset=4096),  # where another one lies
        _expert(0, offset=1.0),
        _expert(0, layer=2),
        _expert(0, expert=EXPERTS),
        _expert(0, expert=3),  # there already
        _expert(0, form=1),
        _expert(0, form=-1),
        _expert(0, hotness=float("nan")),
        _expert(0, hotness="hot"),
        lambda index: index["experts"].pop(),
        lambda index: index["experts"].append(index["experts"][0]),
        lambda index: index["forms"][0].update(size=-4096),
        lambda index: index["forms"][0].update(size=0),
        lambda index: index["forms"][0].update(size=4097),
        lambda index: index["forms"][0].update(size=1 << 50),
        lambda index: index["forms"][0].update(model="../onnx/model.onnx"),
        lambda index: index["forms"][0].update(model="/etc/passwd"),
        lambda index: index["forms"][0].update(model="absent.onnx"),
        lambda index: index["forms"][0].update(tensors="all"),
        lambda index: index["forms"].clear(),
        _tensor(0, dtype="object"),
        _tensor(0, dtype="float64"),
        _tensor(0, dtype=None),
        _tensor(0, shape=[-1, 32, 16]),
        _tensor(0, shape=[1 << 24, 1 << 24, 1 << 24]),
        _tensor(0, shape=[1, 32.0, 16]),
        _tensor(0, offset=-64),
        _tensor(1, offset=0),
        _tensor(3, offset=4090),
        _tensor(0, name="down"),  # two of one name
        _tensor(0, name="../up"),  # not the graph's
        _tensor(0, name=["up"]),
        _tensor(0, shape=[1, 16, 32]),  # not the graph's
        _top(schema=2),
        _top(page=1),
        _top(data="../../secret"),
        _top(data="expert0.onnx"),
        _top(segments=["segment0.onnx"]),
        _top(segments=["segment0.onnx"] * 3),
        _top(segments=[["segment0.onnx"]] * 3),
        _top(outputs=["logits"]),
        _top(outputs=["logits", "nothing"]),
        _top(layers=[]),
        _top(layers=[{}] * 5000),
        _top(predictors="absent.bin"),
        _layer(experts=1 << 40),
        _layer(experts=EXPERTS - 1),
        _layer(top_k=EXPERTS + 1),
        _layer(top_k=0),
        _layer(width=1 << 40),
        _layer(width=64),
        _layer(dynamic=1),
        _layer(predictor={"stream": ["h.0"], "offset": 1 << 40}),
        _layer(predictor={"stream": ["h.0"], "offset": 4}),
        _layer(predictor={"stream": [], "offset": 0}),
        _layer(predictor={"stream": ["absent"], "offset": 0}),
        _layer(predictor={"stream": ["h.1"], "offset": 0}),  # made too late
    ],
)
def test_hostile_indexes(damaged: Path, damage: Callable[[Index], object]) -> None:
    path = damaged / "split/index.json"
    index = json.loads(path.read_text())
    damage(index)
    path.write_text(json.dumps(index))
    seal(damaged)
    with pytest.raises(ArtifactError) as caught:
        load(damaged)
    assert caught.value.code in ("model", "unsafe-path")


def test_stream_that_is_none_and_expert_of_another_width(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalExperts, "asks", lambda *_: True)  # all is there
    path = damaged / "split/index.json"
    sound = path.read_text()
    index = json.loads(sound)
    index["layers"][1]["predictor"]["stream"] = ["routes.0"]
    path.write_text(json.dumps(index))
    seal(damaged)
    with load(damaged, memory="1GB") as model, pytest.raises(CarveRuntimeError) as caught:
        model.generate([3])
    assert caught.value.code == "run"
    path.write_text(sound)
    # A segment's graph in an expert's place takes what an expert is not given.
    shutil.copyfile(damaged / "split/segment0.onnx", damaged / "split/expert0.onnx")
    seal(damaged)
    with pytest.raises(CarveRuntimeError) as caught, load(damaged) as model:
        model.generate([3])
    assert caught.value.code in ("model", "run")


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"schema": true}'])
def test_index_that_is_none(damaged: Path, text: str) -> None:
    (damaged / "split/index.json").write_text(text)
    seal(damaged)
    with pytest.raises(ArtifactError) as caught:
        load(damaged)
    assert caught.value.code == "model"


def test_experts_are_hashed(damaged: Path) -> None:
    with (damaged / "split/experts.bin").open("r+b") as file:
        file.write(b"\xff" * 8)
    with pytest.raises(ArtifactError) as caught:
        load(damaged)
    assert caught.value.code == "hash-mismatch"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"memory": "0MB"}, "argument"),
        ({"memory": "much"}, "argument"),
        ({"shards": 0}, "argument"),
        ({"shards": True}, "argument"),
        ({"shards": 5000}, "argument"),
        ({"memory": "1GB", "policy": "random"}, "argument"),
        ({"memory": "1GB", "target": "onnx-cpu"}, "argument"),
    ],
)
def test_bad_requests(split: dict[int, Path], options: dict[str, Any], code: str) -> None:
    with pytest.raises(RequestError) as caught:
        load(split[4], **options)
    assert caught.value.code == code


def test_shell(split: dict[int, Path]) -> None:
    def shell(*more: str) -> str:
        command = [sys.executable, "-m", "carve_runtime", str(split[4]), "--prompt", "the cat"]
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    want = shell("--max-new-tokens", "8")
    assert shell("--max-new-tokens", "8", "--shards", "2") == want
    assert shell("--max-new-tokens", "8", "--memory", "9MB") == want


def test_whole_models_have_no_split(artifacts: dict[str, Path]) -> None:
    with pytest.raises(ArtifactError, match="onnx-split") as caught:
        carve_runtime.load(artifacts["shared"], memory="1GB")
    assert caught.value.code == "target"


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """No test leaves a child behind."""
    yield
    left = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid() and fields[0] != "Z":
                left.append(stat.parent.name)
    assert not left
