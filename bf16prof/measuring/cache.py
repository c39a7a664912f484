"""Where compiled extensions are kept: a folder for each set of things that decide the binary, and
what is whole in it.

Two environments that share a home share none of these folders, unless they are the same in all of
that.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from bf16prof.files import LARGEST_SETTINGS, read_up_to
from bf16prof.measuring.machine import package_version
from bf16prof.measuring.probes import nvml
from bf16prof.measuring.probes.cpu import SOURCE

CACHE_VARIABLE = "TORCH_EXTENSIONS_DIR"
BUILD_LOCK = "build.lock"

BUILD_VARIABLES = (
    "CXX", "CC", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH",
    "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "PYTORCH_NVCC", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS",
)  # fmt: skip
"""What torch's and DeepSpeed's builders (cpp_extension.py, op_builder/builder.py), the compiler and
nvcc read."""

DEEPSPEED_SOURCES = ("ops/op_builder", "ops/csrc")
"""Where an installed DeepSpeed has what its operators are compiled from, by which flags."""


def cache_folder() -> Path:
    """The folder of this environment, in `TORCH_EXTENSIONS_DIR` or in a folder of our own."""
    root = Path(os.environ.get(CACHE_VARIABLE) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bf16prof")
    versions = f"torch{package_version('torch')}-deepspeed{package_version('deepspeed')}-py{sys.version_info[0]}{sys.version_info[1]}"
    name = f"{versions}-{key()}"
    return root if root.name == name else root / name


def key() -> str:
    """A digest of all that decides the binaries: interpreter, torch, DeepSpeed and our source, each
    by place and content, compiler, variables, processor (DeepSpeed compiles for the one at hand)
    and GPUs."""
    digest = hashlib.sha256()
    for fact in _facts():
        digest.update(fact.encode(errors="backslashreplace") + b"\0")
    return digest.hexdigest()[:12]


def _facts() -> Iterator[str]:
    yield f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')} {platform.machine()} {sys.prefix}"
    torch, deepspeed = _package("torch"), _package("deepspeed")
    yield from (_content(torch / "version.py"), _stamp(SOURCE), _stamp(_compiler()))
    yield f"{torch} {deepspeed}"
    for folder in DEEPSPEED_SOURCES:
        yield from sorted(map(_stamp, (deepspeed / folder).rglob("*.*")))
    yield from (f"{name}={os.environ.get(name, '')}" for name in BUILD_VARIABLES)
    yield _processor()
    yield from (gpu.name for gpu in nvml.list_gpus())


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported; a folder that there is not, where
    it is not installed."""
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations)))
    return Path("/nonexistent") / name


def _compiler() -> Path:
    """The C++ compiler that torch's extensions use: $CXX, else `c++` (torch/utils/cpp_extension.py,
    `get_cxx_compiler`)."""
    chosen = (shlex.split(os.environ.get("CXX", "")) or ["c++"])[0]
    return Path(os.path.realpath(shutil.which(chosen) or chosen))


def _stamp(path: Path) -> str:
    """A file by its place, size and time, which is what ninja goes by."""
    try:
        status = path.stat()
    except OSError:
        return str(path)
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _content(path: Path) -> str:
    return read_up_to(LARGEST_SETTINGS, path).decode(errors="replace") if path.is_file() else ""


def _processor(file: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor can do, by which `-march=native` chooses instructions."""
    lines = read_up_to(LARGEST_SETTINGS, file).decode(errors="replace").splitlines() if file.is_file() else []
    first = (next((line for line in lines if line.startswith(name)), "") for name in ("vendor_id", "flags", "Features"))
    return " ".join(first) or platform.processor()


def is_compiled(folder: Path, part: str) -> bool:
    """Whether a part was compiled to its end, and is still there."""
    try:
        extension = _marker(folder, part).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return False
    return not extension or library(folder, extension).is_file()


def mark_compiled(folder: Path, part: str, extension: str) -> None:
    """Note that a part is compiled, as that extension; as none if there is no library of it
    here."""
    _marker(folder, part).write_text(extension if library(folder, extension).is_file() else "", encoding="utf-8")


def library(folder: Path, extension: str) -> Path:
    """The shared library of an extension (torch/utils/cpp_extension.py)."""
    return folder / extension / f"{extension}.so"


def _marker(folder: Path, part: str) -> Path:
    return folder / f"{part}.compiled"
