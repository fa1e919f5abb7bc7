"""Whether a network gives what is asked of one, found out by asking it once."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sag_dit.attention import AttentionLayer, AttentionTap
from sag_dit.attention.edits import Attend, AttentionEdit
from sag_dit.denoiser.class_conditional import ClassConditional

LARGE = 1e10
"""Parameters times positions from which on a network is asked without memory, where it can be."""
ROWS = 2


def check_network(denoiser: ClassConditional) -> None:
    """Ask a network once, and refuse an answer that neither training nor drawing could use.

    An answer of another shape might be broadcast, and train something else without a word. The
    network is as before afterwards, and no random number is drawn. A large one is asked as a copy
    without memory; what cannot be asked so, is asked as it is.

    Raises:
        ValueError: its ``forward`` fails, returns no tensor, or one of another shape or type than
            it should; or one of its ``layers`` does not exist, does not attend, or attends to
            other tokens than it says. The class is named.

    Example:
        >>> from sag_dit.models import DiT
        >>> from sag_dit.process import DDPM
        >>> network = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2)
        >>> check_network(ClassConditional(network, DDPM()))
    """
    network = denoiser.network
    parameters = sum(each.numel() for each in network.parameters())
    if not parameters:
        raise ValueError(f"{_name(network)}: has no parameters; expected some, to be trained")
    height, width = network.input_size
    if parameters * height * width >= LARGE:
        try:
            _ask(denoiser, _without_memory(network))
            return
        except Exception:  # Not every network can; one that gives the wrong answer is asked again.
            pass
    _ask(denoiser, network)


def _without_memory(network: Any) -> Any:
    """Return a copy on the device ``meta``, made without one of the weights."""
    tensors = (*network.parameters(), *network.buffers())
    return deepcopy(network, {id(each): each.to("meta") for each in tensors})


def _ask(denoiser: ClassConditional, network: Any) -> None:
    """Ask for two images at two times, of a class and of none, and look at the answer."""
    first = next(network.parameters())
    process, null = denoiser.process, denoiser.network.null_label
    x_t = torch.zeros(ROWS, *denoiser.latent_shape, dtype=first.dtype, device=first.device)
    level = process.level(process.time_at(torch.tensor([0.25, 0.75])))
    t = level.times(x_t.to("cpu")).to(first.device)
    y = torch.tensor([0, 0 if null is None else null], device=first.device)
    with _left_as_it_was(network), torch.no_grad():
        try:
            output = network(x_t, t, y)
        except Exception as error:  # Whatever a forward of one's own raises.
            raise ValueError(
                f"{_name(network)}: its forward fails with {type(error).__name__}: "
                f"{str(error).strip() or 'no message'} ({_place(error)}); it was given x_t "
                f"{_told(x_t)}, t {_told(t)} and y {_told(y)}"
            ) from error
        _check_output(denoiser, x_t, output)
        layers = denoiser.layers
        for name, layer in layers.items():
            if layer.name != name:
                raise ValueError(f"{_name(network)}: its layers[{name!r}] is named {layer.name!r}")
        edits = [(_Counted(name, layer), slice(None)) for name, layer in layers.items()]
        try:
            with AttentionTap(network, edits=edits):
                network(x_t, t, y)
        except ValueError as error:
            raise ValueError(f"{_name(network)}: {error}") from error


def _check_output(denoiser: ClassConditional, x_t: Tensor, output: Any) -> None:
    network, name = denoiser.network, _name(denoiser.network)
    if not isinstance(output, Tensor):
        raise ValueError(
            f"{name}: its forward returns a {type(output).__name__}: expected one tensor of the "
            f"shape of x_t, {tuple(x_t.shape)}"
        )
    _, channels, height, width = x_t.shape
    wanted = (ROWS, channels * (1 + network.learn_sigma), height, width)
    if tuple(output.shape) != wanted:
        more = ""
        if network.learn_sigma:
            more = ", with as many channels again for the variance, since learn_sigma is true"
        elif output.shape[1:2] == (2 * channels,):
            more = "; if half of its channels are the variance, state learn_sigma = True"
        raise ValueError(
            f"{name}: its forward returns {tuple(output.shape)} for x_t {tuple(x_t.shape)}: "
            f"expected {wanted}, (batch, channels, height, width) of x_t{more}"
        )
    if output.dtype not in (x_t.dtype, torch.float32):
        raise ValueError(
            f"{name}: its forward returns {_word(output.dtype)} for x_t in {_word(x_t.dtype)}: "
            f"expected {_word(x_t.dtype)}"
        )


@dataclass(frozen=True)
class _Counted(AttentionEdit):
    """Changes nothing, and counts the tokens that a layer attends to."""

    layer: AttentionLayer

    def __hash__(self) -> int:
        return hash(self.module)

    def edit_attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        self.layer.check(key.shape[-2])
        return attend(query, key, value)


@contextmanager
def _left_as_it_was(network: nn.Module) -> Iterator[None]:
    """Have a network in eval mode, and torch draw its random numbers as if nothing had happened."""
    modes = [(module, module.training) for module in network.modules()]
    device = next(network.parameters()).device
    network.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _place(error: BaseException) -> str:
    """Return the line that failed: the last one that is not torch's."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    torch_at = str(Path(torch.__file__).parent)
    own = [each for each in frames if not each.filename.startswith(torch_at)]
    last = (own or frames)[-1] if frames else None
    return "no line is known" if last is None else f"{last.filename}, line {last.lineno}"


def _name(network: Any) -> str:
    return f"{type(network).__module__}.{type(network).__qualname__}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _told(given: Tensor) -> str:
    return f"{tuple(given.shape)} in {_word(given.dtype)}"
