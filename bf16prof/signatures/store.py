"""Where signatures are kept: in this process, as files in the user's cache directory, and as those
that ship with the package.

Files are written whole or not at all, and one name always means the same content, so that any
number of processes may read and write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bf16prof.errors import InputError
from bf16prof.files import LARGEST_DOCUMENT, NotWritten, read_up_to, write_bytes
from bf16prof.reductions import processor_of
from bf16prof.signatures import shipped
from bf16prof.signatures.general import General
from bf16prof.signatures.inquiry import Inquiry, about, can_trace, environment
from bf16prof.signatures.signature import Signature
from bf16prof.signatures.sources import ReadSources

FOLDER_VARIABLE = "BF16PROF_CACHE"
SUFFIX = shipped.SUFFIX
SOURCES = ".sources"

Tracer = Callable[[Sequence[Inquiry]], None]
"""Answers these inquiries: calls `keep` or `give_up` for each."""


@dataclass
class _Known:
    """What this process knows, and who answers what it does not."""

    signatures: dict[str, Signature]
    problems: dict[str, str]
    generals: dict[str, General]
    tracer: Tracer | None


_known = _Known({}, {}, {}, None)


def folder() -> Path:
    """`BF16PROF_CACHE`, else `bf16prof` in the user's cache directory; signatures have a folder of
    their own in it."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    root = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bf16prof"
    return root / "signatures"


def find(inquiry: Inquiry) -> Signature | None:
    """The answer: remembered, from a file, shipped, or from the tracer, if there is one."""
    if (found := _recalled(inquiry)) is None and _known.tracer is not None and inquiry.digest not in _known.problems:
        _known.tracer([inquiry])
        found = _recalled(inquiry)
    return found


def missing(inquiries: Sequence[Inquiry]) -> list[Inquiry]:
    """Those, each once, that are neither answered nor given up."""
    distinct = {inquiry.digest: inquiry for inquiry in inquiries}
    return [each for each in distinct.values() if each.digest not in _known.problems and _recalled(each) is None]


def problem(inquiry: Inquiry) -> str | None:
    """Why there is no answer, if that was found out."""
    return _known.problems.get(inquiry.digest)


def keep(inquiry: Inquiry, content: bytes, sources: bytes | None = None) -> None:
    """Remember an answer, and keep it for other processes as far as its folder can be written;
    without that it still is an answer.

    `sources`: what it depends on besides the inquiry (`ReadSources`), without which one that is not
    lasting is not kept.
    """
    _known.signatures[inquiry.digest] = Signature.unpacked(content)
    if not inquiry.is_lasting and sources is None:
        return
    with contextlib.suppress(OSError, NotWritten):
        folder().mkdir(parents=True, exist_ok=True)
        if sources is not None:
            write_bytes(folder() / (inquiry.name + SOURCES), sources, replace=True)
        write_bytes(folder() / (inquiry.name + SUFFIX), content)


def give_up(inquiry: Inquiry, reason: str) -> None:
    """Remember why there is no answer."""
    _known.problems[inquiry.digest] = reason


def trace_with(tracer: Tracer | None) -> None:
    """Who answers from now on; `None`: nobody."""
    _known.tracer = tracer


def forget() -> None:
    """Nothing is remembered; files stay."""
    _known.signatures.clear()
    _known.problems.clear()
    _known.generals.clear()


def _recalled(inquiry: Inquiry) -> Signature | None:
    if inquiry.digest not in _known.signatures:
        if inquiry.is_lasting:
            exact = shipped.read_file(folder() / (inquiry.name + SUFFIX), Signature.unpacked) or shipped.find(inquiry)
            found = exact or _in_general(inquiry) or _of_other_code(inquiry)
        else:
            found = _of_a_function(inquiry)
        if found is not None:
            _known.signatures[inquiry.digest] = found
    return _known.signatures.get(inquiry.digest)


def _in_general(inquiry: Inquiry) -> Signature | None:
    """The answer at the inquiry's point, from what is known of any."""
    general = general_of(inquiry)
    found = general and general.at(inquiry.point, processor_of(inquiry.job.gpu))
    return dataclasses.replace(found, about=about(inquiry.job)) if found else None


