"""In which order a model of a family calls its modules, and which parameters each of them reads: what the forward pass does, without torch.

The order is that of `models/modules`. Modules that only contain others are calls as well: ZeRO-3 prefetches whenever any module begins.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from bf16prof.models.shapes import ParameterSpec, inventory
from bf16prof.profiles.models import ModelSettings


@dataclass(frozen=True)
class Call:
    """One call of a module: the parameters that it reads itself, as positions in the inventory, and the calls that it makes.

    A tied head reads the embedding's weight.
    """

    parameters: tuple[int, ...] = ()
    inside: tuple[Call, ...] = ()

    @property
    def leaves(self) -> Iterator[Call]:
        """The calls that make no others, in their order."""
        for call in self.inside:
            yield from call.leaves
        if not self.inside:
            yield self


@dataclass(frozen=True)
class Execution:
    """The calls of one forward pass: before the blocks, the blocks, after the blocks (the head comes last).

    `ends_in_matrix`: nothing after a block's last matrix product needs its result for the backward pass; a residual sum does not.
    """

    before: tuple[Call, ...]
    blocks: tuple[Call, ...]
    after: tuple[Call, ...]
    ends_in_matrix: bool

    @property
    def head(self) -> Call:
        """The call that makes the logits."""
        return self.after[-1]


@dataclass(frozen=True)
class _Family:
    before: str
    blocks: str
    inside: str
    after: str
    tied: str = ""


FAMILIES = {
    "gpt2": _Family("wte wpe", "h", "ln_1 attn(c_attn c_proj) ln_2 mlp(c_fc c_proj)", "ln_f lm_head", "wte"),
    "llama": _Family(
        "embed_tokens",
        "layers",
        "input_layernorm self_attn(q_proj k_proj v_proj o_proj) post_attention_layernorm mlp(gate_proj up_proj down_proj)",
        "norm lm_head",
        "embed_tokens",
    ),
    "transformer-postln": _Family("embedding pos_embedding", "layers", "attention norm1 ff(0 1 2) norm2", "output_proj"),
}
"""The calls of each family, those that a call makes in brackets. `attention` is an `nn.MultiheadAttention`, which reads the weights of its
`out_proj` itself instead of calling it; `ff.1` is a GELU."""


@functools.cache
def execution(model: ModelSettings) -> Execution:
    """The calls of one forward pass of a model of a family."""
    family, specs = FAMILIES[model.family], inventory(model)
    owned = _by_module(specs)
    owned.setdefault(family.after.split()[-1], owned.get(family.tied, ()))
    blocks = tuple(Call((), _calls(family.inside, f"{family.blocks}.{index}.", owned)) for index in range(model.num_layers))
    *_, last = blocks[0].leaves
    ends_in_matrix = is_matrix(specs[last.parameters[0]])
    return Execution(_calls(family.before, "", owned), blocks, _calls(family.after, "", owned), ends_in_matrix)


def is_matrix(spec: ParameterSpec) -> bool:
    """Whether the parameter is a weight that activations are multiplied by; an embedding is looked up, unless a tied head reads it."""
    return len(spec.shape) == 2 and spec.layer != "Embedding"


def _by_module(specs: list[ParameterSpec]) -> dict[str, tuple[int, ...]]:
    """Positions of the parameters by the module that reads them."""
    found: dict[str, tuple[int, ...]] = {}
    for index, spec in enumerate(specs):
        module = spec.name.rpartition(".")[0].removesuffix(".out_proj")
        found[module] = (*found.get(module, ()), index)
    return found


def _calls(text: str, prefix: str, owned: dict[str, tuple[int, ...]]) -> tuple[Call, ...]:
    """The calls that a line of `FAMILIES` stands for, or the part of one in brackets."""
    calls, words = [], text.split()
    while words:
        name, opened, first = words.pop(0).partition("(")
        if opened:
            end = next(i for i, word in enumerate([first, *words]) if word.endswith(")"))
            inner, words = [first, *words[:end]], words[end:]
            calls.append(Call((), _calls(" ".join(inner).removesuffix(")"), f"{prefix}{name}.", owned)))
        else:
            calls.append(Call(owned.get(prefix + name, ())))
    return tuple(calls)
