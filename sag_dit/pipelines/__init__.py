"""guide: the guidance of this package inside any diffusers pipeline that is known."""

from sag_dit.pipelines.guide import guide

__all__ = ["guide"]
