"""Write one folder that checks this program on a GPU node without network: wheels of all that is
missing beside an installed torch, and the script that uses them (`gpu-check.sh`). Usage: `make
gpu-bundle`.

The wheels are those of the installed versions, for Python 3.12 and for the running Python on x86-64
Linux; DeepSpeed's is built without compiled operators (`DS_BUILD_OPS=0`). They are stored
uncompressed in one xz archive: most of two wheels of numpy is the same library, which is packed
once. pandas, which only tables in files need, is not in it.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
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
NEEDED = (*BUILT, "transformers")
"""transformers is for the Hugging Face model of the check."""
DICTIONARY = 1 << 27
"""Bytes that xz looks back over: more than numpy's wheels together, uncompressed."""


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


def pack(wheels: Path, target: Path) -> None:
    """All wheels, stored, as one archive; those that are alike stand side by side."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": DICTIONARY}]
    with (
        tempfile.TemporaryDirectory() as folder,
        lzma.open(target, "wb", filters=filters) as packed_file,
        tarfile.open(fileobj=packed_file, mode="w") as archive,
    ):
        for wheel in sorted(wheels.iterdir()):
            stored = Path(folder) / wheel.name
            with zipfile.ZipFile(wheel) as packed, zipfile.ZipFile(stored, "w", zipfile.ZIP_STORED) as plain:
                for info in packed.infolist():
                    plain.writestr(info, packed.read(info), zipfile.ZIP_STORED)
            archive.add(stored, f"wheels/{wheel.name}")
            stored.unlink()


def main() -> None:
    """Write the folder, and say what is in it."""
    folder = Path(sys.argv[1])
    pythons = tuple(sys.argv[2:]) or PYTHONS
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = closure(["torch"])
    needed = {name: version for name, version in closure(NEEDED).items() if name not in base}
    with tempfile.TemporaryDirectory() as made:
        wheels = Path(made)
        pip("wheel", str(ROOT), "--no-deps", "--wheel-dir", str(wheels))
        pip("wheel", f"deepspeed=={needed['deepspeed']}", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), DS_BUILD_OPS="0")
        for name in sorted(needed.keys() - BUILT):
            download(name, needed[name], wheels, pythons)
        count = len(list(wheels.iterdir()))
        pack(wheels, folder / "wheels.tar.xz")
    for name in ("gpu-check.sh", "README.txt"):
        shutil.copy(Path(__file__).parent / "bundle" / name, folder / name)
    bytes_ = size(folder)
    sys.stdout.write(f"{folder}: {bytes_ / 2**20:.1f} MiB, {count} wheels for Python {', '.join(pythons)}\n")
    if bytes_ > LIMIT_BYTES:
        sys.exit(f"more than {LIMIT_BYTES / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
