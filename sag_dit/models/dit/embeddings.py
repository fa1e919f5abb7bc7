"""Embeddings of time, class and position, as in the published DiT."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

POSITION_TOLERANCE = 0.01
"""Positions stored in half precision differ from the table by less: they are rounded by 2^-9."""


class TimestepEmbedder(nn.Module):
    """Embed a time by sinusoids and a two-layer SiLU network.

    Frequencies 10000^(-i / half), i = 0 .. half - 1, with half = 128: cosines first, then sines.
    Source: facebookresearch/DiT, models.py.
    """

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def sinusoids(self, t: Float[Tensor, "b"] | Int[Tensor, "b"]) -> Float[Tensor, "b f"]:
        """Return the features of a time, shape (b, frequency_embedding_size), float32."""
        half = self.frequency_embedding_size // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angle = t.float()[:, None] * torch.exp(-math.log(10000) * exponent)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, t: Float[Tensor, "b"] | Int[Tensor, "b"]) -> Float[Tensor, "b d"]:
        """Embed one time per image; times may be fractional."""
        weight = next(self.mlp.parameters())
        out: Tensor = self.mlp(self.sinusoids(t).to(weight.dtype))
        return out


class LabelEmbedder(nn.Module):
    """Look a class up; row ``num_classes`` of the table means 'no class'.

    In training each label is dropped with probability ``dropout_prob``; without dropout there is
    no null row, and the model cannot be guided by CFG.
    Source: facebookresearch/DiT, models.py.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        rows = num_classes + (1 if dropout_prob > 0 else 0)
        self.embedding_table = nn.Embedding(rows, hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, labels: Int[Tensor, "b"]) -> Float[Tensor, "b d"]:
        """Embed labels from 0 to ``num_classes``, the last being the null class."""
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        out: Tensor = self.embedding_table(labels)
        return out


def sincos_positions(width: int, grid: tuple[int, int]) -> Float[Tensor, "n d"]:
    """Return fixed 2-D positions: half the width tells the column, half the row; sines first.

    Frequencies 10000^(-i / (width / 4)), computed in float64 on the CPU, since not every device has
    float64; row-major over the (h, w) grid. The result is on the device of the context.
    Source: facebookresearch/DiT, models.py (after MAE).

    Raises:
        ValueError: ``width`` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"hidden_size={width}: expected a multiple of 4 for 2-D positions")
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64, device="cpu"),
        torch.arange(grid[1], dtype=torch.float64, device="cpu"),
        indexing="ij",
    )
    quarter = width // 4
    frequency = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    parts = []
    for position in (columns, rows):
        angle = position.reshape(-1, 1) * frequency
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float().to(torch.get_default_device())
