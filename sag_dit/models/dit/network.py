"""DiT: the diffusion transformer of Peebles & Xie 2023 (arXiv 2212.09748).

The arithmetic and the state-dict keys are those of facebookresearch/DiT, so that published files
load strictly. Rectangular grids are allowed: the grid is stored, never a square root.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import repeat
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sag_dit.attention import AttentionLayer
from sag_dit.bounds import Bounds, Count, Share
from sag_dit.models.dit.layers import Mlp, PatchEmbed, SelfAttention
from sag_dit.models.network import Fork, Outputs, drop_labels
from sag_dit.tensors import Images, Labels

POSITION_TOLERANCE = 0.01
"""Positions stored in half precision differ from the table by less: they are rounded by 2^-9."""


class TimestepEmbedder(nn.Module):
    """Embed a time by sinusoids and a two-layer SiLU network.

    Frequencies 10000^(-i / half), i = 0 .. half - 1, with half = 128: cosines first, then sines.
    Source: facebookresearch/DiT, models.py.

    Example:
        >>> TimestepEmbedder(32)(torch.tensor([0.0, 999.0])).shape
        torch.Size([2, 32])
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

    Example:
        >>> embedder = LabelEmbedder(num_classes=10, hidden_size=32, dropout_prob=0.1)
        >>> embedder(torch.tensor([3, 10])).shape
        torch.Size([2, 32])
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
            labels = drop_labels(labels, self.num_classes, self.dropout_prob)
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


SIZES: dict[str, dict[str, int]] = {
    f"DiT-{name}/{patch}": {
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads,
        "patch_size": patch,
    }
    for name, width, depth, heads in (
        ("S", 384, 12, 6),
        ("B", 768, 12, 12),
        ("L", 1024, 24, 16),
        ("XL", 1152, 28, 16),
    )
    for patch in (2, 4, 8)
}
"""The twelve published sizes (table 1 of the paper)."""


def modulate(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b d"], scale: Float[Tensor, "b d"]
) -> Float[Tensor, "b n d"]:
    """Scale and shift tokens by their image's condition: x (1 + scale) + shift."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def noted(outputs: list[Tensor] | None, output: Tensor) -> Tensor:
    """Return an output of a part of a block, and put it into the list, if there is one."""
    if outputs is not None:
        outputs.append(output)
    return output


class DiTBlock(nn.Module):
    """Self-attention and MLP, each modulated and gated by the condition (adaLN-Zero).

    Example:
        >>> block = DiTBlock(hidden_size=32, num_heads=2, mlp_ratio=4.0)
        >>> block(torch.zeros(1, 16, 32), torch.zeros(1, 32)).shape
        torch.Size([1, 16, 32])
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        c: Float[Tensor, "b d"],
        outputs: list[Tensor] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Transform the tokens x under the condition c.

        ``outputs`` are those of attention and MLP: an empty list is filled, a full one used.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, 1)
        if outputs:
            attended, mixed = outputs
            x = torch.addcmul(x, gate_a[:, None], attended)
            return torch.addcmul(x, gate_m[:, None], mixed)
        # addcmul: one pass over the tokens where a product and a sum would take two. No name holds
        # on to what attention gives, since it would take memory beside the MLP's own.
        x = torch.addcmul(
            x,
            gate_a[:, None],
            noted(outputs, self.attn(modulate(self.norm1(x), shift_a, scale_a))),
        )
        return torch.addcmul(
            x,
            gate_m[:, None],
            noted(outputs, self.mlp(modulate(self.norm2(x), shift_m, scale_m))),
        )


class FinalLayer(nn.Module):
    """Modulated norm and the linear layer that turns tokens into patches.

    Example:
        >>> final = FinalLayer(hidden_size=32, patch_size=2, out_channels=3)
        >>> final(torch.zeros(1, 16, 32), torch.zeros(1, 32)).shape
        torch.Size([1, 16, 12])
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b n p"]:
        """Return the patches' values, p = patch_size^2 out_channels."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


