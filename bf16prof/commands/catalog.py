"""`bf16prof profiles` and `bf16prof recipes`: what ships with the package, and what a profile
resolves to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bf16prof.cases import STAGES, Selection, expand
from bf16prof.commands import options as o
from bf16prof.commands.flags import Asked, WorkloadFlags, takes
from bf16prof.commands.help import examples
from bf16prof.commands.literal import LiteralTyper
from bf16prof.commands.request import resolve_profile
from bf16prof.documents import as_json, json_text, raw_document
from bf16prof.engine.constraints import refusal_reason
from bf16prof.models.shapes import NoInventory, inventory
from bf16prof.profiles.gpus import GPUS_PER_NODE, find_gpu
from bf16prof.profiles.load import load_profile, preset_names
from bf16prof.profiles.models import Model
from bf16prof.profiles.optimizers import all_optimizers
from bf16prof.profiles.plain import dotted
from bf16prof.profiles.recipes import BYTES_HEADER, Recipe, all_recipes, find_recipe
from bf16prof.records import MemoryRecord
from bf16prof.reports.learning import of_recipe
from bf16prof.reports.units import UNKNOWN
from bf16prof.reports.views import case_label
from bf16prof.runs import load
from bf16prof.vocabulary import Component, Device, Offload

profiles = LiteralTyper(no_args_is_help=True, help="What to train: the presets, and what a profile resolves to.")
recipes = LiteralTyper(no_args_is_help=True, help="Precision recipes: dtypes, bytes per parameter, who runs them, sources.")


RunOption = Annotated[
    list[Path] | None, typer.Option("--run", metavar="RUN", help="A run whose measured learning is shown. May be repeated.")
]


@profiles.command("list", epilog=examples("bf16prof profiles list", "bf16prof profiles list --json"))
def list_profiles(json_: o.JsonOption = False) -> None:
    """The presets, with their number of parameters."""
    found = [load_profile(name).profile for name in preset_names()]
    if json_:
        rows = [{"name": p.name, "parameters": _parameter_count(p.model), "description": p.description, "names": p.names} for p in found]
        return _json(profiles=rows)
    return print_table(["profile", "what it is"], [[p.name, p.description] for p in found])


@dataclass(frozen=True, kw_only=True)
class ShowFlags(WorkloadFlags):
    """Flags of `profiles show`."""

    name: Annotated[str, typer.Argument(help="A preset's name or a TOML file.")]
    resolved: Annotated[bool, typer.Option("--resolved", help="Every value with where it comes from, defaults included.")] = False
    json_: o.JsonOption = False


@profiles.command(
    "show",
    epilog=examples(
        "bf16prof profiles show cpu-demo --resolved", "bf16prof profiles show my.toml --set deepspeed.zero_optimization.overlap_comm=false"
    ),
)
@takes(ShowFlags)
def show_profile(asked: Asked[ShowFlags]) -> None:
    """One profile: what it sets, or with --resolved every value and where it comes from."""
    given = asked.flags
    found = resolve_profile(asked, given.name)
    parameters = _parameter_count(found.profile.model)
    values = dotted(found.profile.model_dump(mode="json", exclude_unset=not given.resolved, by_alias=True))
    if given.json_:
        _json(profile=values, origins=found.origins, parameters=parameters)
        return
    rows = [[key, json.dumps(value), found.origins.get(key, "default")] for key, value in values.items()]
    print_table(["key", "value", "from"], [*rows, ["(parameters)", UNKNOWN if parameters is None else f"{parameters:,}", "computed"]])


@recipes.command("list", epilog=examples("bf16prof recipes list", "bf16prof recipes list --json"))
def list_recipes(run: RunOption = None, json_: o.JsonOption = False) -> None:
    """All recipes: bytes per parameter of their model states, and what runs them.

    Bytes are those between steps, all ranks together, and what is added within the step; by
    component in the order of `recipes show`.
    """
    from bf16prof.reports.console.layout import make_console, note

    found = list(all_recipes().values())
    records = _records(run)
    if json_:
        return _json(recipes=[_recipe(recipe, records) for recipe in found])
    if make_console().width < WIDE and not run:
        _narrow_list(found)
    else:
        rows = [[r.id, *_sizes(r), r.learning, _runs_on(r), *([_learned(r, records)] if run else []), r.title] for r in found]
        measured = ["measured learning"] if run else []
        print_table(["recipe", BYTES_HEADER, "by component", "learning", "runs on", *measured, "what it is"], rows)
    for text in (START_WITH, COSTS):
        note(make_console(), text)
    return None


WIDE = 200
"""Columns of a console that has room for the whole table of recipes."""

START_WITH = "Start with bf16-fp32-master, DeepSpeed's default; where memory is short, try bf16-kahan or bf16-stochastic-rounding."
COSTS = (
    "What it costs in learning: fp32 master is the reference; bf16 only loses updates, some hundredths of loss in docs/study.md; "
    "stochastic rounding and compensation lost nothing that could be seen there. bf16prof measure --quality 20 says it of your model."
)
NARROW = (
    "Bytes of model states between steps, all ranks together; (+n): within the step only. What a recipe is: bf16prof recipes show NAME."
)


def _narrow_list(found: Sequence[Recipe]) -> None:
    """The table for 80 columns; what each recipe is says `recipes show`."""
    from bf16prof.reports.console.layout import make_console, note

    print_table(["recipe", "bytes per\nparameter", "learning", "DeepSpeed\nruns it"], [_narrow_row(recipe) for recipe in found])
    note(make_console(), NARROW)


def _narrow_row(recipe: Recipe) -> list[str]:
    steady, whole = recipe.steady_bytes_per_parameter, sum(recipe.bytes_per_parameter().values())
    size = f"{steady} (+{whole - steady})" if whole > steady else str(steady)
    by_deepspeed = f"with {all_optimizers()[recipe.optimizer].package}" if recipe.optimizer else "yes"
    runs = _not_by_deepspeed(recipe, "no") if recipe.deepspeed is None else by_deepspeed
    return [recipe.id, size, recipe.learning.replace("stochastic ", "stochastic\n"), runs]


@recipes.command("show", epilog=examples("bf16prof recipes show bf16-full", "bf16prof recipes show nemo-bf16 --json"))
def show_recipe(name: Annotated[str, typer.Argument(help="A recipe's id.")], run: RunOption = None, json_: o.JsonOption = False) -> None:
    """One recipe: the dtype and the bytes of every component, how and where it runs or why it does
    not, and its source."""
    recipe, records = find_recipe(name), _records(run)
    where = _where(recipe)
    if json_:
        return _json(recipe=_recipe(recipe, records) | {"stages": where})
    forms = {"": recipe, "ZeRO 1-3": recipe.at(1)} if recipe.zero else {"": recipe}
    headers = [f"{what} {form}".strip() for form in forms for what in ("dtype", "bytes between steps", "bytes in the step")]
    by_component = [_by_component(form) for form in forms.values()]
    print_table(["component", *headers], [[key, *(text for form in by_component for text in form[key])] for key in by_component[0]])
    about = [
        ["recipe", f"{recipe.id}: {recipe.title}"],
        [BYTES_HEADER, recipe.bytes_in_words],
        ["autocast", recipe.autocast],
        ["learning", recipe.learning],
    ]
    if recipe.partitioned:
        about.append(["over d ranks", "{} + {}/d bytes per parameter and rank".format(*recipe.over_ranks)])
    if recipe.optimizer:
        layout = all_optimizers()[recipe.optimizer]
        about.append(["optimizer", f"{layout.class_} (pip install '{layout.requirement}'), {json.dumps(layout.arguments)}"])
    if recipe.cast:
        about.append(["model", f"parameters cast to {recipe.cast} before DeepSpeed is given them"])
    about += [[f"DeepSpeed {form}".strip(), json.dumps(r.deepspeed)] for form, r in forms.items() if r.deepspeed is not None]
    about += [] if recipe.megatron is None else [["--engine megatron-core", json.dumps(recipe.megatron)]]
    refused = [["not run by DeepSpeed" if recipe.megatron else "not run", recipe.not_run]] if recipe.not_run else []
    about += refused or [[stage, said] for stage, said in where.items()]
    about += [[f"measured, {case_label(record.case)}", found.text] for record, found in of_recipe(records, recipe.id)]
    return print_table(["", ""], [*about, ["source", recipe.source]])


def _parameter_count(model: Model) -> int | None:
    """Elements of the model's parameters; `None` if only building it tells."""
    try:
        return sum(spec.numel for spec in inventory(model))
    except NoInventory:
        return None


