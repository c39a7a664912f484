"""The flags of each command as one typed object: a renamed flag is a type error, and Python callers
and the terminal share it.

A command is written as a function of `Asked[Flags]`, and `takes` gives typer the flags' signature:

    @takes(EstimateFlags)
    def estimate(asked: Asked[EstimateFlags]) -> None: ...

`calling.called` gives the same signature to a function of the Python API. A flag's help, variable
and panel stand in `options.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

import typer

from bf16prof.commands import options as o
from bf16prof.commands.literal import script_words
from bf16prof.commands.where import PlaceFlags
from bf16prof.profiles.gpus import GPUS_PER_NODE
from bf16prof.vocabulary import Device, Offload


@dataclass(frozen=True, kw_only=True)
class WorkloadFlags:
    """What is laid over the profile's workload, and over any other value of it."""

    sequence_length: o.SequenceOption = None
    micro_batch_size: o.MicroBatchOption = None
    gradient_accumulation_steps: o.AccumulationOption = None
    activation_checkpointing: o.CheckpointingOption = None
    zero_init: o.ZeroInitOption = None
    lora: o.LoraOption = None
    load_in_4bit: o.FourBitOption = None
    liger: o.LigerOption = None
    fused_loss: o.FusedLossOption = None
    dpo: o.DpoOption = None
    reward: o.RewardOption = None
    packed_sequences: o.PackedOption = None
    eval_batch_size: o.EvalBatchOption = None
    sp: o.SequenceParallelOption = None
    tp: o.TensorParallelOption = None
    pp: o.PipelineParallelOption = None
    ep: o.ExpertParallelOption = None
    set_: o.SetOption = None


@dataclass(frozen=True, kw_only=True)
class CaseFlags(WorkloadFlags):
    """What is trained, in the words of the user's own files, and how: stage, GPUs, recipe."""

    profile: o.ProfileOption = o.DEFAULT_PROFILE
    zero: o.ZeroOption = ""
    recipe: o.RecipeOption = ""
    offload: o.OffloadOption = None
    hf_config: o.HfConfigOption = None
    download: o.DownloadOption = False
    model: o.ModelOption = None
    ds_config: o.DsConfigOption = None
    training_args: o.TrainingArgsOption = None
    optim: o.OptimOption = None
    json_: o.JsonOption = False
    quiet: o.QuietOption = False

    @property
    def asked_model(self) -> str | None:
        """The model that is named without a flag; commands about logs have none."""
        return None

    @property
    def assumed_gpu(self) -> str:
        """The GPU that is judged by; empty where none is."""
        return ""


@dataclass(frozen=True, kw_only=True)
class SubjectFlags(CaseFlags):
    """The same with the model as the first argument."""

    subject: o.SubjectArgument = field(default=None, kw_only=False)
    engine: o.EngineOption = None

    @property
    def asked_model(self) -> str | None:
        """The model that is named without a flag."""
        return self.subject


@dataclass(frozen=True, kw_only=True)
class FileFlags:
    """Files to write."""

    output: o.FilesOption = None
    force: o.ForceOption = False


@dataclass(frozen=True, kw_only=True)
class PageFlags(FileFlags):
    """Files to write of records, which have figures."""

    output: o.PageFilesOption = None
    figure: o.FigureOption = ""


@dataclass(frozen=True, kw_only=True)
class GridFlags(PageFlags, SubjectFlags):
    """Flags of commands that predict a grid of cases, on GPUs or on CPU ranks."""

    gpus: o.GpusOption = ""
    gpu: o.GpuOption = o.DEFAULT_GPU
    device: o.DeviceOption = Device.GPU
    gpus_per_node: o.PerNodeOption = GPUS_PER_NODE
    expandable_segments: o.ExpandableOption = False
    fail_unless_fits: o.FailUnlessFitsOption = False
    verbose: o.VerboseOption = False

    @property
    def assumed_gpu(self) -> str:
        """The GPU that is judged by; empty for CPU ranks."""
        return self.gpu if self.device is Device.GPU else ""


@dataclass(frozen=True, kw_only=True)
class EstimateFlags(GridFlags):
    """Flags of `estimate`."""

    trace: o.TraceOption = True
    zero: o.ZeroOption = "0,1,2,3"
    gpus: o.GpusOption = "1,2,4,8,16,32,64,128"
    calibrate: o.CalibrateOption = None


