"""Whether a network gives what is asked of one, found out by asking it once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sag_dit.attention import AttentionLayer, AttentionTap
from sag_dit.attention.edits import Attend, AttentionEdit
from sag_dit.denoiser.class_conditional import ClassConditional
from sag_dit.raised import failure
from sag_dit.tensors import without_memory

LARGE = 1e10
"""Parameters times positions from which on a network is asked without memory, where it can be."""
ROWS, GROUPED = 2, 8
SAME = 0.01
"""Share of the greatest value by which two answers to one question may differ, by rounding."""


def check_network(denoiser: ClassConditional) -> None:
    """Ask a network once, and refuse an answer that neither training nor drawing could use.

    An answer of another shape might be broadcast, and train something else without a word. The
    network is as before afterwards, and no random number is drawn. A large one is asked as a copy
    without memory; what cannot be asked so, is asked as it is.

    Raises:
        ValueError: its ``forward`` fails, returns no tensor, or one of another shape or type than
            it should; it has no row for a class or for ``null_label``; it changes what it is given
            or answers otherwise the second time, or draws random numbers; or one of its ``layers``
            does not exist, does not attend, or attends to other tokens than it says. The class is
            named.

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
            _ask(denoiser, without_memory(network))
            return
        except _NoRow:
            raise
        except Exception:  # Not every network can; one that gives the wrong answer is asked again.
            pass
    _ask(denoiser, network)


def _ask(denoiser: ClassConditional, network: Any) -> None:
    """Ask for two images at two times, of the last class and of none, and look at the answer."""
    x_t, t = _question(denoiser, next(network.parameters()), ROWS)
    null, last = denoiser.network.null_label, denoiser.num_classes - 1
    y = torch.tensor([last, last if null is None else null], device=x_t.device)
    versions = [(name, each, each._version) for name, each in (("x_t", x_t), ("t", t), ("y", y))]
    with _left_as_it_was(network), torch.no_grad(), _rows_are_there(denoiser, network, y):
        drawn = torch.get_rng_state()
        try:
            output = network(x_t, t, y)
        except _NoRow:
            raise
        except Exception as error:  # Whatever a forward of one's own raises.
            told = failure(error)
            for label in (*([] if null is None else [null]), last):
                if _fails_for(network, x_t, t, label) and not _fails_for(network, x_t, t, 0):
                    why = f"its forward fails with {told}"
                    raise _NoRow(f"{_no_row(denoiser, label)}: {why}") from error
            raise ValueError(
                f"{_name(network)}: its forward fails with {told}; it was given x_t "
                f"{_told(x_t)}, t {_told(t)} and y {_told(y)}"
            ) from error
        _check_output(denoiser, x_t, output)
        if _not_finite(output) and _not_finite(network(torch.randn_like(x_t), t, y)):
            raise ValueError(
                f"{_name(network)}: its forward returns NaN or infinite values, of zeros and of "
                f"noise: expected finite ones"
            )
        changed = [name for name, each, version in versions if each._version != version]
        if changed:
            raise ValueError(
                f"{_name(network)}: its forward changes {changed[0]} in place, which others still "
                f"need: expected a copy, as x = x * 2 makes one and x *= 2 does not"
            )
        layers = denoiser.layers
        for name, layer in layers.items():
            if layer.name != name:
                raise ValueError(f"{_name(network)}: its layers[{name!r}] is named {layer.name!r}")
        edits = [(_Counted(name, layer), slice(None)) for name, layer in layers.items()]
        try:
            torch.set_rng_state(drawn)
            with AttentionTap(network, edits=edits):
                again = network(x_t, t, y)
        except ValueError as error:
            raise ValueError(f"{_name(network)}: {error}") from error
        # On other devices random numbers are not repeated, and without memory there are none.
        if x_t.device.type == "cpu" and (again - output).abs().max() > SAME * output.abs().max():
            raise ValueError(
                f"{_name(network)}: its forward answers otherwise when it is asked the same again, "
                f"so that an image would depend on what was drawn before: expected an answer that "
                f"follows from x_t, t and y; keep nothing between calls"
            )
        # Twice with other random numbers, of noise, since nothing can be dropped of zeros.
        x_t = torch.randn_like(x_t)
        twice = network(x_t, t, y), network(x_t, t, y)
        apart = (twice[0] - twice[1]).abs().max()
        if x_t.device.type == "cpu" and apart > SAME * twice[0].abs().max():
            raise ValueError(
                f"{_name(network)}: its forward draws random numbers also when it is not training, "
                f"so that an image would not follow from its seed: expected none then, as "
                f"nn.Dropout or F.dropout(x, p, self.training) draws none"
            )


