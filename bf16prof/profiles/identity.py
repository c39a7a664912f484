"""Which settings make a case another case: a digest of all that decides its memory."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from bf16prof.profiles.schema import Profile

WITHOUT_EFFECT: dict[str, set[str]] = {"workload": {"seed", "data"}, "optimizer": {"lr", "betas", "eps"}}
"""Keys of a profile's tables that change what is learned and no byte."""

PLACES = {"deepspeed": {"zero_optimization": {"offload_optimizer": {"nvme_path"}}}}
"""Keys of a profile's tables that say where somebody's files lie: they change no byte, and no
record needs them."""

ADDED: dict[str, dict[str, object]] = {
    "parallel": {"pipeline": 1, "expert": 1},
    "": {"engine": "deepspeed", "peft": None, "quantization": None, "parallel": {"sequence": 1, "tensor": 1}},
    "workload": {
        "use_reentrant": False,
        "checkpoint_every_n_layers": 1,
        "liger": "none",
        "tiled_mlp": False,
        "evaluation": None,
        "packed_sequences": 0,
        "fused_loss": "none",
        "fused_loss_tiles": None,
        "dpo": "none",
        "reward": False,
    },
    "optimizer": {"library": ""},
    "deepspeed.zero_optimization.offload_optimizer": {
        "buffer_count": 4,
        "pipeline_read": False,
        "pipeline_write": False,
    },
}
"""Keys that profiles did not always have, by table, with the value that says what was so before:
cases of earlier runs stay the same."""


def recorded(profile: Profile) -> dict[str, Any]:
    """A profile as records and documents keep it."""
    return profile.model_dump(mode="json", exclude=PLACES)


def workload_digest(profile: Profile) -> str:
    """Twelve hexadecimal digits of everything in a profile that decides the memory; equal for equal
    settings, in every process."""
    decisive = profile.model_dump(mode="json", exclude={"name": True, "description": True, **WITHOUT_EFFECT, **PLACES})
    for table, keys in ADDED.items():
        place = decisive
        for part in table.split(".") if table else ():
            place = place[part]
        for key, usual in keys.items():
            if place[key] == usual:
                del place[key]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
