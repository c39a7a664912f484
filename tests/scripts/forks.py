"""Runs many scripts from one process that has imported everything: `python forks.py JOBS`, each
line of JOBS a job in JSON.

A job of the kind "import" imports a module for all that follow. A dry one has a folder with a task
(`dry_run.script.worker`); a real one is a script on two gloo ranks, whose memory is counted by the
allocator. Each runs in forked copies. What becomes of them lies in their folders.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

RANKS = 2


def redirected(path: Path) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def forked(run: Any, *arguments: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        run(*arguments)
    except BaseException:  # noqa: BLE001 - the copy ends here, whatever it was
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def dry(folder: Path) -> None:
    from bf16prof.dry_run.script.worker import Worker

    redirected(folder / "log")
    Worker(folder).run()


def real(folder: Path, words: list[str], steps: int, rank: int, port: int) -> None:
    import real_rank

    redirected(folder / f"log{rank}")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    real_rank.run(folder / f"rank{rank}.json", words, steps)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import warnings

    warnings.simplefilter("ignore")
    import deepspeed  # noqa: F401

    import bf16prof.dry_run.script.rank
    import bf16prof.dry_run.script.surroundings
    import bf16prof.dry_run.world  # noqa: F401

    for line in Path(sys.argv[1]).read_text().splitlines():
        job = json.loads(line)
        if job["kind"] == "import":
            importlib.import_module(job["module"])
            continue
        folder = Path(job["folder"])
        if job["kind"] == "dry":
            pids = [forked(dry, folder)]
        else:
            port = free_port()
            pids = [forked(real, folder, job["words"], job["steps"], rank, port) for rank in range(RANKS)]
        for pid in pids:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
