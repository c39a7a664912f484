"""Try every fault class on every command, and write what came of it into `docs/faults.md` (`make
faults`).

    python benchmarks/faults.py [TRIES]

Nobody else may use `/dev/shm` meanwhile, as for a soak (`benchmarks/soak.py`).
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from fault_table import BEGIN, END, PAGE, table, tried
from harness import bf16prof
from soaking import CASE, COMMANDS, LOG, SLOW

TRIES = 5


def main() -> int:
    """Write the page; a run that ends wrongly, or leaves anything, is an error."""
    tries, start = int(sys.argv[1]) if sys.argv[1:] else TRIES, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        done = bf16prof("import", LOG, *CASE, "-d", str(folder / "old"))
        assert done.code == 0, done.stderr
        usual = dict.fromkeys(COMMANDS, 1.0) | dict.fromkeys(SLOW, 15.0)
        found = list(tried(tries, usual, folder, folder / "old", lambda text: print(text, file=sys.stderr, flush=True)))  # noqa: T201
    rows = [row for row, _ in found]
    wrong = [each for _, soaked in found for each in soaked]
    if wrong:
        print(f"{len(wrong)} of {sum(row.tries for row in rows)} tries ended wrongly; {PAGE.name} stays as it is")  # noqa: T201
        return 1
    page = PAGE.read_text(encoding="utf-8")
    head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(head + BEGIN + table(rows) + END + tail, encoding="utf-8")
    print(f"{sum(row.tries for row in rows)} tries in {time.monotonic() - start:.0f} s")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
