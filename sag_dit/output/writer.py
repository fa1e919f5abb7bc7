"""PredictionWriter: what a rank has drawn goes to disk, image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import UInt8
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from sag_dit.output.attention import AttentionView, write_arrays, write_sheet
from sag_dit.output.folder import Pixels, SampleFolder, write_png, write_views
from sag_dit.output.gallery import StepView
from sag_dit.sampling import Request


@dataclass(frozen=True)
class Drawn:
    """A batch of finished images, and by index what else is kept of them."""

    requests: Sequence[Request]
    images: UInt8[Tensor, "b c h w"]
    twins: Mapping[int, UInt8[Tensor, "c h w"]] = field(default_factory=dict)
    views: Mapping[int, tuple[StepView, ...]] = field(default_factory=dict)
    attention: Mapping[int, AttentionView] = field(default_factory=dict)


def pixels(image: UInt8[Tensor, "c h w"]) -> Pixels:
    """Move channels last and to NumPy."""
    array: Pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
    return array


class PredictionWriter(BasePredictionWriter):
    """Writes every batch as soon as it is drawn. An image comes last, since it marks completion."""

    def __init__(self, folder: SampleFolder) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the images of a :class:`Drawn` batch."""
        self.write(prediction)

    def write(self, drawn: Drawn) -> None:
        """Write what belongs to the images first, then the images."""
        shown = dict(zip((request.index for request in drawn.requests), drawn.images, strict=True))
        for index, attention in drawn.attention.items():
            sheet = self.folder.attention(index)
            sheet.parent.mkdir(exist_ok=True)
            write_arrays(sheet.with_suffix(".npz"), attention)
            write_sheet(sheet, attention, pixels(shown[index]))
        for index, views in drawn.views.items():
            if views:
                write_views(self.folder.views(index), views)
        for index, twin in drawn.twins.items():
            write_png(self.folder.twin(index), pixels(twin))
        for request, image in zip(drawn.requests, drawn.images, strict=True):
            write_png(self.folder.image(request.index), pixels(image))
