"""Every golden of UNets and SiT fails when our code takes a wrong turn that it guards against."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sag_dit.attention import tap
from sag_dit.guidance import SAG, ClassifierGuidance
from sag_dit.guidance import sag as sag_module
from sag_dit.models.dit import sit
from sag_dit.models.unet import adapter
from sag_dit.models.unet import classifier as classifier_module
from sag_dit.models.unet import network as unet_module
from sag_dit.models.unet.network import UNet
from sag_dit.process import Prediction
from sag_dit.sampler import DDIM, Ancestral, EulerFlow, EulerMaruyama
from tests.parity import mutations as m
from tests.parity import ours, unet_ours
from tests.parity import unet_fixed as f
from tests.parity.compare import disagreements
from tests.parity.mutations import Mutation, replaced

FORWARDS = r"forward\."
CONDITIONAL = (r"forward\.adm", r"step\.adm\.[01]\.", r"run\.ddim", r"guided\.(output|middle)\.")


def timed(**wrong: Any) -> m.Apply:
    """Another time embedding, in UNets and classifiers."""

    def make(right: Any) -> Any:
        def embedding(width: int) -> Any:
            sinusoids, network = right(width)
            for name, value in wrong.items():
                setattr(sinusoids, name, value)
            return sinusoids, network

        return embedding

    return m.on_both((unet_module, classifier_module), "time_embedding", make)


def forward_with(change: Callable[[Tensor, Tensor, Tensor], Any]) -> m.Apply:
    """A UNet that is asked something else."""
    return replaced(UNet, "forward", lambda right: lambda self, *args: right(self, *change(*args)))


def other_order(split: Any) -> Any:
    return lambda joined, heads, new: split(joined, heads, not new)


def sag_with(**wrong: Any) -> m.Apply:
    """SAG with other settings than asked."""
    return replaced(unet_ours, "SAG", lambda _: lambda s, **options: SAG(s, **options | wrong))


def doubled(_: object) -> Any:
    return lambda s, **options: ClassifierGuidance(2 * s, **options)


def sine_negated(reverse: Any) -> Any:
    def wrong(weight: Tensor) -> Any:
        half = weight.shape[1] // 2
        return reverse(torch.cat([weight[:, :half], -weight[:, half:]], dim=1))

    return wrong


def solver_with(**wrong: Any) -> m.Apply:
    """A SiT SDE solver with other settings than asked."""
    return replaced(
        unet_ours, "EulerMaruyama", lambda _: lambda **asked: EulerMaruyama(**asked | wrong)
    )


UNETS = (
    Mutation("exponents over half - 1", timed(downscale_freq_shift=1), (FORWARDS, r"classifier\.")),
    Mutation("sines first", timed(flip_sin_to_cos=False), (FORWARDS, r"classifier\.")),
    Mutation(
        "the other order of queries, keys and values",
        replaced(adapter, "split_qkv", other_order),
        (r"forward\.(adm|new_order|narrow|iddpm|wide)", r"classifier\.logits"),
    ),
    Mutation(
        "one head",
        replaced(unet_module, "split_heads", lambda _: lambda network, heads: None),
        (r"forward\.(narrow|iddpm)", r"run\.ancestral"),
    ),
    Mutation(
        "16 groups",
        m.on_both((unet_module, classifier_module), "GROUPS", lambda _: 16),
        (FORWARDS, r"classifier\.logits", r"step\.plain\.(0|12)\.mean"),
    ),
    Mutation(
        "times not rescaled",
        forward_with(lambda x, t, y: (x, 4 * t, y)),
        (r"forward\.iddpm", r"step\.iddpm\.5\.", r"run\.ancestral"),
    ),
    Mutation("another label", forward_with(lambda x, t, y: (x, t, (y + 1) % 10)), CONDITIONAL),
    Mutation(
        "no clamp",
        replaced(Prediction, "clamped", lambda _: lambda self, _: self),
        (r"step\..*\.mean", r"run\."),
    ),
    Mutation(
        "variance of the step before",
        replaced(Ancestral, "log_variance", m.variance_of_the_neighbour),
        (r"step\..*\.log_variance", r"run\.ancestral"),
    ),
    Mutation(
        "fractional stride", replaced(unet_ours, "StridedDDIM", lambda _: DDIM), (r"run\.ddim",)
    ),
    Mutation(
        "noise of the next step",
        replaced(ours.RecordedNoise, "like", lambda like: lambda self, x, i: like(self, x, i + 1)),
        (r"run\.ancestral", r"sit\.sde"),
    ),
    Mutation(
        "classifier twice as strong",
        replaced(unet_ours, "ClassifierGuidance", doubled),
        (r"classifier\.\d+\.",),
    ),
    Mutation(
        "the classifier's shift clamped",
        replaced(unet_ours.ClassifierGuidance, "clamped", lambda _: True),
        (r"classifier\.120\.clamped\.", r"classifier\.20\.clamped\.eps"),
    ),
    Mutation(
        "another layer",
        sag_with(layer="output_blocks.1"),
        (r"guided\..*\.(mask|x_bar|eps|mean)",),
    ),
    Mutation(
        "the layer's own heads", sag_with(heads=None), (r"guided\.misread\.(mask|x_bar|eps)",)
    ),
    Mutation("first head", m.on_both((tap,), "saliency", m.first_head), (r"guided\..*\.scores",)),
    Mutation(
        "threshold 1.1",
        replaced(sag_module, "attention_mask", lambda make: lambda s, g, t: make(s, g, 1.1 * t)),
        (r"guided\..*\.(mask|x_bar)",),
    ),
)
FLOWS = (
    Mutation(
        "time not reversed", replaced(sit, "reversed_time", lambda _: lambda w: w), (r"sit\.",)
    ),
    Mutation("sine of the wrong sign", replaced(sit, "reversed_time", sine_negated), (r"sit\.",)),
    Mutation(
        "noise and score exchanged",
        replaced(sit, "KINDS", lambda k: k | {"noise": "score", "score": "eps"}),
        (r"sit\.(noise|score)\.",),
    ),
    Mutation(
        "another grid",
        replaced(unet_ours, "EulerFlow", lambda _: lambda: EulerFlow(shift=1.1)),
        (r"sit\.ode",),
    ),
    Mutation(
        "CFG on all channels",
        replaced(unet_ours, "CFG_CHANNELS", lambda _: None),
        (r"sit\.ode_cfg",),
    ),
    Mutation("diffusion a tenth stronger", solver_with(norm=1.1), (r"sit\.sde\.",)),
    Mutation("last step of 0.05", solver_with(last_step=0.05), (r"sit\.sde\.",)),
)


def noticing(mutation: Mutation, keys: set[str]) -> set[str]:
    """The goldens that must fail under a mutation."""
    return {key for key in keys if any(re.match(pattern, key) for pattern in mutation.notices)}


@pytest.fixture(scope="module")
def goldens() -> dict[str, Tensor]:
    return load_file(f.GOLDENS)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", [*UNETS, *FLOWS], ids=str)
@pytest.mark.filterwarnings("ignore:kernel_size")
def test_goldens_notice(
    mutation: Mutation, goldens: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = noticing(mutation, set(goldens))
    mutation.apply(monkeypatch)
    # Networks that were built rightly are not to be asked.
    monkeypatch.setattr(unet_ours, "denoiser", unet_ours.denoiser.__wrapped__)
    outputs: dict[str, Tensor] = {}
    for group in {key.split(".")[0] for key in expected}:
        outputs |= unet_ours.compute(group)
    # Three times the tolerance, so that no golden fails by rounding alone.
    failed = disagreements(outputs, goldens, factor=3.0)
    assert expected
    assert expected - failed.keys() == set()


def test_every_golden_is_guarded(goldens: dict[str, Tensor]) -> None:
    every = (*UNETS, *FLOWS)
    guarded = set().union(*(noticing(mutation, set(goldens)) for mutation in every))
    assert set(goldens) - guarded == set()
