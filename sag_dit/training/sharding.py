"""FSDP2 as a strategy: weights, gradients and optimiser state in parts over all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import ModelParallelStrategy


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with every rank in the data-parallel dimension.

    Left to itself, Lightning makes the ranks of one machine tensor-parallel; a model that is only
    sharded by data would then be trained on each rank alone, without a word.

    Example::

        from lightning.pytorch import Trainer

        trainer = Trainer(strategy=FullyShardedStrategy(), devices=4)
    """

    key = "fsdp"
    former = ("sag_dit.training.sharding.FullyShardedStrategy",)

    def setup_environment(self) -> None:
        """Set the mesh up as (all ranks, 1)."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()
        # Lightning shares out the cores on rank 0 alone here; on others products would be added up
        # in another order than under DDP.
        _set_num_threads_if_needed(self.num_processes)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint, and no state of the optimiser for parameters of which it holds none.

        Where one is not in pieces, torch leaves those as after a step that never was.
        """
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        assert self.model is not None
        for optimizer, held in zip(
            self.optimizers, checkpoint.get("optimizer_states", ()), strict=False
        ):
            for name, parameter in self.model.named_parameters():
                if not held["state"].get(name):
                    optimizer.state.pop(parameter, None)
        return checkpoint
