"""torchrun through its Python interface, in a process that dies with its parent and writes down which rank ended how.

Run as `python -m bf16prof.measure.torchrun EXITS.json RANKS TORCHRUN-ARGUMENTS...`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bf16prof.errors import SIGNALLED
from bf16prof.measure.exits import ExitWatch, RankExit, save_exits
from bf16prof.processes import die_with_parent


def main() -> None:
    """Run torchrun; leave with 1 when a rank has failed."""
    die_with_parent()
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    target, ranks = Path(sys.argv[1]), int(sys.argv[2])
    exits: dict[int, RankExit] = {}

    def note(found: RankExit) -> None:
        exits[found.rank] = found
        save_exits(target, exits)

    ExitWatch(ranks, note).start()
    try:
        run(parse_args(sys.argv[3:]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            seen = exits.get(rank)
            exits[rank] = RankExit(rank, failure.exitcode, seen.at if seen else None)
        save_exits(target, exits)
        sys.exit(1)
    except SignalException as error:  # somebody ended torchrun, which then ended the ranks
        target.unlink(missing_ok=True)
        sys.exit(SIGNALLED + error.sigval)


if __name__ == "__main__":
    main()
