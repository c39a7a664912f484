"""Measurements that several tests look at are made once: those that look at the same one are a
group, which one process runs."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import SHORT, TEXT, TINY, Finished, inside, measure

from bf16prof import runs
from bf16prof.measuring.results import load_rank
from bf16prof.records import merge_phases
from bf16prof.step_records import PhaseMemory
from bf16prof.vocabulary import Phase

WARMUP = 4
"""Steps before the one measured; the second to the last of them repeat each other, so that the
quickest gloo can be taken."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put every test of a measurement, which is known by its words, into that measurement's
    group."""
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if words := parameters.get("run") or parameters.get("words"):
            item.add_marker(pytest.mark.xdist_group(f"run-{zlib.crc32(repr(words).encode()):x}"))


@dataclass(frozen=True)
class Measured:
    """A measurement that is over: how it ended and its run directory."""

    finished: Finished
    folder: Path

    def quickest(self, stage: int, recipe: str, rank: int = 0) -> dict[Phase, PhaseMemory]:
        """The phases of a rank of a case, with the peaks of those moments in which gloo was
        quickest.

        When a collective is over, gloo's threads may hold its tensors for a moment longer, in one
        step and not in the next. The first step counts, and of the warm-up steps after it, which
        repeat each other, the smallest peak of each phase.
        """
        (label,) = {
            each.case.label for each in runs.load(self.folder).records if (each.case.zero_stage, each.case.recipe) == (stage, recipe)
        }
        result = load_rank(self.folder / label, rank)
        assert result is not None
        first, *others = [step.phases for step in result.steps if step.warmup]
        least = {
            phase: PhaseMemory(min(step[phase].peak_bytes or 0 for step in others), others[-1][phase].end_bytes) for phase in others[-1]
        }
        return merge_phases({Phase.INIT: result.init, **first}, least)


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Measured]:
    """A function that measures as told, with a witness in every rank; the same words twice measure
    once."""
    made: dict[tuple[str, ...], Measured] = {}

    def get(*arguments: str) -> Measured:
        if arguments not in made:
            folder = tmp_path_factory.mktemp("runs") / "run"
            sets = SHORT if {"--hf-config", "--model"} & set(arguments) else TINY
            made[arguments] = Measured(measure(folder, *arguments, sets=sets, warmup=WARMUP, steps=1, env=inside("witness")), folder)
        return made[arguments]

    return get


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """One case, trained for some steps on the Python language reference, without any injection."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return Measured(measure(folder, "--zero", "2", "--recipe", "bf16-fp32-master", sets=TEXT, steps=40), folder)
