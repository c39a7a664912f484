"""The census of PyTorch's operators: what each keeps and allocates on a CPU, really and in the dry
run (`make operators`).

It takes some twenty minutes on two cores. What is done is kept in `build/operators.jsonl`, so that
it goes on where it was stopped; with `--again` what differed is done anew. It prints what differs,
and writes `bf16prof/dry_run/hardware/cpu-operators.toml`, which the dry run reads, and
`docs/operators.md`.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from census import names, run
from operator_pages import cpu_page, cpu_table, findings

ROOT = Path(__file__).parent.parent
DONE = ROOT / "build" / "operators.jsonl"
TABLE = ROOT / "bf16prof" / "simulate" / "hardware" / "cpu-operators.toml"
PAGE = ROOT / "docs" / "operators.md"


def done() -> dict[str, dict[str, Any]]:
    """What the file has, the last line of each operator."""
    lines = DONE.read_text(encoding="utf-8").splitlines() if DONE.exists() else []
    rows = [json.loads(line) for line in lines if line.startswith('{"name"')]
    return {row["name"]: row for row in rows}


def differs(row: dict[str, Any]) -> bool:
    """Whether a sample or an operator below it is not as the dry run says."""
    samples = any(sample.get("real") != sample.get("dry") or "error" in sample for sample in row["samples"])
    return "error" in row or samples or any(found["wrong when asked"] for found in row["operators"].values())


def missing(known: dict[str, dict[str, Any]], *, again: bool) -> Iterator[str]:
    """The operators that are still to be done."""
    return (name for name in names() if name not in known or (again and differs(known[name])))


def main() -> None:
    """Run what is missing, and write what was found."""
    gc.freeze()  # what has been imported is no garbage
    DONE.parent.mkdir(exist_ok=True)
    todo = list(missing(done(), again="--again" in sys.argv))
    with DONE.open("a", encoding="utf-8") as stream:
        for count, row in enumerate(run(todo, asks_all=True), 1):
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            sys.stderr.write(f"{count} of {len(todo)}: {row['name']}{': differs' if differs(row) else ''}\n")
    known = done()
    found = findings([known[name] for name in names() if name in known])
    import torch

    TABLE.write_text(cpu_table(found, torch.__version__), encoding="utf-8")
    PAGE.write_text(cpu_page(found, torch.__version__), encoding="utf-8")
    sys.stdout.write(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
