"""Mixtures of experts: Mixtral, Qwen2-MoE with its shared expert, Qwen3-MoE with normed heads; layers without experts where they say so.

transformers 5.23.0: `models/{mixtral,qwen2_moe,qwen3_moe}/modeling_*.py`; `integrations/moe.py` grouped_mm_experts_forward, its choice,
which sorts the tokens by expert: no shape depends on how many each of them gets.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

from bf16prof.lazy_dataclass import dataclass
from bf16prof.models.autograd.experts import INT32, grouped_product, taken, topk
from bf16prof.models.autograd.operators import FP32, TOKEN_BYTES, add, cast, linear, mul, softmax, split, viewed
from bf16prof.models.autograd.pointwise import divided_in_place, row_sum, sigmoid
from bf16prof.models.autograd.tape import Tape, Tensor
from bf16prof.models.shapes.huggingface.families.mixture import has_experts
from bf16prof.models.tapes import NoTape
from bf16prof.models.tapes.huggingface.blocks import act, windows_of
from bf16prof.models.tapes.huggingface.families.llama import Llama, Mistral, Qwen2, Qwen3
from bf16prof.models.tapes.layers import linear_layer

ALIGNMENT = 8
"""16 bytes of bf16 elements (torch/_meta_registrations.py, _meta_grouped_mm_common)."""


@dataclass(frozen=True, eq=False)
class Mixture(Llama):
    """What the three have in common.

    * `experts`, `expert_width`: keys of the number of experts and of the width of one.
    * `scores_stay_wide`: whether the experts' weights stay in fp32.
    """

    leaf: ClassVar[str | None] = "mlp"
    experts: ClassVar[str] = "num_experts"
    expert_width: ClassVar[str] = "moe_intermediate_size"
    scores_stay_wide: ClassVar[bool] = False

    @property
    def kinds(self) -> Sequence[Hashable]:
        """Layers differ in their windows and in whether they have experts."""
        return [(window, self.is_sparse(layer)) for layer, window in enumerate(self.windows)]

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return has_experts(self.config, layer)

    def has_leaf(self, layer: int) -> bool:
        """Blocks of experts are (`DEFAULT_LEAF_MODULE_CLASSES`)."""
        return self.is_sparse(layer)

    def mlp(self, tape: Tape, x: Tensor) -> Tensor:
        """The block of experts, or an MLP."""
        if not self.is_sparse(tape.layer):
            return super().mlp(tape, x)
        if self.run.dtype != "bf16":
            raise NoTape(f"the experts' products are modelled for parameters in bf16, not in {self.run.dtype}")
        if odd := [width for width in (self.hidden, self.config.count(self.expert_width)) if width % ALIGNMENT]:
            raise NoTape(f"torch's grouped matrix product takes rows of a multiple of {ALIGNMENT} elements, not of {odd[0]}")
        return self.sparse(tape, x)

    def sparse(self, tape: Tape, x: Tensor) -> Tensor:
        """`…SparseMoeBlock`."""
        _, scores, chosen = self.routed(tape, x)
        return self.through_experts(tape, x, chosen, scores)

    def routed(self, tape: Tape, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`…TopKRouter`: logits, scores and experts of each token."""
        count = self.config.count(self.experts)
        weight = tape.parameter("mlp.gate.weight", count * self.hidden)

        def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = linear(tape, x, weight, None, self.hidden, is_matrix=True)
            scores, chosen = self.chosen(tape, logits)
            return logits, scores, chosen

        return tape.module("mlp.gate", forward, x)

    def chosen(self, tape: Tape, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the best experts of each token."""
        tokens, each = self.run.tokens, self.config.count("num_experts_per_tok")
        if each > self.config.count(self.experts):
            raise NoTape(f"model.hf_config.num_experts_per_tok ({each}) is more than {self.experts} ({self.config.count(self.experts)})")
        probabilities = softmax(tape, logits, width=FP32)
        scores, chosen = topk(tape, probabilities, tokens * each)
        if self.normalises:
            scores = divided_in_place(tape, scores, row_sum(tape, scores, tokens))
        return (scores if self.scores_stay_wide else cast(tape, scores, logits.width)), chosen

    @property
    def normalises(self) -> bool:
        """Whether the scores of the best experts are made to sum to one."""
        return bool(self.config.values["norm_topk_prob"])

    def through_experts(self, tape: Tape, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        """`…Experts`."""
        return tape.module("mlp.experts", lambda x, chosen, scores: self._grouped(tape, x, chosen, scores), x, chosen, scores)

    def _grouped(self, tape: Tape, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        """`grouped_mm_experts_forward`."""
        count, wide, hidden, rows = self.config.count(self.experts), self.config.count(self.expert_width), self.hidden, chosen.numel
        up = tape.parameter("mlp.experts.gate_up_proj", count * 2 * wide * hidden)
        down = tape.parameter("mlp.experts.down_proj", count * hidden * wide)
        order = [tape.new(rows, TOKEN_BYTES, "sort") for _ in range(2)]
        selected = taken(tape, x, rows * hidden, tape.new(rows, TOKEN_BYTES, "floor_divide"))
        weights = taken(tape, scores, rows, order[1])
        counted = [tape.new(rows, INT32, "_to_copy"), tape.new(count, INT32, "histc")]
        offsets = tape.new(count, INT32, "cumsum")
        out = grouped_product(tape, selected, tape.view_of(up), 2 * wide, offsets, inputs=hidden)
        out = self._gated(tape, out)
        out = grouped_product(tape, out, tape.view_of(down), hidden, offsets, inputs=wide)
        weighted = mul(tape, out, weights)
        back = tape.new(rows, TOKEN_BYTES, "empty_like")
        numbers = tape.new(rows, TOKEN_BYTES, "arange")
        del numbers
        weighted = taken(tape, weighted, rows * hidden, back)
        total = cast(tape, row_sum(tape, viewed(tape, weighted), self.run.tokens * hidden), x.width)
        del order, counted
        return total

    def _gated(self, tape: Tape, x: Tensor) -> Tensor:
        gate, up = split(tape, x, [x.numel // 2] * 2)
        return mul(tape, act(tape, self.config.values["hidden_act"], "mlp.experts.act_fn", gate), up)


@dataclass(frozen=True, eq=False)
class Mixtral(Mixture, Mistral):
    """MixtralForCausalLM."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **Mistral.defaults, "sliding_window": None, "num_experts_per_tok": 2, "router_jitter_noise": 0.0,
    }  # fmt: skip
    experts: ClassVar[str] = "num_local_experts"
    expert_width: ClassVar[str] = "intermediate_size"
    scores_stay_wide: ClassVar[bool] = True

    @property
    def normalises(self) -> bool:
        """Always."""
        return True

    def is_sparse(self, layer: int) -> bool:
        """All are."""
        return True

    def sparse(self, tape: Tape, x: Tensor) -> Tensor:
        """`MixtralSparseMoeBlock`."""
        if self.config.values["router_jitter_noise"]:
            raise NoTape("model.hf_config.router_jitter_noise is not modelled")
        return super().sparse(tape, x)


