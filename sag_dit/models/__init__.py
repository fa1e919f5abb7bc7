"""Networks: their arithmetic and nothing of diffusion."""

from sag_dit.models.dit import SIZES, DiT, dit

__all__ = ["SIZES", "DiT", "dit"]