@dataclass(frozen=True, kw_only=True)
class SimulateFlags(GridFlags):
    """Flags of `simulate`."""

    zero: o.ZeroOption = "3"
    gpus: o.GpusOption = "4"
    recipe: o.RecipeOption = "bf16-fp32-master,bf16-full-autocast"
    snapshot: Annotated[
        Path | None,
        typer.Option("--snapshot", metavar="FILE", help="Write a memory snapshot for pytorch.org/memory_viz.", rich_help_panel=o.OUTPUT),
    ] = None
    steps: o.ScriptStepsOption = 3
    rank: o.ScriptRankOption = 0
    timeout: o.ScriptTimeoutOption = 900


@dataclass(frozen=True, kw_only=True)
class PlanFlags(FileFlags, SubjectFlags):
    """Flags of `plan`."""

    zero: o.ZeroOption = "0,1,2,3"
    gpus: o.GpusOption = "8"
    gpu: o.GpuOption = o.DEFAULT_GPU
    gpus_per_node: o.PerNodeOption = GPUS_PER_NODE
    offload: Annotated[
        Offload | None,
        typer.Option("--offload", envvar="BF16PROF_OFFLOAD", help="Only this offloading; all if not given.", rich_help_panel=o.SELECT),
    ] = None
    margin: Annotated[
        str | None,
        typer.Option(
            "--margin",
            envvar="BF16PROF_MARGIN",
            metavar="PERCENT",
            help="Share of the allocator's memory to keep free: 10% if not given, 5% with --expandable-segments.",
            rich_help_panel=o.SELECT,
        ),
    ] = None
    expandable_segments: o.ExpandableOption = False
    micro_batch_limit: Annotated[
        int,
        typer.Option(
            "--micro-batch-limit",
            envvar="BF16PROF_MICRO_BATCH_LIMIT",
            min=1,
            max=4096,
            help="Try micro-batches of 1, 2, 4, ... up to this.",
            rich_help_panel=o.SELECT,
        ),
    ] = 64
    verify: Annotated[
        int | None,
        typer.Option(
            "--verify",
            metavar="N",
            min=0,
            max=100,
            show_default=False,
            help="Dry-run the first N choices with the real engine: 3 if not given, where torch and deepspeed are installed.",
            rich_help_panel=o.SELECT,
        ),
    ] = None
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Only predict.", rich_help_panel=o.SELECT)] = False
    search_dimensions: Annotated[
        bool | None,
        typer.Option(
            "--search-dimensions/--no-search-dimensions",
            help="Look for --sp, --tp or --pp and what keeps activations small by dry runs: where nothing else fits, if not given.",
            show_default=False,
            rich_help_panel=o.SELECT,
        ),
    ] = None
    dry_runs: Annotated[
        int, typer.Option("--dry-runs", metavar="N", min=1, max=100, help="Dry runs of such a search at most.", rich_help_panel=o.SELECT)
    ] = 8
    calibrate: o.CalibrateOption = None
    trace: o.TraceOption = True
    write: Annotated[
        Path | None,
        typer.Option("--write", metavar="FILE", help="Write the first choice as a DeepSpeed JSON.", rich_help_panel=o.OUTPUT),
    ] = None
    fail_unless_fits: o.FailUnlessFitsOption = False
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every plan that fits.", rich_help_panel=o.OUTPUT)] = False

    @property
    def assumed_gpu(self) -> str:
        """The GPU that is judged by."""
        return self.gpu


@dataclass(frozen=True, kw_only=True)
class MeasureFlags(PlaceFlags, PageFlags, SubjectFlags):
    """Flags of `measure`. GPUs are found, not asked for."""

    profile: o.ProfileOption = "cpu-demo"
    zero: o.ZeroOption = "1,2,3"
    recipe: o.RecipeOption = "bf16-fp32-master,bf16-full"
    trace: o.TraceOption = True
    warmup: Annotated[int, typer.Option("--warmup", min=1, help="Steps before the measured ones.", rich_help_panel=o.TRAIN)] = 3
    steps: Annotated[int, typer.Option("--steps", min=1, help="Measured steps.", rich_help_panel=o.TRAIN)] = 10
    quality: Annotated[
        int,
        typer.Option("--quality", min=0, help="Further steps in which lost updates and EDQ are measured.", rich_help_panel=o.TRAIN),
    ] = 0
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds that one case may take.", rich_help_panel=o.TRAIN)] = 900
    simulate: Annotated[bool, typer.Option("--simulate", help="Dry-run the same cases as well.", rich_help_panel=o.SELECT)] = False
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output-dir: finished cases are kept.", rich_help_panel=o.SELECT)
    ] = False
    fail_over: o.TolerateOption = None
    verbose: o.VerboseOption = False