@dataclass(frozen=True, eq=False)
class Qwen2Moe(Mixture, Qwen2):
    """Qwen2MoeForCausalLM."""

    defaults: ClassVar[Mapping[str, Any]] = {**Qwen2.defaults, "num_experts_per_tok": 4, "norm_topk_prob": False}

    @property
    def windows(self) -> Sequence[int | None]:
        """By the types of layers; every other one below `max_window_layers`, if not said."""
        below = self.config.values["max_window_layers"] if self.window else 0
        return windows_of(self.config, self.window, lambda layer: layer % 2 == 0 and layer < below)

    def masks(self, tape: Tape, windows: Sequence[int | None], width: int) -> Mapping[int | None, Tensor | None]:
        """Both are made, if need be for a window of nothing."""
        return super().masks(tape, [None, next((each for each in windows if each is not None), 0)], width)

    @property
    def bias(self) -> bool:
        """As configured."""
        return self.config.flag("qkv_bias")

    def sparse(self, tape: Tape, x: Tensor) -> Tensor:
        """`Qwen2MoeSparseMoeBlock`: an expert that all tokens pass, gated by a sigmoid."""
        shared = tape.module("mlp.shared_expert", lambda x: self._shared(tape, x), x)
        _, scores, chosen = self.routed(tape, x)
        out = self.through_experts(tape, x, chosen, scores)
        shared = mul(
            tape, sigmoid(tape, linear_layer(tape, "mlp.shared_expert_gate", x, self.hidden, 1, bias=False, is_matrix=True)), shared
        )
        return add(tape, out, shared)

    def _shared(self, tape: Tape, x: Tensor) -> Tensor:
        return self.gated(tape, "mlp.shared_expert", x, self.config.count("shared_expert_intermediate_size"))


@dataclass(frozen=True, eq=False)
class Qwen3Moe(Mixture, Qwen3):
    """Qwen3MoeForCausalLM."""

    defaults: ClassVar[Mapping[str, Any]] = {**Qwen3.defaults, "num_experts_per_tok": 8, "norm_topk_prob": False}

    @property
    def windows(self) -> Sequence[int | None]:
        """The same for all layers."""
        return [self.window for _ in self.config.layers()]


FAMILIES = {"mixtral": Mixtral, "qwen2_moe": Qwen2Moe, "qwen3_moe": Qwen3Moe}
