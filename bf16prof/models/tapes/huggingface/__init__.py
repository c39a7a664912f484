"""The forward passes of transformers' causal language models on a tape, without torch or transformers.

Facts are of transformers 5.23.0 in training: no cache, no attention mask from outside, labels that are the input ids. A file in `families`
has the models that share a block, as in `shapes/huggingface`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from bf16prof.models.autograd.tape import Precision, Tape
from bf16prof.models.shapes.huggingface import configuration, families_of, skeleton
from bf16prof.models.tapes import ForwardRun, Network, NoTape
from bf16prof.models.tapes.huggingface.causal import CausalLM
from bf16prof.profiles.models import HuggingFaceSettings

FAMILIES_PACKAGE = f"{__name__}.families"
HALF = 2
IMPLEMENTATIONS = (None, "sdpa", "eager")
NOT_MODELLED = ("use_bidirectional_attention", "layerdrop", "experts_implementation", "_experts_implementation")
"""Keys that, when set, change what is computed, in ways that no tape knows."""


@functools.cache
def model_types() -> Mapping[str, type[CausalLM]]:
    """Every model type that has a tape."""
    return families_of(FAMILIES_PACKAGE)


def network_of(run: ForwardRun, model: HuggingFaceSettings) -> Network:
    """The model of a Hugging Face configuration, run forwards once to see that all its values are known.

    Raises `NoTape`, and `NoInventory` where not even its parameters are known.
    """
    if model.safetensors is not None:
        raise NoTape("a safetensors file lists parameters, and not what is computed with them")
    if model.attention not in IMPLEMENTATIONS:
        raise NoTape(f"attention by {model.attention!r:.40} is not modelled")
    buffers = skeleton(model.hf_config).buffers
    if model.family not in model_types():
        raise NoTape(f"the activations of model_type {model.family!r:.40} are not modelled")
    found = model_types()[model.family]
    for key in NOT_MODELLED:
        if model.hf_config.get(key):
            raise NoTape(f"model.hf_config.{key} is not modelled")
    if model.hf_config.get("is_causal") is False:
        raise NoTape("attention that is not causal is not modelled")
    if model.attention == "sdpa" and not found.has_sdpa:
        raise NoTape(f"transformers has no sdpa for model_type {model.family!r:.40}")
    is_eager = model.attention == "eager" or not found.has_sdpa
    known = found(run, configuration(model.hf_config, found.defaults), is_eager, buffers)
    layers = sorted({*{kind: layer for layer, kind in enumerate(known.kinds)}.values()})
    try:
        known.loss(Tape(Precision(HALF)), layers)
    except ArithmeticError as error:  # a size of nothing, by which something is divided
        raise NoTape(f"model.hf_config: nothing can be computed with these sizes ({error})") from error
    return known
