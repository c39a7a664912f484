"""GPT-2 (see `shapes/gpt2.py`): causal scaled-dot-product attention, tanh GELU, no dropout (so that
runs repeat)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bf16prof.models.modules import run_layers
from bf16prof.models.modules.ends import Positions, as_head
from bf16prof.profiles.models import ModelSettings


class Gpt2Attention(nn.Module):
    """Causal self-attention with one fused projection. x: [batch, sequence, hidden]."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(hidden, 3 * hidden)
        self.c_proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """The attended values, of the shape of the input."""
        batch, sequence, hidden = x.shape
        q, k, v = (t.view(batch, sequence, self.heads, -1).transpose(1, 2) for t in self.c_attn(x).split(hidden, dim=2))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.c_proj(attended.transpose(1, 2).reshape(batch, sequence, hidden))
        return out


class Gpt2MLP(nn.Module):
    """Two projections around a GELU."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(hidden, intermediate)
        self.c_proj = nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of the input."""
        out: Tensor = self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))
        return out


class Gpt2Block(nn.Module):
    """Pre-LN attention and MLP with residual sums."""

    def __init__(self, hidden: int, heads: int, intermediate: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden)
        self.attn = Gpt2Attention(hidden, heads)
        self.ln_2 = nn.LayerNorm(hidden)
        self.mlp = Gpt2MLP(hidden, intermediate)

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of the input."""
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


def build(model: ModelSettings, *, activation_checkpointing: bool) -> nn.Module:
    """The model of these sizes."""
    return Gpt2Model(model, activation_checkpointing)


class Gpt2Model(nn.Module):
    """Token ids [batch, sequence] to logits [batch, sequence, vocabulary]."""

    def __init__(self, model: ModelSettings, activation_checkpointing: bool) -> None:
        super().__init__()
        hidden = model.hidden_size
        self.checkpointing = activation_checkpointing
        self.wte = nn.Embedding(model.vocab_size, hidden)
        self.wpe = nn.Embedding(model.max_sequence_length, hidden)
        intermediate = model.intermediate_size or 4 * hidden
        self.h = nn.ModuleList(Gpt2Block(hidden, model.num_heads, intermediate) for _ in range(model.num_layers))
        self.ln_f = nn.LayerNorm(hidden)
        self.lm_head = nn.Linear(hidden, model.vocab_size, bias=False)
        self.apply(initialise)
        if model.tie_embeddings is None or model.tie_embeddings:
            self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of every position."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.wte(input_ids) + self.wpe(positions)
        logits: Tensor = self.lm_head(self.ln_f(run_layers(self.h, x, checkpointing=self.checkpointing)))
        return logits


def pipeline_layers(model: ModelSettings) -> list[Any]:
    """The model as DeepSpeed's PipelineModule takes it: the head is the embedding again, unless
    they are untied."""
    from deepspeed.runtime.pipe.module import LayerSpec, TiedLayerSpec

    vocabulary, hidden = model.vocab_size, model.hidden_size
    block = LayerSpec(Gpt2Block, hidden, model.num_heads, model.intermediate_size or 4 * hidden)
    is_tied = model.tie_embeddings is None or model.tie_embeddings
    return [
        TiedLayerSpec("wte", nn.Embedding, vocabulary, hidden) if is_tied else LayerSpec(nn.Embedding, vocabulary, hidden),
        LayerSpec(Positions, model.max_sequence_length, hidden),
        *[block] * model.num_layers,
        LayerSpec(nn.LayerNorm, hidden),
        TiedLayerSpec("wte", nn.Embedding, vocabulary, hidden, forward_fn=as_head)
        if is_tied
        else LayerSpec(nn.Linear, hidden, vocabulary, bias=False),
    ]


def initialise(module: nn.Module) -> None:
    """Normal weights of standard deviation 0.02, as in GPT-2."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
