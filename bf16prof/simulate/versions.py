"""What the dry run says of versions of DeepSpeed that it was not tested with."""

from __future__ import annotations

from bf16prof.engine.versions import NEWEST_DEEPSPEED, OLDEST_DEEPSPEED, version_tuple
from bf16prof.errors import InputError, RunFailed


def check(version: str) -> tuple[str, ...]:
    """What there is to say of this version; `InputError` if it is too old."""
    if version_tuple(version) < version_tuple(OLDEST_DEEPSPEED):
        raise InputError(
            f"DeepSpeed {version} is installed; the dry run needs {OLDEST_DEEPSPEED} or later",
            hint=f"pip install 'deepspeed>={OLDEST_DEEPSPEED}'",
        )
    if version_tuple(version) > version_tuple(NEWEST_DEEPSPEED):
        return (f"DeepSpeed {version} is later than {NEWEST_DEEPSPEED}, the last that this dry run was tested with",)
    return ()


def does_not_fit(what: str) -> RunFailed:
    """The error where something that the dry run replaces is not there."""
    from deepspeed import __version__ as deepspeed
    from torch import __version__ as torch

    return RunFailed(
        f"the dry run does not fit DeepSpeed {deepspeed} and PyTorch {torch}: {what}",
        hint=f"it was tested with DeepSpeed {OLDEST_DEEPSPEED} to {NEWEST_DEEPSPEED}",
    )
