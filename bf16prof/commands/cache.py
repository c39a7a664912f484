"""`bf16prof cache`: what has been recorded of models, and is kept for the next time."""

from __future__ import annotations

import sys

import typer

from bf16prof.commands import options as o
from bf16prof.commands.help import examples
from bf16prof.commands.literal import LiteralTyper
from bf16prof.documents import json_text, raw_document
from bf16prof.signatures.store import CachedSignature

cache = LiteralTyper(no_args_is_help=True, help="Recorded passes of models (signatures): what is kept, and where.")


@cache.command("list", epilog=examples("bf16prof cache list", "bf16prof cache list --json"))
def list_cache(json_: o.JsonOption = False) -> None:
    """What is kept, with the versions of the code that was run."""
    from bf16prof.commands.catalog import print_table
    from bf16prof.signatures import store

    found = store.entries()
    if json_:
        typer.echo(json_text(raw_document([], folder=str(store.folder()), signatures=found)))
        return
    rows = [_row(each) for each in found]
    if rows:
        print_table(["signature", "of", "parameters", "events", "bytes", "recorded with"], rows)
    sys.stderr.write(f"{len(found)} in {store.folder()}\n")


def _row(kept: CachedSignature) -> list[str]:
    versions = " ".join(f"{package} {version}" for package, version in kept.versions.items())
    return [kept.name, kept.about, f"{kept.parameters:,}", f"{kept.events:,}", f"{kept.bytes:,}", versions]


@cache.command("clear", epilog=examples("bf16prof cache clear", "bf16prof cache clear --quiet"))
def clear_cache(quiet: o.QuietOption = False) -> None:
    """Remove all of it; it is recorded again when it is needed."""
    from bf16prof.signatures import store

    count = store.clear()
    if not quiet:
        sys.stderr.write(f"removed {count} from {store.folder()}\n")
