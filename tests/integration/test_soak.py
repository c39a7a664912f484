"""A short form of `make soak`: a few commands with a fault each leave nothing behind, and end as
they should."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import bf16prof
from soaking import CASE, COMMANDS, LOG, soak

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that `report` can read."""
    folder = tmp_path_factory.mktemp("old") / "run"
    done = bf16prof("import", LOG, *CASE, "-d", str(folder))
    assert done.code == 0, done.stderr
    return folder


@pytest.mark.alone  # it counts what is in /dev/shm
@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_left(seed: int, tmp_path: Path, old_run: Path) -> None:
    found = soak(seed, tmp_path / "run", old_run, dict.fromkeys(COMMANDS, 1.0), slow=0.0)

    assert not found.wrong, found