def check_trainable(denoiser: ClassConditional) -> None:
    """Ask a copy of a network for two steps as training does, with three images and gradients.

    What cannot be copied, or is compiled, is not asked. Where three fail, it is asked with eight,
    since a network may put its images into pairs or groups.

    Raises:
        ValueError: its ``forward`` fails in training mode, returns something else than it should,
            or what it returns does not follow from its parameters. The class is named.

    Example:
        >>> from sag_dit.models import DiT
        >>> from sag_dit.process import DDPM
        >>> network = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2)
        >>> check_trainable(ClassConditional(network, DDPM()))
    """
    network = denoiser.network
    if any(module._compiled_call_impl is not None for module in network.modules()):
        return
    height, width = network.input_size
    large = sum(each.numel() for each in network.parameters()) * height * width >= LARGE
    try:
        twin: Any = without_memory(network) if large else deepcopy(network)
        twin.train()
    except Exception:  # What a network of one's own may hold.
        return
    device = next(twin.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for rows in (ROWS + 1, GROUPED):
            x_t, t = _question(denoiser, next(twin.parameters()), rows)
            y = torch.zeros(len(x_t), dtype=torch.long, device=device)
            try:
                # Twice, so that what is kept of the first step would be met at the second.
                for step in ("first", "second"):  # noqa: B007, for the message
                    output = twin(x_t, t, y)
                    if isinstance(output, Tensor) and output.requires_grad:
                        output.sum().backward()
                break
            except Exception as error:  # Whatever a forward of one's own raises.
                if large:  # Not every network can be asked without memory.
                    return
                if rows != GROUPED:
                    continue
                raise ValueError(
                    f"{_name(network)}: it fails in training, at its {step} step, with "
                    f"{failure(error)}; it was given x_t {_told(x_t)}, t {_told(t)} and y "
                    f"{_told(y)}"
                ) from error
    _check_output(denoiser, x_t, output, " in training")
    if not output.requires_grad and any(each.requires_grad for each in twin.parameters()):
        raise ValueError(
            f"{_name(network)}: what its forward returns in training does not follow from its "
            f"parameters, so that nothing would be learned: expected an output with a gradient; "
            f"leave out .detach() and torch.no_grad()"
        )


def _question(denoiser: ClassConditional, like: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return images of zeros and times between, of the type and on the device of a parameter."""
    process = denoiser.process
    x_t = torch.zeros(rows, *denoiser.latent_shape, dtype=like.dtype, device=like.device)
    level = process.level(process.time_at(torch.linspace(0.25, 0.75, rows)))
    return x_t, level.times(torch.zeros(rows, 1, 1, 1)).to(like.device)


def _not_finite(output: Tensor) -> bool:
    return output.device.type != "meta" and not output.isfinite().all()


class _NoRow(ValueError):
    """A label that a network has no row for."""


def _no_row(denoiser: ClassConditional, label: int, rows: str = "") -> str:
    """Return that a network has no row for a label, and what to do, in a sentence."""
    network, classes = denoiser.network, denoiser.num_classes
    if label == network.null_label and label >= classes:
        return (
            f"{_name(network)}: it has {classes} classes and null_label={label}, and no row for "
            f"it{rows}; expected one row more, {label + 1}, to draw without a class, or "
            f"null_label=None"
        )
    return (
        f"{_name(network)}: it has {classes} classes, and no row for class {label}{rows}; expected "
        f"a row for each, and one more for a null_label"
    )


def _fails_for(network: Any, x_t: Tensor, t: Tensor, label: int) -> bool:
    """Whether a network fails for images of a label; not on a GPU, where nothing goes on then."""
    if x_t.device.type == "cuda":
        return False
    try:
        network(x_t, t, torch.full((ROWS,), label, device=x_t.device))
    except Exception:  # Whatever a forward of one's own raises.
        return True
    return False


@contextmanager
def _rows_are_there(denoiser: ClassConditional, network: nn.Module, y: Tensor) -> Iterator[None]:
    """Refuse an embedding of labels that has no row for one of them, before it is looked up.

    The lookup's own error names neither. On a GPU no process goes on after it, and on the device
    ``meta`` there is none.
    """
    null = denoiser.network.null_label
    labels = {denoiser.num_classes - 1, *([] if null is None else [null])}

    def look(name: str, module: nn.Embedding, given: tuple[Any, ...]) -> None:
        own = given and (given[0] is y or _equal(given[0], y))
        beyond = [each for each in sorted(labels) if each >= module.num_embeddings]
        if own and beyond:
            rows = f" ({name} has {module.num_embeddings})"
            raise _NoRow(_no_row(denoiser, beyond[0], rows))

    watched = [
        module.register_forward_pre_hook(partial(look, name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    try:
        yield
    finally:
        for each in watched:
            each.remove()


def _equal(given: Any, y: Tensor) -> bool:
    there = isinstance(given, Tensor) and given.device.type != "meta" and given.shape == y.shape
    return bool(there and not given.is_floating_point() and torch.equal(given, y))


def _check_output(denoiser: ClassConditional, x_t: Tensor, output: Any, when: str = "") -> None:
    network, name = denoiser.network, _name(denoiser.network)
    if not isinstance(output, Tensor):
        raise ValueError(
            f"{name}: its forward returns a {type(output).__name__}{when}: expected one tensor of "
            f"the shape of x_t, {tuple(x_t.shape)}"
        )
    rows, channels, height, width = x_t.shape
    wanted = (rows, channels * (1 + network.learn_sigma), height, width)
    if tuple(output.shape) != wanted:
        more = ""
        if network.learn_sigma:
            more = ", with as many channels again for the variance, since learn_sigma is true"
        elif output.shape[1:2] == (2 * channels,):
            more = "; if half of its channels are the variance, state learn_sigma = True"
        raise ValueError(
            f"{name}: its forward returns {tuple(output.shape)} for x_t {tuple(x_t.shape)}{when}: "
            f"expected {wanted}, (batch, channels, height, width) of x_t{more}"
        )
    if output.dtype not in (x_t.dtype, torch.float32):
        raise ValueError(
            f"{name}: its forward returns {_word(output.dtype)} for x_t in {_word(x_t.dtype)}"
            f"{when}: expected {_word(x_t.dtype)}"
        )
    if output.device != x_t.device:
        raise ValueError(
            f"{name}: its forward returns a tensor on {output.device} for x_t on {x_t.device}"
            f"{when}: expected the device of x_t"
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


def _name(network: Any) -> str:
    return f"{type(network).__module__}.{type(network).__qualname__}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _told(given: Tensor) -> str:
    return f"{tuple(given.shape)} in {_word(given.dtype)}"
