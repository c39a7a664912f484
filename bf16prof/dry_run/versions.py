"""What the dry run says of versions of DeepSpeed, PyTorch and transformers that it was not tried
with."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from importlib import metadata

from bf16prof.cases import Job
from bf16prof.engine.engines import engine_of
from bf16prof.engine.versions import NEWEST_DEEPSPEED, OLDEST_DEEPSPEED, Support, supported, version_tuple
from bf16prof.errors import InputError, RunFailed
from bf16prof.profiles.models import HuggingFaceSettings

NAMES = {"deepspeed": "DeepSpeed", "torch": "PyTorch", "transformers": "transformers", "megatron-core": "megatron-core"}


def installed(jobs: Sequence[Job]) -> dict[str, str]:
    """The versions of the packages that these jobs need, as far as they are installed. Nothing is
    imported."""
    names = dict.fromkeys(["deepspeed", "torch", *(engine_of(job).package for job in jobs)])
    if any(isinstance(job.profile.model, HuggingFaceSettings) for job in jobs):
        names["transformers"] = None
    found: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def check(versions: dict[str, str]) -> tuple[str, ...]:
    """What there is to say of these versions by package; `InputError` for one that is too old, or
    that is known not to work."""
    for package, version in versions.items():
        _refuse(package, version, supported()[package])
    said = ((package, version, supported()[package].untested(version)) for package, version in versions.items())
    return tuple(f"{NAMES[package]} {version} is {place} that this dry run was tested with" for package, version, place in said if place)


def _refuse(package: str, version: str, support: Support) -> None:
    if version_tuple(version) < version_tuple(support.oldest):
        raise InputError(
            f"{NAMES[package]} {version} is installed; the dry run needs {support.oldest} or later",
            hint=f"pip install '{package}>={support.oldest}'",
        )
    if reason := support.reason_against(version):
        raise InputError(
            f"the dry run does not work with {NAMES[package]} {version}: {reason}", hint=f"pip install '{package}=={support.newest}'"
        )


def does_not_fit(what: str) -> RunFailed:
    """The error where something that the dry run replaces is not there."""
    from deepspeed import __version__ as deepspeed
    from torch import __version__ as torch

    return RunFailed(
        f"the dry run does not fit DeepSpeed {deepspeed} and PyTorch {torch}: {what}",
        hint=f"it was tested with DeepSpeed {OLDEST_DEEPSPEED} to {NEWEST_DEEPSPEED}",
    )