@dataclass(frozen=True, kw_only=True)
class LogFlags(CaseFlags):
    """Flags of commands about what others logged: nothing of the case is assumed."""

    profile: o.ProfileOption = ""
    gpus: o.GpusOption = ""
    gpu: o.GpuOption = ""


@dataclass(frozen=True, kw_only=True)
class ImportFlags(PageFlags, LogFlags):
    """Flags of `import`."""

    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What was logged of one run: all that there is of it.")] = field(
        kw_only=False
    )
    output_dir: o.OutputDirOption = None
    fail_over: o.TolerateOption = None
    verbose: o.VerboseOption = False


@dataclass(frozen=True, kw_only=True)
class ExplainFlags(LogFlags):
    """Flags of `explain`."""

    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="A log, or the message itself; - reads standard input.", show_default=False)
    ] = field(kw_only=False)


F = TypeVar("F", bound=WorkloadFlags)
F_co = TypeVar("F_co", bound=WorkloadFlags, covariant=True)

COMMANDLINE, ENVIRONMENT, DEFAULT = "COMMANDLINE", "ENVIRONMENT", "DEFAULT"


@dataclass(frozen=True)
class Asked(Generic[F_co]):
    """The flags of a call, and where each value came from: typed, from a variable, or by default.

    `script`: what stands after `--`, `None` where there is no `--`.
    """

    command: str
    flags: F_co
    sources: dict[str, str]
    script: Sequence[str] | None = None

    def source(self, name: str) -> str:
        """`COMMANDLINE`, `ENVIRONMENT` or `DEFAULT`; empty for a flag that the command lacks."""
        return self.sources.get(name, "")

    def origin(self, name: str) -> str:
        """The flag that the user typed, or the variable that stood for it."""
        return f"BF16PROF_{name.upper()}" if self.source(name) == ENVIRONMENT else "--" + name.rstrip("_").replace("_", "-")

    def is_named(self, name: str) -> bool:
        """Whether the user said this flag, by typing or by a variable."""
        return self.source(name) in (COMMANDLINE, ENVIRONMENT)

    def given(self) -> dict[str, Any]:
        """All flags by name."""
        return {each.name: getattr(self.flags, each.name) for each in dataclasses.fields(self.flags)}

    def with_flags(self, **changes: Any) -> Asked[F_co]:
        """The same with other values of some flags."""
        return dataclasses.replace(self, flags=dataclasses.replace(self.flags, **changes))


@contextlib.contextmanager
def one_call() -> Iterator[None]:
    """What a call lets be recorded is recorded for this call: whoever asks the closed form next,
    asks without."""
    try:
        yield
    finally:
        if store := sys.modules.get("bf16prof.signatures.store"):  # not imported for commands that ask it nothing
            store.trace_with(None)


def takes(flags: type[F]) -> Callable[[Callable[[Asked[F]], None]], Callable[..., None]]:
    """Give typer a command whose parameters are the fields of `flags`."""

    def decorate(command: Callable[[Asked[F]], None]) -> Callable[..., None]:
        def run(context: typer.Context, **given: Any) -> None:
            sources = {name: source.name for name in given if (source := context.get_parameter_source(name))}
            with one_call():
                command(Asked(context.info_name or command.__name__, flags(**given), sources, script_words(context)))

        hints = hints_of(flags)
        context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        named = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters_of(flags, hints)]
        run.__signature__ = inspect.Signature([context, *named])  # type: ignore[attr-defined]
        run.__annotations__ = {"context": typer.Context, **hints, "return": None}
        run.__doc__, run.__name__, run.__module__ = command.__doc__, command.__name__, command.__module__
        return run

    return decorate


def hints_of(flags: type[Any]) -> dict[str, Any]:
    """The annotations of all fields, typer's options included."""
    hints = get_type_hints(flags, include_extras=True)
    return {each.name: hints[each.name] for each in dataclasses.fields(flags)}


def parameters_of(flags: type[Any], hints: dict[str, Any]) -> list[inspect.Parameter]:
    """The fields as parameters of a function, those without a flag first."""
    found = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY if each.kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if each.default is dataclasses.MISSING else each.default,
            annotation=hints[each.name],
        )
        for each in dataclasses.fields(flags)
    ]
    return sorted(found, key=_place)


def _place(parameter: inspect.Parameter) -> tuple[int, int]:
    """Where a parameter stands: arguments first, then the panels of `--help`, each in the order of
    the fields."""
    option = next((each for each in getattr(parameter.annotation, "__metadata__", ())), None)
    panel = getattr(option, "rich_help_panel", None)
    return parameter.kind, o.PANELS.index(panel) if panel in o.PANELS else len(o.PANELS)
