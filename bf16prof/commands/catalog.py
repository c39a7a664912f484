"""`bf16prof profiles` and `bf16prof recipes`: what ships with the package, and what a profile resolves to."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from bf16prof.commands import options as o
from bf16prof.commands.request import resolve_profile
from bf16prof.models.shapes import NoInventory, inventory
from bf16prof.profiles.load import load_profile, preset_names
from bf16prof.profiles.models import Model
from bf16prof.profiles.recipes import Recipe, all_recipes, find_recipe
from bf16prof.records import Component, as_json, document, json_text
from bf16prof.reports.units import UNKNOWN

profiles = typer.Typer(no_args_is_help=True, help="What to train: the presets, and what a profile resolves to.")
recipes = typer.Typer(no_args_is_help=True, help="Precision recipes: dtypes, bytes per parameter, who runs them, sources.")


@profiles.command("list", epilog=o.examples("bf16prof profiles list", "bf16prof profiles list --json"))
def list_profiles(json_: o.JsonOption = False) -> None:
    """The presets, with their number of parameters."""
    rows = [(p, sum(s.numel for s in inventory(p.model))) for p in (load_profile(name).profile for name in preset_names())]
    if json_:
        return _json(profiles=[{"name": p.name, "parameters": count, "description": p.description} for p, count in rows])
    return _table(["profile", "parameters", "what it is"], [[p.name, f"{count:,}", p.description] for p, count in rows])


@profiles.command(
    "show",
    epilog=o.examples(
        "bf16prof profiles show cpu-demo --resolved", "bf16prof profiles show my.toml --set deepspeed.zero_optimization.overlap_comm=false"
    ),
)
def show_profile(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A preset's name or a TOML file.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="Every value with where it comes from, defaults included.")] = False,
    sequence_length: o.SequenceOption = None,
    micro_batch_size: o.MicroBatchOption = None,
    gradient_accumulation_steps: o.AccumulationOption = None,
    activation_checkpointing: o.CheckpointingOption = None,
    set_: o.SetOption = None,
    json_: o.JsonOption = False,
) -> None:
    """One profile: what it sets, or with --resolved every value and where it comes from."""
    found = resolve_profile(context, name)
    parameters = _parameter_count(found.profile.model)
    values = _flatten(found.profile.model_dump(mode="json", exclude_unset=not resolved, by_alias=True))
    if json_:
        return _json(profile=values, origins=found.origins, parameters=parameters)
    rows = [[key, json.dumps(value), found.origins.get(key, "default")] for key, value in values.items()]
    return _table(["key", "value", "from"], [*rows, ["(parameters)", UNKNOWN if parameters is None else f"{parameters:,}", "computed"]])


@recipes.command("list", epilog=o.examples("bf16prof recipes list", "bf16prof recipes list --json"))
def list_recipes(json_: o.JsonOption = False) -> None:
    """All recipes with their bytes per parameter (unpartitioned, between steps) and what runs them."""
    found = list(all_recipes().values())
    if json_:
        return _json(recipes=[_recipe(recipe) for recipe in found])
    rows = [[r.id, str(r.steady_bytes_per_parameter), r.learning, "DeepSpeed" if r.deepspeed is not None else "-", r.title] for r in found]
    return _table(["recipe", "bytes", "learning", "runs on", "what it is"], rows)


@recipes.command("show", epilog=o.examples("bf16prof recipes show bf16-full", "bf16prof recipes show nemo-bf16 --json"))
def show_recipe(name: Annotated[str, typer.Argument(help="A recipe's id.")], json_: o.JsonOption = False) -> None:
    """One recipe: the dtype and the bytes of every component, how it runs or why it does not, and its source."""
    recipe = find_recipe(name)
    if json_:
        return _json(recipe=_recipe(recipe))
    sizes = recipe.bytes_per_parameter()
    rows = [[key, {**{str(c): d for c, d in recipe.dtypes.items()}, **recipe.extra}[key], str(size)] for key, size in sizes.items()]
    _table(["component", "dtype", "bytes per parameter"], rows)
    about = [
        ["recipe", f"{recipe.id}: {recipe.title}"],
        [
            "bytes per parameter",
            f"{recipe.steady_bytes_per_parameter} between steps, {sum(sizes.values())} with {Component.MASTER_GRADIENTS} (in the step)",
        ],
        ["autocast", recipe.autocast],
        ["learning", recipe.learning],
        ["DeepSpeed", json.dumps(recipe.deepspeed) if recipe.deepspeed is not None else f"not run: {recipe.not_run}"],
        ["source", recipe.source],
    ]
    return _table(["", ""], about)


def _parameter_count(model: Model) -> int | None:
    """Elements of the model's parameters; `None` if only building it tells."""
    try:
        return sum(spec.numel for spec in inventory(model))
    except NoInventory:
        return None


def _recipe(recipe: Recipe) -> dict[str, Any]:
    row: dict[str, Any] = as_json(dataclasses.asdict(recipe))
    return {**row, "bytes_per_parameter": recipe.bytes_per_parameter(), "steady_bytes_per_parameter": recipe.steady_bytes_per_parameter}


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _json(**content: Any) -> None:
    typer.echo(json_text(document([], **content)))


def _table(headers: list[str], rows: list[list[str]]) -> None:
    from bf16prof.reports.console import make_console
    from bf16prof.reports.console.layout import Column, table

    console = make_console()
    table(console, [Column(header, "left", key=index == 0) for index, header in enumerate(headers)], rows)
