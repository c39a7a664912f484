"""Gemma, Gemma 2 and the text model of Gemma 3: a scaled embedding, norms that stay in fp32, and from Gemma 2 on norms around each part.

transformers 5.23.0: `models/{gemma,gemma2,gemma3}/modeling_*.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from bf16prof.lazy_dataclass import dataclass
from bf16prof.models.autograd.operators import FP32, add, cast, embedding, mul, strided
from bf16prof.models.autograd.pointwise import over_number, plus_number, power, reciprocal_root, row_mean, tanh
from bf16prof.models.autograd.tape import Tape, Tensor
from bf16prof.models.tapes.huggingface.blocks import Tables, windows_of
from bf16prof.models.tapes.huggingface.families.llama import Llama


@dataclass(frozen=True, eq=False)
class Gemma(Llama):
    """GemmaForCausalLM."""

    defaults: ClassVar[Mapping[str, Any]] = {**Llama.defaults, "hidden_act": "gelu_pytorch_tanh"}

    def embedded(self, tape: Tape, width: int) -> Tensor:
        """`GemmaTextScaledWordEmbedding`: the scale in the parameters' dtype."""
        name = f"{self.root}.{self.tokens}"
        table = tape.parameter(f"{name}.weight", self.config.count("vocab_size") * width)

        def forward() -> Tensor:
            found = embedding(tape, table, self.run.tokens, width)
            return mul(tape, found, tape.new(1, table.width, "_to_copy") if table.width < FP32 else None)

        return tape.module(name, forward)

    def norm(self, tape: Tape, name: str, x: Tensor, width: int) -> Tensor:
        """`GemmaRMSNorm`: scaled in fp32 as well."""
        weight = tape.parameter(f"{name}.weight", width)

        def normed(x: Tensor) -> Tensor:
            return mul(tape, x, reciprocal_root(tape, plus_number(tape, row_mean(tape, power(tape, x), x.numel // width))))

        def forward(x: Tensor) -> Tensor:
            output = normed(cast(tape, x, FP32))
            output = mul(tape, output, plus_number(tape, cast(tape, weight, FP32)))
            return cast(tape, output, x.width)

        return tape.module(name, forward, x)


@dataclass(frozen=True, eq=False)
class Gemma2(Gemma):
    """Gemma2ForCausalLM: every other layer looks back on a window, scores and logits are capped."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **Gemma.defaults, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    }  # fmt: skip
    has_sdpa: ClassVar[bool] = False
    activation: ClassVar[str] = "hidden_activation"

    @property
    def windows(self) -> Sequence[int | None]:
        """By the types of layers: the first one slides."""
        return windows_of(self.config, self.config.count("sliding_window"), lambda layer: layer % 2 == 0)

    def masks(self, tape: Tape, windows: Sequence[int | None], width: int) -> Mapping[int | None, Tensor | None]:
        """Both are made, whatever the layers need."""
        return super().masks(tape, [None, self.config.count("sliding_window")], width)

    @property
    def caps(self) -> bool:
        """Whether the scores are capped."""
        return self.config.values["attn_logit_softcapping"] is not None

    def block(self, tape: Tape, x: Tensor, tables: Tables, mask: Tensor | None) -> Tensor:
        """Gemma2DecoderLayer."""
        residual = x
        x = self.norm(tape, "input_layernorm", x, self.hidden)
        x, _ = tape.module("self_attn", lambda: self.attention(tape, x, tables, mask))
        x = self.norm(tape, "post_attention_layernorm", x, self.hidden)
        x = add(tape, residual, x)
        residual = x
        x = self.norm(tape, "pre_feedforward_layernorm", x, self.hidden)
        x = tape.module("mlp", lambda x: self.mlp(tape, x), x)
        x = self.norm(tape, "post_feedforward_layernorm", x, self.hidden)
        return add(tape, residual, x)

    def logits(self, tape: Tape, x: Tensor) -> Tensor:
        """Capped, if they are."""
        logits = self.head(tape, x, self.hidden)
        if self.config.values["final_logit_softcapping"] is None:
            return logits
        logits = over_number(tape, logits)
        logits = tanh(tape, logits)
        return mul(tape, logits)


@dataclass(frozen=True, eq=False)
class Gemma3(Gemma2):
    """Gemma3ForCausalLM: queries and keys are normed, and layers of one type turn by tables of their own."""

    defaults: ClassVar[Mapping[str, Any]] = {**Gemma2.defaults, "final_logit_softcapping": None, "attn_logit_softcapping": None}
    has_sdpa: ClassVar[bool] = True

    @property
    def caps(self) -> bool:
        """Never."""
        return False

    @property
    def windows(self) -> Sequence[int | None]:
        """By the types of layers: the last of a pattern sees all."""
        pattern = self.config.count("sliding_window_pattern")
        return windows_of(self.config, self.config.count("sliding_window"), lambda layer: (layer + 1) % pattern != 0)

    def tables(self, tape: Tape, positions: Tensor, width: int) -> Mapping[int | None, Tables]:
        """Those of each type of layers."""
        return {window: self.turning(tape, positions, width) for window in dict.fromkeys(self.windows)}

    def by_heads(self, tape: Tape, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys are normed after all are there."""
        q, k, v = super().by_heads(tape, x)
        q = strided(self.norm(tape, "self_attn.q_norm", q, self.heads.width))
        return q, strided(self.norm(tape, "self_attn.k_norm", k, self.heads.width)), v


FAMILIES = {"gemma": Gemma, "gemma2": Gemma2, "gemma3_text": Gemma3}