class DiT(nn.Module):
    """Diffusion transformer: (x, t, y) -> eps, and with ``learn_sigma`` as many channels again.

    The arguments are those of facebookresearch/DiT; ``input_size`` may also be (height, width).

    Raises:
        ValueError: ``input_size`` is not divisible by ``patch_size``, or ``hidden_size`` by
            ``num_heads`` or 4.

    Example:
        >>> network = DiT(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=10)
        >>> network(torch.zeros(1, 4, 8, 8), torch.tensor([500]), torch.tensor([3])).shape
        torch.Size([1, 8, 8, 8])
    """

    key = "dit"
    former = ("sag_dit.models.dit.DiT",)
    any_size = True
    """Images of another size have its positions, resized."""

    def __init__(
        self,
        input_size: Count | tuple[Count, Count] = 32,
        patch_size: Count = 2,
        in_channels: Count = 4,
        hidden_size: Count = 1152,
        depth: Count = 28,
        num_heads: Count = 16,
        mlp_ratio: Annotated[float, Bounds(least=0.01, most=1000)] = 4.0,
        class_dropout_prob: Share = 0.1,
        num_classes: Count = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        # Sizes that fit each other.
        height, width = (input_size,) * 2 if isinstance(input_size, int) else tuple(input_size)
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"input_size={input_size}: expected a multiple of patch_size={patch_size}"
            )
        if hidden_size % num_heads:
            raise ValueError(
                f"num_heads={num_heads}: expected a divisor of hidden_size={hidden_size}"
            )
        # What all else asks of a network.
        self.input_size = (height, width)
        self.grid = (height // patch_size, width // patch_size)
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.learn_sigma = learn_sigma
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.num_classes = num_classes
        self.checkpoint_blocks = False
        """Whether the backward pass computes each block anew instead of keeping its activations."""

        # Parameters, under the published names.
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # A parameter, not a buffer, because the published files hold it as one.
        self.pos_embed = nn.Parameter(
            sincos_positions(hidden_size, self.grid)[None], requires_grad=False
        )
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialise()

    @property
    def arguments(self) -> dict[str, Any]:
        """What builds this network anew, as plain values."""
        height, width = self.input_size
        hidden_size = int(self.pos_embed.shape[-1])
        block: Any = self.blocks[0]
        return {
            "input_size": height if height == width else [height, width],
            "patch_size": self.patch_size,
            "in_channels": self.in_channels,
            "hidden_size": hidden_size,
            "depth": len(self.blocks),
            "num_heads": int(block.attn.num_heads),
            "mlp_ratio": mlp_ratio(hidden_size, int(block.mlp.fc1.out_features)),
            "class_dropout_prob": self.y_embedder.dropout_prob,
            "num_classes": self.num_classes,
            "learn_sigma": self.learn_sigma,
        }

    @property
    def layers(self) -> dict[str, AttentionLayer]:
        """Its self-attention layers by name."""
        names = [f"blocks.{i}.attn" for i in range(len(self.blocks))]
        return {name: AttentionLayer(name, self.grid) for name in names}

    @property
    def aliases(self) -> dict[str, str]:
        """Further names of layers: none."""
        return {}

    @property
    def null_label(self) -> int | None:
        """The label that means 'no class', None if the network was trained without."""
        return self.num_classes if self.y_embedder.dropout_prob > 0 else None

    @property
    def class_embedder(self) -> str:
        """The module that embeds the classes."""
        return "y_embedder"

    @property
    def time_inputs(self) -> tuple[str, ...]:
        """The modules of the blocks that the embedding of the time enters."""
        return tuple(f"blocks.{i}.adaLN_modulation" for i in range(len(self.blocks)))

    def embed_time(self, t: Float[Tensor, "b"] | Int[Tensor, "b"]) -> Float[Tensor, "b d"]:
        """Return the embeddings of times."""
        out: Tensor = self.t_embedder(t)
        return out

    def _initialise(self) -> None:
        """Initialise as published: Xavier, small embeddings, zero modulation and output."""
        for name, parameter in self.named_parameters():
            if name == "pos_embed":
                continue
            zeroed = "adaLN_modulation" in name or name == "final_layer.linear.weight"
            if zeroed or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(parameter, std=0.02)
            else:
                # The patch embedding is a convolution, initialised as the linear layer it is.
                nn.init.xavier_uniform_(parameter.flatten(1))

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 n d"]:
        """Return the positions of a grid: its own, or those resized (bicubic) to another one.

        Source: HHU-MMBS/swg_bmvc2025_official, edm2/diffusion/models.py.
        """
        if grid == self.grid:
            return self.pos_embed
        own = self.pos_embed.float().unflatten(1, self.grid).permute(0, 3, 1, 2)
        resized = F.interpolate(own, grid, mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2).to(self.pos_embed)

    def resize(self, input_size: tuple[int, int]) -> None:
        """Be a network of another size from now on, with the positions that it had there before.

        Raises:
            ValueError: the size is not divisible by ``patch_size``.
        """
        if input_size[0] % self.patch_size or input_size[1] % self.patch_size:
            raise ValueError(
                f"input_size={input_size}: expected multiples of patch_size={self.patch_size}"
            )
        grid = (input_size[0] // self.patch_size, input_size[1] // self.patch_size)
        self.pos_embed = nn.Parameter(self.positions(grid).detach(), requires_grad=False)
        self.input_size, self.grid = input_size, grid

    def unpatchify(self, x: Float[Tensor, "b n p"], grid: tuple[int, int] | None = None) -> Images:
        """Lay the patches' values out as images (b, out_channels, h, w), by default of its size."""
        (rows, columns), size = grid or self.grid, self.patch_size
        x = x.reshape(-1, rows, columns, size, size, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(
            -1, self.out_channels, rows * size, columns * size
        )

    def forward(
        self,
        x: Images,
        t: Float[Tensor, "b"] | Int[Tensor, "b"],
        y: Labels,
        forks: Sequence[Fork] = (),
        outputs: Outputs | None = None,
    ) -> Images:
        """Denoise images or latents x at times t for classes y (``num_classes`` is the null).

        ``forks`` are further rows, which share the blocks before theirs with a row of the batch.
        ``outputs`` are those of the blocks, to be kept or to be used. An x of another size is seen
        as a whole image too, see :meth:`positions`.
        """
        grid = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        # The patch embedding is a transposed view, whose strides every later operation would keep.
        tokens = (self.x_embedder(x) + self.positions(grid)).contiguous()
        condition = self.t_embedder(t) + self.y_embedder(y)
        recompute = self.checkpoint_blocks and torch.is_grad_enabled()
        given = repeat(()) if outputs is None else ((each,) for each in outputs)
        for i, (block, kept) in enumerate(zip(self.blocks, given, strict=False)):
            for fork in forks:
                if fork.block == i:
                    tokens, condition = fork.joined(tokens), fork.joined(condition)
            if recompute:
                tokens = checkpoint(block, tokens, condition, use_reentrant=False)
            else:
                tokens = block(tokens, condition, *kept)
        return self.unpatchify(self.final_layer(tokens, condition), grid)

    def compile_blocks(self) -> None:
        """Compile every block by itself, in place; parameter names stay as they are."""
        for block in self.blocks:
            block.compile(fullgraph=True)


def mlp_ratio(hidden_size: int, mlp_size: int) -> float:
    """Return the ratio r with int(hidden_size r) = mlp_size."""
    ratio = mlp_size / hidden_size
    # The quotient is rounded, and its product must not fall below the whole number.
    return ratio if int(hidden_size * ratio) == mlp_size else (mlp_size + 0.5) / hidden_size


def dit(size: str, **options: object) -> DiT:
    """Build one of the published sizes; ``options`` are arguments of :class:`DiT`.

    Raises:
        ValueError: no size of that name.

    Example::

        network = dit("DiT-S/2", input_size=32, num_classes=10)
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r}: expected one of {', '.join(SIZES)}")
    return DiT(**{**SIZES[size], **options})  # type: ignore[arg-type]
