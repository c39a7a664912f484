"""GPT-2: learned positions, one projection for query, key and value, dropout nearly everywhere.

transformers 5.23.0: `models/gpt2/modeling_gpt2.py`; `pytorch_utils.py` Conv1D, which is no linear layer to DeepSpeed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from bf16prof.lazy_dataclass import dataclass
from bf16prof.models.autograd.attention import Heads
from bf16prof.models.autograd.operators import add, addmm, contiguous, embedding, reshaped, split
from bf16prof.models.autograd.tape import Tape, Tensor
from bf16prof.models.tapes import NoTape
from bf16prof.models.tapes.huggingface.blocks import Attended, act, counted, eager, sdpa
from bf16prof.models.tapes.huggingface.causal import CausalLM
from bf16prof.models.tapes.layers import dropout_layer, norm_layer


def conv1d(tape: Tape, name: str, x: Tensor, inputs: int, outputs: int) -> Tensor:
    """`Conv1D`: `addmm` with a weight that lies the other way round."""
    weight, bias = tape.parameter(f"{name}.weight", inputs * outputs), tape.parameter(f"{name}.bias", outputs)
    return tape.module(name, lambda x: addmm(tape, x, weight, bias, inputs), x)


@dataclass(frozen=True, eq=False)
class GPT2(CausalLM):
    """GPT2LMHeadModel."""

    root: ClassVar[str] = "transformer"
    tokens: ClassVar[str] = "wte"
    layers: ClassVar[str] = "n_layer"
    defaults: ClassVar[Mapping[str, Any]] = {
        "activation_function": "gelu_new", "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "reorder_and_upcast_attn": False,
    }  # fmt: skip

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.config.count("n_embd")

    def body(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """GPT2Model."""
        embedded = self.embedded(tape, self.hidden)
        positions = counted(tape, self.run.sequence)
        rows = tape.parameter("transformer.wpe.weight", self.config.count("n_positions") * self.hidden)
        placed = tape.module("transformer.wpe", lambda: embedding(tape, rows, self.run.sequence, self.hidden, positions))
        entering = [add(tape, embedded, placed)]
        mask = self.masks(tape, [None], embedded.width)[None]
        entering = [dropout_layer(tape, "transformer.drop", entering.pop(), self.share("embd_pdrop"))]
        x = self.through(tape, layers, entering.pop(), lambda _: functools.partial(self.block, tape, mask=mask))
        return norm_layer(tape, "transformer.ln_f", x, self.hidden)

    def block(self, tape: Tape, x: Tensor, mask: Tensor | None) -> Tensor:
        """GPT2Block."""
        residual = x
        x = norm_layer(tape, "ln_1", x, self.hidden)
        attended, _ = tape.module("attn", lambda x: self.attention(tape, x, mask), x)
        x = add(tape, attended, residual)
        residual = x
        x = norm_layer(tape, "ln_2", x, self.hidden)
        mixed = tape.module("mlp", lambda x: self.mlp(tape, x), x)
        return add(tape, residual, mixed)

    def attention(self, tape: Tape, x: Tensor, mask: Tensor | None) -> Attended:
        """GPT2Attention."""
        hidden, run, count = self.hidden, self.run, self.config.count("n_head")
        heads = Heads(run.batch, count, count, run.sequence, hidden // count, run.capability, self.share("attn_pdrop"))
        parts = split(tape, conv1d(tape, "attn.c_attn", x, hidden, 3 * hidden), [run.tokens * hidden] * 3)
        q, k, v = (reshaped(tape, each) for each in parts)
        weights = None
        if not self.is_eager:
            attended = sdpa(tape, q, k, v, heads, mask=mask)
        elif self.config.flag("reorder_and_upcast_attn"):
            raise NoTape("model.hf_config.reorder_and_upcast_attn is not modelled")
        else:
            attended, weights = eager(tape, q, k, v, heads, mask=mask, softmax_width=0)
        attended = conv1d(tape, "attn.c_proj", contiguous(tape, attended), hidden, hidden)
        return dropout_layer(tape, "attn.resid_dropout", attended, self.share("resid_pdrop")), weights

    def mlp(self, tape: Tape, x: Tensor) -> Tensor:
        """GPT2MLP."""
        hidden, wide = self.hidden, self.config.count_or("n_inner", 4 * self.hidden)
        x = conv1d(tape, "mlp.c_fc", x, hidden, wide)
        x = act(tape, self.config.values["activation_function"], "mlp.act", x)
        x = conv1d(tape, "mlp.c_proj", x, wide, hidden)
        return dropout_layer(tape, "mlp.dropout", x, self.share("resid_pdrop"))


FAMILIES = {"gpt2": GPT2}
