"""Signatures that ship with the package: those of presets whose passes nothing else describes, for the questions that are asked first.

A file is named by the digest of its inquiry. `make signatures` writes them anew, and fails when that changes one.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from bf16prof.errors import InputError
from bf16prof.files import LARGEST_DOCUMENT, read_up_to
from bf16prof.signatures.general import General
from bf16prof.signatures.inquiry import Inquiry, can_trace, versions
from bf16prof.signatures.signature import Signature

FOLDER = Path(__file__).parent / "presets"
SUFFIX, GENERAL = ".signature", ".general"


def file_of(inquiry: Inquiry) -> Path:
    """Where the answer lies, if it ships."""
    return FOLDER / f"{inquiry.digest}{SUFFIX}"


def find(inquiry: Inquiry) -> Signature | None:
    """The answer, where nothing could be recorded anew, or where the same releases are installed that it was recorded with."""
    path = file_of(inquiry)
    if not path.exists():
        return None
    with contextlib.suppress(InputError):  # one that is broken is as good as none
        signature = Signature.unpacked(read_up_to(LARGEST_DOCUMENT, path))
        if is_of_today(signature, inquiry):
            return signature
    return None


def general_file_of(inquiry: Inquiry) -> Path:
    """Where what holds of any batch and length lies, if it ships."""
    return _general_file(inquiry.general)


def _general_file(digest: str) -> Path:
    return FOLDER / f"{digest}{GENERAL}"


def find_general(inquiry: Inquiry) -> General | None:
    """What holds of any batch and length, under the same conditions as an answer; also what was recorded in bf16 or on another GPU, if that
    is the same."""
    for digest, is_in_bf16 in inquiry.as_shipped:
        found = _read_general(inquiry, digest)
        if found is not None and (found.is_that_of_fp16 or not is_in_bf16):
            return found
    return None


def _read_general(inquiry: Inquiry, digest: str) -> General | None:
    path = _general_file(digest)
    if not digest or not path.exists():
        return None
    with contextlib.suppress(InputError):
        general = General.unpacked(read_up_to(LARGEST_DOCUMENT, path))
        if is_of_today(general.whole, inquiry):
            return general
    return None


def is_of_today(signature: Signature, inquiry: Inquiry) -> bool:
    """Whether nothing could be recorded anew, or the same releases are installed that this was recorded with."""
    found = signature.versions
    return not can_trace(inquiry.job.profile.model) or _releases(found) == _releases({name: versions().get(name, "") for name in found})


def _releases(found: dict[str, str]) -> dict[str, str]:
    """Without how a release was built (`2.13.0+cpu`): a trace asks no device."""
    return {package: version.partition("+")[0] for package, version in found.items()}
