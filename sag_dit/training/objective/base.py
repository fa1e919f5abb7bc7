"""The contract of objectives: (denoiser, x_0, cond) -> one loss per image, and where it was asked.

An objective draws times and noise from torch's own generator, which whoever trains has seeded. It
may own modules, such as a projector, and see the pixels that x_0 was made from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sag_dit.codec import Pixels
from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.base import Condition
from sag_dit.models.network import takes
from sag_dit.process import NoiseLevel
from sag_dit.tensors import Images

LOGGED = ("loss", "lr", "grad_norm", "weight_norm", "skipped")
"""What training logs itself, as ``train/loss`` and so on: no names of terms."""


@dataclass(frozen=True)
class Losses:
    """What one batch costs; shapes (b,).

    ``per_image`` is to be averaged and minimised; ``level`` is where each image was asked, its
    ``t`` one time per image; ``terms`` are the parts of a composite loss by name, for logging.

    Raises:
        ValueError: a term is named as what training logs itself.

    Example::

        losses = objective(model.denoiser, x_0, labels)
        losses.per_image.mean().backward()
    """

    per_image: Float[Tensor, "b"]
    level: NoiseLevel
    terms: Mapping[str, Float[Tensor, "b"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        taken = [name for name in self.terms if name in LOGGED]
        if taken:
            raise ValueError(
                f"terms={{{taken[0]!r}: ...}}: training logs train/{taken[0]} itself; expected "
                f"another name"
            )


class Objective(ABC):
    """What a denoiser is trained to minimise.

    Written by its :meth:`losses` at a given level and noise; the time is uniform unless
    :meth:`quantiles` says otherwise.

    One whose :meth:`losses` takes ``pixels`` beside the rest is given the uint8 images (b, c, h, w)
    that x_0 was made from. One that owns modules derives from ``torch.nn.Module`` too, after this
    class: their parameters are trained by the same optimiser, saved, gone on with and kept equal
    on all ranks, and are no part of the model that a run exports. Validation asks them as they are
    at that step, or their moving average where the class says ``averaged = True``. What is asked
    and never trained, such as an encoder, is held in :class:`Frozen`.

    Raises:
        TypeError: a subclass names ``torch.nn.Module`` before this class.

    Example::

        @dataclass(frozen=True)
        class AbsoluteError(Objective):
            def losses(self, denoiser, x_0, cond, level, eps) -> Losses:
                x_t = denoiser.process.add_noise(x_0, eps, level)
                error = denoiser(x_t, level, cond).eps - eps
                return Losses(error.abs().flatten(1).mean(dim=1), level)
    """

    averaged: ClassVar[bool] = False
    """Whether the objective's own parameters have a moving average like the network's."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__call__ is nn.Module.__call__:
            raise TypeError(
                f"class {cls.__name__}: expected Objective before nn.Module among its bases"
            )

    @property
    def sees_pixels(self) -> bool:
        """Whether :meth:`losses` takes ``pixels``."""
        return takes(self.losses, "pixels")

    def check(self, denoiser: Denoiser) -> None:  # noqa: B027 - most objectives train any denoiser
        """Refuse a denoiser that cannot be trained so, before anything is evaluated.

        Raises:
            ValueError: the process or the network is of a kind this objective is not for.
        """

    def check_modules(self) -> None:
        """Refuse trainable modules that an objective holds without being a module itself.

        Raises:
            ValueError: they would be neither trained nor saved; the attribute is named.
        """
        if isinstance(self, nn.Module):
            return
        for name, value in getattr(self, "__dict__", {}).items():
            held = list(value.values()) if isinstance(value, Mapping) else value
            for each in held if isinstance(held, (list, tuple)) else [held]:
                parameters = each.parameters() if isinstance(each, nn.Module) else [each]
                if any(isinstance(p, Tensor) and p.requires_grad for p in parameters):
                    own = type(self).__name__
                    raise ValueError(
                        f"objective={own}: its {name} would be neither trained nor saved: make it "
                        f"class {own}(Objective, nn.Module), or hold what is not trained in Frozen"
                    )

    def quantiles(self, count: int, device: torch.device) -> Float[Tensor, "b"]:
        """Draw where in the process, from its image (0) to its noise (1), images are asked."""
        # Under 16-bit training the default type has few numbers in [0, 1).
        return torch.rand(count, device=device, dtype=torch.float32)

    @abstractmethod
    def losses(
        self, denoiser: Denoiser, x_0: Images, cond: Condition, level: NoiseLevel, eps: Images
    ) -> Losses:
        """Return the losses of x_0 noised with eps to one level per image."""

    def __call__(
        self, denoiser: Denoiser, x_0: Images, cond: Condition, pixels: Pixels | None = None
    ) -> Losses:
        """Draw times, then noise, and return the losses there.

        Raises:
            ValueError: the objective sees pixels, and there are none, or it returns something else
                than a loss for each image.
        """
        process = denoiser.process
        ask: Callable[..., Losses] = self.losses
        if self.sees_pixels:
            if pixels is None:
                raise no_pixels(self)
            ask = partial(ask, pixels=pixels)
        level = process.level(process.time_at(self.quantiles(x_0.shape[0], x_0.device)))
        found = ask(denoiser, x_0, cond, level, torch.randn_like(x_0))
        self._check_losses(found, x_0)
        return found

    def _check_losses(self, found: Any, x_0: Images) -> None:
        """Refuse what is no loss of each image.

        Raises:
            ValueError: what it is, with the objective's class.
        """
        told = f"objective={type(self).__name__}: its losses returns"
        if not isinstance(found, Losses):
            raise ValueError(
                f"{told} {type(found).__name__}: expected sag_dit.training.objective.Losses"
            )
        for name, each in {"per_image": found.per_image, **found.terms}.items():
            shape = tuple(getattr(each, "shape", ()))
            if shape != (len(x_0),):
                raise ValueError(
                    f"{told} {name} {shape} of {len(x_0)} images: expected a tensor "
                    f"{(len(x_0),)}, a loss for each image, as error.flatten(1).mean(dim=1) is"
                )


