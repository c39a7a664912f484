"""Fault classes times commands, each tried some times: the exit codes, and what is said. `make
faults` writes `docs/faults.md` of it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import bf16prof
from soaking import COMMANDS, FAULTS, LOG, Soaked, suffer

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"

PRESET = Path(__file__).parents[2] / "bf16prof" / "profiles" / "presets" / "cpu-demo.toml"
READS = {"import": "train.log", "explain": "train.log", "report": "old/run.json"}
"""The file that a command reads, where it is no profile."""


def _put(content: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content(path.read_bytes()))


def _instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        path.unlink()
        make(path)

    return spoil


OF_INPUT = "the file that it reads: "
SPOILED: dict[str, Callable[[Path], object]] = {
    "it is missing": _instead(lambda _: None),
    "it is empty": _put(lambda _: b""),
    "it ends in the middle": _put(lambda content: content[: content.rfind(b"{") + 1 or len(content) // 2]),
    "it is no text": _put(lambda _: bytes(range(256)) * 40),
    "numbers are beyond 2^63": _put(lambda content: re.sub(rb"(?<![\w.])\d+(?![\w.])", b"9" * 40, content)),
    "it is a pipe that nobody writes to": _instead(os.mkfifo),
    "it is /dev/zero": _instead(lambda path: path.symlink_to("/dev/zero")),
    "it is a folder": _instead(Path.mkdir),
}
"""What the file that a command reads may be instead of what it should be."""


@dataclass(frozen=True)
class FaultRow:
    """What came of a fault: the commands, how often each was tried, the exit codes, and what was
    said (where that differs: last)."""

    fault: str
    commands: tuple[str, ...]
    tries: int
    codes: tuple[int, ...]
    said: str


def reading(command: str, folder: Path, old_run: Path) -> tuple[list[str], Path]:
    """The words of a command that reads a valid file in that folder, which is made here, and the
    file."""
    folder.mkdir()
    path = folder / READS.get(command, "profile.toml")
    if command == "report":
        shutil.copytree(old_run, path.parent)
    else:
        shutil.copyfile(LOG if command in READS else PRESET, path)
    words = COMMANDS[command] if command != "measure" else ("measure", "-p", "cpu-demo", "--zero", "1", "-d", "{folder}/run")
    swapped = {LOG: str(path), **({} if command in READS else {"cpu-demo": str(path)})}
    return [swapped.get(word, word).format(folder=folder) for word in words], path


def line(stderr: str, folder: Path) -> str:
    """The line in which a command says how it ended, without names of folders and places in a
    file."""
    found = [text for text in stderr.splitlines() if text.startswith("bf16prof: ")]
    said = (found[-1] if found else "").replace(str(folder), "…").removeprefix("bf16prof: ")
    return re.sub(r"bf16prof-\w{8}|line \d+ column \d+ \(char \d+\)", "…", said)


def tried(
    tries: int, usual_s: dict[str, float], folder: Path, old_run: Path, say: Callable[[str], None]
) -> Iterator[tuple[FaultRow, list[Soaked]]]:
    """Every fault of every command that it can have, and of its tries those that ended wrongly or
    left something behind."""
    for fault, each in FAULTS.items():
        if fault == "nothing":
            continue
        for command in each.only:
            ends, wrong = [], []
            for index in range(tries):
                moment, place = (index + 0.5) / tries, folder / f"{command}-{index}"
                found = suffer((command, fault, moment), place, old_run, usual_s)
                if found.wrong:
                    wrong.append(found)
                    shutil.rmtree(place)
                    say(f"WRONG: {found}")
                ends.append((found.code, line(found.said, place)))
            say(f"{fault}, {command}: {ends}")
            yield FaultRow(fault, (command,), tries, *_of(ends)), wrong
    for fault, spoil in SPOILED.items():
        for command in COMMANDS:
            place = folder / "input"
            words, path = reading(command, place, old_run)
            spoil(path)
            done = bf16prof(*words)
            say(f"{fault}, {command}: {done.code} {line(done.stderr, place)}")
            yield FaultRow(OF_INPUT + fault, (command,), 1, *_of([(done.code, line(done.stderr, place))])), []
            shutil.rmtree(place)


def _of(ends: Sequence[tuple[int, str]]) -> tuple[tuple[int, ...], str]:
    return tuple(sorted({code for code, _ in ends}, key=abs)), next((said for _, said in reversed(ends) if said), "")


def merged(rows: Iterable[FaultRow]) -> list[FaultRow]:
    """Rows of one fault that differ in the command only become one."""
    found: dict[tuple[object, ...], FaultRow] = {}
    for row in rows:
        key = (row.fault, row.tries, row.codes, row.said)
        before = found[key].commands if key in found else ()
        found[key] = FaultRow(row.fault, (*before, *row.commands), row.tries, row.codes, row.said)
    return list(found.values())


def table(rows: Iterable[FaultRow]) -> str:
    """The table in Markdown."""
    lines = ["| fault | command | tries | exit code | what is said |", "| --- | --- | ---: | --- | --- |"]
    for row in merged(rows):
        said = row.said.replace("|", "\\|")
        cells = (row.fault, ", ".join(row.commands), str(row.tries), ", ".join(map(str, row.codes)), f"`{said}`" if said else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parsed(page: str) -> list[FaultRow]:
    """The rows of a page that has such a table."""
    rows = []
    for text in page.partition(BEGIN)[2].partition(END)[0].splitlines()[2:]:
        fault, commands, tries, codes, said = (cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", text)[1:-1])
        numbers = tuple(int(code) for code in codes.split(", "))
        rows.append(FaultRow(fault, tuple(commands.split(", ")), int(tries), numbers, said.strip("`")))
    return rows
