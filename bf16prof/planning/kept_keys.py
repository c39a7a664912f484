"""A plan laid over the user's own DeepSpeed JSON: every key of theirs stays, with the plan's value
where the plan decides it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from bf16prof.engine.config import merged
from bf16prof.profiles.ds_config import DECISIVE, OFFLOADS
from bf16prof.profiles.features import AUTO, documented_key, features
from bf16prof.profiles.schema import Profile

OLD_NAMES = {"bfloat16": "bf16"}
OLD_SWITCHES = ("cpu_offload", "cpu_offload_param")
NVME_PATH = "nvme_path"


def laid_over(content: Mapping[str, Any], config: Mapping[str, Any], profile: Profile) -> dict[str, Any]:
    """The user's content with a plan's configuration over it, in the user's order; `profile` is the
    plan's."""
    base = {OLD_NAMES.get(key, key): copy.deepcopy(value) for key, value in content.items()}
    plan = dict(config)
    zero = base.get("zero_optimization")
    base["zero_optimization"] = _zero(zero if isinstance(zero, dict) else {}, plan["zero_optimization"], profile)
    plan.pop("zero_optimization")
    _without_precision(base)
    _lay_optimizer(base, plan, brings_optimizer(content, profile))
    settings = profile.deepspeed.model_dump(mode="json", by_alias=True)
    for key in [key for key, value in base.items() if value == AUTO and key in settings and key not in plan]:
        base[key] = settings[key]
    return merged(base, plan)


def brings_optimizer(content: Mapping[str, Any], profile: Profile) -> bool:
    """Whether the training script brings the optimizer: the file has none, and the Trainer makes
    it."""
    return not content.get("optimizer") and profile.optimizer.from_trainer


def _zero(base: dict[str, Any], plan: Mapping[str, Any], profile: Profile) -> dict[str, Any]:
    """The ZeRO block: long names, no old switches, offloading as planned; what the plan has at its
    default is written out."""
    named = {documented_key(f"zero_optimization.{key}").rpartition(".")[2]: v for key, v in base.items() if key not in OLD_SWITCHES}
    defaults = profile.deepspeed.zero_optimization.model_dump(mode="json", by_alias=True)
    for key in named.keys() & (defaults.keys() - set(OFFLOADS)):
        if key not in plan and defaults[key] is not None:
            named[key] = defaults[key]
    tables = {key: named.get(key) if isinstance(named.get(key), dict) else None for key in OFFLOADS}
    laid = merged(named, plan)
    for key, table in tables.items():
        planned = {"device": defaults[key]["device"], **plan.get(key, {})}
        if table is not None or planned["device"] != "none":
            theirs = {name: value for name, value in (table or {}).items() if name != NVME_PATH or planned["device"] == "nvme"}
            laid[key] = {**theirs, **planned}
    return laid


def _without_precision(base: dict[str, Any]) -> None:
    """Switch off what the user's file says of the dtypes; the plan's configuration says it anew."""
    for block, keys in DECISIVE.items():
        table = base.get(block)
        if isinstance(table, dict):
            base[block] = {key: False if key in keys and key != "dtype" else value for key, value in table.items()}


def _lay_optimizer(base: dict[str, Any], plan: dict[str, Any], is_brought: bool) -> None:
    """The plan's optimizer with the learning rate and the like of the user's, none added, for the
    Trainer compares them with its arguments; no optimizer at all where the training script brings
    it.
    """
    planned, own = plan.pop("optimizer", None), base.get("optimizer")
    if planned is None or is_brought:
        base.pop("optimizer", None)
        return
    if not isinstance(own, dict):
        base["optimizer"] = planned
        return
    params = own.get("params") or {}
    free = {key for key in {**planned["params"], **params} if (row := features().get(f"optimizer.params.{key}")) and row.free}
    decided = {key: value for key, value in planned["params"].items() if key not in free}
    base["optimizer"] = {**planned, "params": {**decided, **{key: value for key, value in params.items() if key in free}}}
