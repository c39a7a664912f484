"""Started under a launcher, `measure` does not start ranks of its own on the same devices."""

from __future__ import annotations

import pytest
from command_line import Main, main, refused

from bf16prof.started_by import started_by

__all__ = ["main"]

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        (TORCHRUN, ("torchrun", 1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "8"}, ("a launcher of ranks", 0, 8)),
        (STEP, ("srun", 3, 4)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, ("mpirun", 0, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ("mpiexec", 1, 2)),
        ({}, None),
        (BATCH_SCRIPT, None),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({**TORCHRUN, "WORLD_SIZE": "1"}, None),
        ({"RANK": "x", "WORLD_SIZE": "2"}, None),
    ],
)
def test_a_launcher_is_known_by_its_variables(variables: dict[str, str], found: tuple[str, int, int] | None) -> None:
    started = started_by(variables)

    assert (started and (started.by, started.rank, started.ranks)) == found


@pytest.mark.parametrize("variables", [TORCHRUN, STEP])
def test_measure_refuses_under_a_launcher_and_says_the_way(main: Main, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = refused(main("measure"))

    assert "measure starts its ranks itself" in said
    assert "leave the launcher out" in said
