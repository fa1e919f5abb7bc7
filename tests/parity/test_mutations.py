"""Every golden fails when our code takes a wrong turn that it guards against.

A mutation is applied to our code alone, and names the goldens that must notice it by patterns that
start their keys. Together the patterns cover every golden.
"""

from __future__ import annotations

import re
from importlib import import_module

import pytest
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sag_dit.attention import tap
from sag_dit.denoiser import Denoiser
from sag_dit.guidance import CFG, SAG
from sag_dit.guidance import sag as sag_module
from sag_dit.models import DiT
from sag_dit.models.dit.network import TimestepEmbedder
from sag_dit.process import DDPM, Prediction
from sag_dit.process import ddpm as ddpm_module
from sag_dit.process.ddpm import Posterior
from sag_dit.sampler import DDIM, Ancestral
from tests.parity import fixed as f
from tests.parity import mutations as m
from tests.parity import ours
from tests.parity.compare import disagreements
from tests.parity.mutations import Mutation, replaced

# The package also has a function of this name.
DIT_MODULE = import_module("sag_dit.models.dit.network")

PASSES = r"forward\..*_t"
SALIENCY = (ours, tap)
MASKED = (r"(degrade|guided)\..*\.(mask|x_bar)",)
# At the clean end the guided mean hardly depends on what is blurred.
GUIDED_MEAN = r"guided\..*\.[159]\.mean"
BLURRED = (r"(degrade|guided)\..*\.x_bar", GUIDED_MEAN)
WIDE_BLUR = (r"degrade\.(adm|clean_end)\.x_bar", r"guided\.clamped\.[15]\.(x_bar|mean)")

