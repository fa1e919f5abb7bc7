"""Reading and editing self-attention in any backbone that calls PyTorch's fused attention."""

from sag_dit.attention.edits import (
    AttentionEdit,
    AttentionLayer,
    Capture,
    CaptureKind,
    Edit,
    InputEdit,
    OutputEdit,
    Span,
    capture_key,
)
from sag_dit.attention.saliency import attention_map, saliency
from sag_dit.attention.tap import AttentionTap

__all__ = [
    "AttentionEdit",
    "AttentionLayer",
    "AttentionTap",
    "Capture",
    "CaptureKind",
    "Edit",
    "InputEdit",
    "OutputEdit",
    "Span",
    "attention_map",
    "capture_key",
    "saliency",
]
