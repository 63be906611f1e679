"""Build the native runner, ``carve/native/``, for a machine, with the libraries that it needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from carve.emit.tvm.names import FFI, PACKAGES, TVM, compiler
from carve.errors import CarveError, UserError
from carve.files import cache_folder

RUNNER = "carve-run"
LIBRARIES = ("libtvm_runtime.so", "libtvm_ffi.so")
SOURCE = Path(__file__).parent / "native"
_INCLUDE = "tvm_ffi/include/"
_MOST = 64 << 20
_VERSIONS = {
    "glibc": re.compile(rb"(?<=\0)GLIBC_([\d.]+)(?=\0)"),
    "libstdc++": re.compile(rb"(?<=\0)GLIBCXX_([\d.]+)(?=\0)"),
}


@dataclass(frozen=True)
class TvmFiles:
    """TVM's runtime libraries for a machine, and the headers of its interface."""

    libraries: tuple[Path, ...]
    include: Path


def tvm_files(machine: str, wheels: Path | None, scratch: Path) -> TvmFiles:
    """Where TVM's runtime for a machine is.

    Args:
        machine: the architecture.
        wheels: a folder with the wheels of apache-tvm and apache-tvm-ffi. Where it is not given,
            what is installed here is taken if it is for the machine, else wheels are fetched with
            pip and kept in carve's cache.
        scratch: a folder for what is unpacked.

    Raises:
        UserError: there are no such wheels, or pip cannot fetch them.
    """
    from carve_runtime import processor

    if wheels is None and machine == processor.machine() and (own := _installed()) is not None:
        return own
    folder = wheels or _fetched(machine)
    found = [_wheel(folder, p.replace("-", "_"), version, machine) for p, _, version in PACKAGES]
    missing = [name for name, wheel in zip(_names(), found, strict=True) if wheel is None]
    if missing:
        raise UserError(
            "wheels",
            f"{folder} holds no wheel of {missing[0]} for {machine}",
            f"pip download --no-deps --only-binary=:all: --platform {_platform(machine)} "
            + " ".join(_names()),
        )
    for wheel in found:
        assert wheel is not None
        _unpack(wheel, scratch)
    parts = (scratch / "tvm/lib", scratch / "tvm_ffi/lib")
    libraries = tuple(p / n for p, n in zip(parts, LIBRARIES, strict=True))
    return TvmFiles(_there(libraries, folder), scratch / _INCLUDE)


def _names() -> list[str]:
    return [f"{package}=={version}" for package, _, version in PACKAGES]


def _platform(machine: str) -> str:
    return f"manylinux_2_28_{machine}"


def _installed() -> TvmFiles | None:
    """What is installed here, where it is of the right version."""
    found = []
    for package, module, version in PACKAGES:
        spec = importlib.util.find_spec(module)  # importing it would load the compiler
        if spec is None or spec.origin is None or importlib.metadata.version(package) != version:
            return None
        found.append(Path(spec.origin).parent)
    libraries = tuple(f / "lib" / n for f, n in zip(found, LIBRARIES, strict=True))
    return TvmFiles(_there(libraries, found[0]), found[1] / "include")


def _there(libraries: tuple[Path, ...], origin: Path) -> tuple[Path, ...]:
    for library in libraries:
        if not library.is_file():
            raise UserError("wheels", f"{origin} has no {library.name}", "install TVM's own wheels")
    return libraries


def _wheel(folder: Path, name: str, version: str, machine: str) -> Path | None:
    if not folder.is_dir():
        raise UserError("not-found", f"{folder}: no such directory")
    fitting = sorted(folder.glob(f"{name}-{version}-*{machine}.whl"))
    return fitting[0] if fitting else None


def _fetched(machine: str) -> Path:
    """The folder of the cache with a machine's wheels, which pip checks against their index."""
    folder = cache_folder() / "wheels" / f"{machine}-{TVM}-{FFI}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        platforms = [f"manylinux_2_{n}_{machine}" for n in (28, 27, 24, 17)]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += [f"--platform={p}" for p in platforms]
        command += ["--dest", f"{part}/wheels", *_names()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(
                "wheels",
                f"pip cannot fetch TVM's runtime for {machine}: {said[:300]}",
                "fetch the wheels elsewhere and give their folder: --wheels FOLDER",
            )
        Path(part, "wheels").rename(folder)
    return folder


def _unpack(wheel: Path, scratch: Path) -> None:
    """The runtime's libraries and headers of a wheel, and nothing else."""
    from carve_runtime.manifest import check_relative_path

    wanted = tuple(f"{p}/lib/{n}" for p, n in zip(("tvm", "tvm_ffi"), LIBRARIES, strict=True))
    try:
        with zipfile.ZipFile(wheel) as archive:
            for item in archive.infolist():
                name = item.filename
                if item.is_dir() or not (name in wanted or name.startswith(_INCLUDE)):
                    continue
                if item.file_size > _MOST:
                    raise UserError("wheels", f"{wheel}: {name:.100} is larger than a library is")
                target = scratch / check_relative_path(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(item) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, OSError) as e:
        raise UserError("wheels", f"{wheel} cannot be unpacked: {e}") from e


def build(machine: str, tvm: TvmFiles, folder: Path) -> None:
    """Compile the runner into ``folder``, and put beside it the libraries that it is linked to.

    What it needs of the device beside is what `system_libraries` tells.

    Raises:
        UserError: there is no C++ compiler for the machine.
        CarveError: it does not compile the runner.
    """
    found = compiler(machine, "g++")
    home = folder / "lib"
    copy_libraries(tvm, home)
    command = [found, "-std=c++17", "-O1", "-s", "-pthread", "-isystem", str(tvm.include)]
    command += [str(SOURCE / "carve_run.cpp"), "-o", str(folder / RUNNER), f"-L{home}"]
    command += ["-Wl,--no-as-needed", *(f"-l:{name}" for name in LIBRARIES)]
    # The older kind of path holds for what libraries need, too.
    command += [f"-Wl,-rpath-link,{home}", "-Wl,--disable-new-dtags", "-Wl,-rpath,$ORIGIN/lib"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
        raise CarveError("compile", f"{found} cannot compile the runner: {said[0][:400]}")


def copy_libraries(tvm: TvmFiles, home: Path) -> None:
    """Copy TVM's runtime."""
    home.mkdir(exist_ok=True)
    for library in tvm.libraries:
        shutil.copyfile(library, home / library.name)


def system_libraries(files: Iterable[Path]) -> dict[str, str]:
    """The oldest versions of glibc and libstdc++ that have all that ELF files ask of them."""
    needed = {}
    texts = [f.read_bytes() for f in files]
    for name, pattern in _VERSIONS.items():
        found = [m[1].decode() for text in texts for m in pattern.finditer(text)]
        if found:
            needed[name] = max(found, key=lambda v: [int(n) for n in v.split(".")])
    return needed
