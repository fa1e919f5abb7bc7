"""Each rank's share of the requests that are still to be drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from sag_dit.sampling import Request


class _Batches(Dataset[list[Request]]):
    """Requests, so many at a time; the last batch may be short."""

    def __init__(self, requests: Sequence[Request], size: int) -> None:
        self._requests, self._size = requests, size

    def __len__(self) -> int:
        return -(-len(self._requests) // self._size)

    def __getitem__(self, number: int) -> list[Request]:
        return list(self._requests[number * self._size : (number + 1) * self._size])


class PendingRequests(LightningDataModule):
    """Batches of the requests still to be drawn; rank r of w takes every w-th from the r-th on.

    A rank may have none: Lightning allows that only when told.

    Example::

        requests = make_requests(8, 0, [3, 7], model.class_names)
        trainer.predict(module, PendingRequests(requests, batch_size=4))
    """

    def __init__(self, pending: Sequence[Request], batch_size: int) -> None:
        super().__init__()
        self.pending = pending
        self.batch_size = batch_size
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def transfer_batch_to_device(
        self, batch: list[Request], device: torch.device, dataloader_idx: int
    ) -> list[Request]:
        """Return the batch as it is: requests hold no tensors."""
        return batch

    def predict_dataloader(self) -> DataLoader[list[Request]]:
        """Return this rank's share, in batches of the compute size; the last may be short."""
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        share = _Batches(self.pending[rank::world], self.batch_size)
        # Batches of our own: of a loader's, Lightning remembers which they were, without end.
        return DataLoader(share, batch_size=None, collate_fn=list)
