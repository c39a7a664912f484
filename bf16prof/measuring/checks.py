"""What this machine can do, one line and a hint each, for `bf16prof doctor`.

Nothing fails here: what is missing is reported. torch is asked about GPUs in a process of its own,
so that a broken installation, or a driver that hangs, cannot take the command with it.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from bf16prof.control_groups import memory_limit
from bf16prof.engine.versions import OLDEST, version_tuple
from bf16prof.errors import install_hint
from bf16prof.locks import is_held
from bf16prof.measuring.accelerator import TorchAnswer, ask_torch, run
from bf16prof.measuring.cache import BUILD_LOCK, CACHE_VARIABLE, cache_folder
from bf16prof.measuring.cluster import host_name, network, shared_cache, starters
from bf16prof.measuring.findings import Check, State
from bf16prof.measuring.machine import package_version
from bf16prof.measuring.probes import nvml
from bf16prof.measuring.shared_memory import SHARED_MEMORY
from bf16prof.processes import can_list, whole_memory
from bf16prof.profiles.optimizers import all_optimizers
from bf16prof.profiles.recipes import all_recipes

MINIMUM_PYTHON = (3, 11)
SHM_BYTES = 512 * 2**20
"""Less free shared memory than this is worth a warning: containers start with 64 MiB, DeepSpeed's
CPU ranks take 69 MB each."""

DISK_BYTES = 2 * 2**30
BF16_CAPABILITY = (8, 0)
"""The first compute capability with bf16 tensor cores."""


def checks() -> list[Check]:
    """Everything that bf16prof depends on, most important first. Takes as long as importing torch
    once, in another process."""
    probe = ask_torch()
    gpu = _gpu(probe)
    shm_hint = "in a container: docker run --shm-size=8g (or --ipc=host)"
    disk_hint = "free some space, or write runs elsewhere with --output-dir"
    return [
        _python(),
        _torch(probe),
        _package("deepspeed", "measuring and simulating need it"),
        gpu,
        _nvml(),
        _compiler(),
        _ninja(),
        _nvcc(gpu.status is State.OK),
        _package("tokenizers", "only BPE data (text-bpe, pydoc-bpe) needs it"),
        _package("transformers", "only models given by a Hugging Face config need it", hint=install_hint("hf")),
        _package("megatron-core", "only --engine megatron-core needs it", hint=install_hint("megatron")),
        *_optimizer_libraries(),
        *(
            _asked(name, check)
            for name, check in (
                ("/proc", _proc),
                ("memory", _memory),
                ("shared memory", lambda: _space("shared memory", SHARED_MEMORY, SHM_BYTES, shm_hint)),
                ("disk", lambda: _space("disk", Path.cwd(), DISK_BYTES, disk_hint)),
                ("extension cache", _extension_cache),
                ("host name", host_name),
                ("network", network),
                ("launchers", starters),
            )
        ),
    ]


def _asked(name: str, check: Callable[[], Check]) -> Check:
    """What a check says, and that it cannot say anything where the system does not let it."""
    try:
        return check()
    except OSError as error:
        return Check(name, State.WARNING, f"cannot tell: {error.filename or 'the system'}: {error.strerror}")


def _proc() -> Check:
    if can_list():
        return Check("/proc", State.OK, "mounted")
    return Check("/proc", State.MISSING, "not mounted; measuring and simulating need it", "mount -t proc proc /proc")


def verdict(found: Sequence[Check]) -> str:
    """The conclusion in one line: whether measuring is possible here, and on what."""
    status = {check.name: check.status for check in found}
    absent = [name for name in ("torch", "deepspeed") if status[name] is State.MISSING]
    if absent:
        return f"Measuring and simulating are not possible here ({' and '.join(absent)} missing); estimate, plan and report work."
    if State.WARNING in (status["torch"], status["deepspeed"]):
        return "Measuring may not work here: see torch and deepspeed above."
    if status["GPU"] is State.OK:
        return "Measuring works here, on GPU and on CPU."
    return "Measuring works here on CPU (gloo ranks); there is no usable GPU."


def _python() -> Check:
    old = sys.version_info[:2] < MINIMUM_PYTHON
    return Check("Python", State.WARNING if old else State.OK, platform.python_version(), "bf16prof needs 3.11 or later" if old else "")


def _package(name: str, purpose: str, hint: str = install_hint("train")) -> Check:
    version, oldest = package_version(name), OLDEST.get(name, "")
    if version is None:
        return Check(name, State.MISSING, f"not installed; {purpose}", hint)
    if version_tuple(version) < version_tuple(oldest):
        return Check(name, State.WARNING, f"{version} is older than {oldest}, the first supported", f"pip install '{name}>={oldest}'")
    return Check(name, State.OK, version)


def _optimizer_libraries() -> list[Check]:
    needed = [(recipe.id, all_optimizers()[recipe.optimizer].distribution) for recipe in all_recipes().values() if recipe.optimizer]
    return [_package(name, f"only {recipe} needs it", hint=install_hint("recipes")) for recipe, name in needed]


def _torch(probe: TorchAnswer | str) -> Check:
    check = _package("torch", "measuring and simulating need it")
    if check.status is not State.OK:
        return check
    if isinstance(probe, str):
        return Check("torch", State.WARNING, f"{check.detail} is installed but does not work: {probe}", 'try: python -c "import torch"')
    build = f"CUDA {probe.cuda}" if probe.cuda else "CPU only"
    return Check("torch", State.OK, f"{check.detail} ({build})")


def _gpu(probe: TorchAnswer | str) -> Check:
    gpus = () if isinstance(probe, str) else probe.gpus
    if gpus:
        detail = ", ".join(f"{gpu.name} ({_gib(gpu.total_bytes)})" for gpu in gpus)
        if min(gpu.compute_capability for gpu in gpus) < BF16_CAPABILITY:
            return Check("GPU", State.WARNING, detail, "compute capability below 8.0: no bf16 tensor cores, bf16 will be slow")
        return Check("GPU", State.OK, detail)
    seen = ", ".join(gpu.name for gpu in nvml.list_gpus())
    if seen:
        return Check(
            "GPU", State.WARNING, f"the driver sees {seen}, torch does not", "install a CUDA build of torch; see CUDA_VISIBLE_DEVICES"
        )
    return Check("GPU", State.MISSING, "none: measuring runs on CPU", "estimate, simulate and plan predict any GPU without one")


def _nvml() -> Check:
    reason = nvml.available()
    if reason is not None:
        return Check("NVML", State.MISSING, reason, "without it device memory, utilisation and power stay unknown")
    return Check("NVML", State.OK, f"driver {nvml.driver_version()}")


def _compiler() -> Check:
    """The C++ compiler that torch's extensions use: $CXX, else `c++` (torch/utils/cpp_extension.py,
    `get_cxx_compiler`)."""
    chosen = (shlex.split(os.environ.get("CXX", "")) or ["c++"])[0]
    path = shutil.which(chosen)
    if path is not None:
        return Check("C++ compiler", State.OK, _first_line([path, "--version"]) or path)
    other = shutil.which("g++") or shutil.which("clang++")
    hint = f"export CXX={shlex.quote(other)}" if other else "apt-get install g++"
    return Check("C++ compiler", State.MISSING, f"{chosen!r} not found; DeepSpeed compiles its CPU optimizer and other ops", hint)


def _ninja() -> Check:
    """DeepSpeed compiles through the command `ninja`; one that is only in an inactive virtual
    environment is not found by it."""
    if path := shutil.which("ninja"):
        return Check("ninja", State.OK, f"{_first_line([path, '--version']) or 'version unknown'} ({path})")
    scripts = sysconfig.get_path("scripts")
    if shutil.which("ninja", path=scripts):
        return Check("ninja", State.WARNING, f"in {scripts}, which is not on PATH", f"export PATH={shlex.quote(scripts)}:$PATH")
    return Check("ninja", State.MISSING, "not found; DeepSpeed compiles its ops with it", "pip install ninja")


def _nvcc(gpu: bool) -> Check:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    path = shutil.which("nvcc", path=os.pathsep.join(folders)) or shutil.which("nvcc")
    if path is not None:
        return Check("nvcc", State.OK, path)
    if not gpu:
        return Check("nvcc", State.MISSING, "not needed without a GPU")
    return Check(
        "nvcc", State.MISSING, "DeepSpeed cannot compile FusedAdam for the GPU", "install the CUDA toolkit of torch's CUDA version"
    )


def _memory() -> Check:
    limit = memory_limit()
    allowed = f", of which this container may use {_gib(limit)}" if limit is not None else ""
    return Check("memory", State.OK, f"{_gib(whole_memory())}{allowed}")


def _space(name: str, folder: Path, wanted: int, hint: str) -> Check:
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Check(name, State.MISSING, f"{folder}: {error.strerror}")
    detail = f"{folder}: {_gib(usage.free)} free of {_gib(usage.total)}"
    return Check(name, State.OK, detail) if usage.free >= wanted else Check(name, State.WARNING, detail, hint)


def _extension_cache() -> Check:
    """Where compiled ops are kept, and whether somebody is compiling into it."""
    name, folder = "extension cache", cache_folder()
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if os.path.exists(parent))  # noqa: PTH110 - raises nothing
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check(name, State.WARNING, f"{folder} cannot be written", "set TORCH_EXTENSIONS_DIR to a folder that can")
    if is_held(folder / BUILD_LOCK):
        return Check(name, State.WARNING, f"a build is going on in {folder}", "measure waits for its end")
    where, warning = shared_cache(existing)
    if warning:
        return Check(name, State.WARNING, f"{folder}: {warning}", f"set {CACHE_VARIABLE} to a folder on each host's own disk")
    return Check(name, State.OK, f"{folder}{where}")


def _first_line(command: list[str]) -> str:
    try:
        return (run(command, 10.0).stdout.splitlines() or [""])[0]
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
