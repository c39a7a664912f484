"""The Python API: each function is a command of the terminal, with the same names, and returns
records instead of printing them.

    >>> import bf16prof
    >>> recipe = "bf16-fp32-master"
    >>> outcome = bf16prof.estimate("llama3.1-8b", gpus=8, gpu="h100", zero=3, recipe=recipe)
    >>> record, = outcome.records
    >>> f"{record.peak_allocated_bytes / 2**30:.2f} GiB in {record.peak_phase}: {record.verdict}"
    '48.37 GiB in backward: fits'
    >>> outcome.to_dataframe()["recipe"].tolist()
    ['bf16-fp32-master']

What is wrong raises a `Bf16profError` with a hint. Environment variables that stand for flags are
not read. Nothing here imports torch but `simulate`, `measure` and what `plan` runs dry.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bf16prof import runs
from bf16prof.commands.calling import called
from bf16prof.commands.flags import Asked, EstimateFlags, ImportFlags, MeasureFlags, PlanFlags, SimulateFlags
from bf16prof.commands.options import ScriptArgument
from bf16prof.commands.request import read_request
from bf16prof.outcome import Outcome, Plans, of_run, without_error

__all__ = ["Outcome", "Plans", "estimate", "import_logs", "load", "measure", "plan", "simulate"]


@called(EstimateFlags)
def estimate(asked: Asked[EstimateFlags]) -> Outcome:
    """Predict the memory of one GPU in closed form, over a grid of ZeRO stages, GPU counts and
    recipes; bytes in the records."""
    from bf16prof.commands.estimate import estimated

    return estimated(asked, read_request(asked))


@dataclass(frozen=True, kw_only=True)
class SimulateCall(SimulateFlags):
    """The arguments of `simulate`."""

    script: ScriptArgument = None


@dataclass(frozen=True, kw_only=True)
class MeasureCall(MeasureFlags):
    """The arguments of `measure`."""

    script: ScriptArgument = None


@called(SimulateCall)
def simulate(asked: Asked[SimulateCall]) -> Outcome:
    """Dry-run the real DeepSpeed engine on fake tensors. Where a case fails, raises with the others
    on the error (`error.records`).

    `script=["train.py", "--its", "args"]` dry-runs a training script as it is.
    """
    from bf16prof.commands.simulate import simulated
    from bf16prof.commands.simulate_script import simulated_script

    if asked.script is not None:
        return without_error(simulated_script(asked, asked.script))
    return without_error(simulated(asked, read_request(asked)))


@called(MeasureCall)
def measure(asked: Asked[MeasureCall]) -> Outcome:
    """Train for a few steps on real DeepSpeed ranks of this machine; the run directory is
    `outcome.run.path`.

    `script=["train.py", "--its", "args"]` measures a training script as it is.
    """
    from bf16prof.commands.measure import measured

    return without_error(measured(asked))


@called(PlanFlags)
def plan(asked: Asked[PlanFlags]) -> Plans:
    """Find what fits a GPU: every plan that does, best first."""
    from bf16prof.commands.plan import planned

    return planned(asked.with_flags(verbose=True), read_request(asked))


@called(ImportFlags)
def import_logs(asked: Asked[ImportFlags]) -> Outcome:
    """Turn what others logged of a run into a run directory, with the estimate beside it where a
    model is named."""
    from bf16prof.commands.importing import imported

    return imported(asked)


def load(path: str | Path) -> Outcome:
    """A run directory, as `measure` and `import` write it. Raises `InputError` naming the file and
    the field that cannot be read."""
    from bf16prof.reconcile import reconcile

    run = runs.load(Path(path))
    return of_run(run, {"comparisons": reconcile(run.records)})
