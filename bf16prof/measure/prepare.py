"""Compile what the ranks will need before they start: the counting allocator and DeepSpeed's own operators, once, then cached.

Ranks that compile on their own wait for each other on lock files that a killed build leaves behind for ever. Here one process compiles,
under a file lock that the system releases when its holder dies, in a cache folder of our own (by versions, since DeepSpeed overwrites
operators of other versions in a shared one). Ranks take torch's lock files even to load what is compiled; so whoever finds itself the
only user of our folder removes those that are there: they can only be dead ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bf16prof.cases import Job
from bf16prof.engine.config import SHARED_MEMORY_BUILDER, BasicOptimizer, deepspeed_config, engine_facts, offloads_optimizer, optimizer_type
from bf16prof.errors import InputError
from bf16prof.files import last_lines
from bf16prof.measure.machine import package_version
from bf16prof.processes import child_environment, die_with_parent, started
from bf16prof.records import Device

CACHE_VARIABLE = "TORCH_EXTENSIONS_DIR"
TIMEOUT_S = 900.0
ALLOCATOR = "allocator"
BUILDERS = {BasicOptimizer.FUSED_ADAM: "FusedAdamBuilder", BasicOptimizer.CPU_ADAM: "CPUAdamBuilder"}
OTHER_BUILDERS = {"lion": ("FusedLionBuilder", "CPULionBuilder"), "lamb": ("FusedLambBuilder", ""), "adagrad": ("", "CPUAdagradBuilder")}
"""What DeepSpeed's optimizers other than Adam are compiled by, on the device and when offloading (`runtime/engine.py`)."""


def prepare(jobs: Sequence[Job]) -> None:
    """Compile everything that these jobs need and set `TORCH_EXTENSIONS_DIR` (and `PATH`, if need be) for the ranks.

    Raises `InputError` with the compiler's last line when something does not compile.
    """
    folder = cache_folder()
    os.environ[CACHE_VARIABLE] = str(folder)
    if shutil.which("ninja") is None:  # torch runs it by name, and pip puts it where only an activated environment looks
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with extension_cache(), _locked(folder / "bf16prof.lock"):
            missing = [part for part in needed(jobs) if not _marker(folder, part).exists()]
            if missing:
                _compile(missing, folder)
    except OSError as error:
        raise InputError(f"cannot write the extension cache {folder}: {error.strerror}", hint=f"set {CACHE_VARIABLE}") from error


@contextlib.contextmanager
def extension_cache() -> Iterator[None]:
    """Use the extension cache; its only user first removes the lock files that killed processes have left in it."""
    folder = cache_folder()
    with (folder / "users.lock").open("w") as handle:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_stale_locks(folder)
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield


def needed(jobs: Sequence[Job]) -> list[str]:
    """The parts that these jobs need compiled."""
    on_cpu = any(job.device is Device.CPU for job in jobs)
    parts = [ALLOCATOR, SHARED_MEMORY_BUILDER] if on_cpu else []
    builders = [_optimizer_builder(deepspeed_config(job)) for job in jobs]
    return parts + list(dict.fromkeys(builder for builder in builders if builder))


def _optimizer_builder(config: Mapping[str, Any]) -> str:
    """What compiles the optimizer of a configuration; empty for one of PyTorch's."""
    others = OTHER_BUILDERS.get(optimizer_type(config), ("", ""))
    return BUILDERS.get(engine_facts(config).optimizer, others[offloads_optimizer(config)])


def cache_folder() -> Path:
    """Where compiled extensions are kept: `TORCH_EXTENSIONS_DIR`, or a folder of our own for these versions."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    versions = f"torch{package_version('torch')}-deepspeed{package_version('deepspeed')}-py{sys.version_info[0]}{sys.version_info[1]}"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bf16prof" / versions


def _marker(folder: Path, part: str) -> Path:
    return folder / f"{part}.compiled"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _remove_stale_locks(folder: Path) -> None:
    if folder.parent.name == "bf16prof":
        for lock in folder.glob("*/lock"):
            lock.unlink(missing_ok=True)


def _compile(parts: Sequence[str], folder: Path) -> None:
    log = folder / "compile.log"
    command = [sys.executable, "-m", "bf16prof.measure.prepare", str(folder), *parts]
    code = None
    with contextlib.suppress(subprocess.TimeoutExpired), started(command, log, child_environment()) as process:
        code = process.wait(TIMEOUT_S)
    if code != 0:
        reason = f"no end after {TIMEOUT_S:g} s" if code is None else (last_lines(log, 1) or [f"exit code {code}"])[0]
        raise InputError(f"cannot compile {', '.join(parts)}: {reason}", hint=f"bf16prof doctor checks the compiler; the log is {log}")


def _compile_part(part: str) -> None:
    if part == ALLOCATOR:
        from bf16prof.measure.probes.cpu import compile_allocator

        compile_allocator()
        return
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(part)
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        if part == SHARED_MEMORY_BUILDER:  # DeepSpeed then goes without it
            return
        raise SystemExit(f"DeepSpeed cannot compile {part} on this machine")
    builder.load()


def main() -> None:
    """Compile the parts named on the command line and mark each as done; compilers die with this process, and it with its parent."""
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    die_with_parent(signal.SIGTERM)
    folder, parts = Path(sys.argv[1]), sys.argv[2:]
    for part in parts:
        _compile_part(part)
        _marker(folder, part).touch()


if __name__ == "__main__":
    main()
