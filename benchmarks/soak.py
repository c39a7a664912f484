"""Two hundred small runs with a random fault each, and what they leave behind (`make soak`):
nothing may be.

    python benchmarks/soak.py [RUNS] [SEED]

Each run has a seed of its own, one more than the run before, and is told when it is over: where
this was stopped after 100 runs, `soak.py 100 100` makes the rest. Nobody else may use `/dev/shm`
meanwhile; `unshare -m sh -c 'mount -t tmpfs tmpfs /dev/shm; python benchmarks/soak.py'` has one of
its own.
"""

from __future__ import annotations

import collections
import sys
import tempfile
import time
from pathlib import Path

from harness import bf16prof
from soaking import CASE, COMMANDS, SLOW, soak

RUNS = 200


def main() -> int:
    """Run until so many have ended; 1 where one has left anything, or ended wrongly."""
    words = sys.argv[1:]
    count, first = (int(word) for word in (*words, *(str(RUNS), "0")[len(words) :]))
    start, wrong = time.monotonic(), 0
    ends: collections.Counter[tuple[str, str]] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        done = bf16prof(
            "import", str(Path(__file__).parents[1] / "tests" / "data" / "example-stdout.log"), *CASE, "-d", str(folder / "old")
        )
        if done.code:
            raise SystemExit(done.stderr)
        usual: dict[str, float] = dict.fromkeys(COMMANDS, 1.0) | dict.fromkeys(SLOW, 15.0)
        for index in range(count):
            found = soak(first + index, folder / f"run{index}", folder / "old", usual)
            ends[found.command, found.fault] += 1
            print(f"{first + index}: {found.command}, {found.fault}: exit code {found.code}", file=sys.stderr, flush=True)  # noqa: T201
            for line in found.wrong:
                print(f"{first + index}: {found.command}, {found.fault}: {line}", flush=True)  # noqa: T201
            wrong += bool(found.wrong)
    for command in COMMANDS:
        print(f"{command:<10}" + ", ".join(f"{fault} {n}" for (name, fault), n in sorted(ends.items()) if name == command))  # noqa: T201
    print(f"{count} runs in {time.monotonic() - start:.0f} s, {wrong} ended wrongly or left something")  # noqa: T201
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
