"""Write one folder that checks this program on a GPU node without network: wheels of all that is missing beside an installed torch, and the
script that uses them (`gpu-check.sh`). Usage: `make gpu-bundle`.

The wheels are those of the installed versions, for Python 3.12 and for the running Python on x86-64 Linux; DeepSpeed's is built without
compiled operators (`DS_BUILD_OPS=0`). What would make the folder larger than `LIMIT_BYTES` is left out from `OPTIONAL`, and
said: with one Python (`bundle.py FOLDER 3.12`) there is room for all.
pandas, which only tables in files need, is never in it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LIMIT_BYTES = 60 * 2**20
PYTHONS = tuple(dict.fromkeys(("3.12", f"{sys.version_info.major}.{sys.version_info.minor}")))
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
NEVER = {"pandas", "python-dateutil", "tzdata", "six"}
"""pandas and what only it needs."""
BUILT = {"bf16prof", "deepspeed"}
OPTIONAL = ("transformers",)
"""The Hugging Face model of the check needs it."""


def closure(names: Iterable[str]) -> dict[str, str]:
    """The installed distributions that these need, with their versions."""
    seen: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen or name in NEVER:
            continue
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        seen[name] = found.version
        needs = map(Requirement, found.requires or [])
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return seen


def download(name: str, version: str, target: Path, pythons: Sequence[str]) -> None:
    """The wheels of a distribution for every Python."""
    for python in pythons:
        words = ["--no-deps", "--only-binary=:all:", "--python-version", python, *(word for p in PLATFORMS for word in ("--platform", p))]
        pip("download", f"{name}=={version}", *words, "--dest", str(target))


def pip(*words: str, **environment: str) -> None:
    """Run pip quietly."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    subprocess.run(command, check=True, env={**os.environ, **environment})


def size(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Write the folder, and say what is in it."""
    folder = Path(sys.argv[1])
    pythons = tuple(sys.argv[2:]) or PYTHONS
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    base = closure(["torch"])
    needed = {name: version for name, version in closure(BUILT).items() if name not in base}
    pip("wheel", str(ROOT), "--no-deps", "--wheel-dir", str(wheels))
    pip("wheel", f"deepspeed=={needed['deepspeed']}", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), DS_BUILD_OPS="0")
    for name in sorted(needed.keys() - BUILT):
        download(name, needed[name], wheels, pythons)
    for name in ("gpu-check.sh", "README.txt"):
        shutil.copy(Path(__file__).parent / "bundle" / name, folder / name)
    for name in OPTIONAL:
        _add(name, base.keys() | needed.keys(), folder, pythons)
    sys.stdout.write(f"{folder}: {size(folder) / 2**20:.1f} MiB, {len(list(wheels.iterdir()))} wheels for Python {', '.join(pythons)}\n")


def _add(name: str, there: Iterable[str], folder: Path, pythons: Sequence[str]) -> None:
    """An optional distribution with what it needs, unless the folder gets too large."""
    extra = folder / "wheels.new"
    for each, version in closure([name]).items():
        if each not in there:
            download(each, version, extra, pythons)
    if size(folder) > LIMIT_BYTES:
        sys.stdout.write(f"{name} is left out: {size(folder) / 2**20:.1f} MiB with it\n")
    else:
        for wheel in extra.iterdir():
            shutil.move(wheel, folder / "wheels" / wheel.name)
    shutil.rmtree(extra)


if __name__ == "__main__":
    main()
