"""What stands after `--`: a training script and its arguments, as they would stand after
`python`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bf16prof.errors import InputError
from bf16prof.vocabulary import STRICT

EXAMPLE = "as in: -- train.py --its args, or: -- -m package.module --its args"
PYTHONS = ("python", "python3")
LAUNCHERS = ("deepspeed", "torchrun", "accelerate", "srun", "mpirun", "mpiexec")


@dataclass(frozen=True)
class Script:
    """A file, or a module (`python -m`), and the arguments that it gets."""

    __pydantic_config__ = STRICT

    path: str = ""
    module: str = ""
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What people call it: `train.py`, or `package.module`."""
        return self.module or Path(self.path).name

    @property
    def words(self) -> list[str]:
        """As it stands after `python`."""
        return [*(("-m", self.module) if self.module else (self.path,)), *self.arguments]


def read_script(words: Sequence[str]) -> Script:
    """The script that these words name. Raises `InputError` where they name none that can be run
    here."""
    if words and Path(words[0]).name in PYTHONS:
        words = words[1:]
    if not words:
        raise InputError("nothing stands after --", hint=EXAMPLE)
    first, *rest = words
    if first in LAUNCHERS:
        raise InputError(f"-- {first}: a launcher, and bf16prof launches the script itself", hint=f"name the script alone, {EXAMPLE}")
    if first == "-m":
        if not rest:
            raise InputError("-- -m: no module stands after it", hint=EXAMPLE)
        return Script(module=rest[0], arguments=tuple(rest[1:]))
    if first.startswith("-"):
        raise InputError(f"-- {first}: expected a script or -m MODULE", hint=EXAMPLE)
    _require_file(Path(first))
    return Script(path=first, arguments=tuple(rest))


def _require_file(path: Path) -> None:
    """Raise `InputError` unless the file can be read."""
    try:
        if path.is_dir():
            raise InputError(f"-- {path}: a folder", hint=f"name the script in it, {EXAMPLE}")
        if not path.exists():
            raise InputError(f"-- {path}: no such file", hint=EXAMPLE)
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"-- {path}: {error.strerror}") from error
