"""The accountings that textbooks and blog posts use, beside ours so that a reader sees what they
leave out.

They multiply the number of parameters by bytes per parameter: no padding, no buckets, no gathered
parameters, no kept activations, no allocator.
"""

from __future__ import annotations

from collections.abc import Mapping

from bf16prof.profiles.recipes import Recipe
from bf16prof.vocabulary import Component


def zero_paper_bytes(
    parameters: float, stage: int, world_size: int, *, parameter: int = 2, gradient: int = 2, optimizer: int = 12
) -> float:
    """Model states per GPU by Rajbhandari et al. 2020 (arXiv 1910.02054), figure 1 and table 1: 2 +
    2 + K bytes, K = 12 for Adam.

    Stage 1 partitions the K, stage 2 the gradients too, stage 3 everything.
    """
    shares = (parameter, gradient, optimizer)
    partitioned = (stage >= 3, stage >= 2, stage >= 1)
    return sum(size * parameters / (world_size if cut else 1) for size, cut in zip(shares, partitioned, strict=True))


def readme_bytes(parameters: float, stage: int, world_size: int, recipe: Recipe) -> float:
    """The published example's own table: 20 bytes per parameter for the baseline, 12 for bf16
    throughout.

    Unlike the ZeRO paper it counts master gradients as if they stayed (DeepSpeedExamples
    training/bf16_master_weight/README.md).
    """
    return _recipe_bytes(parameters, stage, world_size, recipe.at(stage).bytes_per_parameter())


def textbook(parameters: int, stage: int, world_size: int, recipe: Recipe) -> dict[str, int]:
    """Both accountings of a recipe, in bytes per GPU."""
    sizes = recipe.at(stage).bytes_per_parameter()
    stay = {name: size for name, size in sizes.items() if name != Component.MASTER_GRADIENTS}
    return {
        "ZeRO paper": round(_recipe_bytes(parameters, stage, world_size, stay)),
        "example README": round(_recipe_bytes(parameters, stage, world_size, sizes)),
    }


def _recipe_bytes(parameters: float, stage: int, world_size: int, sizes: Mapping[str, int]) -> float:
    """The ZeRO paper's sum over these bytes per parameter by component: all but parameters and
    gradients is the optimizer's."""
    parameter, gradient = sizes[Component.PARAMETERS], sizes[Component.GRADIENTS]
    optimizer = sum(sizes.values()) - parameter - gradient
    return zero_paper_bytes(parameters, stage, world_size, parameter=parameter, gradient=gradient, optimizer=optimizer)
