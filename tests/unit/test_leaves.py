"""ZeRO-3's leaf modules: when a parameter of one is looked for again."""

from __future__ import annotations

from bf16prof.closed_form.leaves import Leaves
from bf16prof.models.autograd.events import NO_LAYER, ParameterKey


def test_what_is_in_a_leaf_comes_again_in_every_container() -> None:
    names = ["", "layers.0", "layers.0.mlp", "layers.1", "layers.1.attn", "layers.1.mlp", "layers.0.mlp"]
    trace = [ParameterKey(NO_LAYER, name) for name in names]
    numels = {ParameterKey(NO_LAYER, f"layers.{layer}.{name}.weight"): 10 for layer in (0, 1) for name in ("attn", "mlp")}
    leaves = Leaves({ParameterKey(NO_LAYER, "layers.0.mlp"), ParameterKey(NO_LAYER, "layers.1.mlp")}, trace, numels)
    first, second = (ParameterKey(NO_LAYER, f"layers.{layer}.mlp.weight") for layer in (0, 1))

    assert leaves.is_reused(first, 0, 1)
    assert leaves.is_reused(second, 2, 11)
    assert leaves.is_reused(first, 3, 41)
    assert not leaves.is_reused(first, 3, 40)
