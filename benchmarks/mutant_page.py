"""Write what the mutants came to into `docs/mutants.md`, from what `mutants.py run` has left in
`mutants/` (`make mutants`)."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

ROOT = Path(__file__).parents[1]
JUDGED = ROOT / "mutants"
PAGE = ROOT / "docs" / "mutants.md"
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"
EQUAL = "equal"
CRASHED = -11
"""The exit code of a test process that a mutant made read memory that is not there."""
COLUMNS = ("killed", "timeout", EQUAL, "survived", "no tests", "not checked")
WORDS = ("killed", "by time", "equal", "alive", "no test", "not judged")


@dataclass(frozen=True)
class Kind:
    """Mutants that do what the code does, by what they take away and add, and by their names."""

    why: str
    was: re.Pattern[str]
    becomes: re.Pattern[str]
    where: re.Pattern[str]

    def holds(self, mutant: str, diff: str) -> bool:
        """Whether a mutant is of this kind."""
        lines = [line for line in diff.splitlines() if line[:3] not in ("---", "+++")]
        return self.where.search(mutant) is not None and all(
            any(line.startswith(sign) and pattern.search(line[1:].strip()) for line in lines)
            for sign, pattern in (("-", self.was), ("+", self.becomes))
        )


def main() -> None:
    """Write the page."""
    with (Path(__file__).parent / "equal_mutants.toml").open("rb") as stream:
        kinds = [
            Kind(kind["why"], *(re.compile(kind.get(key, "")) for key in ("was", "becomes", "where")))
            for kind in tomllib.load(stream)["kind"]
        ]
    modules, reasons = {}, Counter[str]()
    for meta in sorted(JUDGED.glob("bf16prof/**/*.meta")):
        if judged := json.loads(meta.read_text())["exit_code_by_key"]:
            name = str(meta.relative_to(JUDGED)).removesuffix(".meta")
            modules[name] = Counter(_status(mutant, code, name, kinds, reasons) for mutant, code in judged.items())
    page = PAGE.read_text(encoding="utf-8")
    head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(head + BEGIN + "\n".join(_tables(modules, reasons)) + "\n" + END + tail, encoding="utf-8")


def _status(mutant: str, code: int | None, module: str, kinds: Sequence[Kind], reasons: Counter[str]) -> str:
    status = str(status_by_exit_code[code])
    if status == "survived":
        diff = get_diff_for_mutant(mutant, path=module)
        if kind := next((kind for kind in kinds if kind.holds(mutant, diff)), None):
            reasons[kind.why] += 1
            return EQUAL
    if status in COLUMNS:
        return status
    return "killed" if code == CRASHED else "not checked"  # ended by somebody, or for want of memory


def _tables(modules: dict[str, Counter[str]], reasons: Counter[str]) -> Iterator[str]:
    date = subprocess.run(["git", "show", "-s", "--format=%cs"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    yield f"Written {date}:\n"
    yield f"| module | mutants | {' | '.join(WORDS)} |"
    yield f"| --- |{' ---: |' * (1 + len(WORDS))}"
    yield from (_row(f"`{name.removeprefix('bf16prof/')}`", counts) for name, counts in modules.items())
    yield _row("all", sum(modules.values(), Counter[str]()))
    if reasons:
        yield "\n| why they are equal | mutants |\n| --- | ---: |"
        yield from (f"| {why} | {count} |" for why, count in reasons.most_common())


def _row(name: str, counts: Counter[str]) -> str:
    return f"| {name} | {' | '.join(f'{number:,}' for number in (counts.total(), *(counts[each] for each in COLUMNS)))} |"


if __name__ == "__main__":
    main()
