"""`bf16prof measure -- train.py --its args`: the user's own training script on real ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bf16prof.claims import claimed
from bf16prof.commands import where as w
from bf16prof.commands.flags import Asked, MeasureFlags
from bf16prof.commands.output import hint, write_report
from bf16prof.commands.simulate_script import refuse_what_the_script_says
from bf16prof.errors import Bf16profError, InputError, RunFailed
from bf16prof.files import NotWritten
from bf16prof.outcome import Outcome, of_run
from bf16prof.profiles.gpus import gpu_named
from bf16prof.reconcile import reconcile
from bf16prof.records import MemoryRecord
from bf16prof.scripts.command import Script, read_script

if TYPE_CHECKING:
    from bf16prof.measuring.accelerator import TorchAnswer
    from bf16prof.measuring.places import Place

SHARED = frozenset({
    "ranks", "nnodes", "node_rank", "rdzv_endpoint", "hostfile", "include", "exclude", "launcher", "output_dir", "warmup", "steps",
    "timeout", "simulate", "json_", "output", "figure", "force", "fail_over", "verbose", "quiet",
})  # fmt: skip
"""Flags that go with a script. All others say what the script says itself."""


def measured_script(asked: Asked[MeasureFlags], words: Sequence[str], place: Place) -> Outcome:
    """The measured run of a script. It runs to its own end, unless a number of steps or of seconds
    was asked for."""
    from bf16prof.measuring.accelerator import require_torch
    from bf16prof.measuring.commands import on_first_node
    from bf16prof.measuring.results import GuestTask
    from bf16prof.measuring.script.session import ScriptPlan, measure_script

    given = asked.flags
    refuse_what_the_script_says(asked, SHARED)
    script = read_script(words)
    torch = require_torch(on_first_node(place))
    world_size, *more = w.numbers_of_ranks(given.ranks, torch, place)
    if more:
        raise InputError(f"--num-gpus {given.ranks}: a script is measured on one number of ranks at a time")
    failed, predictions = None, tuple[MemoryRecord, ...]()
    with claimed(given.output_dir, script.name, force=given.force, beside=given.output or ()) as claim:
        if given.simulate:
            predictions, failed = _dry_run(script, world_size, torch, given)
        claim.clear()
        task = GuestTask(script, given.warmup, given.steps, is_ended=asked.is_named("steps"))
        timeout = given.timeout if asked.is_named("timeout") else math.inf
        plan = ScriptPlan(task, claim.path, place, world_size, torch.device, timeout, predictions, is_shown=not given.json_)
        run = measure_script(plan, lambda text: hint(text, given.quiet))
        try:
            write_report(run)
        except NotWritten as error:
            raise RunFailed(error.message, hint=f"the run in {run.path} is complete: bf16prof report {run.path}") from error
    outcome = {"comparisons": reconcile(run.records), "run": str(run.path), "cases": run.manifest.cases}
    return of_run(run, {"settings": {}, **outcome}, notes=(), error=failed)


def _dry_run(
    script: Script, world_size: int, torch: TorchAnswer, given: MeasureFlags
) -> tuple[tuple[MemoryRecord, ...], Bf16profError | None]:
    """The dry run of the script on such a GPU, or on CPU ranks, and the estimate of its model, if
    it has one; why there is none."""
    from bf16prof.commands.progress import ScriptProgress
    from bf16prof.commands.script_estimate import with_estimate
    from bf16prof.dry_run.runner import Options
    from bf16prof.dry_run.script.runner import simulate_script
    from bf16prof.dry_run.script.task import ScriptTask

    gpu = gpu_named(torch.gpus[0].name) if torch.gpus else None
    if torch.gpus and gpu is None:
        return (), InputError(f"--simulate: {torch.gpus[0].name} is not in the table of GPUs", hint="bf16prof simulate --gpu 80GiB -- ...")
    task = ScriptTask(script, world_size, 0, gpu.id if gpu else None, min(given.warmup + given.steps, 3))
    with ScriptProgress(script.name, given.quiet) as progress:
        outcome = simulate_script(task, given.timeout, progress, Options())
    records: tuple[MemoryRecord, ...] = ()
    if (record := outcome.record) is not None:
        records = tuple(with_estimate(record, outcome.described, gpu.id if gpu else ""))
    if gpu is not None:
        records = tuple(dataclasses.replace(record, gpu=torch.gpus[0].name) for record in records)
    return records, outcome.failure
