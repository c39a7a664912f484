"""torchrun through its Python interface, in a process that dies with its parent and writes down
which rank ended how. One per node.

Run as `python -m bf16prof.measuring.agent FOLDER RANKS` for all ranks of a case on one machine, and
as `... FOLDER --node NUMBER` (`slurm`: Slurm knows it) for those of one of several nodes. Such a
node is prepared first, reports (`nodes.py`), and is cleaned at the end.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bf16prof.errors import SIGNALLED, Bf16profError
from bf16prof.measuring.exits import ExitWatch, RankExit, save_exits
from bf16prof.measuring.shared_memory import clean_shared_memory
from bf16prof.processes import die_with_parent
from bf16prof.runs import SCRIPT, SPEC, exits_file

if TYPE_CHECKING:
    from bf16prof.measuring.places import Layout


def main() -> None:
    """Run torchrun; leave with 1 when a rank has failed."""
    die_with_parent()
    arguments = _arguments()
    if arguments.ranks:
        _run(exits_file(arguments.folder, 0), arguments.ranks, arguments.folder, ["--standalone", "--nproc-per-node", str(arguments.ranks)])
    else:
        _run_node(arguments.folder, _number(arguments.node), while_stdin=arguments.while_stdin)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("ranks", type=int, nargs="?", default=0)
    parser.add_argument("--node", default="")
    parser.add_argument("--while-stdin", action="store_true")
    return parser.parse_args()


def _number(text: str) -> int:
    """The number of this node as it was given, or Slurm's."""
    return int(os.environ["SLURM_NODEID"] if text == "slurm" else text)


def _run_node(folder: Path, node: int, *, while_stdin: bool) -> None:
    """One of several nodes: whatever happens, the last thing is a report of it."""
    from bf16prof.measuring.machine import hardware
    from bf16prof.measuring.nodes import Reporter
    from bf16prof.measuring.places import Layout
    from bf16prof.measuring.waiting import end_when_alone

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGNALLED + signal.SIGTERM))
    layout = Layout.load(folder)
    reporter = Reporter(folder, node, layout.ranks[node], hardware())
    reporter.start()
    end_when_alone(folder, while_stdin=while_stdin)
    code, message = 1, ""
    try:
        with clean_shared_memory():
            port = _prepare(folder, layout, node)
            reporter.say(is_ready=True, port=port if node == 0 else None)
            _run(exits_file(folder, node), layout.ranks[node], folder, _meeting(folder, layout, node, port))
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
        raise
    except Bf16profError as error:
        message = error.message
        sys.exit(1)
    except Exception as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        raise
    finally:
        reporter.end(code, message)


def _prepare(folder: Path, layout: Layout, node: int) -> int | None:
    """Compile what this host lacks, choose devices and threads for its own ranks; where nodes meet,
    on the first node if nobody has said.

    Only then may a port be chosen, which another process may take meanwhile.
    """
    from bf16prof.measuring.prepare import needed, of_any_script, prepare_parts
    from bf16prof.measuring.results import RankTask
    from bf16prof.measuring.surroundings import rank_environment
    from bf16prof.measuring.waiting import free_port
    from bf16prof.runs import read

    if (folder / SCRIPT).exists():
        parts = of_any_script()
    else:
        task: RankTask = read(folder / SPEC, RankTask)
        parts = needed([task.job.job()])
    prepare_parts(parts, lambda text: print(text, flush=True))  # noqa: T201 - into the log of the node
    variables = rank_environment(layout.ranks[node])
    os.environ.clear()
    os.environ.update(variables)
    devices = layout.visible(node)
    if devices is not None and devices != tuple(range(len(devices))):
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    return layout.port or (free_port() if node == 0 else None)


def _meeting(folder: Path, layout: Layout, node: int, port: int | None) -> list[str]:
    """torchrun's arguments for a rendezvous without elections: the first node listens, and ranks
    are numbered by node."""
    from bf16prof.measuring.waiting import port_of_first_node

    return [
        "--nnodes", str(len(layout.hosts)), "--node-rank", str(node), "--nproc-per-node", str(layout.ranks[node]),
        "--rdzv-backend", "static", "--master-addr", layout.endpoint, "--master-port", str(port or port_of_first_node(folder)),
    ]  # fmt: skip


def _run(exits_target: Path, ranks: int, folder: Path, arguments: list[str]) -> None:
    """Run torchrun with these arguments, a worker (or the user's script) in each rank; write down
    how each of `ranks` children ends."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    exits: dict[int, RankExit] = {}

    def note(found: RankExit) -> None:
        exits[found.rank] = found
        save_exits(exits_target, exits)

    ExitWatch(ranks, note).start()
    script = ["-m", "bf16prof.measuring.script.launched", str(folder)]
    program = script if (folder / SCRIPT).exists() else ["-m", "bf16prof.measuring.worker", str(folder / SPEC), str(folder)]
    try:
        run(parse_args([*arguments, "--max-restarts", "0", "--log-dir", os.devnull, *program]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            seen = exits.get(rank)
            exits[rank] = RankExit(rank, failure.exitcode, seen.at if seen else None)
        save_exits(exits_target, exits)
        sys.exit(1)
    except SignalException as error:  # somebody ended torchrun, which then ended the ranks
        exits_target.unlink(missing_ok=True)
        sys.exit(SIGNALLED + error.sigval)


if __name__ == "__main__":
    main()
