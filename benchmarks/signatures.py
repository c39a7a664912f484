"""Record the signatures that ship with the package anew, and say what has changed (`make
signatures`).

Of presets of transformers' models: in bf16, with and without checkpointing, at stages below 3 and
at 3, for any batch and length, and whether the same happens in fp16; where that does not cover what
is assumed of both, for that. In the other precisions that `estimate` shows: for what is assumed
alone. Those that are new are written; where one of before has changed, its new content is written
too, every change is printed, and the exit code is 1. Names of presets as arguments: those alone;
`--points`: only what is for one point.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from bf16prof.cases import Job, Selection, expand
from bf16prof.closed_form.anatomy import inquiries_of
from bf16prof.engine.constraints import refusal_reason
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import Override, load_profile, preset_names
from bf16prof.reductions import processor_of
from bf16prof.signatures import shipped, store
from bf16prof.signatures.general import General, Range
from bf16prof.signatures.inquiry import Inquiry, about
from bf16prof.signatures.sampling import folded, generalized, is_same_in_fp16
from bf16prof.signatures.signature import Signature
from bf16prof.tracing.session import Session
from bf16prof.vocabulary import Device

GPUS = ("h100-80gb", "a100-80gb")
"""One for each set of attention kernels that ships: cuDNN's come first on compute capability 9.0,
flash attention on 8.0."""
STAGES = (2, 3)
RECIPE, IN_FP16 = "bf16-full", "fp16-fp32-master"
"""Some of those that run a model whose parameters are in bf16, and in fp16; a signature is that of
all of them."""
OTHERS = ("fp32", "autocast-fp32", "bf16-full-autocast")
"""Of the other precisions that are shown first."""
IN_ALL_PRECISIONS = ("llama3.1-8b",)
"""Presets that are recorded for any batch and length in those, too: what the README asks for."""
SHOWN = 5
"""Events that are printed of a signature that has changed."""
BUILD = Path(__file__).parents[1] / "build"


def main() -> int:
    """Record, compare, write; whether anything has changed."""
    os.environ[store.FOLDER_VARIABLE] = str(BUILD)  # where it goes on if it was stopped
    shipped.FOLDER.mkdir(exist_ok=True)
    named = [each for each in sys.argv[1:] if each != "--points"] or preset_names()
    session, has_changed, asked = Session(), False, set()
    for preset in named:
        for job in _jobs(preset, (RECIPE,), (False, True), GPUS) if "--points" not in sys.argv else ():
            for inquiry in inquiries_of([job]):
                words = f"{preset} ({about(inquiry.job)})"
                has_changed |= _write_general(words, inquiry, session) | _write(words, inquiry, session)
                asked |= {shipped.general_file_of(inquiry), shipped.file_of(inquiry)}
        is_whole = preset in IN_ALL_PRECISIONS and "--points" not in sys.argv
        for inquiry in inquiries_of(list(_jobs(preset, OTHERS, (False, True) if is_whole else (False,), GPUS[:1]))):
            write = _write_general if is_whole else _write_point
            has_changed |= write(f"{preset} ({about(inquiry.job)})", inquiry, session)
            asked.add(shipped.general_file_of(inquiry))
    session.close()
    is_all = sys.argv[1:] == []
    idle = [path for path in shipped.FOLDER.iterdir() if path not in asked] if is_all else []
    for path in idle:
        path.unlink()
        sys.stdout.write(f"nothing asks for {path.name} any more: removed\n")
    return int(has_changed or bool(idle))


def _jobs(preset: str, recipes: Sequence[str], checkpointing: Sequence[bool], gpus: Sequence[str]) -> Iterator[Job]:
    for is_on in checkpointing:
        profile = load_profile(preset, [Override("workload.activation_checkpointing", is_on, "make signatures")]).profile
        for gpu in gpus:
            jobs = expand(Selection(profile, STAGES, [8], recipes, Device.GPU, find_gpu(gpu)))
            yield from (job for job in jobs if refusal_reason(job) is None)


def _write_general(words: str, inquiry: Inquiry, session: Session) -> bool:
    """Write what holds of any batch and length; whether it was there and was another."""
    found = store.general_of(inquiry, is_shipped=False)
    if found is None and (found := generalized(inquiry, session.record)) is not None:
        same = any(
            is_same_in_fp16(found, each, session.record) for each in _in_fp16(inquiry.job) if (inquiry.general, True) in each.as_shipped
        )
        found = dataclasses.replace(found, is_that_of_fp16=same)
        store.keep_general(inquiry, found)
    return _write_found(words, inquiry, found)


def _in_fp16(job: Job) -> list[Inquiry]:
    selection = Selection(job.profile, [job.case.zero_stage], [job.case.world_size], [IN_FP16], job.device, job.gpu)
    return inquiries_of(expand(selection))


def _write_point(words: str, inquiry: Inquiry, session: Session) -> bool:
    """The same of one batch and length."""
    found = store.general_of(inquiry, is_shipped=False)
    if found is None and (found := folded(inquiry, session.record)) is not None:
        store.keep_general(inquiry, found)
    return _write_found(words, inquiry, found)


def _write_found(words: str, inquiry: Inquiry, found: General | None) -> bool:
    path = shipped.general_file_of(inquiry)
    before = path.read_bytes() if path.exists() else None
    if found is None:
        path.unlink(missing_ok=True)
        sys.stdout.write(f"{words}: nothing is known in this way\n")
        return before is not None
    content = found.packed()
    path.write_bytes(content)
    for piece in found.pieces:
        sys.stdout.write(f"{words}: {_range(piece.range)}" + ", fp16 too" * found.is_that_of_fp16 + "\n")
    if before is None:
        sys.stdout.write(f"{words}: new, {len(content):,} bytes\n")
    elif before != content:
        sys.stdout.write(f"{words}: changed\n" + "".join(f"  {line}\n" for line in _general_changes(before, found, inquiry)))
    return before is not None and before != content


def _general_changes(before: bytes, now: General, inquiry: Inquiry) -> Iterator[str]:
    """Which bytes are others, at the ends of every range."""
    old = General.unpacked(before)
    for piece in now.pieces:
        for point in zip(piece.range.batches, piece.range.lengths, strict=True):
            was, found = (general.at(point, processor_of(inquiry.job.gpu)) for general in (old, now))
            if was is None or found is None:
                yield f"{point[0]} x {point[1]}: was not known"
            else:
                yield from (f"{point[0]} x {point[1]}: {line}" for line in _changes(was, found))


def _range(found: Range) -> str:
    (fewest, most), (shortest, longest) = found.batches, found.lengths
    return f"{fewest} to {most} x {shortest} to {longest}" + f" in steps of {found.multiple}" * (found.multiple > 1)


def _write(words: str, inquiry: Inquiry, session: Session) -> bool:
    """Write the answer at one point, unless the general one has it; whether it was there and was
    another one.

    An exact answer of before is held against the general one.
    """
    path = shipped.file_of(inquiry)
    before = path.read_bytes() if path.exists() else None
    general = store.general_of(inquiry, is_shipped=False)
    found = general.at(inquiry.point, processor_of(inquiry.job.gpu)) if general is not None else None
    if found is not None:
        path.unlink(missing_ok=True)
        lines = list(_changes(Signature.unpacked(before), found)) if before is not None else []
        if lines:
            sys.stdout.write(f"{words}: changed\n" + "".join(f"  {line}\n" for line in lines))
        return bool(lines)
    path.unlink(missing_ok=True)  # so that it is not taken for the answer
    session.answer([inquiry])
    found = store.find(inquiry)
    if found is None or found.problem:
        sys.stdout.write(f"{words}: none, {store.problem(inquiry) or (found and found.problem)}\n")
        return before is not None
    content = found.packed()
    path.write_bytes(content)
    if before is None:
        sys.stdout.write(f"{words}: new, {len(content):,} bytes\n")
    elif before != content:
        sys.stdout.write(f"{words}: changed\n" + "".join(f"  {line}\n" for line in _changes(Signature.unpacked(before), found)))
    return before is not None and before != content


def _changes(old: Signature, new: Signature) -> Iterator[str]:
    """Which bytes are others."""
    for what in ("parameters", "held", "modules", "outputs", "loss_bytes", "building", "versions"):
        if (was := getattr(old, what)) != (now := getattr(new, what)):
            pairs = list(zip_longest(was, now)) if isinstance(was, tuple) else [(was, now)]
            differing = [(first, second) for first, second in pairs if first != second]
            yield f"{what}: {differing[0][0]} is {differing[0][1]} now" + f" (and {len(differing) - 1} more)" * (len(differing) > 1)
    events = [(place, *pair) for place, pair in enumerate(zip_longest(old.events, new.events)) if pair[0] != pair[1]]
    for place, was, now in events[:SHOWN]:
        yield f"event {place}: {was} is {now} now"
    if len(events) > SHOWN:
        yield f"and {len(events) - SHOWN:,} more of {len(new.events):,} events"


if __name__ == "__main__":
    sys.exit(main())
