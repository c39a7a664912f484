"""The hosts that other programs know: DeepSpeed's hostfile with its filters, and the nodes of a
Slurm allocation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bf16prof.errors import InputError
from bf16prof.measuring.accelerator import require_packages, run
from bf16prof.measuring.places import Host

TIMEOUT_S = 120.0

_READ = """
import contextlib, json, sys
with contextlib.redirect_stdout(sys.stderr):
    from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion
    found = parse_inclusion_exclusion(fetch_hostfile(sys.argv[1]), sys.argv[2], sys.argv[3])
print(json.dumps(list(found.items())))
"""


def hostfile_hosts(path: Path, include: str, exclude: str) -> tuple[Host, ...]:
    """The hosts of a hostfile and the slots of each that remain, as DeepSpeed itself reads them, in
    a process of its own.

    Raises `InputError` for what DeepSpeed refuses.
    """
    if not path.is_file():
        raise InputError(f"--hostfile {path}: no such file")
    require_packages("--hostfile")
    done = run([sys.executable, "-c", _READ, str(path), include, exclude], TIMEOUT_S)
    if done.returncode:
        raise InputError(f"--hostfile {path}: {_reason(done)}")
    hosts = tuple(Host(name, tuple(slots)) for name, slots in json.loads(done.stdout.splitlines()[-1]))
    if not hosts:
        raise InputError(f"--hostfile {path}: no host is left")
    if strange := [host.name for host in hosts if host.name.startswith("-")]:
        raise InputError(f"--hostfile {path}: {strange[0]!r} is no host's name")
    return hosts


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].removeprefix("ValueError: ")


def allocated_hosts() -> tuple[Host, ...]:
    """The nodes of the Slurm allocation in which this process is, as Slurm writes them out. Raises
    `InputError` where there is none."""
    names = os.environ.get("SLURM_JOB_NODELIST")
    if not names:
        raise InputError("--launcher srun: this is no Slurm allocation", hint="--launcher slurm asks for one")
    try:
        done = run(["scontrol", "show", "hostnames", names], TIMEOUT_S)
    except OSError as error:
        raise InputError(f"--launcher srun: cannot run scontrol: {error.strerror}") from error
    if done.returncode:
        raise InputError(f"--launcher srun: scontrol: {_reason(done)}")
    return tuple(Host(name) for name in done.stdout.split())
