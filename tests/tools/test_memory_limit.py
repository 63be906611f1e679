"""The limit of tools/memory_limit.py is one, whichever kind this machine has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
_TOUCH = """
import sys
sys.path.insert(0, sys.argv[1])
from memory_limit import limit_data, open_group
if sys.argv[2]:
    found = open_group(sys.argv[2])
    found.limit(int(sys.argv[4]))
    found.enter()
else:
    limit_data(int(sys.argv[4]))
print(len(bytearray(int(sys.argv[3]))), flush=True)
"""


@pytest.mark.parametrize("grouped", [True, False])
def test_no_more_than_the_limit(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    from memory_limit import group

    with group("carve-test") as found:
        folder = str(found.folder) if grouped and found is not None else ""

        def touch(size: int, limit: int) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", _TOUCH, str(TOOLS), folder, str(size), str(limit)]
            return subprocess.run(command, capture_output=True, text=True, check=False)

        fits, beyond = touch(16_000_000, 64_000_000), touch(256_000_000, 64_000_000)
        raised = touch(100_000_000, 160_000_000)
    assert (fits.returncode, fits.stdout) == (0, "16000000\n"), fits.stderr
    assert beyond.returncode != 0 and not beyond.stdout
    assert (raised.returncode, raised.stdout) == (0, "100000000\n"), raised.stderr
    assert not (folder and Path(folder).exists())
