"""`measure --launcher slurm` on a small cluster of Slurm's own daemons: submitted, waited for,
collected, and cancelled."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster import cluster, missing
from harness import LIMIT_S, bf16prof, end, environment, finish, measure_arguments, start, wait_for

from bf16prof.measuring.cache import CACHE_VARIABLE, cache_folder
from bf16prof.records import MemoryRecord
from bf16prof.runs import Status, load

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing()), reason="needs Debian's slurmctld, slurmd, slurm-client and munge (make slurm)"),
]

PLAIN = Path(__file__).parents[1] / "integration" / "scripts" / "plain.py"
BOTH = ("--launcher", "slurm", "--nnodes", "2", "--num-gpus", "1", "--rdzv-endpoint", "127.0.0.1")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with cluster(tmp_path_factory.mktemp("slurm")) as variables:
        yield {**variables, "GLOO_SOCKET_IFNAME": "lo", CACHE_VARIABLE: str(cache_folder())}


def jobs(slurm: dict[str, str]) -> list[str]:
    """The states of jobs that are not over."""
    return subprocess.run(["squeue", "-h", "-o", "%T"], env=slurm, capture_output=True, text=True, check=True).stdout.split()


def test_a_job_on_two_nodes_is_collected(slurm: dict[str, str], tmp_path: Path) -> None:
    arguments = measure_arguments(tmp_path / "run", "--zero", "2", "--recipe", "bf16-full", "--json", *BOTH)
    done = bf16prof(*arguments, env=slurm)

    assert done.code == 0, done.stderr
    measured = done.record("measure", 2, "bf16-full")
    predicted = done.record("estimate", 2, "bf16-full")
    assert measured["allocated_bytes"] == predicted["allocated_bytes"]
    assert [rank["node"] for rank in measured["ranks"]] == [0, 1]
    assert "#SBATCH --nodes=2" in (tmp_path / "run.sbatch").read_text()
    assert "job " in done.stderr
    assert not jobs(slurm)


def test_a_script_has_its_exit_code(slurm: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "rude.py"
    path.write_text("print('here I am', flush=True)\nraise SystemExit(7)\n")
    done = bf16prof("measure", "--launcher", "slurm", "--num-gpus", "1", "-d", str(tmp_path / "run"), "--", str(path), env=slurm)

    assert done.code == 3
    assert "here I am" in done.stdout + done.stderr
    assert "left with exit code 7" in done.stderr


def slurms(slurm: dict[str, str], folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm's, with this environment's programs."""
    env = {**environment(), **slurm, "PATH": f"{Path(sys.executable).parent}:{slurm['PATH']}", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def only_record(folder: Path) -> MemoryRecord:
    run = load(folder)
    assert run.manifest.status is Status.FINISHED
    (record,) = run.records
    return record


def test_srun_starts_the_ranks_of_an_attached_script(slurm: dict[str, str], tmp_path: Path) -> None:
    """The nodes of this cluster have no names that resolve; the port is agreed on without a
    word."""
    words = ("srun", "--nodes", "2", "--ntasks-per-node", "1", "python", "-m", "bf16prof.attach", "-d", "run", str(PLAIN), "--steps", "5")
    done = slurms(slurm, tmp_path, *words)

    assert done.returncode == 0, done.stderr
    assert bf16prof("report", str(tmp_path / "run"), "--quiet").code == 0
    record = only_record(tmp_path / "run")
    assert (record.case.world_size, len(record.steps)) == (2, 5)
    assert [rank.node for rank in record.ranks] == [0, 1]


def test_an_allocation_of_two_nodes_is_measured_in(slurm: dict[str, str], tmp_path: Path) -> None:
    ours = ("bf16prof", "measure", "--num-gpus", "1", "--rdzv-endpoint", "127.0.0.1", "-d", "run", "--", str(PLAIN), "--steps", "5")
    done = slurms(slurm, tmp_path, "salloc", "--nodes", "2", *ours)

    assert done.returncode == 0, done.stderr
    assert [rank.node for rank in only_record(tmp_path / "run").ranks] == [0, 1]
    assert not jobs(slurm)


@pytest.mark.parametrize(("where", "ranks"), [(("--num-gpus", "1"), 1), (BOTH, 2)], ids=["one node", "two nodes"])
def test_an_interruption_cancels_the_job(slurm: dict[str, str], tmp_path: Path, where: tuple[str, ...], ranks: int) -> None:
    path = tmp_path / "waits.py"
    path.write_text("import os, pathlib, time\npathlib.Path(f'pid{os.getpid()}').touch()\ntime.sleep(600)\n")
    launcher = () if "--launcher" in where else ("--launcher", "slurm")
    process = start("measure", *launcher, *where, "-d", str(tmp_path / "run"), "--", str(path), env=slurm, cwd=tmp_path)
    try:
        wait_for("all ranks wait", lambda: len(waiting(tmp_path)) == ranks, 300)
        process.send_signal(signal.SIGINT)
        done = finish(process, 120)
    finally:
        end(process)

    assert done.code == 130
    assert not jobs(slurm)
    wait_for("all ranks are gone", lambda: not any(map(psutil.pid_exists, waiting(tmp_path))), 20)


def waiting(folder: Path) -> list[int]:
    """The processes that have said so in this folder."""
    return [int(path.name.removeprefix("pid")) for path in folder.glob("pid*")]


def test_what_does_not_go_together_is_said_before_a_job_is_made(slurm: dict[str, str], tmp_path: Path) -> None:
    done = bf16prof("measure", "--launcher", "slurm", "--node-rank", "0", "-d", str(tmp_path / "run"), env=slurm)

    assert done.code == 2
    assert "--launcher slurm excludes --hostfile and --node-rank" in done.stderr
