"""The environment that ranks get."""

from __future__ import annotations

from bf16prof.processes import child_environment, threads_per_rank

UNWANTED_VARIABLES = (
    "LOCAL_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
)  # fmt: skip
"""Left over from another launcher: LOCAL_SIZE makes DeepSpeed take its shared-memory path, the
others would confuse torchrun."""


def launcher_environment() -> dict[str, str]:
    """This process's environment for what starts ranks, without what other launchers may have left
    in it."""
    return {key: value for key, value in child_environment().items() if key not in UNWANTED_VARIABLES}


def rank_environment(ranks: int) -> dict[str, str]:
    """This process's environment for `ranks` ranks on this host, which share its cores."""
    return {"TOKENIZERS_PARALLELISM": "false", **launcher_environment(), "OMP_NUM_THREADS": str(threads_per_rank(ranks))}
