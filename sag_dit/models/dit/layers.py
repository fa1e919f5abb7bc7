"""The layers of a DiT block: timm's in names, arithmetic and state-dict keys, without its import.

Importing timm takes three times as long as importing torch. A parity test holds these to timm's.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sag_dit.tensors import Images


class PatchEmbed(nn.Module):
    """Cut images into patches and embed each by one linear map, written as a convolution.

    Source: timm, layers/patch_embed.py.

    Example:
        >>> import torch
        >>> PatchEmbed(patch_size=2, in_channels=4, hidden_size=32)(torch.zeros(1, 4, 8, 6)).shape
        torch.Size([1, 12, 32])
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Images) -> Float[Tensor, "b n d"]:
        """Return the tokens, row by row."""
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases: softmax(q k^T / sqrt(d)) v for each head.

    Source: timm, layers/attention.py.

    Example:
        >>> import torch
        >>> SelfAttention(hidden_size=32, num_heads=4)(torch.zeros(1, 16, 32)).shape
        torch.Size([1, 16, 32])
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Let every token attend to all."""
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # Looked up at each call: capture sees the attention of whatever calls it by this name.
        attended = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(attended.transpose(1, 2).reshape(b, n, d))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, approximated by tanh.

    Source: timm, layers/mlp.py.

    Example:
        >>> import torch
        >>> Mlp(hidden_size=32, mlp_size=128)(torch.zeros(1, 16, 32)).shape
        torch.Size([1, 16, 32])
    """

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Transform each token by itself."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out
