"""Phi-3 and Phi-4: Llama's layer with one projection for query, key and value, and one for gate and
up.

transformers 5.23.0: `models/phi3/modeling_phi3.py` (Phi3DecoderLayer, Phi3ForCausalLM),
`configuration_phi3.py`.
"""

from __future__ import annotations

from bf16prof.models.shapes import ParameterSpec, linear
from bf16prof.models.shapes.huggingface import Family, Skeleton
from bf16prof.models.shapes.huggingface.blocks import HeadSizes, decoder, weights
from bf16prof.models.shapes.huggingface.config import Config
from bf16prof.models.shapes.huggingface.rotary import rotary

NORM = "Phi3RMSNorm"
ALSO_LONGROPE = ("su", "yarn")
"""Older names of the one kind of scaling that Phi-3 has
(Phi3Config.convert_rope_params_to_dict)."""


def _phi3(config: Config) -> Skeleton:
    sizes, intermediate = HeadSizes.of(config), config.count("intermediate_size")

    def layer(name: str, index: int) -> list[ParameterSpec]:
        return [
            *linear(f"{name}.self_attn.o_proj", sizes.hidden, sizes.inputs[0], bias=False),
            *linear(f"{name}.self_attn.qkv_proj", sum(sizes.inputs), sizes.hidden, bias=False),
            *linear(f"{name}.mlp.gate_up_proj", 2 * intermediate, sizes.hidden, bias=False),
            *linear(f"{name}.mlp.down_proj", sizes.hidden, intermediate, bias=False),
            *weights(name, NORM, sizes.hidden, "input_layernorm", "post_attention_layernorm"),
        ]

    return decoder(config, layer, norm=NORM, buffers=rotary(_with_one_name(config), sizes.width, by_default=True))


def _with_one_name(config: Config) -> Config:
    table = {**(config.table("rope_scaling") or config.table("rope_parameters"))}
    if table.get("rope_type", table.get("type")) in ALSO_LONGROPE:
        table["rope_type"] = "longrope"
    return Config({**config.values, "rope_scaling": table})


PHI3 = {
    "vocab_size": 32_064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
    "tie_word_embeddings": False,
}  # fmt: skip

FAMILIES = {"phi3": Family("Phi3ForCausalLM", _phi3, PHI3)}
