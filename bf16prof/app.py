"""The Typer application: registers the subcommands. Importing it takes a while; `cli.py` is there before."""

from __future__ import annotations

from typing import Annotated

import typer

from bf16prof import __version__
from bf16prof.commands.cache import cache
from bf16prof.commands.catalog import profiles, recipes
from bf16prof.commands.doctor import doctor
from bf16prof.commands.estimate import estimate
from bf16prof.commands.explain import explain
from bf16prof.commands.importing import import_
from bf16prof.commands.literal import LiteralTyper
from bf16prof.commands.measure import measure
from bf16prof.commands.options import EXIT_CODES, examples
from bf16prof.commands.plan import plan
from bf16prof.commands.published import published
from bf16prof.commands.report import report
from bf16prof.commands.schemas import schema
from bf16prof.commands.simulate import simulate

app = LiteralTyper(
    name="bf16prof",
    help="Predict, measure and reconcile the memory of DeepSpeed training with low-precision recipes.",
    epilog=EXIT_CODES,
    invoke_without_command=True,
    pretty_exceptions_show_locals=False,
    pretty_exceptions_enable=False,
)


app.command(
    epilog=examples(
        "bf16prof estimate llama3.1-8b --gpus 8,16 --gpu h100",
        "bf16prof estimate deepspeed-bf16-example --zero 3 --gpus 4 --recipe bf16-full --json",
    )
)(estimate)
app.command(
    epilog=examples("bf16prof measure cpu-demo", "bf16prof measure my.toml --zero 3 --recipe bf16-full --num-gpus 8 --fail-over 1%")
)(measure)
app.command(
    takes_script=True,
    epilog=examples(
        "bf16prof simulate deepspeed-bf16-example --zero 3 --gpus 4",
        "bf16prof simulate --gpus 8 --gpu h100 -- train.py --deepspeed --deepspeed_config ds.json",
    ),
)(simulate)
app.command(
    epilog=examples(
        "bf16prof plan llama3.1-8b --gpu h100 --gpus 8",
        "bf16prof plan gpt2-xl --gpu rtx-4090 --gpus 2 --margin 15% --write ds.json",
    )
)(plan)
app.command(
    "import",
    epilog=examples(
        "bf16prof import train.log loss.csv nvidia-smi.csv -p deepspeed-bf16-example --ds-config baseline.json --gpus 4",
        "bf16prof import snapshot.pickle --hf-config config.json --zero 3 --gpus 8 --recipe bf16-full --fail-over 1%",
    ),
)(import_)
app.command(
    epilog=examples(
        "bf16prof explain train.log",
        "bf16prof explain train.log --hf-config config.json --ds-config ds.json --gpus 8",
        "... 2>&1 | bf16prof explain -",
    )
)(explain)
app.command(
    epilog=examples(
        "bf16prof report runs/20260101-120000-cpu-demo --open", "bf16prof report published:deepspeed-bf16-example RUN -o both.html"
    )
)(report)
app.command(epilog=examples("bf16prof doctor", "bf16prof doctor --json"))(doctor)
app.command(epilog=examples("bf16prof schema", "bf16prof schema estimate"))(schema)
app.add_typer(profiles, name="profiles", epilog=examples("bf16prof profiles list", "bf16prof profiles show cpu-demo --resolved"))
app.add_typer(cache, name="cache", epilog=examples("bf16prof cache list", "bf16prof cache clear"))
app.add_typer(published, name="published", epilog=examples("bf16prof published list", "bf16prof report published:issue-7434"))
app.add_typer(recipes, name="recipes", epilog=examples("bf16prof recipes list", "bf16prof recipes show bf16-full"))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bf16prof {__version__}")
        raise typer.Exit


TO_TRY = """\
Will it fit, how fast is it, does it still learn? Three lines to try:

  bf16prof plan llama3.1-8b --gpus 8 --gpu h100   what fits these GPUs, ranked
  bf16prof estimate config.json --gpus 8          your own model, in a second
  bf16prof measure --simulate                     real ranks on this machine

All commands: bf16prof -h
"""
"""What the program says where nobody asked for anything."""


@app.callback()
def common(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Predict, measure and reconcile the memory of DeepSpeed training with low-precision recipes."""
    if context.invoked_subcommand is None:
        typer.echo(TO_TRY, nl=False)
