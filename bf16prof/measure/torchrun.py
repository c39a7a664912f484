"""torchrun through its Python interface, in a process that dies with its parent and writes down which rank failed how.

Run as `python -m bf16prof.measure.torchrun FAILURES.json TORCHRUN-ARGUMENTS...`.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from bf16prof.measure.process import die_with_parent
from bf16prof.records import SCHEMA_VERSION, STRICT
from bf16prof.runs import read, write_json


@dataclass(frozen=True)
class RankFailure:
    """A rank that did not end with exit code 0. A negative code is the signal that killed it."""

    __pydantic_config__ = STRICT

    rank: int
    code: int
    time: int

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
    """The failed ranks, the first to fail first; empty when there are none."""
    if not path.exists():
        return []
    found: _Failures = read(path, _Failures)
    # Ranks that torchrun itself ended after the first failure carry its SIGTERM and a later time.
    return sorted(found.failures, key=lambda f: (f.code == -signal.SIGTERM, f.time, f.rank))


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
