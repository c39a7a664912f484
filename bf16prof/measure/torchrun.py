"""torchrun through its Python interface, in a process that dies with its parent and writes down which rank failed how.

Run as `python -m bf16prof.measure.torchrun FAILURES.json TORCHRUN-ARGUMENTS...`.
"""

from __future__ import annotations

import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from bf16prof.documents import SCHEMA_VERSION
from bf16prof.files import write_json
from bf16prof.measure.results import load_rank
from bf16prof.processes import die_with_parent
from bf16prof.records import STRICT
from bf16prof.runs import Status, rank_file, read


@dataclass(frozen=True)
class RankFailure:
    """A rank that did not end with exit code 0. A negative code is the signal that killed it."""

    __pydantic_config__ = STRICT

    rank: int
    code: int
    time: int

    @property
    def killed(self) -> bool:
        """Whether a signal killed it that was not torchrun's own."""
        return self.code < 0 and self.code != -signal.SIGTERM

    @property
    def reason(self) -> str:
        """The exit code or the name of the signal."""
        return f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"


@dataclass(frozen=True)
class _Failures:
    __pydantic_config__ = STRICT

    failures: tuple[RankFailure, ...]
    schema_version: int = SCHEMA_VERSION


def load_failures(path: Path) -> list[RankFailure]:
    """The failed ranks, the one that failed by itself first; empty when there are none.

    torchrun's times are whole seconds, and when one rank fails the others lose their connection within milliseconds. So a rank that a
    signal killed comes before all that raised, those in the order in which they wrote why, and last the ranks that torchrun ended.
    """
    if not path.exists():
        return []
    found: _Failures = read(path, _Failures)
    return sorted(found.failures, key=lambda f: (not f.killed, _raised_at(path.parent, f.rank), f.code == -signal.SIGTERM, f.time, f.rank))


def _raised_at(folder: Path, rank: int) -> float:
    """When the rank wrote that it failed; infinity if it did not."""
    result = load_rank(folder, rank)
    raised = result is not None and result.status in (Status.FAILED, Status.REFUSED)
    return rank_file(folder, rank).stat().st_mtime if raised else math.inf


def main() -> None:
    """Run torchrun; leave with 1 when a rank has failed."""
    die_with_parent()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    target = Path(sys.argv[1])
    try:
        run(parse_args(sys.argv[2:]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        failures = tuple(RankFailure(rank, f.exitcode, f.timestamp) for rank, f in error.failures.items())
        write_json(target, _Failures(failures))
        sys.exit(1)


if __name__ == "__main__":
    main()
