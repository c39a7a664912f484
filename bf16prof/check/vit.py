"""The vision transformer of a published run, as timm 0.6 writes it (vision_transformer.py):
attention operator by operator, no dropout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE, PATCH, CLASSES = 224, 14, 1000
GIGANTIC = {"width": 1664, "depth": 48, "heads": 16, "wide": 8192}
"""`vit_gigantic_patch14_224`: 1.84 billion parameters."""


class VitAttention(nn.Module):
    """Self-attention whose scores are kept."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`x` is [batch, tokens, width], and so is what it gives."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) * self.scale
        out: Tensor = self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, width))
        return out


class VitBlock(nn.Module):
    """Attention and MLP, each with its norm first."""

    def __init__(self, width: int, heads: int, wide: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), VitAttention(width, heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, wide), nn.Linear(wide, width)

    def forward(self, x: Tensor) -> Tensor:
        """`x` is [batch, tokens, width], and so is what it gives."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return out


class VisionTransformer(nn.Module):
    """Images and their classes in, loss and logits out."""

    def __init__(self, width: int, depth: int, heads: int, wide: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (IMAGE // PATCH) ** 2 + 1, width))
        self.patch_embed = nn.Conv2d(3, width, PATCH, PATCH)
        self.blocks = nn.Sequential(*(VitBlock(width, heads, wide) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """`images` are [batch, 3, 224, 224]."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(images), -1, -1), patches), dim=1) + self.pos_embed
        logits = self.head(self.norm(self.blocks(x))[:, 0])
        return functional.cross_entropy(logits, classes), logits


def make() -> nn.Module:
    """The largest."""
    return VisionTransformer(**GIGANTIC)