MUTATIONS = (
    # the network
    Mutation(
        "frequencies over 127",
        replaced(TimestepEmbedder, "sinusoids", m.sinusoids(127, sines_first=False)),
        (PASSES,),
    ),
    Mutation(
        "sines before cosines",
        replaced(TimestepEmbedder, "sinusoids", m.sinusoids(128, sines_first=True)),
        (PASSES,),
    ),
    Mutation("LayerNorm epsilon 1e-5", m.network_edit(m.wide_epsilon), (PASSES,)),
    Mutation("exact GELU", m.network_edit(m.exact_gelu), (PASSES,)),
    Mutation("half the heads", m.network_edit(m.half_the_heads), (PASSES,)),
    Mutation(
        "scale without the one",
        replaced(DIT_MODULE, "modulate", lambda _: lambda x, b, a: x * a[:, None] + b[:, None]),
        (PASSES,),
    ),
    Mutation("patches transposed", replaced(DiT, "unpatchify", m.transposed_patches), (PASSES,)),
    Mutation("rows first", replaced(DIT_MODULE, "sincos_positions", m.rows_first), (r"forward\.",)),
    Mutation(
        "fraction of t lost",
        replaced(TimestepEmbedder, "forward", m.whole_times),
        (r"forward\..*real_t",),
    ),
    # the process
    Mutation(
        "beta ends at 0.0201",
        m.other_betas("linear", lambda betas: betas * 1.005),
        (r"schedule\.linear\..*(betas|alphas_cumprod|fixed_.*)",),
    ),
    Mutation(
        "cosine betas capped at 0.99",
        m.other_betas("cosine", lambda betas: betas.clip(max=0.99)),
        (r"schedule\.cosine\..*(betas|alphas_cumprod|fixed_.*)",),
    ),
    Mutation(
        "steps at i T / S",
        replaced(ddpm_module, "respace", lambda _: lambda t, s: [i * t // s for i in range(s)]),
        (r"schedule\..*\.(250|50|10)\.", r"posterior\..*\.(5|9|25|49|125|249)\.mean"),
    ),
    Mutation(
        "t one too high",
        replaced(DDPM, "grid", m.later_times),
        (r"schedule\..*timestep_map", r"posterior\..*mean", r"run\."),
    ),
    Mutation(
        "last variance its own",
        replaced(Posterior, "of", m.own_last_variance),
        (r"schedule\..*fixed", r"posterior\.fixed.*\.0\.log_variance"),
    ),
    # samplers
    Mutation(
        "variance of the step before",
        replaced(Ancestral, "log_variance", m.variance_of_the_neighbour),
        (
            r"posterior\..*\.[1-9]\d*\.log_variance",
            r"posterior\.learned\..*log_variance",
            r"run\.ddpm",
        ),
    ),
    Mutation(
        "variance output not mapped to [0, 1]",
        replaced(Ancestral, "log_variance", m.unhalved_fraction),
        (r"posterior\.learned\..*\.(10\.[15]|50\.1|250\.1)\.log_variance", r"run\.ddpm(_cfg)?$"),
    ),
    Mutation(
        "fixed variances exchanged",
        replaced(ours, "Ancestral", m.small_for_large),
        (r"posterior\.fixed_.*\.[159]\.log_variance", r"run\.ddpm_(small|large)"),
    ),
    Mutation(
        "no clamp",
        replaced(Prediction, "clamped", lambda _: lambda self, _: self),
        (r"posterior\..*clamped", r"run\.(ddim_cosine_clamp|ddim_eta|ddpm_small|ddpm_large)"),
    ),
    Mutation(
        "eps not recomputed from the clamped x_0",
        replaced(Prediction, "clamped", m.only_x_0_clamped),
        (r"run\.(ddim_cosine_clamp|ddim_eta)",),
    ),
    Mutation(
        "eta 0.1 too high",
        replaced(ours, "DDIM", lambda _: lambda eta: DDIM(eta=eta + 0.1)),
        (r"run\.ddim",),
    ),
    Mutation(
        "noise of the next step",
        replaced(ours.RecordedNoise, "like", lambda like: lambda self, x, i: like(self, x, i + 1)),
        (r"run\.(ddim_eta|ddpm.*)",),
    ),
    # classifier-free guidance
    Mutation("CFG on all channels", replaced(ours, "CFG_CHANNELS", lambda _: None), (r"cfg\.",)),
    Mutation(
        "CFG scale counted from 0",
        replaced(ours, "CFG", lambda _: lambda w, channels: CFG(w + 1, channels=channels)),
        (r"cfg\.", r"run\..*_cfg"),
    ),
    # self-attention guidance
    Mutation(
        "threshold 1.1",
        replaced(sag_module, "attention_mask", lambda make: lambda s, g, t: make(s, g, 1.1 * t)),
        MASKED,
    ),
    Mutation("one head", m.on_both(SALIENCY, "saliency", m.first_head), MASKED),
    Mutation(
        "attention given, not received",
        m.on_both(SALIENCY, "saliency", lambda _: lambda q, k, **_o: q.new_ones(len(q), 64)),
        MASKED,
    ),
    Mutation(
        "kernel 29", replaced(sag_module, "fitting_kernel", lambda _: lambda k, s: 29), WIDE_BLUR
    ),
    Mutation(
        "blur a third as wide",
        replaced(ours, "SAG", lambda _: m.NarrowBlur),
        BLURRED,
    ),
    Mutation("edge padding", replaced(sag_module, "gaussian_blur", m.edge_padding), BLURRED),
    Mutation(
        "mask enlarged smoothly",
        replaced(F, "interpolate", lambda f: lambda x, s, mode: f(x, s, mode="bilinear")),
        BLURRED,
    ),
    Mutation(
        "SAG scale counted from 1",
        replaced(ours, "SAG", lambda _: lambda s, *a, **k: SAG(s - 1, *a, **k)),
        (r"guided\..*mean",),
    ),
    Mutation("combined in v", replaced(ours, "SAG", lambda _: m.CombinedInV), (GUIDED_MEAN,)),
    Mutation(
        "degraded with the clamped eps",
        replaced(Denoiser, "forward", m.clamped_network),
        (r"guided\.clamped\..*\.x_bar",),
    ),
)


def noticing(mutation: Mutation, keys: set[str]) -> set[str]:
    """The goldens that must fail under a mutation."""
    return {key for key in keys if any(re.match(pattern, key) for pattern in mutation.notices)}


@pytest.fixture(scope="module")
def goldens() -> dict[str, Tensor]:
    return load_file(f.GOLDENS)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
@pytest.mark.filterwarnings("ignore:kernel_size")
def test_goldens_notice(
    mutation: Mutation, goldens: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = noticing(mutation, set(goldens))
    mutation.apply(monkeypatch)
    outputs: dict[str, Tensor] = {}
    for group in {key.split(".")[0] for key in expected}:
        outputs |= ours.compute(group)
    # Three times the tolerance, so that no golden fails by rounding alone.
    failed = disagreements(outputs, goldens, factor=3.0)
    assert expected
    assert expected - failed.keys() == set()


def test_every_golden_is_guarded(goldens: dict[str, Tensor]) -> None:
    guarded = set().union(*(noticing(mutation, set(goldens)) for mutation in MUTATIONS))
    assert set(goldens) - guarded == set()
