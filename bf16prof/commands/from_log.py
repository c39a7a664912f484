"""What a log says of its own case takes the place of flags that the user did not give, and is
said."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bf16prof.commands.flags import Asked, LogFlags
from bf16prof.scratch import temporary_folder

if TYPE_CHECKING:
    from bf16prof.imports.files import Sources

_FLAGS = {"gpus": "world_size", "zero": "zero_stage"}
_WORKLOAD = ("micro_batch_size", "gradient_accumulation_steps")


@contextlib.contextmanager
def filled_from_log(asked: Asked[LogFlags], sources: Sources, *, without_json: bool = False) -> Iterator[tuple[Asked[LogFlags], list[str]]]:
    """The flags filled in from the log, and what was taken over and what contradicts a flag.

    The DeepSpeed JSON that a log prints is that of the job, so it wins over single lines; as a file
    it lives as long as the context.
    """
    said = {name: sources.said(name) for name in (*_FLAGS.values(), *_WORKLOAD, "deepspeed")}
    given, changes, taken = asked.given(), dict[str, Any](), dict[str, str]()
    with temporary_folder() as folder:
        if said["deepspeed"] is not None and not given["ds_config"] and not without_json:
            path = folder / "deepspeed-of-the-log.json"
            path.write_text(json.dumps(said["deepspeed"]), encoding="utf-8")
            changes["ds_config"] = path
            taken["--ds-config"] = "the JSON that DeepSpeed printed"
        has_json = given["ds_config"] or "ds_config" in changes
        for key, name in _FLAGS.items():
            if said[name] is not None and not given[key] and not (key == "zero" and has_json):
                changes[key] = taken["--" + key] = str(said[name])
        for name in _WORKLOAD if not has_json else ():
            if said[name] is not None and given[name] is None:
                changes[name] = said[name]
                taken["--" + name.replace("_", "-")] = str(said[name])
        filled = asked.with_flags(**changes)
        yield filled, [*_told(taken), *_contradictions(filled.given(), said)]


def _told(taken: Mapping[str, str]) -> list[str]:
    return [f"taken from the log: {', '.join(f'{flag} {value}' for flag, value in taken.items())}"] if taken else []


def _contradictions(given: Mapping[str, Any], said: Mapping[str, Any]) -> list[str]:
    """Flags that name another case than the log does."""
    pairs = [("--" + key, str(given[key]), said[name]) for key, name in _FLAGS.items() if given[key]]
    return [f"{flag} {value}: the log says {log}" for flag, value, log in pairs if log is not None and value != str(log)]
