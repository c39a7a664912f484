"""How near the closed form comes to the dry run: hypothesis looks for the worst case; the errors by
stage and phase, as docs/closed-form.md has them.

`make peaks`, or `python benchmarks/peaks.py EXAMPLES` - ten jobs an example, about half a minute
each on two cores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from drawn_cases import jobs
from hypothesis import HealthCheck, given, settings, target
from hypothesis import Phase as Search
from hypothesis import strategies as st
from judged import Judgement, judge

from bf16prof.cases import Job
from bf16prof.dry_run.runner import Options
from bf16prof.vocabulary import TRAINING, Phase

EACH = 10
WORST = 5
EXAMPLES = 12
DISTINCT = 0.02
"""Two phases whose peaks differ by more are told apart."""


def search(examples: int) -> list[Judgement]:
    """Every job that the search has looked at, once. It goes for the largest error, and so comes
    back to the same jobs."""
    found: dict[str, Judgement] = {}

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Search.generate, Search.target],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(jobs(), min_size=EACH, max_size=EACH, unique_by=lambda job: job.profile.model))
    def look(drawn: Sequence[Job]) -> None:
        judged = judge(drawn, Options(expandable_segments=True))
        found.update((repr(each.job), each) for each in judged)
        target(max(abs(each.worst) for each in judged))

    look()
    return sorted(found.values(), key=lambda each: -abs(each.worst))


def main(examples: int) -> None:
    """Search, and print what docs/closed-form.md has."""
    found = search(examples)
    steady = sum(each.steady_error_bytes == 0 for each in found)
    told_apart = [each for each in found if each.margin > DISTINCT]
    right = sum(each.names_the_phase for each in told_apart)
    lines = [
        f"{len(found)} jobs; the steady state equal to the byte in {steady}; the right phase in {right} of the {len(told_apart)} where two "
        f"differ by more than {DISTINCT:.0%}. The worst error by phase:"
    ]
    lines += ["", *_table(found, "expandable segments")]
    lines += ["", f"With default segments, of the {EACH} jobs with the largest errors above:"]
    lines += ["", *_table(judge([each.job for each in found[:EACH]]), "default segments")]
    lines += ["", "The worst:", "", "| error | job |", "|---|---|"]
    lines += [f"| {each.worst:+.3%} | {each.label} |" for each in found[:WORST]]
    sys.stdout.write("\n".join(lines) + "\n")


def _table(found: Sequence[Judgement], title: str) -> list[str]:
    """The worst error by stage and phase."""
    lines = [f"| {title}, stage | " + " | ".join(Phase) + " |", "|---" * (1 + len(Phase)) + "|"]
    for stage in sorted({each.job.case.zero_stage for each in found}):
        mine = [each for each in found if each.job.case.zero_stage == stage]
        cells = (max((each.errors[phase] for each in mine), key=abs) for phase in (Phase.INIT, *TRAINING))
        lines.append(f"| {stage} ({len(mine)} jobs) | " + " | ".join(f"{cell:+.3%}" for cell in cells) + " |")
    return lines


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else EXAMPLES)
