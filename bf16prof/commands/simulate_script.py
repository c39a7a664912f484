"""`bf16prof simulate -- train.py --its args`: the user's own training script in the dry run's
world."""

from __future__ import annotations

from collections.abc import Container, Sequence

from bf16prof.commands import options as o
from bf16prof.commands.flags import COMMANDLINE, Asked, CaseFlags, SimulateFlags
from bf16prof.commands.output import (
    check_judged_device,
    finished_run,
    hint,
    print_json,
    require_fit,
    with_host_per_node,
    write_files,
)
from bf16prof.documents import as_json
from bf16prof.errors import Bf16profError, InputError
from bf16prof.outcome import Outcome, of_run, without_error
from bf16prof.parallelism import MOST_RANKS
from bf16prof.profiles.gpus import find_gpu
from bf16prof.records import MemoryRecord
from bf16prof.reports.units import gib, signed_percent
from bf16prof.scripts.command import Script, read_script
from bf16prof.vocabulary import Device, Source

OF_THE_SCRIPT = ("steps", "rank", "timeout")
"""Flags that mean nothing without a script."""

SHARED = frozenset({
    *OF_THE_SCRIPT, "gpus", "gpu", "device", "gpus_per_node", "expandable_segments", "snapshot", "json_", "output", "force",
    "fail_unless_fits", "verbose", "quiet",
})  # fmt: skip
"""Flags that go with a script. All others say what the script says itself."""


def refuse_script_flags(asked: Asked[SimulateFlags]) -> None:
    """Raise `InputError` for a flag that goes with a script, where there is none."""
    for name in OF_THE_SCRIPT:
        if asked.source(name) == COMMANDLINE:
            raise InputError(f"--{name}: goes with a script of your own", hint="bf16prof simulate -- train.py --its args")


def simulate_script(asked: Asked[SimulateFlags], words: Sequence[str]) -> None:
    """Run it once for each number of ranks, and show what was recorded; a failure is raised when
    all has been shown."""
    given = asked.flags
    found = simulated_script(asked, words)
    if found.records:
        _show(found, given)
    without_error(found)
    require_fit(found.records, given.fail_unless_fits)
    hint("next: -v lists every item, --gpus 8,16 other sizes, --rank 1 another rank", given.quiet or given.json_)


def simulated_script(asked: Asked[SimulateFlags], words: Sequence[str]) -> Outcome:
    """The records of a script; `error`: why there are no others. Raises where there are none at
    all."""
    from bf16prof.measuring.accelerator import require_packages

    given = asked.flags
    refuse_what_the_script_says(asked)
    check_judged_device(given.fail_unless_fits, Device(given.device))
    require_packages("simulating")
    script = read_script(words)
    sizes = o.numbers("--gpus", given.gpus)
    if given.snapshot is not None and len(sizes) > 1:
        raise InputError(f"--snapshot {given.snapshot}: a snapshot is of one run, these are {len(sizes)}")
    found, estimates, failure = _run(script, sizes, given)
    if failure is not None and not found:
        raise failure
    records = with_host_per_node(found, given.gpus_per_node)
    run = finished_run(f"simulate {script.name}", [*records, *estimates], {"script": as_json(script)}, {})
    return of_run(run, {}, records, error=failure)


def refuse_what_the_script_says(asked: Asked[CaseFlags], shared: Container[str] = SHARED) -> None:
    """Raise `InputError` for a flag that was typed and is not among those that go with a script."""
    for name in asked.given():
        if name not in shared and asked.source(name) == COMMANDLINE:
            said = asked.flags.asked_model if name == "subject" else asked.origin(name)
            raise InputError(f"{said}: a script after -- says itself what is trained and how", hint="give it to the script, if it takes it")


def _run(script: Script, sizes: Sequence[int], given: SimulateFlags) -> tuple[list[MemoryRecord], list[MemoryRecord], Bf16profError | None]:
    """The records, their estimates where there are such, and the first failure, which knows the
    records."""
    from bf16prof.commands.progress import ScriptProgress
    from bf16prof.commands.script_estimate import with_estimate
    from bf16prof.dry_run.runner import Options
    from bf16prof.dry_run.script.runner import simulate_script as run
    from bf16prof.dry_run.script.task import ScriptTask

    gpu = find_gpu(given.gpu).id if given.device is Device.GPU else None
    for size in sizes:
        if not given.rank < size <= MOST_RANKS:
            raise InputError(f"--rank {given.rank}: of {size} ranks there are the numbers 0 to {size - 1}")
    options = Options(given.expandable_segments, given.snapshot, given.force)
    records, estimates, failures = {}, [], []
    with ScriptProgress(script.name, given.quiet) as progress:
        for number, size in enumerate(sizes):
            task = ScriptTask(script, size, given.rank, gpu, given.steps, options.expandable_segments, options.snapshot is not None)
            outcome = run(task, given.timeout, progress, options)
            if (record := outcome.record) is not None:
                records[number], *estimate = with_estimate(record, outcome.described, given.gpu)
                estimates += estimate
            failures += [outcome.failure] if outcome.failure is not None else []
    for failure in failures:
        failure.records = records
    return list(records.values()), estimates, next(iter(failures), None)


def _show(found: Outcome, given: SimulateFlags) -> None:
    from rich.text import Text

    from bf16prof.reports.console import answer, holders, make_console, notes

    write_files(given.output, [found.run], force=given.force)
    if given.json_:
        print_json(found.records)
        return
    console = make_console()
    answer([found.run], console, verbose=given.verbose)
    for record in found.records if not given.verbose and len(found.records) == 1 else ():
        holders(record, console)
        for text in _beside(record, found.run.records):
            console.print(Text(text))
        notes(record, console)


def _beside(record: MemoryRecord, records: Sequence[MemoryRecord]) -> list[str]:
    """What the closed form says of the same case."""
    estimate = next((each for each in records if each.case == record.case and each.source is Source.ESTIMATE), None)
    if estimate is None:
        return []
    pairs = {
        "between steps": (estimate.allocated_bytes, record.allocated_bytes),
        "at the training peak": (estimate.peak_allocated_bytes, record.peak_allocated_bytes),
    }
    known = [(when, said, ran) for when, (said, ran) in pairs.items() if said is not None and ran]
    parts = [f"{gib(said)} {when} ({signed_percent(said / ran - 1)})" for when, said, ran in known]
    return [f"The closed form of the model's configuration: {', '.join(parts)}"] if parts else []
