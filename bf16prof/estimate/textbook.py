"""The accountings that textbooks and blog posts use, beside ours so that a reader sees what they leave out.

They multiply the number of parameters by bytes per parameter: no padding, no buckets, no gathered parameters, no kept activations, no
allocator.
"""

from __future__ import annotations

from bf16prof.profiles.recipes import DTYPE_BYTES, Recipe
from bf16prof.records import Component

C = Component


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
