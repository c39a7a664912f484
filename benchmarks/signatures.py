"""Record the signatures that ship with the package anew, and say what has changed (`make signatures`).

Presets whose passes this package has not written down: in bf16, with and without checkpointing, at stages below 3 and at 3, at what is
assumed of batch and length. Those that are new are written; where one of before has changed, its new content is written too, every change
is printed, and the exit code is 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from bf16prof.cases import Job, Selection, expand
from bf16prof.closed_form.anatomy import inquiries_of
from bf16prof.engine.constraints import refusal_reason
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import Override, load_profile, preset_names
from bf16prof.records import Device
from bf16prof.signatures import shipped, store
from bf16prof.signatures.inquiry import Inquiry, about
from bf16prof.signatures.signature import Signature
from bf16prof.tracing.session import Session

GPUS = ("h100-80gb",)
STAGES = (2, 3)
RECIPE = "bf16-full"
"""One of those that run a model whose parameters are in bf16; a signature is that of all of them."""
SHOWN = 5
"""Events that are printed of a signature that has changed."""
BUILD = Path(__file__).parents[1] / "build"


def main() -> int:
    """Record, compare, write; whether anything has changed."""
    os.environ[store.FOLDER_VARIABLE] = str(BUILD)  # where it goes on if it was stopped
    shipped.FOLDER.mkdir(exist_ok=True)
    before = {path.name: path.read_bytes() for path in shipped.FOLDER.glob(f"*{shipped.SUFFIX}")}
    for path in shipped.FOLDER.glob(f"*{shipped.SUFFIX}"):
        path.unlink()  # so that none is taken for an answer
    asked = {preset: list(inquiries_of(list(_jobs(preset)))) for preset in preset_names()}
    session, has_changed = Session(), False
    for preset, inquiries in asked.items():
        session.answer(inquiries)
        for inquiry in inquiries:
            name = shipped.file_of(inquiry).name
            has_changed |= _write(f"{preset} ({about(inquiry.job)})", inquiry, before.pop(name, None))
    session.close()
    for name in before:
        sys.stdout.write(f"nothing asks for {name} any more: removed\n")
    return int(has_changed or bool(before))


def _jobs(preset: str) -> Iterator[Job]:
    for checkpointing in (False, True):
        profile = load_profile(preset, [Override("workload.activation_checkpointing", checkpointing, "make signatures")]).profile
        for gpu in GPUS:
            jobs = expand(Selection(profile, STAGES, [8], [RECIPE], Device.GPU, find_gpu(gpu)))
            yield from (job for job in jobs if refusal_reason(job) is None)


def _write(words: str, inquiry: Inquiry, before: bytes | None) -> bool:
    """Write a signature; whether it was there and was another one."""
    found = store.find(inquiry)
    if found is None or found.problem:
        sys.stdout.write(f"{words}: none, {store.problem(inquiry) or (found and found.problem)}\n")
        return before is not None
    content = found.packed()
    shipped.file_of(inquiry).write_bytes(content)
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
