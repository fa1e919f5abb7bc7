"""Networks: their arithmetic, and what is known of their files; nothing of diffusion."""

from sag_dit.models.dit.network import SIZES, DiT, dit
from sag_dit.models.family import Family, families, family_for, family_of, register
from sag_dit.models.network import Backbone, Network

__all__ = [
    "SIZES",
    "Backbone",
    "DiT",
    "Family",
    "Network",
    "dit",
    "families",
    "family_for",
    "family_of",
    "register",
]
