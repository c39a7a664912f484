"""The command line: registers the subcommands and maps errors to exit codes, once.

Exit codes: 0 ok, 1 internal error, 2 bad input, 3 the run failed, 4 an answer that was not to be accepted, 130 interrupted.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from bf16prof import __version__
from bf16prof.commands.catalog import profiles, recipes
from bf16prof.commands.doctor import doctor
from bf16prof.commands.estimate import estimate
from bf16prof.commands.importing import import_
from bf16prof.commands.measure import measure
from bf16prof.commands.options import EXIT_CODES, examples
from bf16prof.commands.plan import plan
from bf16prof.commands.report import report
from bf16prof.commands.schemas import schema
from bf16prof.commands.simulate import simulate
from bf16prof.errors import Bf16profError, InputError

INTERRUPTED = 130
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Why what is written to stdout may get nowhere."""

app = typer.Typer(
    name="bf16prof",
    help="Predict, measure and reconcile the memory of DeepSpeed training with low-precision recipes.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.command(
    epilog=examples(
        "bf16prof estimate --profile llama3-8b --gpus 8,16 --gpu h100-80gb",
        "bf16prof estimate --profile deepspeed-bf16-example --zero 3 --gpus 4 --recipe bf16-fp32-master,bf16-full --json",
    )
)(estimate)
app.command(
    epilog=examples(
        "bf16prof measure --profile cpu-demo", "bf16prof measure --profile my.toml --zero 3 --recipe bf16-full --num-gpus 8 --fail-over 1%"
    )
)(measure)
app.command(
    epilog=examples(
        "bf16prof simulate --profile deepspeed-bf16-example --zero 3 --gpus 4",
        "bf16prof simulate --profile llama3-8b --zero 2,3 --gpus 8 --recipe bf16-full --gpu h100-80gb --json",
    )
)(simulate)
app.command(
    epilog=examples(
        "bf16prof plan --profile llama3-8b --gpu h100-80gb --gpus 8",
        "bf16prof plan --profile gpt2-xl --gpu rtx-4090-24gb --gpus 2 --recipe bf16-fp32-master --margin 15% --write ds.json",
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
        "bf16prof report runs/20260101-120000-cpu-demo --open", "bf16prof report published:deepspeed-bf16-example RUN -o both.html"
    )
)(report)
app.command(epilog=examples("bf16prof doctor", "bf16prof doctor --json"))(doctor)
app.command(epilog=examples("bf16prof schema", "bf16prof schema estimate"))(schema)
app.add_typer(profiles, name="profiles", epilog=examples("bf16prof profiles list", "bf16prof profiles show cpu-demo --resolved"))
app.add_typer(recipes, name="recipes", epilog=examples("bf16prof recipes list", "bf16prof recipes show bf16-full"))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bf16prof {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Predict, measure and reconcile the memory of DeepSpeed training with low-precision recipes."""


def main() -> NoReturn:
    """Run the program; every way out of it passes here."""
    gc.disable()  # nearly all that is made here lives to the end: looking for garbage takes a fifth of the time and finds none
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(args=[_dashes(argument) for argument in sys.argv[1:]], standalone_mode=False)
        if code == INTERRUPTED:  # typer has caught the KeyboardInterrupt, and says nothing
            raise KeyboardInterrupt
        sys.stdout.flush()
    except Bf16profError as error:
        code = _fail(error.message, error.hint, error.exit_code)
    except typer.exceptions.TyperException as error:
        code = _fail(error.format_message(), "", error.exit_code)
    except OSError as error:
        if error.errno not in FULL:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it would fail again on the way out
        code = _fail(f"cannot write the output: {error.strerror}", "", InputError.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted", "", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, hint: str, code: int) -> int:
    from bf16prof.reports.units import inert

    if message:  # there is none where the help page was the answer
        typer.echo(f"bf16prof: {inert(message, None)}", err=True)
    if hint:
        typer.echo(f"  hint: {inert(hint, None)}", err=True)
    return code


def _dashes(argument: str) -> str:
    """`--num_gpus=2` as `--num-gpus=2`: people type both."""
    if not argument.startswith("--"):
        return argument
    flag, sign, value = argument.partition("=")
    return flag.replace("_", "-") + sign + value


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
