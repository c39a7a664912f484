"""What stands after `--`, and how it is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bf16prof.errors import InputError
from bf16prof.scripts.command import Script, read_script
from bf16prof.scripts.dashes import split


def test_the_first_dashes_divide_a_command() -> None:
    assert split(["simulate", "--gpus", "2", "--", "train.py", "--", "-x"]) == (["simulate", "--gpus", "2"], ["train.py", "--", "-x"])
    assert split(["simulate", "--gpus", "2"]) == (["simulate", "--gpus", "2"], None)


def test_a_file_a_module_or_what_one_types_before_them(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text("")
    assert read_script([str(file), "--lr", "1"]) == Script(path=str(file), arguments=("--lr", "1"))
    assert read_script(["python3", str(file)]).name == "train.py"
    assert read_script(["-m", "pkg.mod", "-m"]) == Script(module="pkg.mod", arguments=("-m",))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing stands after --"),
        (["nothere.py"], "nothere.py: no such file"),
        (["-m"], "no module stands after it"),
        (["--lr", "1"], "expected a script"),
        (["torchrun", "train.py"], "a launcher"),
        (["."], "a folder"),
    ],
)
def test_what_is_no_script_is_refused(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        read_script(words)


TELLS = """
import json, sys, __main__
sys.stdout.write(json.dumps([sys.argv, sys.path[0], __name__, __file__, __main__.__dict__ is globals(), __spec__ is None]))
"""
RUNS = "import sys; from bf16prof.scripts import command, main; e = main.run(command.read_script(sys.argv[1:]))"


def _output(command: list[str], folder: Path) -> tuple[str, int]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), *([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [])])
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    return done.stdout, done.returncode


@pytest.mark.parametrize("words", [["sub/tell.py", "--a", "b"], ["-m", "sub.tell", "c"]])
def test_a_script_finds_what_python_gives_it(words: list[str], tmp_path: Path) -> None:
    # GIVEN a script that tells where it finds itself
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "tell.py").write_text(TELLS)
    # WHEN python runs it, and this package does
    expected, _ = _output(words, tmp_path)
    told, _ = _output(["-c", RUNS, *words], tmp_path)
    # THEN it is told the same
    assert told == expected


ENDINGS = {
    "raise ValueError('no\\n good')": (1, "raised ValueError: no good (s.py:1)"),
    "import sys; sys.exit(3)": (3, "left with exit code 3"),
    "import sys; sys.exit('so long')": (1, "left with: so long"),
    "import sys; sys.exit()": (0, ""),
    "x = (": (1, "raised SyntaxError: '(' was never closed (s.py, line 1) (s.py:1)"),
    "import json\njson.loads('no')": (1, "raised JSONDecodeError: Expecting value: line 1 column 1 (char 0) (s.py:2)"),
    "pass": (0, ""),
}  # fmt: skip


@pytest.mark.parametrize(("text", "ending"), ENDINGS.items())
def test_how_a_script_ends(text: str, ending: tuple[int, str], tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text(text)
    said, _ = _output(["-c", f"{RUNS}; sys.stdout.write(repr((e.code, e.message)))", "s.py"], tmp_path)
    assert said == repr(ending)
