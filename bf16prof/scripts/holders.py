"""What the training loop holds between steps, by the script's own names: the tensors in the
variables of the frames above `engine.step`."""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

DEPTH = 4
"""How deep objects are looked into: `self.state.outputs.logits` is three below `self`."""

MOST_OBJECTS = 20_000
"""Objects that are looked at per variable; a tokenizer has more."""


def held_by_frames(frame: FrameType | None, skipped: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    """Tensors by the variable that holds them, `logits (train.py:312)`, innermost frame first.

    Parameters of models are left out, and the frames of files whose paths start with one of
    `skipped`.
    """
    found: dict[str, list[Any]] = {}
    while frame is not None:
        if not frame.f_code.co_filename.startswith(skipped):
            _look_into(frame, found)
        frame = frame.f_back
    return found


def are_outputs(kept: Mapping[str, Collection[Any]]) -> bool:
    """Whether what is held are a model's outputs: more than single numbers, made from parameters. A
    batch and a loss are not."""
    return any(tensor.grad_fn is not None and tensor.numel() > 1 for tensors in kept.values() for tensor in tensors)


def _look_into(frame: FrameType, found: dict[str, list[Any]]) -> None:
    for name, value in list(frame.f_locals.items()):
        try:
            tensors = list(_tensors(value, DEPTH, iter(range(MOST_OBJECTS)), set()))
        except Exception:  # noqa: BLE001 - whatever objects of a script may raise when they are looked at
            continue
        if tensors:
            place = f"{Path(frame.f_code.co_filename).name}:{line_of(frame.f_code, name, frame.f_lineno)}"
            found.setdefault(f"{name} ({place})", []).extend(tensors)
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED and sys.version_info < (3, 13):
        frame.f_locals.clear()  # Python keeps this copy of the variables with the frame, and with it every tensor


def line_of(code: CodeType, name: str, before: int) -> int:
    """The line that has set a variable last: of those that set it the nearest above line `before`,
    else the last below it.

    A parameter is set where its function begins.
    """
    lines = _lines_setting(code).get(name)
    if not lines:
        return code.co_firstlineno
    above = [line for line in lines if line <= before]
    return max(above) if above else max(lines)


def _lines_setting(code: CodeType) -> dict[str, list[int]]:
    lines: dict[str, list[int]] = {}
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        line = getattr(instruction, "line_number", None) or instruction.starts_line or line
        if instruction.opname.startswith("STORE_") and isinstance(instruction.argval, str):
            lines.setdefault(instruction.argval, []).append(int(line))
    return lines


def _tensors(value: Any, depth: int, left: Iterator[int], seen: set[int]) -> Iterator[Any]:
    """The tensors in a value: itself, or in nested containers and objects. `left` runs out when
    enough objects have been looked at."""
    import torch

    if isinstance(value, torch.Tensor):
        if not isinstance(value, torch.nn.Parameter):
            yield value
        return
    if not depth or id(value) in seen or _is_opaque(value):
        return
    seen.add(id(value))
    for inner, _ in zip(_parts(value), left, strict=False):
        yield from _tensors(inner, depth - 1, left, seen)


def _parts(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return tuple(dict.values(value))  # not by a method of its own, which may load what the script has never asked for
    if isinstance(value, list | tuple | set):
        return value
    attributes: Mapping[str, Any] = getattr(value, "__dict__", {})
    return tuple(attributes.values())


def _is_opaque(value: Any) -> bool:
    """What holds tensors that are attributed otherwise, or none."""
    import torch

    kinds = (torch.nn.Module, torch.optim.Optimizer, ModuleType, FunctionType, type, str, bytes, int, float, torch.dtype, torch.device)
    return value is None or isinstance(value, kinds) or type(value).__module__.partition(".")[0] in ("deepspeed", "bf16prof", "logging")
