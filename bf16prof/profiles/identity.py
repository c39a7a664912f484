"""Which settings make a case another case: a digest of all that decides its memory."""

from __future__ import annotations

import hashlib
import json

from bf16prof.profiles.schema import Profile

WITHOUT_EFFECT: dict[str, set[str]] = {"workload": {"seed", "data"}, "optimizer": {"lr", "betas", "eps"}}
"""Keys of a profile's tables that change what is learned and no byte."""


def workload_digest(profile: Profile) -> str:
    """Twelve hexadecimal digits of everything in a profile that decides the memory; equal for equal settings, in every process."""
    decisive = profile.model_dump(mode="json", exclude={"name": True, "description": True, **WITHOUT_EFFECT})
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
