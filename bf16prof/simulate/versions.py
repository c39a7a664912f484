"""Which versions of DeepSpeed the dry run has been seen to work with, and what it says of others."""

from __future__ import annotations

from bf16prof.errors import InputError, RunFailed

OLDEST, NEWEST = "0.18.3", "0.19.8"
"""The first with the bf16 master options, and the one that this version was developed against. A test runs both."""


def parsed(version: str) -> tuple[int, ...]:
    """`0.18.4+cu124` as (0, 18, 4)."""
    return tuple(int(part) for part in version.partition("+")[0].split(".")[:3] if part.isdigit())


def check(version: str) -> tuple[str, ...]:
    """What there is to say of this version; `InputError` if it is too old."""
    if parsed(version) < parsed(OLDEST):
        raise InputError(
            f"DeepSpeed {version} is installed; the dry run needs {OLDEST} or later", hint=f"pip install 'deepspeed>={OLDEST}'"
        )
    if parsed(version) > parsed(NEWEST):
        return (f"DeepSpeed {version} is later than {NEWEST}, the last that this dry run was tested with",)
    return ()


def does_not_fit(what: str) -> RunFailed:
    """The error where something that the dry run replaces is not there."""
    from deepspeed import __version__ as deepspeed
    from torch import __version__ as torch

    return RunFailed(
        f"the dry run does not fit DeepSpeed {deepspeed} and PyTorch {torch}: {what}",
        hint=f"it was tested with DeepSpeed {OLDEST} to {NEWEST}",
    )
