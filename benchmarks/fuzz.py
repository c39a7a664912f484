"""Ten thousand mutants of valid files, to every reader in turn (`make fuzz`): no traceback, an exit
code of 0 or 2, and no endless wait.

    python benchmarks/fuzz.py [INPUTS] [SEED]

Where one breaks a reader, hypothesis makes it small; the smallest is kept in `tests/data/found`,
which the test suite reads from then on.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fuzzing import FOUND, READERS, Answer, TooSlow, ask, judge, mutants
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

INPUTS = 10_000
AT_ONCE = 100
"""Inputs of one search; hypothesis draws another seed for the next."""


def search(name: str, number: int) -> tuple[str, collections.Counter[str], str]:
    """One search: the reader, how its answers ended, and what broke it (empty: nothing did)."""
    codes: collections.Counter[str] = collections.Counter()
    counter, last = itertools.count(), [b""]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:

        @seed(number)
        @settings(max_examples=AT_ONCE, deadline=None, database=None, phases=[Phase.generate, Phase.shrink], print_blob=False,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(st.data())
        def many(data: st.DataObject) -> None:
            last[0] = data.draw(mutants(READERS[name].valid))
            answer = _answer(name, last[0], Path(folder) / str(next(counter)))
            codes[str(answer.code)] += 1
            judge(answer)

        try:
            many()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            return name, codes, _kept(name, last[0], error)
    return name, codes, ""


def _answer(name: str, content: bytes, folder: Path) -> Answer:
    try:
        return ask(READERS[name], content, folder)
    except TooSlow as error:
        raise TimeoutError(str(error)) from error  # hypothesis makes nothing small of what is no Exception


def _kept(name: str, content: bytes, error: Exception) -> str:
    while isinstance(error, ExceptionGroup):  # of hypothesis, where an input broke a reader once and not again
        error = error.exceptions[0]
    path = FOUND / name / hashlib.sha256(content).hexdigest()[:8]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return f"{path}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main() -> int:
    """Search until so many inputs have been answered; 1 where one broke a reader."""
    words = sys.argv[1:]
    inputs, first = (int(word) for word in (*words, *(str(INPUTS), "0")[len(words) :]))
    start, total = time.monotonic(), collections.Counter[str]()
    by_reader: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in READERS}
    broken: list[str] = []
    turns = itertools.cycle(READERS)
    with ProcessPoolExecutor() as pool:
        searches = [pool.submit(search, next(turns), first + index) for index in range(-(-inputs // AT_ONCE))]
        for done in searches:
            name, codes, what = done.result()
            print(f"{name}: {dict(codes)}", file=sys.stderr, flush=True)  # noqa: T201
            by_reader[name].update(codes)
            total.update(codes)
            if what:
                broken.append(what)
                print(what, flush=True)  # noqa: T201
    for name, codes in by_reader.items():
        print(f"{name:<14}{codes.total():>7} inputs: {codes['0']} read, {codes['2']} refused in one line")  # noqa: T201
    print(f"{total.total()} inputs in {time.monotonic() - start:.0f} s, {len(broken)} broke a reader")  # noqa: T201
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