def _not_by_deepspeed(recipe: Recipe, nobody: str) -> str:
    """Who runs a recipe that DeepSpeed does not."""
    return "megatron-core" if recipe.megatron is not None else nobody


def _runs_on(recipe: Recipe) -> str:
    """Who runs a recipe here."""
    if recipe.deepspeed is None:
        return _not_by_deepspeed(recipe, "-")
    return f"DeepSpeed, {all_optimizers()[recipe.optimizer].package}" if recipe.optimizer else "DeepSpeed"


def _sizes(recipe: Recipe) -> list[str]:
    """Bytes per parameter between steps and in the step, and by component."""
    return [recipe.bytes_in_words, " + ".join(str(size) for size in recipe.bytes_per_parameter().values() if size)]


def _by_component(recipe: Recipe) -> dict[str, list[str]]:
    """Dtype, bytes per parameter between steps and at the peak by component, and their sums."""
    dtypes = {**{str(component): dtype for component, dtype in recipe.dtypes.items()}, **recipe.extra}
    peak = recipe.bytes_per_parameter()
    steady = {name: 0 if name == Component.MASTER_GRADIENTS else size for name, size in peak.items()}
    rows = {name: [dtypes[name], str(steady[name]), str(peak[name])] for name in peak}
    return rows | {"all": ["", str(sum(steady.values())), str(sum(peak.values()))]}


