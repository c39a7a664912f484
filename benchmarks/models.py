"""Which model types of transformers have a closed form, and how near it comes to the dry run.

Of each a small model and a job are drawn, its own code is recorded, and its peaks are held against
the dry run of the real engine.

`make models` (an hour on two cores; nightly), or `python benchmarks/models.py SEED [TYPE ...]`.
What is done is kept in `build/models.jsonl`, so that it goes on where it was stopped; types come in
a drawn order, so that any part of them is a fair sample. Writes docs/models.md after every few
types; not where types were named.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from drawn_models import drawn_job, model_types
from judged import Judgement, judged_against
from model_page import page

from bf16prof.cases import Job
from bf16prof.closed_form.anatomy import anatomy_of, inquiries_of
from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.gap import peaks_gap
from bf16prof.dry_run.runner import DryRunFailed, DryRunRefused, Options, simulate
from bf16prof.errors import Bf16profError
from bf16prof.records import MemoryRecord
from bf16prof.signatures import store
from bf16prof.signatures.inquiry import versions
from bf16prof.tracing.session import Session

ROOT = Path(__file__).parents[1]
DONE = ROOT / "build" / "models.jsonl"
PAGE = ROOT / "docs" / "models.md"
AT_ONCE = 8
"""Types whose dry runs share the import of torch and transformers."""


@dataclass(frozen=True)
class ModelRow:
    """What is known of a model type: how near its closed form comes, or why there is nothing to
    compare (`reason`)."""

    seed: int
    code: str
    name: str
    job: str = ""
    steady_error_bytes: int = 0
    worst: float = 0.0
    is_phase_right: bool = True
    reason: str = ""


def main(seed: int, chosen: Sequence[str]) -> None:
    """Look at what was not looked at yet, and print what docs/models.md has."""
    code = ", ".join(f"{package} {version}" for package, version in versions().items())
    known = {} if chosen else {row.name: row for row in _done() if (row.seed, row.code) == (seed, code)}
    everything = list(chosen) or model_types()
    todo = [name for name in random.Random(seed).sample(everything, len(everything)) if name not in known]
    DONE.parent.mkdir(exist_ok=True)
    session = Session()
    for start in range(0, len(todo), AT_ONCE):
        for row in _looked_at(session, seed, code, todo[start : start + AT_ONCE]):
            known[row.name] = row
            sys.stderr.write(f"{row.name}: {row.reason or f'{row.worst:+.4%}, steady {row.steady_error_bytes:+}'}\n")
            if not chosen:
                with DONE.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(asdict(row)) + "\n")
        if not chosen:
            PAGE.write_text(page(seed, code, list(known.values()), len(everything)), encoding="utf-8")
    session.close()
    sys.stdout.write(page(seed, code, list(known.values()), len(everything)))


def _done() -> Iterator[ModelRow]:
    lines = DONE.read_text(encoding="utf-8").splitlines() if DONE.exists() else []
    return (ModelRow(**json.loads(line)) for line in lines)


def _looked_at(session: Session, seed: int, code: str, names: Iterable[str]) -> Iterator[ModelRow]:
    jobs: dict[str, Job] = {}
    for name in names:
        try:
            jobs[name] = drawn_job(name, random.Random(f"{seed} {name}"))
        except Exception as error:  # noqa: BLE001 - a configuration class raises what it likes
            yield ModelRow(seed, code, name, reason=f"no small configuration: {_line(error)}")
    store.trace_with(None)
    session.answer(inquiries_of(list(jobs.values())))
    reasons = {name: reason for name, job in jobs.items() if (reason := _gap(job))}
    for name, found in _judged({name: job for name, job in jobs.items() if name not in reasons}):
        if isinstance(found, str):
            reasons[name] = found
        else:
            right = found.names_the_phase or found.margin < 0.02
            yield ModelRow(seed, code, name, found.label, found.steady_error_bytes, found.worst, right)
    for name, reason in reasons.items():
        yield ModelRow(seed, code, name, reason=reason)
    store.forget()


def _gap(job: Job) -> str:
    """Why there is no closed form; empty where there is one."""
    try:
        anatomy_of(job)
        return _line(peaks_gap(job, Engine.of(job)) or "")
    except Bf16profError as error:
        return _line(error.message)


def _judged(jobs: dict[str, Job]) -> Iterator[tuple[str, Judgement | str]]:
    """How near the closed form is, or why there is no dry run to compare with."""
    dry: dict[int, MemoryRecord] = {}
    reasons: dict[int, str] = {}
    try:
        dry = dict(enumerate(simulate(list(jobs.values()), options=Options(expandable_segments=True)))) if jobs else {}
    except (DryRunFailed, DryRunRefused) as error:
        dry, reasons = dict(error.records), dict(error.reasons)
    for place, (name, job) in enumerate(jobs.items()):
        if place in dry:
            yield name, judged_against(job, dry[place])
        else:
            yield name, f"recorded, and no dry run to compare with: {_line(reasons[place])}"


def _line(said: object) -> str:
    return " ".join(str(said).split())


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0, sys.argv[2:])
