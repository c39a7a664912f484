"""The accountings that textbooks and blog posts use, beside ours so that a reader sees what they leave out.

They multiply the number of parameters by bytes per parameter: no padding, no buckets, no gathered parameters, no kept activations, no
allocator.
"""

from __future__ import annotations

from typing import Literal

from bf16prof.profiles.recipes import DTYPE_BYTES, Recipe
from bf16prof.records import Component

C = Component

ADAM_BYTES = 18
"""Bytes per parameter of Megatron's mixed precision: 2 + 4 of its gradients, 12 of the optimizer."""


def zero_paper_bytes(
    parameters: float, stage: int, world_size: int, *, parameter: int = 2, gradient: int = 2, optimizer: int = 12
) -> float:
    """Model states per GPU by Rajbhandari et al. 2020 (arXiv 1910.02054), figure 1 and table 1: 2 + 2 + K bytes, K = 12 for Adam.

    Stage 1 partitions the K, stage 2 the gradients too, stage 3 everything.
    """
    shares = (parameter, gradient, optimizer)
    partitioned = (stage >= 3, stage >= 2, stage >= 1)
    return sum(size * parameters / (world_size if cut else 1) for size, cut in zip(shares, partitioned, strict=True))


def readme_bytes(parameters: float, stage: int, world_size: int, recipe: Recipe) -> float:
    """The published example's own table: 20 bytes per parameter for the baseline, 12 for bf16 throughout.

    Unlike the ZeRO paper it counts master gradients as if they stayed (DeepSpeedExamples training/bf16_master_weight/README.md).
    """
    size = recipe.at(stage).bytes_per_parameter()
    optimizer = sum(size[c] for c in (C.MASTER_PARAMETERS, C.MASTER_GRADIENTS, C.MOMENTUM, C.VARIANCE)) + _extra(recipe)
    return zero_paper_bytes(parameters, stage, world_size, parameter=size[C.PARAMETERS], gradient=size[C.GRADIENTS], optimizer=optimizer)


def _extra(recipe: Recipe) -> int:
    """Bytes per parameter of what its optimizer keeps besides master parameters and moments."""
    return sum(DTYPE_BYTES[dtype] for dtype in recipe.extra.values())


def textbook(parameters: int, stage: int, world_size: int, recipe: Recipe) -> dict[str, int]:
    """Both accountings of a recipe, in bytes per GPU."""
    size = recipe.at(stage).bytes_per_parameter()
    optimizer = sum(size[c] for c in (C.MASTER_PARAMETERS, C.MOMENTUM, C.VARIANCE)) + _extra(recipe)
    paper = zero_paper_bytes(parameters, stage, world_size, parameter=size[C.PARAMETERS], gradient=size[C.GRADIENTS], optimizer=optimizer)
    return {"ZeRO paper": round(paper), "example README": round(readme_bytes(parameters, stage, world_size, recipe))}


def korthikanti_layer_bytes(
    sequence: int,
    batch: int,
    hidden: int,
    heads: int,
    *,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
    recompute: Literal["none", "selective", "full"] = "none",
) -> float:
    """Activations that a transformer layer keeps for backward, by Korthikanti et al. 2022 (arXiv 2205.05198), table 2, in bytes.

    16-bit, with dropout, an MLP of 4 x hidden, and attention that keeps its score matrix unless `recompute` is selective (it is computed
    again) or full (only the layer's input is kept).
    """
    tokens = sequence * batch * hidden
    if recompute == "full":
        return 2 * tokens
    whole, cut = (0, 34) if sequence_parallel else (10, 24)
    scores = 5 * heads * sequence / hidden if recompute == "none" else 0
    return tokens * (whole + (cut + scores) / tensor_parallel)


def korthikanti_figure_bytes(layers: int, layer_bytes: float, *, pipeline_parallel: int = 1, interleave: int = 1) -> float:
    """Activations of the first pipeline stage, which keeps those of all layers (figure 1): interleaving adds (p - 1) / (p m) of them."""
    return layers * layer_bytes * (1 + (pipeline_parallel - 1) / (pipeline_parallel * interleave))


def megatron_states_bytes(layers: int, hidden: int, *, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> float:
    """Parameters, gradients and optimizer state of the layers (figure 1): 12 hidden^2 parameters a layer, `ADAM_BYTES` each."""
    return 12 * layers * hidden**2 * ADAM_BYTES / (tensor_parallel * pipeline_parallel)
