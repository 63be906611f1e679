"""Schedules of TVM's kernels: timed once, kept in a file that is not believed blindly."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from carve.emit.tvm import schedules
from carve.emit.tvm.cpu import CPUS, Cpu
from carve.emit.tvm.kernels import LinearSpec, Schedule
from carve.emit.tvm.kernels.schedule import default

HOST = Cpu.named("host")


def test_small_kernels_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(schedules, "_time", None)
    file = tmp_path / "cache.json"
    assert not schedules.choose(LinearSpec(64, 64), HOST, file).parallel
    assert schedules.choose(LinearSpec(512, 512), HOST, file) == default(HOST)
    large = LinearSpec(4096, 4096)
    other = next(c for c in CPUS if c.triple != HOST.triple)
    assert schedules.choose(large, other, file) == default(other)
    assert not file.exists()


def test_schedules_are_timed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(schedules, "_SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = LinearSpec(256, 256)
    first = schedules.choose(spec, HOST)
    assert first in [
        replace(a, tile=b.tile)
        for a in schedules._grid(default(HOST))
        for b in schedules._grid(default(HOST))
    ]
    file = tmp_path / "carve" / "tvm-schedules.json"
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    monkeypatch.setattr(schedules, "_time", None)
    assert schedules.choose(spec, HOST) == first
    # Another kernel, other code: timed again.
    timed: list[Any] = []
    monkeypatch.setattr(schedules, "_time", lambda *a: timed.append(a) or a[2])
    schedules.choose(LinearSpec(256, 288), HOST)
    assert len(timed) == 1
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"a": 1}', '{"KEY": {"tile": 4}}', "[" * 100_000, '{"KEY": NaN}'],
)
def test_a_damaged_cache_is_not_believed(
    content: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(schedules, "_SMALL", 0)
    monkeypatch.setattr(schedules, "_time", lambda spec, cpu, first: first)
    spec, file = LinearSpec(64, 64), tmp_path / "cache.json"
    file.write_text(content.replace("KEY", schedules._key(spec, HOST)))
    with caplog.at_level(logging.WARNING):
        schedule = schedules.choose(spec, HOST, file)
    assert caplog.records
    assert schedules._read(file) == {schedules._key(spec, HOST): schedule}


@pytest.mark.parametrize(
    "change", [{"tile": 10**9}, {"tile": True}, {"ahead": 3}, {"parallel": 1}, {"more": 1}]
)
def test_schedules_out_of_range_are_left_out(change: dict[str, object]) -> None:
    entry = {"unroll": 2, "tile": 4, "streams": 4, "ahead": 2048, "parallel": True}
    assert schedules._schedule(entry) == Schedule()
    assert schedules._schedule(entry | change) is None
