"""States of a conversion: after every pass, and within those that take long."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from carve import snapshot
from carve.errors import CarveError, UserError
from carve.fingerprint import Parts, difference
from carve.passbase import Context, ContractError, Partial, PassResult
from carve.program import Program
from carve.state_folder import Course
from carve.store import StateError, Store, Stored, parse_stored, read_index, write_index
from carve.typed import fits

log = logging.getLogger(__name__)


class PassStates:
    """States on disk; a `carve.passbase.Keeper`.

    ``NN-PASS.json`` says what belongs to the state after a pass: the fingerprints of the input and
    of all passes so far, and the files of ``objects/`` by part. ``NN-PASS.part.json`` is the same
    for a pass that is not finished. Both have the hash of their own content, the files of
    ``objects/`` are named by theirs.

    Args:
        folder: where they are.
        input_parts: see `carve.fingerprint.of_input`.
        passes: see `carve.fingerprint.of_pass`, in order.
        course: where the run starts and stops.
        before: a pass; what the program was before it is wanted as well, as ``earlier``, where a
            state is restored that comes after.
    """

    def __init__(
        self,
        folder: Path,
        input_parts: Parts,
        passes: Sequence[Parts],
        course: Course,
        before: str | None = None,
    ) -> None:
        self.folder, self.course = folder, course
        self.names = [p["the pass"] for p in passes]
        # As it comes back from JSON, so that comparing is between equals.
        self._input, self._passes = json.loads(json.dumps([input_parts, [*passes]]))
        self.store = Store(folder / "objects")
        self.resumed_seconds = 0.0
        self.earlier: Program | None = None
        self._before = len(passes) if before is None else self.names.index(before)

    def restore(self, program: Program, context: Context) -> list[PassResult]:
        """Bring a dense program to the state that the course starts from.

        Raises:
            UserError: the course starts from a state that cannot be used.
        """
        if self.course.start is not None:
            return self._restore_before(self.course.start, program, context)
        if not self.course.resume:
            return []
        for index in reversed(range(len(self.names))):
            if not self._index(index).is_file():
                continue
            try:
                done = self._load(index, program, context)
            except StateError as e:
                log.warning("%s and what follows it is redone: %s", self.names[index], e.message)
                continue
            log.info("going on after %s", self.names[index])
            return done
        log.info("no pass is finished: starting from the beginning")
        return []

    def _restore_before(self, name: str, program: Program, context: Context) -> list[PassResult]:
        first = self.names.index(name)
        try:
            done = self._load(first - 1, program, context) if first else []
        except StateError as e:
            raise UserError(
                "state",
                f"the state after {self.names[first - 1]} cannot be used: {e.message}",
                "--resume redoes what has to be redone",
            ) from e
        for index in range(first, len(self.names)):
            for path in (self._index(index), self._part(index)):
                path.unlink(missing_ok=True)
        log.info("starting again at %s", name)
        return done

    def _load(self, index: int, program: Program, context: Context) -> list[PassResult]:
        earlier = None
        if index >= self._before:
            earlier = program.copy()
            apart = replace(context, splits={}, skips={}, widths={})
            if self._before:
                self._load_one(self._before - 1, earlier, apart)
        records = self._load_one(index, program, context)
        self.resumed_seconds = sum(r.seconds for r in records)
        self.earlier = earlier
        return records

    def _load_one(self, index: int, program: Program, context: Context) -> list[PassResult]:
        body = self._read(self._index(index), index)
        parts = body.get("parts")
        if not isinstance(parts, dict):
            raise StateError(f"{self._index(index).name} is malformed")
        places = {str(k): parse_stored(v) for k, v in parts.items()}
        for stored in places.values():
            self.store.check(stored)
        records = self.store.get(places.pop("records", Stored("", ())))
        names = [r.name for r in records] if fits(records, list[PassResult]) else None
        if names != self.names[: index + 1]:
            raise StateError("it holds the records of other passes")
        snapshot.put_back(program, context, self.store, places)
        return list(records)

    def _read(self, path: Path, index: int) -> dict[str, Any]:
        """An index whose fingerprints are those of pass ``index`` and all before."""
        body = read_index(path)
        reason = difference(self._input, body.get("input"))
        then = body.get("passes")
        if not isinstance(then, list) or len(then) != index + 1:
            raise StateError("other passes came before")
        for now, former in zip(self._passes, then, strict=False):
            reason = reason or difference(now, former)
        if reason:
            raise StateError(reason)
        return body

    def partial(self, index: int) -> Partial:
        """Where pass ``index`` keeps what it has finished."""
        return _StoredPartial(self, index)

    def save(self, program: Program, context: Context, done: Sequence[PassResult]) -> None:
        """Write the state after the last pass of ``done``."""
        index = len(done) - 1
        parts = snapshot.take(program, context, self.store)
        parts["records"], _ = self.store.put(list(done))
        self._write(self._index(index), index, parts)
        self._part(index).unlink(missing_ok=True)
        self._sweep()

    def failed(self, index: int, error: CarveError) -> None:
        """Forget what a pass had finished where it broke its contract: the fault may be in it."""
        if isinstance(error, ContractError):
            self._part(index).unlink(missing_ok=True)

    def _write(self, path: Path, index: int, parts: dict[str, Stored]) -> None:
        places = {k: [s.file, *s.needs] for k, s in parts.items()}
        body = {"input": self._input, "passes": self._passes[: index + 1], "parts": places}
        write_index(path, body)

    def _sweep(self) -> None:
        """Remove files that no index names."""
        needed: set[str] = set()
        for path in self.folder.glob("*.json"):
            try:
                parts = read_index(path).get("parts", {})
                needed.update(n for v in parts.values() for n in parse_stored(v).needs)
            except (StateError, AttributeError):
                path.unlink()
        self.store.drop_others(needed)

    def _index(self, index: int) -> Path:
        return self.folder / f"{index:02d}-{self.names[index]}.json"

    def _part(self, index: int) -> Path:
        return self._index(index).with_suffix(".part.json")


class _StoredPartial(Partial):
    """What one pass has finished, on disk."""

    def __init__(self, states: PassStates, index: int) -> None:
        self._states, self._index = states, index
        self._path = states._part(index)
        self._parts: dict[str, Stored] = {}
        if not self._path.is_file():
            return
        name = states.names[index]
        try:
            parts = states._read(self._path, index).get("parts")
            found = {str(k): parse_stored(v) for k, v in dict(parts or {}).items()}
            for stored in found.values():
                states.store.check(stored)
        except (StateError, TypeError, ValueError) as e:
            log.warning("what %s had finished is redone: %s", name, e)
            return
        self._parts = found
        if found:
            log.info("%s goes on: %d parts of it are done", name, len(found))

    def once(self, key: str, make: Callable[..., Any], *given: Any) -> Any:
        if key in self._parts:
            return self.get(key)
        return self._put(key, make(*given))

    def get(self, key: str) -> Any:
        stored = self._parts.get(key)
        return None if stored is None else self._states.store.get(stored)

    def put(self, key: str, value: Any) -> None:
        self._put(key, value)

    def _put(self, key: str, value: Any) -> Any:
        former = self._parts.get(key)
        self._parts[key], kept = self._states.store.put(value)
        self._states._write(self._path, self._index, self._parts)
        if former is not None:
            self._states._sweep()
        return kept


def size_of(folder: Path) -> int:
    """Bytes of a state."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
