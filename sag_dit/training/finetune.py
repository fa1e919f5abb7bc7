"""Fine-tuning: a loaded model made to fit other classes and another resolution, frozen in part.

With LoRA a few added parameters are trained and the own weights of the checkpoint stay. Checkpoints
hold both, see :mod:`sag_dit.checkpoints.formats`; what a run exports has them merged.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from sag_dit.checkpoints import Model, from_denoiser
from sag_dit.denoiser import ClassConditional
from sag_dit.models import families, family_for
from sag_dit.training.objective import MSE, FlowMatching, Hybrid, Objective

SHOWN = 5


@dataclass(frozen=True, eq=False)
class Adapted:
    """A model that fits its new data, and what happened to the checkpoint's weights.

    Attributes:
        model: to train; its name is the run's.
        kept: classes that the checkpoint knows by the same name.
        new: classes that it does not know.
        remade: parameters that were computed or composed anew, and how, in words.

    Example::

        adapted = adapt(base, "cats", ["tabby", "siamese"], resolution=256)
        print(adaptation_report(base, adapted))
    """

    model: Model
    kept: tuple[str, ...]
    new: tuple[str, ...]
    remade: Mapping[str, str]


def resolution_of(model: Model) -> int:
    """Return the pixels along each side of a model's images.

    Raises:
        ValueError: they are not square.
    """
    _, height, width = model.denoiser.latent_shape
    if height != width:
        raise ValueError(
            f"{model.name} draws {height * model.codec.factor} x {width * model.codec.factor} "
            f"pixels: expected a square to train on; set resolution"
        )
    return height * model.codec.factor


def adapt(base: Model, name: str, class_names: Sequence[str], resolution: int) -> Adapted:
    """Make a model fit classes and a resolution; all other weights stay as they are.

    Architecture, process, kind, codec, channels and patch size are the checkpoint's. ``base`` is
    left alone, but the two share their memory.

    Raises:
        ValueError: no class, a resolution that the autoencoder and the patches do not divide, or a
            network of a family that cannot be fitted to other classes.
    """
    # What cannot be fine-tuned is refused before anything is built.
    before, names = base.class_conditional, tuple(class_names)
    family = family_for(before.network)
    if not family.tunable:
        tunable = (each.noun for each in families().values() if each.tunable)
        raise ValueError(
            f"ckpt={base.name}: {family.noun}, which can be trained from the start but not "
            f"fine-tuned; expected {' or '.join(tunable)}"
        )
    if not names:
        raise ValueError("the data has no classes: expected one or more to fine-tune on")
    cell = base.codec.factor * before.network.patch_size
    if resolution < cell or resolution % cell:
        raise ValueError(
            f"resolution={resolution}: expected a multiple of {cell}, the autoencoder's factor "
            f"{base.codec.factor} times the checkpoint's patch size {before.network.patch_size}"
        )
    # The same network but for size and classes, whose weights are going to be the others'.
    side = resolution // base.codec.factor
    network = family.build_to_fill(family.resized(base.description["model"], side, len(names)))
    if tuple(network.input_size) != (side, side):
        raise ValueError(
            f"resolution={resolution}: {family.title} has no argument input_size, and its x_t "
            f"stays {network.input_size[0]} x {network.input_size[1]}: expected "
            f"{resolution_of(base)}"
        )
    # All weights are kept but for what the family fits to other classes and another grid.
    refitted = family.refit(before.network, network, before.class_names, names)
    network.load_state_dict(refitted.state, assign=True)
    denoiser = ClassConditional(network, before.process, before.kind, before.x_0_range, names)
    model = from_denoiser(
        denoiser.eval(), name, codec=base.codec, defaults=base.defaults, vae=base.vae
    )
    new = tuple(n for n in names if n not in refitted.kept)
    return Adapted(model, refitted.kept, new, refitted.remade)


def matching(names: Iterable[str], pattern: str) -> set[str]:
    """Return the names that match a pattern (with ``*``, ``?``, ``[...]``).

    The name of a module stands for all in it: ``blocks.0`` means the same as ``blocks.0.*``.
    """
    return {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")}


def freeze(network: nn.Module, patterns: Iterable[str]) -> tuple[str, ...]:
    """Exclude parameters from training and return their names; see :func:`matching`.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to train.
    """
    parameters = dict(network.named_parameters())
    frozen: set[str] = set()
    for pattern in patterns:
        found = matching(parameters, pattern)
        if not found:
            parts = dict.fromkeys(name.split(".")[0] for name in parameters)
            examples = [*parts, "blocks.0", "blocks.*.attn", next(reversed(parameters))]
            raise ValueError(
                f"freeze: {pattern!r} matches no parameter; expected names or patterns such as "
                f"{', '.join(examples)}"
            )
        frozen |= found
    for name in frozen:
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError("freeze: nothing is left to train; expected patterns that leave some")
    return tuple(name for name in parameters if name in frozen)


def default_objective(denoiser: ClassConditional) -> Objective:
    """Return the objective that a denoiser was most likely trained with.

    Flow matching for the velocity of a flow, DiT's for a learned variance, else the squared error.
    """
    if denoiser.process.is_flow:
        return FlowMatching() if denoiser.kind == "v" else MSE()
    return Hybrid() if denoiser.network.learn_sigma else MSE()


def adaptation_report(base: Model, adapted: Adapted, adapters: Sequence[str] = ()) -> str:
    """Return in a few lines what was loaded, re-made and frozen, with counts of parameters.

    ``adapters`` are the layers that were given LoRA's.
    """
    network = adapted.model.class_conditional.network
    parameters = dict(network.named_parameters())
    fixed = family_for(network).fixed
    added = {name for name in parameters if ".lora_" in name}
    loaded = set(parameters) - set(adapted.remade) - added
    frozen = [n for n, p in parameters.items() if not p.requires_grad and n not in fixed]
    trained = [n for n, p in parameters.items() if p.requires_grad]

    def count(names: Iterable[str]) -> str:
        return f"{sum(parameters[name].numel() for name in names):,}"

    # A line for each, LoRA's before the last two.
    lines = [
        f"fine-tuning {base.name} ({base.config['weights']} weights, sha256 {base.sha256[:8]})",
        f"  loaded   {count(loaded)} parameters in {len(loaded)} tensors, unchanged",
        *(f"  re-made  {what}" for what in adapted.remade.values()),
        f"  classes  {len(adapted.kept)} known{_in_brackets(adapted.kept)}, "
        f"{len(adapted.new)} new{_in_brackets(adapted.new)}",
        f"  frozen   {count(frozen)} parameters in {len(frozen)} tensors{_in_brackets(frozen)}",
        f"  trained  {count(trained)} of {count(parameters)} parameters"
        f"{'; positions never are' * bool(fixed)}",
    ]
    if adapters:
        kinds = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in adapters)
        layers = ", ".join(f"{kind} ({number})" for kind, number in kinds.items())
        lines.insert(-2, f"  LoRA     {count(added)} parameters added to {layers}")
    return "\n".join(lines)


def _in_brackets(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)})"


TARGETS = ("blocks.*.attn", "blocks.*.mlp")
"""The attention and MLP layers of a DiT."""


@dataclass(frozen=True)
class LoRA:
    """What is added to a linear layer of weight W: W x + (alpha / rank) B A dropout(x).

    A is (rank, in) and starts random, B is (out, rank) and starts at zero, so that the first step
    begins at the checkpoint. ``alpha`` is the rank unless given. ``targets`` are patterns of layers
    or of modules, which stand for all linear layers in them.

    Raises:
        ValueError: a value out of its range, or peft is not installed.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1.

    Example::

        layers = add_adapters(network, LoRA(rank=16))
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    targets: Sequence[str] = TARGETS

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"lora.rank={self.rank}: expected a number from 1 on, null for none")
        if self.alpha is not None and not (_is_real(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha={self.alpha}: expected more than 0, null for the rank")
        if not (_is_real(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"lora.dropout={self.dropout}: expected 0 to less than 1")
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(f"lora.targets={self.targets}: expected a list such as {[*TARGETS]}")
        if importlib.util.find_spec("peft") is None:
            raise ValueError(
                f"lora.rank={self.rank}: LoRA needs peft, which is not installed; "
                f"pip install -e '.[lora]'"
            )

    @property
    def description(self) -> dict[str, Any]:
        """What it takes to merge the adapters, as plain values."""
        alpha = self.rank if self.alpha is None else self.alpha
        return {"rank": self.rank, "alpha": float(alpha)}


def add_adapters(network: nn.Module, lora: LoRA, frozen: Collection[str] = ()) -> tuple[str, ...]:
    """Give layers adapters, exclude all else from training, and return the layers' names.

    A layer whose weight is among ``frozen`` gets none.

    Raises:
        ValueError: a pattern matches no linear layer, or only frozen ones are left.
    """
    # Imported here, since peft is an extra and imports transformers.
    from peft import LoraConfig, inject_adapter_in_model

    # Which layers: those that match, unless they are frozen.
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    chosen: set[str] = set()
    for pattern in lora.targets:
        found = matching(linear, pattern)
        if not found:
            kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in linear)
            raise ValueError(
                f"lora.targets: {pattern!r} matches no linear layer"
                + (
                    f"; expected names or patterns such as {', '.join([*kinds][:SHOWN])}"
                    if kinds
                    else f", of which {type(network).__name__} has none; leave lora.rank out"
                )
            )
        chosen |= found
    layers = [name for name in linear if name in chosen and f"{name}.weight" not in frozen]
    if not layers:
        raise ValueError("lora.targets: all of them are frozen; expected some that freeze leaves")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.description["alpha"],
        lora_dropout=lora.dropout,
        target_modules=layers,
    )
    inject_adapter_in_model(config, network)
    return tuple(layers)


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
