"""A short form of `make fuzz`: a few mutants for every reader of people's files, and all that once
broke one."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from fuzzing import FOUND, READERS, ask, judge, mutants
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

FEW = 12
number = itertools.count()


@pytest.mark.parametrize("name", READERS)
def test_what_is_valid_is_read(name: str, tmp_path: Path) -> None:
    """Else mutants of it would prove nothing."""
    for index, content in enumerate(READERS[name].valid):
        answer = ask(READERS[name], content, tmp_path / str(index))
        assert answer.code == 0, answer.err


@pytest.mark.parametrize("name", READERS)
def test_mutants(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("mutants")

    @settings(max_examples=FEW, derandomize=True, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def few(data: st.DataObject) -> None:
        judge(ask(READERS[name], data.draw(mutants(READERS[name].valid)), folder / str(next(number))))

    few()


@pytest.mark.parametrize("path", sorted(FOUND.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_broke_a_reader(path: Path, tmp_path: Path) -> None:
    judge(ask(READERS[path.parent.name], path.read_bytes(), tmp_path / "once"))
