"""Two models to train, of the sizes that people know: plain torch modules, random data."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _convolution(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, stride)
        self.second = _convolution(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else _convolution(inputs, outputs, stride, size=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(F.relu(self.first(x)))
        return F.relu(y + self.skip(x))


class ResNet(nn.Module):
    """A residual network with ResNet-18's layers at full width."""

    def __init__(self, width: int = 64, batch: int = 8, pixels: int = 64) -> None:
        super().__init__()
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks: list[nn.Module] = [_convolution(3, width, 2, size=7), nn.ReLU(), nn.MaxPool2d(2)]
        for stage, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            blocks += [_Residual(inputs, outputs, 1 + (stage > 0)), _Residual(outputs, outputs, 1)]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(8 * width, 1000)
        self.images = torch.randn(batch, 3, pixels, pixels)
        self.labels = torch.randint(1000, (batch,))

    def loss(self) -> Tensor:
        """Return the loss of one batch."""
        return F.cross_entropy(self.head(self.body(self.images).mean((2, 3))), self.labels)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        hidden: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + hidden


class GPT(nn.Module):
    """A transformer of GPT-2's smallest size, its embedding tied to its head."""

    def __init__(
        self,
        width: int = 768,
        layers: int = 12,
        vocabulary: int = 50257,
        batch: int = 1,
        length: int = 256,
    ) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(1024, width)
        self.blocks = nn.Sequential(*(_Block(width, heads=12) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.text = torch.randint(vocabulary, (batch, length + 1))
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def loss(self) -> Tensor:
        """Return the loss of one batch."""
        tokens, targets = self.text[:, :-1], self.text[:, 1:]
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits = F.linear(self.norm(self.blocks(x)), self.token.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