def no_pixels(objective: Objective) -> ValueError:
    """Return the error of an objective that sees pixels where the data has none."""
    return ValueError(
        f"objective={type(objective).__name__}: it sees the pixels of each image, and this data "
        f"has none: expected images, or latents with data.images=FOLDER, the images that were "
        f"encoded"
    )


class Frozen:
    """A network that an objective asks and does not train: no part of checkpoints and averages.

    It is in eval mode, its weights frozen, and follows to the device of what it is given.

    Example:
        >>> encoder = Frozen(nn.Linear(2, 3))
        >>> encoder(torch.zeros(1, 2)).requires_grad
        False
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def __call__(self, given: Tensor) -> Any:
        """Return what the network makes of a tensor."""
        self.network.to(given.device)
        with torch.no_grad():
            return self.network(given)

    def __deepcopy__(self, memo: object) -> Self:
        """Return itself: what never changes needs no copy."""
        return self


@contextmanager
def features_of(network: nn.Module, *names: str) -> Iterator[dict[str, Any]]:
    """Collect what modules of a network put out while it is asked, by their names.

    Gradients pass through them.

    Raises:
        ValueError: the network has no module of such a name.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with features_of(network, "0") as features:
        ...     y = network(torch.zeros(1, 2))
        >>> features["0"].shape
        torch.Size([1, 3])
    """
    modules = dict(network.named_modules())
    found: dict[str, Any] = {}
    for name in names:
        if name not in modules:
            raise ValueError(
                f"{name!r}: {type(network).__name__} has no module of this name; expected one such "
                f"as {', '.join([each for each in modules if each][:5])}"
            )
    # A compiled module runs no hook that it was not compiled with, and so is wrapped.
    with ExitStack() as watched:
        for name in names:
            module, note = modules[name], partial(found.__setitem__, name)
            compiled = module._compiled_call_impl
            if compiled is None:
                hook = module.register_forward_hook(lambda _, given, out, note=note: note(out))
                watched.callback(hook.remove)
            else:
                module._compiled_call_impl = partial(_noted, compiled, note)
                watched.callback(setattr, module, "_compiled_call_impl", compiled)
        yield found


def _noted(call: Callable[..., Any], note: Callable[[Any], None], *given: Any, **known: Any) -> Any:
    output = call(*given, **known)
    note(output)
    return output


def square_error(output: Images, target: Images) -> Float[Tensor, "b"]:
    """Return |output - target|^2 averaged over channels and pixels, in float32, one per image."""
    return (output.float() - target).square().flatten(1).mean(dim=1)
