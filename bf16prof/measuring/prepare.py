"""Compile what the ranks will need before they start and before any clock runs: the counting
allocator and DeepSpeed's own operators.

One process compiles, under a lock that the system releases when its holder dies, in the folder of
this environment (`cache.py`). Once compiled, a part is only loaded.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bf16prof.cases import Job
from bf16prof.engine.config import SHARED_MEMORY_BUILDER, BasicOptimizer, deepspeed_config, engine_facts, offloads_optimizer, optimizer_type
from bf16prof.errors import InputError
from bf16prof.files import last_lines
from bf16prof.locks import Busy, held
from bf16prof.measuring.batons import use_dying_batons
from bf16prof.measuring.cache import BUILD_LOCK, CACHE_VARIABLE, cache_folder, is_compiled, mark_compiled
from bf16prof.processes import child_environment, die_with_parent, kill_session, started
from bf16prof.vocabulary import Device

TIMEOUT_S = 900.0
POLL_S = 0.2
ALLOCATOR = "allocator"
BUILDERS = {BasicOptimizer.FUSED_ADAM: "FusedAdamBuilder", BasicOptimizer.CPU_ADAM: "CPUAdamBuilder"}
OTHER_BUILDERS = {"lion": ("FusedLionBuilder", "CPULionBuilder"), "lamb": ("FusedLambBuilder", ""), "adagrad": ("", "CPUAdagradBuilder")}
"""What DeepSpeed's optimizers other than Adam are compiled by, on the device and when offloading
(`runtime/engine.py`)."""


def prepare(jobs: Sequence[Job], say: Callable[[str], None]) -> None:
    """Compile everything that these jobs need and set `TORCH_EXTENSIONS_DIR` (and `PATH`, if need
    be) for the ranks.

    `say` hears what takes long. Raises `InputError` with the compiler's last line when something
    does not compile.
    """
    prepare_parts(needed(jobs), say)


def prepare_parts(parts: Sequence[str], say: Callable[[str], None]) -> None:
    """The same for parts by name."""
    folder = cache_folder()
    os.environ[CACHE_VARIABLE] = str(folder)
    if shutil.which("ninja") is None:  # torch runs it by name, and pip puts it where only an activated environment looks
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):  # torch writes beside an extension even where it only loads it
            raise PermissionError(errno.EACCES, "it is read-only here")
        if all(is_compiled(folder, part) for part in parts):
            return
        with _build_lock(folder / BUILD_LOCK, say):
            if missing := [part for part in parts if not is_compiled(folder, part)]:
                say(f"compiling {', '.join(missing)}, once for this environment (a minute or so)")
                _compile(missing, folder)
    except OSError as error:
        raise InputError(f"cannot write the extension cache {folder}: {error.strerror}", hint=f"set {CACHE_VARIABLE}") from error


@contextlib.contextmanager
def _build_lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Be the only one who compiles in a folder. Raises `InputError` when another has not come to an
    end in `TIMEOUT_S`."""
    deadline = time.monotonic() + TIMEOUT_S
    with contextlib.ExitStack() as stack:
        told = False
        while True:
            try:
                stack.enter_context(held(path))
                break
            except Busy as busy:
                if time.monotonic() > deadline:
                    raise InputError(f"{busy} has been compiling into {path.parent} for {TIMEOUT_S:g} s") from busy
                if not told:
                    say(f"waiting for {busy}, which compiles the same extensions")
                told = True
            time.sleep(POLL_S)
        yield


def needed(jobs: Sequence[Job]) -> list[str]:
    """The parts that these jobs need compiled."""
    on_cpu = any(job.device is Device.CPU for job in jobs)
    parts = [ALLOCATOR, SHARED_MEMORY_BUILDER] if on_cpu else []
    builders = [_optimizer_builder(deepspeed_config(job)) for job in jobs if not job.profile.is_for_megatron]
    return parts + list(dict.fromkeys(builder for builder in builders if builder))


def of_any_script() -> list[str]:
    """What ranks of a script need here, whatever it does."""
    from bf16prof.measuring.accelerator import require_torch

    return [] if require_torch().gpus else of_cpu_script()


def of_cpu_script() -> list[str]:
    """The same where ranks run on the CPU."""
    return [ALLOCATOR, SHARED_MEMORY_BUILDER]


def _optimizer_builder(config: Mapping[str, Any]) -> str:
    """What compiles the optimizer of a configuration; empty for one of PyTorch's."""
    others = OTHER_BUILDERS.get(optimizer_type(config), ("", ""))
    return BUILDERS.get(engine_facts(config).optimizer, others[offloads_optimizer(config)])


def _compile(parts: Sequence[str], folder: Path) -> None:
    log = folder / "compile.log"
    command = [sys.executable, "-m", "bf16prof.measuring.prepare", str(folder), *parts]
    code = None
    environment = {**child_environment(folder), "TMPDIR": str(folder / "tmp")}
    with _emptied(folder / "tmp"), contextlib.suppress(subprocess.TimeoutExpired), started(command, log, environment) as process:
        code = process.wait(TIMEOUT_S)
    if code != 0:
        reason = f"no end after {TIMEOUT_S:g} s" if code is None else (last_lines(log, 1) or [f"exit code {code}"])[0]
        raise InputError(f"cannot compile {', '.join(parts)}: {reason}", hint=f"bf16prof doctor checks the compiler; the log is {log}")


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """A folder that is empty, and gone afterwards: compilers that are killed leave temporary files.
    Only one process compiles."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compile_part(part: str) -> str:
    """Compile a part; the name of its extension, empty where DeepSpeed goes without it."""
    if part == ALLOCATOR:
        from bf16prof.measuring.probes.cpu import NAME, compile_allocator

        compile_allocator()
        return NAME
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(part)
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        if part == SHARED_MEMORY_BUILDER:
            return ""
        raise SystemExit(f"DeepSpeed cannot compile {part} on this machine")
    builder.load()
    return str(builder.name)


def main() -> None:
    """Compile the parts named on the command line and mark each as done; compilers die with this
    process, and it with its parent."""
    signal.signal(signal.SIGTERM, lambda *_: kill_session(os.getpid()))
    die_with_parent(signal.SIGTERM)
    use_dying_batons()
    folder, parts = Path(sys.argv[1]), sys.argv[2:]
    for part in parts:
        mark_compiled(folder, part, _compile_part(part))


if __name__ == "__main__":
    main()
