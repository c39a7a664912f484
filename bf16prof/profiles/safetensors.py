"""Names and shapes of the tensors in a safetensors checkpoint, from its header alone: the data need
not be there, and is never read.

The format: eight bytes with the length of a JSON object (little-endian), the object, the data
(huggingface/safetensors, README.md). A checkpoint of several files has an index beside them
(`model.safetensors.index.json`), which says in which file each tensor is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, TypeGuard

from bf16prof.errors import InputError
from bf16prof.files import opened
from bf16prof.profiles.plain import parse_json_object, read_json_object

LARGEST_HEADER_BYTES = 100_000_000
"""The format's own limit (safetensors/src/tensor.rs, MAX_HEADER_SIZE)."""
LENGTH_BYTES = 8
MOST_DIMENSIONS = 16
PARAMETER_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of one element, by the dtypes that parameters are trained in."""
NO_PARAMETER = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias|attention\.masked_bias|running_mean|running_var|num_batches_tracked|position_ids)$"
)
"""Buffers that checkpoints hold as well."""
MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
"""The causal masks of older checkpoints of GPT-2 and GPT-NeoX: of four dimensions, which no bias
has."""


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The parameters of a `.safetensors` file, or of all files of an index, by name.

    Raises `InputError` naming the file and what is wrong with it.
    """
    tensors = _of_index(path) if path.suffix == ".json" else _tensors(path)
    shapes = {name: _shape(path, name, entry) for name, entry in tensors.items()}
    found = {name: shape for name, shape in shapes.items() if not _is_buffer(name, shape)}
    for name in found:
        if tensors[name]["dtype"] not in PARAMETER_BYTES:
            raise InputError(
                f"{path}: {name:.120} is of {tensors[name]['dtype']!r:.20}: expected one of {', '.join(PARAMETER_BYTES)}",
                hint="a quantised checkpoint does not hold the parameters as they are trained",
            )
    if not found:
        raise InputError(f"{path}: no parameters in it")
    return found


def _of_index(path: Path) -> dict[str, Any]:
    """The tensors of all files of an index."""
    files = read_json_object(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) and _is_name(file) for file in files.values()):
        raise InputError(f"{path}: weight_map: expected a table of the names of files beside this one")
    parts = {file: _tensors(path.with_name(file)) for file in sorted(set(files.values()))}
    for name, file in files.items():
        if name not in parts[file]:
            raise InputError(f"{path.with_name(file)}: no tensor {name!r:.120}, which {path.name} says is there")
    return {name: parts[files[name]][name] for name in sorted(files)}


def _is_name(text: str) -> bool:
    """Whether a text is the name of a file in a folder, and no way out of it."""
    return PurePath(text).name == text and text not in ("", ".", "..")


def _tensors(path: Path) -> dict[str, Any]:
    """The entries of a file's header, without its metadata."""
    content = _header(path)
    table = parse_json_object(content, f"{path}: header")
    return {name: entry for name, entry in sorted(table.items()) if name != "__metadata__"}


def _header(path: Path) -> bytes:
    with opened(path) as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if not 1 < length <= LARGEST_HEADER_BYTES:
            raise InputError(f"{path}: not a safetensors file: its header would be of {length} bytes")
        content = stream.read(length)
    if len(content) < length:
        raise InputError(f"{path}: its header ends after {len(content)} of {length} bytes")
    return content


def _shape(path: Path, name: str, entry: object) -> list[int]:
    """The shape of one entry, which is as long as its data."""
    shape = entry.get("shape") if isinstance(entry, Mapping) else None
    whole = isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS and all(_is_extent(extent) for extent in shape)
    if not (isinstance(entry, Mapping) and isinstance(shape, list) and whole and isinstance(entry.get("dtype"), str)):
        raise InputError(f"{path}: {name:.120}: expected a dtype and a shape of whole numbers")
    begin, end = offsets if _are_offsets(offsets := entry.get("data_offsets")) else (0, -1)
    if entry["dtype"] in PARAMETER_BYTES and end - begin != PARAMETER_BYTES[entry["dtype"]] * math.prod(shape):
        raise InputError(f"{path}: {name:.120}: data_offsets do not fit a shape of {shape} in {entry['dtype']}")
    return shape


def _is_extent(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def _are_offsets(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)


def _is_buffer(name: str, shape: list[int]) -> bool:
    return bool(NO_PARAMETER.search(name) or (MASK.search(name) and len(shape) == 4))