def general_of(inquiry: Inquiry, *, is_shipped: bool = True) -> General | None:
    """What is known of the inquiry's model at any batch and length: remembered, from a file, or
    shipped."""
    if not (name := inquiry.general):
        return None
    if name not in _known.generals:
        found = shipped.read_file(_general_file(inquiry), General.unpacked) or (shipped.find_general(inquiry) if is_shipped else None)
        if found is None:
            return None
        _known.generals[name] = found
    return _known.generals[name]


def keep_general(inquiry: Inquiry, general: General) -> None:
    """Remember what holds beside one point, and what was known before; keep it as far as its folder
    can be written."""
    before = _known.generals.get(inquiry.general)
    if before is not None:
        general = dataclasses.replace(general, pieces=(*general.pieces, *before.pieces))
    _known.generals[inquiry.general] = general
    with contextlib.suppress(OSError, NotWritten):
        folder().mkdir(parents=True, exist_ok=True)
        write_bytes(_general_file(inquiry), general.packed(), replace=True)


def _general_file(inquiry: Inquiry) -> Path:
    return folder() / f"{inquiry.general}-{environment()}{shipped.GENERAL}"


def _of_a_function(inquiry: Inquiry) -> Signature | None:
    """What was recorded of a function of the user's own, if all that it had read is as it was."""
    kept, known = folder() / (inquiry.name + SUFFIX), folder() / (inquiry.name + SOURCES)
    with contextlib.suppress(InputError):  # what nobody has kept, what is broken, or gone meanwhile, is as good as nothing
        content = read_up_to(LARGEST_DOCUMENT, kept)
        sources = ReadSources.unpacked(read_up_to(LARGEST_DOCUMENT, known))
        return Signature.unpacked(content) if sources is not None and sources.hold(content) else None
    return None


def _of_other_code(inquiry: Inquiry) -> Signature | None:
    """Where nothing could be traced anew, what other code has answered; it says which
    (`versions`)."""
    if can_trace(inquiry.job.profile.model):
        return None
    others: list[Path] = []
    with contextlib.suppress(OSError):  # a cache of another user's, which this one may not look into, is as good as none
        others = sorted(folder().glob(f"{inquiry.digest}-*{SUFFIX}"), key=lambda each: each.stat().st_mtime)
    return shipped.read_file(others[-1], Signature.unpacked) if others else None


@dataclass(frozen=True)
class CachedSignature:
    """A file of the cache: its bytes, what was traced in a few words, and the versions of the code
    that ran."""

    name: str
    about: str
    bytes: int
    parameters: int
    events: int
    versions: dict[str, str]


def entries() -> list[CachedSignature]:
    """Every file that can be read."""
    found = []
    for path in sorted(folder().glob(f"*{SUFFIX}")):
        with contextlib.suppress(InputError):
            content = read_up_to(LARGEST_DOCUMENT, path)
            signature = Signature.unpacked(content)
            found.append(_entry(path, signature, len(content), len(signature.events)))
    for path in sorted(folder().glob(f"*{shipped.GENERAL}")):
        with contextlib.suppress(InputError):
            content = read_up_to(LARGEST_DOCUMENT, path)
            general = General.unpacked(content)
            found.append(_entry(path, general.whole, len(content), general.events))
    return found


def _entry(path: Path, signature: Signature, size: int, events: int) -> CachedSignature:
    elements = sum(each.numel for each in signature.parameters)
    return CachedSignature(path.stem, signature.about, size, elements, events, signature.versions)


def clear() -> int:
    """Remove all files of the cache: how many there were."""
    count = 0
    general = shipped.GENERAL
    beside = [*folder().glob(f"*{SOURCES}"), *folder().glob(f".*{SUFFIX}*.part"), *folder().glob(f".*{general}*.part")]
    for path in [*folder().glob(f"*{SUFFIX}"), *folder().glob(f"*{general}"), *beside]:
        with contextlib.suppress(FileNotFoundError):  # somebody else has
            path.unlink()
            count += path.suffix in (SUFFIX, general)
    return count
