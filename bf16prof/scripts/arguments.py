"""DeepSpeed's launcher gives every rank its number as `--local_rank`; so does this, where a
script's parser knows that option."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from bf16prof.scripts.face.module import Row

OPTIONS = ("--local_rank", "--local-rank")


def replacements(local_rank: int) -> Iterator[Row]:
    """What is replaced in `argparse`."""
    real = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        known = [option for action in self._actions for option in action.option_strings if option in OPTIONS]
        if known and given == sys.argv[1:] and not any(word.partition("=")[0] in OPTIONS for word in given):
            given = [f"{known[0]}={local_rank}", *given]
        return real(self, given, namespace)

    yield argparse.ArgumentParser, "parse_known_args", parse_known_args
