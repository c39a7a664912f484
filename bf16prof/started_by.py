"""Which launcher has started this process as one of several, by the variables that launchers
set."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Started:
    """The launcher's name, which of how many processes this one is, and the variables that say
    so."""

    by: str
    rank: int
    ranks: int
    variables: tuple[str, str]


_SIGNS = (
    ("torchrun", ("RANK", "WORLD_SIZE"), "TORCHELASTIC_RUN_ID"),
    ("a launcher of ranks", ("RANK", "WORLD_SIZE"), ""),
    ("srun", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), "SLURM_STEP_ID"),
    ("mpirun", ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ""),
    ("mpiexec", ("PMI_RANK", "PMI_SIZE"), ""),
)
"""Name, variables with the rank and the number of ranks, and a variable that has to be there as
well. A batch script of Slurm has a SLURM_PROCID, but no step."""


def started_by(variables: Mapping[str, str] | None = None) -> Started | None:
    """The launcher; `None` where nobody has started more than one process of this kind."""
    variables = os.environ if variables is None else variables
    for name, (rank, ranks), sign in _SIGNS:
        if sign and sign not in variables:
            continue
        number, total = variables.get(rank, ""), variables.get(ranks, "")
        if number.isdecimal() and total.isdecimal() and int(total) > 1:
            return Started(name, int(number), int(total), (rank, ranks))
    return None


_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID", "GROUP_RANK": "SLURM_NODEID"}
_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK", "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE", "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
}  # fmt: skip


def rank_variables(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """What torch and DeepSpeed read a rank from, where a launcher has said it in words of its own
    only: srun, mpirun.

    Nothing where RANK is set, or where nobody says anything.
    """
    variables = os.environ if variables is None else variables
    if "RANK" in variables:
        return {}
    words = _SLURM if "SLURM_STEP_ID" in variables else _MPI
    found = {name: variables[word] for name, word in words.items() if word in variables}
    if words is _SLURM:
        found |= _meeting(variables)
    return {name: value for name, value in found.items() if name not in variables}


PORTS = range(10_000, 30_000)
"""Ports that systems give to nobody who asks for any."""


def _meeting(variables: Mapping[str, str]) -> dict[str, str]:
    """Where the ranks of a step of srun meet, on which all of them agree without a word: the step's
    first host, a port by its number."""
    job, step, hosts = (variables.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST"))
    if not (job.isdecimal() and step.isdecimal() and hosts):
        return {}
    return {"MASTER_ADDR": first_host(hosts), "MASTER_PORT": str(PORTS[(31 * int(job) + int(step)) % len(PORTS)])}


def first_host(names: str) -> str:
    """The first of hosts as Slurm writes them: `node[03-07,12],login1` begins with `node03`; so do
    several brackets in a name."""
    first = re.match(r"(?:[^,[]|\[[^\]]*\])*", names)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else names)
