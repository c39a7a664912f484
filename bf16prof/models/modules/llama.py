"""Llama (see `shapes/llama.py`): rotary positions, RMSNorm, SwiGLU and grouped-query attention
through PyTorch's SDPA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bf16prof.models.modules import run_layers
from bf16prof.models.modules.ends import as_head
from bf16prof.profiles.models import ModelSettings

ROPE_BASE = 500_000.0
"""Base of the rotary frequencies in Llama 3."""
NORM_EPSILON = 1e-5


class LlamaAttention(nn.Module):
    """Causal grouped-query attention. x: [batch, sequence, hidden]; cos, sin: [sequence, head
    width]."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.width = hidden // heads
        self.groups = heads // kv_heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.width, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.width, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The attended values, of the shape of the input."""
        batch, sequence, hidden = x.shape
        q, k, v = (p(x).view(batch, sequence, -1, self.width).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        attended = functional.scaled_dot_product_attention(
            _rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True, enable_gqa=self.groups > 1
        )
        out: Tensor = self.o_proj(attended.transpose(1, 2).reshape(batch, sequence, hidden))
        return out


class LlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of the input."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class LlamaBlock(nn.Module):
    """Pre-norm attention and MLP with residual sums."""

    def __init__(self, model: ModelSettings) -> None:
        super().__init__()
        hidden = model.hidden_size
        self.self_attn = LlamaAttention(hidden, model.num_heads, model.num_kv_heads or model.num_heads)
        self.mlp = LlamaMLP(hidden, model.intermediate_size or 4 * hidden)
        self.input_layernorm = nn.RMSNorm(hidden, eps=NORM_EPSILON)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=NORM_EPSILON)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Of the shape of the input."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


def build(model: ModelSettings, *, activation_checkpointing: bool) -> nn.Module:
    """The model of these sizes."""
    return LlamaModel(model, activation_checkpointing)


class LlamaModel(nn.Module):
    """Token ids [batch, sequence] to logits [batch, sequence, vocabulary]."""

    def __init__(self, model: ModelSettings, activation_checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = activation_checkpointing
        self.head_width = model.hidden_size // model.num_heads
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(model) for _ in range(model.num_layers))
        self.norm = nn.RMSNorm(model.hidden_size, eps=NORM_EPSILON)
        self.lm_head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        self.apply(initialise)
        if model.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of every position."""
        x = self.embed_tokens(input_ids)
        cos, sin = _rotary(input_ids.shape[1], self.head_width, x)
        logits: Tensor = self.lm_head(self.norm(run_layers(self.layers, x, cos, sin, checkpointing=self.checkpointing)))
        return logits


def _rotary(sequence: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [sequence, width] of the rotary angles, computed in fp32, in the dtype and
    on the device of `like`."""
    frequencies = ROPE_BASE ** (-torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(sequence, device=like.device, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + width / 2) of x [batch, heads, sequence, width] by the rotary
    angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RotaryBlock(LlamaBlock):
    """A block that makes the rotary angles itself: what a stage of a pipeline hands on is x
    alone."""

    def __init__(self, model: ModelSettings) -> None:
        super().__init__(model)
        self.head_width = model.hidden_size // model.num_heads

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        """Of the shape of the input."""
        return super().forward(x, *_rotary(x.shape[1], self.head_width, x))


def pipeline_layers(model: ModelSettings) -> list[Any]:
    """The model as DeepSpeed's PipelineModule takes it."""
    from deepspeed.runtime.pipe.module import LayerSpec, TiedLayerSpec

    vocabulary, hidden, is_tied = model.vocab_size, model.hidden_size, model.tie_embeddings
    return [
        TiedLayerSpec("embed", nn.Embedding, vocabulary, hidden) if is_tied else LayerSpec(nn.Embedding, vocabulary, hidden),
        *[LayerSpec(RotaryBlock, model)] * model.num_layers,
        LayerSpec(nn.RMSNorm, hidden, eps=NORM_EPSILON),
        TiedLayerSpec("embed", nn.Embedding, vocabulary, hidden, forward_fn=as_head)
        if is_tied
        else LayerSpec(nn.Linear, hidden, vocabulary, bias=False),
    ]


def initialise(module: nn.Module) -> None:
    """Normal weights of standard deviation 0.02."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