def _where(recipe: Recipe) -> dict[str, str]:
    """By ZeRO stage whether DeepSpeed runs the recipe there, or why not, on a GPU."""
    if recipe.deepspeed is None:
        return {}
    profile, gpu = load_profile(o.DEFAULT_PROFILE).profile, find_gpu(o.DEFAULT_GPU)
    said = {}
    for stage in STAGES:
        jobs = [
            expand(Selection(profile, [stage], [GPUS_PER_NODE], [recipe.id], Device.GPU, gpu, offload))[0] for offload in SHOWN_OFFLOADS
        ]
        reason, offloaded = (refusal_reason(job) for job in jobs)
        if reason is None:
            said[f"ZeRO {stage}"] = "runs, also with --offload optimizer" if offloaded is None else "runs"
        else:
            said[f"ZeRO {stage}"] = "runs with --offload optimizer only" if offloaded is None else f"refused: {reason}"
    return said


SHOWN_OFFLOADS = (Offload.NONE, Offload.OPTIMIZER)


def _records(runs: Sequence[Path] | None) -> list[MemoryRecord]:
    """The records of these runs."""
    return [record for path in runs or () for record in load(path).records]


def _learned(recipe: Recipe, records: Sequence[MemoryRecord]) -> str:
    """What the first of these records that knows says of the recipe."""
    return next((found.text for _, found in of_recipe(records, recipe.id)), "")


def _recipe(recipe: Recipe, records: Sequence[MemoryRecord]) -> dict[str, Any]:
    row: dict[str, Any] = as_json(dataclasses.asdict(recipe))
    measured = [{"case": record.case, **dataclasses.asdict(found)} for record, found in of_recipe(records, recipe.id)]
    sizes = {"bytes_per_parameter": recipe.bytes_per_parameter(), "steady_bytes_per_parameter": recipe.steady_bytes_per_parameter}
    return {**row, **sizes, "measured": as_json(measured)}


def _json(**content: Any) -> None:
    typer.echo(json_text(raw_document([], **content)))


def print_table(headers: list[str], rows: list[list[str]]) -> None:
    """Rows under their headers, on stdout."""
    from bf16prof.reports.console.layout import Column, make_console, table

    console = make_console()
    table(console, [Column(header, "left", key=index == 0) for index, header in enumerate(headers)], rows)
