"""Predictor: the one loop in which the ranks of a Trainer draw, or read, images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from sag_dit.checkpoints import Model
from sag_dit.output.bar import Bar
from sag_dit.profiling import part
from sag_dit.sampling import Drawn, Request, Settings
from sag_dit.traces import Maps
from sag_dit.training.module import DiffusionModule
from sag_dit.training.pending import PendingRequests

Consumer = Callable[[Any], object]
"""Takes each batch of this rank as soon as it is there, in its own way: writes it, measures it."""

WAITING = 2
"""Batches that wait to be written while the next one is drawn; then drawing waits for them."""


class Behind:
    """Gives batches to a consumer on a thread of its own, in their order, while the next are drawn.

    At most ``WAITING`` batches wait. What the consumer raises is raised by the next call, or at the
    end, and no later batch is given to it. At the end all that was drawn is written, also where
    drawing has failed or was told to stop.

    Example::

        with Behind(folder.write) as write:
            for batch in drawn(model, requests, settings):
                write(batch)
    """

    def __init__(self, consume: Consumer) -> None:
        self._consume = consume
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._waiting: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> Self:
        return self

    def __call__(self, batch: Drawn) -> None:
        """Take a batch; wait if too many are waiting already."""
        with part("wait"):
            while self._waiting and (len(self._waiting) >= WAITING or self._waiting[0].done()):
                self._waiting.popleft().result()
        batch, there = _on_the_way(batch)
        self._waiting.append(self._thread.submit(self._take, batch, there))

    def _take(self, batch: Drawn, there: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            there()
            self._consume(batch)
        except BaseException:
            self._failed = True
            raise

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        with part("wait"):
            self._thread.shutdown(wait=True)
        # The first error is what is told.
        for each in self._waiting if error is None else ():
            each.result()


def _on_the_way(batch: Drawn) -> tuple[Drawn, Callable[[], object]]:
    """Return a batch whose images are being copied to the CPU, and what waits until they are there.

    Without waiting here, so that a GPU goes on with the next batch at once.
    """
    device = batch.images.device
    if device.type != "cuda":
        return batch, lambda: None

    def sent(image: torch.Tensor) -> torch.Tensor:
        pinned = torch.empty(image.shape, dtype=image.dtype, pin_memory=True)
        return pinned.copy_(image, non_blocking=True)

    def all_sent(images: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        return {index: sent(image) for index, image in images.items()}

    copy = replace(
        batch,
        images=sent(batch.images),
        twins=all_sent(batch.twins),
        spared={key: all_sent(twins) for key, twins in batch.spared.items()},
    )
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(device))
    return copy, copied.synchronize


class Predictor:
    """Draws sets of images on all ranks of one Trainer and hands each batch to consumers.

    ``make`` builds the Trainer from the options that drawing needs; what it adds (devices,
    precision) is the caller's. ``folder`` is where Lightning may write.

    Example::

        predictor = Predictor(partial(Trainer, accelerator="cpu"), folder.path)
        predictor.draw(model, requests, settings, write=folder.write)
    """

    def __init__(
        self, make: Callable[..., Trainer], folder: Path, callbacks: Sequence[Callback] = ()
    ) -> None:
        self._loop = _Loop()
        self.trainer = make(
            logger=False,
            # Of training alone, as Lightning has them anyway: nobody else may set them.
            max_epochs=None,
            max_steps=-1,
            max_time=None,
            accumulate_grad_batches=1,
            gradient_clip_val=None,
            callbacks=[self._loop, *callbacks],
            # Ours instead: sharding of the requests, no_grad, and a bar over all ranks' images.
            use_distributed_sampler=False,
            inference_mode=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=str(folder),
        )

    def draw(
        self,
        model: Model,
        requests: Sequence[Request],
        settings: Settings,
        consumers: Sequence[Consumer] = (),
        *,
        write: Consumer | None = None,
        gallery: int = 0,
        maps: Maps | None = None,
        text: str = "sampling",
        done: int = 0,
    ) -> None:
        """Draw the requests; consumers get :class:`~sag_dit.sampling.Drawn` batches.

        ``write`` is one more of them: it is called on a thread of its own, in the order of the
        batches, and all is written when this returns.

        The first ``gallery`` indices come with twins and traces. ``text`` stands before the bar,
        which counts from the ``done`` images of the set that are there already.
        """
        module = DiffusionModule(
            model, settings=settings, gallery=gallery, maps=maps, watch=self._loop.bar.step
        )
        data = PendingRequests(requests, settings.batch_size)
        self._loop.gallery = gallery
        count = done + len(requests)
        if write is None:
            self._run(module, data, consumers, text, count, done)
            return
        with Behind(write) as behind:
            self._run(module, data, [*consumers, behind], text, count, done)

    def read(
        self,
        data: LightningDataModule,
        consumers: Sequence[Consumer],
        *,
        text: str,
        total: int,
        read: Callable[[Any], Any] = lambda batch: batch,
    ) -> None:
        """Hand what ``read`` makes of each batch of ``data`` to consumers; nothing is drawn."""
        self._run(_Reading(read), data, consumers, text, total, 0)

    def _run(
        self,
        module: LightningModule,
        data: LightningDataModule,
        consumers: Sequence[Consumer],
        text: str,
        total: int,
        done: int,
    ) -> None:
        self._loop.consumers, self._loop.told = consumers, (text, total, done)
        self.trainer.predict(module, datamodule=data, return_predictions=False)


class _Reading(LightningModule):
    """A module without weights that reads batches."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self._read = read

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self._read(batch)


class _Loop(Callback):
    """Gives each batch to the consumers, and shows on rank 0 how many images are there.

    Ranks have equal shares, so that rank 0's own count tells for all.
    """

    def __init__(self) -> None:
        self.bar = Bar()
        self.consumers: Sequence[Consumer] = ()
        self.told = ("", 0, 0)
        self.gallery = 0

    def on_predict_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            self.bar.begin(*self.told)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any
    ) -> None:
        # Requests are listed; of images from disk there is a pair, (images, indices).
        drawn = isinstance(batch[0], Request)
        rows = len(batch) if drawn else len(batch[0])
        # A batch with twins takes longer than the others.
        usual = not drawn or batch[0].index >= self.gallery
        self.bar.begin_batch(rows * trainer.world_size, usual)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        for consume in self.consumers:
            consume(outputs)
        self.bar.end_batch()

    def on_predict_end(self, *_: Any) -> None:
        self.bar.stop()

    def on_exception(self, *_: Any) -> None:
        # So that the error stands alone.
        self.bar.stop()
