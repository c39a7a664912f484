"""Which model types of transformers have a closed form, and how near it comes to the dry run.

Of each a small model and a job are drawn, its own code is recorded, and its peaks are held against the dry run of the real engine.

`make models` (an hour on two cores; nightly), or `python benchmarks/models.py SEED [TYPE ...]`. Writes docs/models.md when it has looked at
all types.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

from drawn_models import drawn_job, model_types
from judged import Judgement, judge

from bf16prof.cases import Job
from bf16prof.closed_form.anatomy import anatomy_of, inquiries_of
from bf16prof.closed_form.gap import peaks_gap
from bf16prof.closed_form.steady import Engine
from bf16prof.dry_run.runner import DryRunFailed, DryRunRefused, Options
from bf16prof.errors import Bf16profError
from bf16prof.signatures import store
from bf16prof.signatures.inquiry import versions
from bf16prof.tracing.session import Session

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
WORST = 10
LONGEST = 140
"""Characters of a reason."""


def main(seed: int, chosen: Sequence[str]) -> None:
    """Draw, record, judge, and print what docs/models.md has."""
    reasons: dict[str, str] = {}
    jobs: dict[str, Job] = {}
    for model_type in chosen or model_types():
        try:
            jobs[model_type] = drawn_job(model_type, random.Random(f"{seed} {model_type}"))
        except Exception as error:  # noqa: BLE001 - a configuration class raises what it likes
            reasons[model_type] = f"no small configuration: {_line(error)}"
    session = Session()
    session.answer(inquiries_of(list(jobs.values())), lambda done, total, words: None)
    session.close()
    judged: dict[str, Judgement] = {}
    for model_type, job in jobs.items():
        found = _judged(job)
        if isinstance(found, Judgement):
            judged[model_type] = found
        else:
            reasons[model_type] = found
        sys.stderr.write(
            f"{model_type}: {found if isinstance(found, str) else f'{found.worst:+.4%}, steady {found.steady_error_bytes:+}'}\n"
        )
    page = _page(seed, judged, reasons)
    sys.stdout.write(page)
    if not chosen:
        PAGE.write_text(page, encoding="utf-8")


def _judged(job: Job) -> Judgement | str:
    """How near the closed form is, or why there is none."""
    store.trace_with(None)
    try:
        anatomy_of(job)
        if gap := peaks_gap(job, Engine.of(job)):
            return _line(gap)
        return judge([job], Options(expandable_segments=True))[0]
    except (DryRunFailed, DryRunRefused) as error:
        return f"recorded, and no dry run to compare with: {_line(error.message)}"
    except Bf16profError as error:
        return _line(error.message)


def _line(said: object) -> str:
    text = " ".join(str(said).split()).replace("|", "/")
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."


def _page(seed: int, judged: dict[str, Judgement], reasons: dict[str, str]) -> str:
    steady = sum(each.steady_error_bytes == 0 for each in judged.values())
    near = sum(abs(each.worst) < 0.001 for each in judged.values())
    right = sum(each.names_the_phase or each.margin < 0.02 for each in judged.values())
    code = ", ".join(f"{package} {version}" for package, version in versions().items())
    worst = sorted(judged.items(), key=lambda pair: -abs(pair[1].worst))[:WORST]
    lines = [
        "# Model types: which have a closed form, and how near it is",
        "",
        f"Written by `make models` (seed {seed}; {code}).",
        "Of each model type of transformers a small model and a job are drawn (stage, ranks, recipe, checkpointing, accumulation, ...);",
        "its own code is recorded, and the peak of every phase is held against the dry run of the real engine.",
        "",
        f"{len(judged) + len(reasons)} model types: {len(judged)} compared. Of these the steady state is equal to the byte in {steady},",
        f"every phase within 0.1 % in {near}, and the phase that sets the peak is right (or two are within 2 %) in {right}.",
        "",
        "| worst | error of a phase's peak | steady state | job |",
        "|---|---:|---:|---|",
        *(f"| {name} | {each.worst:+.4%} | {each.steady_error_bytes:+} B | {each.label} |" for name, each in worst),
        "",
        "## Compared",
        "",
        ", ".join(sorted(judged)) + ".",
        "",
        "## Not compared, and why",
        "",
        "| model type | why |",
        "|---|---|",
        *(f"| {name} | {reason} |" for name, reason in sorted(reasons.items())),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0, sys.argv[2:])
