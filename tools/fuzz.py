"""Fuzz whatever reads files of others, with atheris: ``pip install -e '.[fuzz]'``.

    python tools/fuzz.py --minutes 60 --work /tmp/fuzz            # all targets
    python tools/fuzz.py --minutes 5 --work /tmp/fuzz split json  # some of them

Valid files are damaged as the fuzzer's bytes say (``fuzz_mutate.py``), so that most of what is
read is sound. A finding is an exception other than the package's own, a run of more than 60
seconds, more than 4 GB of memory, a crash of the process, or a file that is opened outside the
folder: Python's opens are watched, and a bait beside the folder shows by its access time whether
anything read it.
Inputs that found something are kept in ``work``; ``--input FILE`` runs one again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
RUNTIME = ("manifest", "index", "placement", "tokenizer", "json", "decoder", "encoder", "split")
CARVE = (
    *("devices", "recipe", "trace", "sizes", "report", "state", "checkpoint", "shards", "config"),
)
_LONGEST = 60
_OWN = tuple(
    str(Path(p).resolve()) + "/"
    for p in (*sys.path, sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), HOME, "/proc")
    if p
)


class Watch:
    """Notes every file that Python opens outside of a folder while it is on."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder.resolve()) + "/"
        self.bait = folder / "bait"
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[object, ...]) -> None:
        if not self.on or event != "open" or not isinstance(args[0], str | bytes):
            return
        path = os.path.realpath(os.fsdecode(args[0]))
        if not path.startswith((self.folder, *_OWN)):
            self.seen.append(path)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Fail when the block opened anything elsewhere, or read the bait."""
        self.seen.clear()
        self.on = True
        try:
            yield
        finally:
            self.on = False
        if self.bait.exists() and not self.bait.is_symlink():
            read = self.bait.stat().st_atime != 0
            self.bait.unlink()
            assert not read, "the bait outside the folder was read"
        assert not self.seen, f"opened outside the folder: {self.seen[:3]}"


def make_seeds(folder: Path) -> Path:
    """Valid files, made once for each work folder."""
    for part in ("tests", "tests/runtime"):
        sys.path.append(str(HOME / part))
    if not (folder / "done").exists():
        import fuzz_carve
        import fuzz_runtime

        shutil.rmtree(folder, ignore_errors=True)  # what was begun and not done
        folder.mkdir(parents=True)
        fuzz_runtime.seeds(folder)
        fuzz_carve.seeds(folder)
        (folder / "done").touch()
    return folder


def fuzz(name: str, work: Path, options: list[str]) -> None:
    """Run one target in this process; does not return."""
    import atheris

    seeds = make_seeds(work / "seeds")
    with atheris.instrument_imports(include=["carve", "carve_runtime", "fuzz_mutate"]):
        if name in RUNTIME:
            from fuzz_runtime import targets
        else:
            from fuzz_carve import targets
    with tempfile.TemporaryDirectory(dir=work) as folder:
        box = Path(folder)
        tempfile.tempdir = folder  # where libraries may write what they please
        target = targets(seeds, box)[name]()
        watch = Watch(box)

        def one(data: bytes) -> None:
            with watch.watching():
                target(data)

        atheris.Setup([sys.argv[0], *options], one)
        atheris.Fuzz()


def run(name: str, work: Path, seconds: float) -> tuple[int, list[str]]:
    """Run one target in processes of its own until the time is up: runs, and what was found."""
    corpus, log = work / "corpus" / name, work / f"{name}.log"
    corpus.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    total, found = 0, list[str]()
    while (left := int(end - time.monotonic())) > 0 and len(found) < 20:
        options = [
            str(corpus),
            f"-max_total_time={left}",
            f"-timeout={_LONGEST}",
            "-rss_limit_mb=4096",
            "-max_len=256",
            "-print_final_stats=1",
            f"-artifact_prefix={work}/{name}-",
        ]
        command = [sys.executable, __file__, "--work", str(work), "--target", name, "--", *options]
        done = subprocess.run(command, capture_output=True, check=False)
        text = (done.stdout + done.stderr).decode("utf-8", "replace")
        with log.open("a", encoding="utf-8") as file:
            file.write(text)
        counts = re.findall(r"number_of_executed_units: (\d+)", text) or re.findall(
            r"^#(\d+)", text, re.MULTILINE
        )
        total += int(counts[-1]) if counts else 0
        if done.returncode:
            kept = re.findall(r"Test unit written to (\S+)", text)
            what = re.findall(
                r"^(?:.*ERROR: .*|\w[\w.]*(?:Error|Exception|Interrupt)\b.*)$", text, re.M
            )
            found.append(f"{(what or ['?'])[0][:200]} ({(kept or ['no input kept'])[-1]})")
            if not kept:
                time.sleep(1)
    return total, found


def main() -> int:
    """Run targets in turn and print a table; returns 1 where anything was found."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("targets", nargs="*", help=f"of {', '.join((*RUNTIME, *CARVE))} (default: all)")
    p.add_argument("--minutes", type=float, default=5.0, help="over all targets together")
    p.add_argument("--work", type=Path, required=True, help="seeds, corpora and findings")
    p.add_argument("--target", help=argparse.SUPPRESS)
    p.add_argument("--input", type=Path, help="one kept input, for the one target that is named")
    args = p.parse_args()
    work = args.work.resolve()
    if args.target:
        fuzz(args.target, work, args.targets)
    if args.input:
        fuzz(args.targets[0], work, [str(args.input)])
    for name in args.targets:
        if name not in (*RUNTIME, *CARVE):
            p.error(f"unknown target {name}")
    make_seeds(work / "seeds")
    names = args.targets or [*RUNTIME, *CARVE]
    bad = 0
    for name in names:
        runs, found = run(name, work, 60 * args.minutes / len(names))
        print(f"{name:12} {runs:>9} runs  {len(found)} findings", flush=True)
        for what in found:
            print(f"  {what}", flush=True)
        bad += len(found)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
