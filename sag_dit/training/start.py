"""What a run is, in a few lines before its first step: parameters, steps, and a memory estimate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from sag_dit.messages import counted
from sag_dit.tensors import without_memory
from sag_dit.training.module import DiffusionModule
from sag_dit.training.sharding import FullyShardedStrategy

SHOWN = 5
"""So many parts of a network are named, the largest."""


def in_bytes(count: float) -> str:
    """Return bytes as one says them.

    Example:
        >>> in_bytes(2_500_000), in_bytes(7.5e10)
        ('2.5 MB', '75 GB')
    """
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    value = count / unit
    return f"{value:,.0f} {name}" if value >= 10 else f"{value:.2g} {name}"


def parameters_by_part(network: nn.Module) -> dict[str, int]:
    """Return how many parameters each part of a network has, the largest part first.

    Example:
        >>> parameters_by_part(nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 3)))
        {'1': 9, '0': 4}
    """
    counts: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        part = name.partition(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return dict(sorted(counts.items(), key=lambda each: -each[1]))


@dataclass(frozen=True)
class Memory:
    """What training holds on one device, in bytes, by what it is for; None: not known.

    Example:
        >>> Memory({"weights": 4_000_000, "optimiser": None}).told("cpu")
        'memory: about 4 MB on cpu: weights 4 MB; beside it optimiser, which is not known'
    """

    parts: Mapping[str, int | None]

    @property
    def total(self) -> int:
        """The sum of what is known."""
        return sum(filter(None, self.parts.values()))

    def told(self, where: str, there: int | None = None) -> str:
        """Return the estimate in a line; ``there`` are the bytes that the device has."""
        known = [f"{name} {in_bytes(each)}" for name, each in self.parts.items() if each]
        open_ = [name for name, each in self.parts.items() if each is None]
        line = f"memory: about {in_bytes(self.total)} on {where}"
        line += f" of {in_bytes(there)}" if there else ""
        line += f": {', '.join(known)}"
        if open_:
            line += f"; beside it {' and '.join(open_)}, which is not known"
        if there and self.total > there:
            line += (
                "\n  warning: more than there is; checkpoint_blocks=true, "
                "trainer.precision=bf16-mixed or a smaller data.batch_size takes less"
            )
        return line


def estimate_memory(module: DiffusionModule, images: int, trainer: Trainer) -> Memory:
    """Return what training holds on one device, counted on a copy that has no memory.

    Weights, average, gradients and the optimiser's state are counted after one step of it.
    Activations are what the forward pass of ``images`` keeps for the backward pass. What is
    needed for a moment only is not counted, nor is an autoencoder.
    """
    twin = without_memory(module, module.model.codec)
    half_weights, half = trainer.precision.endswith("16-true"), "16" in str(trainer.precision)
    shards = trainer.world_size if isinstance(trainer.strategy, FullyShardedStrategy) else 1
    own = list(twin.denoiser.state_dict(keep_vars=True).values())
    trained = [weight for weight in twin.parameters() if weight.requires_grad]
    averaged = [weight for each in twin.averages for weight in each.state_dict().values()]
    scale = (0.5 if half_weights else 1.0) / shards

    def of(tensors: Iterable[Tensor]) -> int:
        return int(scale * sum(tensor.nbytes for tensor in tensors))

    state, kept = _optimizer_state(twin, trained), _activations(twin, images)
    return Memory(
        {
            "weights": of(own),
            "average": of(averaged),
            "gradients": of(trained),
            "optimiser": None if state is None else of(state),
            f"activations of {counted(images, 'image')}": None
            if kept is None
            else kept // (1 + half),
        }
    )


def _optimizer_state(twin: DiffusionModule, trained: Sequence[nn.Parameter]) -> list[Tensor] | None:
    """Return what the optimiser keeps after a step; None where it cannot step without memory."""
    make = twin._make_optimizer
    if isinstance(make, partial) and make.keywords.get("fused"):
        # The same state, from a kernel that wants a device.
        twin._make_optimizer = partial(make, fused=False)
    try:
        made = twin.configure_optimizers()
        optimizer: Optimizer = made["optimizer"] if isinstance(made, dict) else made
        for weight in trained:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
        return [
            each
            for state in optimizer.state.values()
            for each in cast(Mapping[str, Any], state).values()
            if isinstance(each, Tensor)
        ]
    except Exception:  # Whatever an optimiser of somebody's needs a device for.
        return None
    finally:
        twin._make_optimizer = make
        for weight in trained:
            weight.grad = None


def _activations(twin: DiffusionModule, images: int) -> int | None:
    """Return the bytes that a forward pass keeps; None where it cannot be made without memory."""
    network = cast(Any, twin.denoiser).network
    blocks = [*network.blocks.children()] if hasattr(network, "blocks") else []
    recomputed = bool(blocks) and bool(getattr(network, "checkpoint_blocks", False))
    try:
        if recomputed:
            network.checkpoint_blocks = False
        kept = _kept(twin, images)
        if not recomputed:
            return kept
        # Then a block keeps its input alone, and one at a time is computed again.
        inputs: list[int] = []
        watched = [
            block.register_forward_pre_hook(lambda _, given: inputs.append(given[0].nbytes))
            for block in blocks
        ]
        network.checkpoint_blocks = True
        outside = _kept(twin, images)
        for each in watched:
            each.remove()
        return outside + sum(inputs) + (kept - outside) // len(blocks)
    except Exception:  # Whatever a network or an objective of somebody's needs memory for.
        return None


def _kept(twin: DiffusionModule, images: int) -> int:
    own = {each.untyped_storage()._cdata for each in (*twin.parameters(), *twin.buffers())}
    found: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return tensor

    x_0 = torch.empty(images, *twin.denoiser.latent_shape, device="meta")
    labels = torch.zeros(images, dtype=torch.long, device="meta")
    with _given_back(), torch.device("meta"), _FusedAttention():
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = twin.losses(twin.denoiser, (x_0, labels))
        return sum(int(storage.nbytes()) for storage in found.values()) + losses.per_image.nbytes


@contextmanager
def _given_back() -> Any:
    """Leave torch's generator as it was."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


