"""Signatures that ship with the package: those of transformers' models among the presets, for the
questions that are asked first.

A file is named by the digest of its inquiry. `make signatures` writes them anew, and fails when
that changes one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bf16prof.errors import InputError
from bf16prof.files import LARGEST_DOCUMENT, read_up_to
from bf16prof.signatures.general import General
from bf16prof.signatures.inquiry import Inquiry, can_trace, versions
from bf16prof.signatures.signature import Signature

FOLDER = Path(__file__).parent / "presets"
SUFFIX, GENERAL = ".signature", ".general"

T = TypeVar("T")


def file_of(inquiry: Inquiry) -> Path:
    """Where the answer lies, if it ships."""
    return FOLDER / f"{inquiry.digest}{SUFFIX}"


def find(inquiry: Inquiry) -> Signature | None:
    """The answer, where nothing could be recorded anew, or where the same releases are installed
    that it was recorded with."""
    signature = read_file(file_of(inquiry), Signature.unpacked)
    return signature if signature is not None and is_of_today(signature, inquiry) else None


def general_file_of(inquiry: Inquiry) -> Path:
    """Where what holds of any batch and length lies, if it ships."""
    return _general_file(inquiry.general)


def _general_file(digest: str) -> Path:
    return FOLDER / f"{digest}{GENERAL}"


def find_general(inquiry: Inquiry) -> General | None:
    """What holds of any batch and length, under the same conditions as an answer; also what was
    recorded in bf16 or on another GPU, if that is the same."""
    for digest, is_in_bf16 in inquiry.as_shipped:
        found = read_file(_general_file(digest), General.unpacked)
        if found is not None and is_of_today(found.whole, inquiry) and (found.is_that_of_fp16 or not is_in_bf16):
            return found
    return None


def read_file(path: Path, unpacked: Callable[[bytes], T]) -> T | None:
    """What a file has; one that is broken, of another format or of another user's is as good as
    none."""
    with contextlib.suppress(InputError, OSError):
        if path.exists():
            return unpacked(read_up_to(LARGEST_DOCUMENT, path))
    return None


def is_of_today(signature: Signature, inquiry: Inquiry) -> bool:
    """Whether nothing could be recorded anew, or the same releases are installed that this was
    recorded with."""
    found = signature.versions
    return not can_trace(inquiry.job.profile.model) or _releases(found) == _releases({name: versions().get(name, "") for name in found})


def _releases(found: dict[str, str]) -> dict[str, str]:
    """Without how a release was built (`2.13.0+cpu`): a trace asks no device."""
    return {package: version.partition("+")[0] for package, version in found.items()}