class _FusedAttention(TorchFunctionMode):
    """Keeps of attention what fused kernels keep; without a device its map would be kept too."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and len(args) >= 3:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        context.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        raise NotImplementedError("it is only counted")


def start_report(
    module: DiffusionModule, trainer: Trainer, images: int, step: int, epoch: int
) -> str:
    """Return in a few lines what is going to be trained, how long and with how much memory.

    ``images`` are those of a batch over all ranks, ``step`` is where the run goes on, and ``epoch``
    the number of images to train on.
    """
    # The network and its parts.
    network = cast(Any, module.denoiser).network
    counts = parameters_by_part(network)
    total = sum(counts.values())
    trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
    named = [f"{name} {count:,}" for name, count in [*counts.items()][:SHOWN]]
    rest = sum([*counts.values()][SHOWN:])
    named += [f"others {rest:,}"] * bool(rest)
    share = "all" if trained == total else f"{trained:,}"
    # The steps.
    steps, each_step = trainer.max_steps, images * trainer.accumulate_grad_batches
    devices = counted(trainer.world_size, "device")
    few = int(trainer.overfit_batches)  # type: ignore[attr-defined]
    epoch = min(epoch, few * images) if few else epoch
    first = "batch" if few == 1 else f"{few} batches"
    again = f", the first {first} again and again" if few else ""
    epochs = steps * each_step / epoch
    lines = [
        f"model: {type(network).__name__}, {total:,} parameters, {share} trained",
        f"  parts    {', '.join(named)}",
        f"steps: {steps:,} of {counted(each_step, 'image')} on {devices}, "
        f"{counted(steps * each_step, 'image')} in all: {epochs:,.1f} epochs{again}",
    ]
    # The memory of one device.
    device = trainer.strategy.root_device
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    estimate = estimate_memory(module, max(1, images // trainer.world_size), trainer)
    lines.append(estimate.told(str(device), there))
    if step:
        lines.append(f"going on from step {step:,} of {steps:,}")
    return "\n".join(lines)
