"""Fine-tuning: each change to a loaded model, and what cannot be changed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from sag_dit.checkpoints import Model, from_denoiser
from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from sag_dit.models.dit.adapter import POSITIONS, TABLE, relabelled
from sag_dit.models.dit.network import sincos_positions
from sag_dit.process import DDPM, Flow, Process
from sag_dit.training.finetune import (
    adapt,
    adaptation_report,
    default_objective,
    freeze,
    resolution_of,
)
from sag_dit.training.objective import MSE, FlowMatching, Hybrid, Objective

NAMES = ("cat", "dog", "emu")


def make_base(
    names: Sequence[str] = NAMES,
    process: Process | None = None,
    kind: str = "eps",
    **options: object,
) -> Model:
    """A model of 8x8 pixels in 2x2 patches, with random weights."""
    torch.manual_seed(0)
    settings = {
        "input_size": 8,
        "in_channels": 3,
        "hidden_size": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": len(names),
        **options,
    }
    network = DiT(**settings)  # type: ignore[arg-type]
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.1
    denoiser = ClassConditional(network, process or DDPM(), kind, (-1.0, 1.0), names)  # type: ignore[arg-type]
    return from_denoiser(denoiser.eval(), "base", sha256="0123456789", defaults={"batch_size": 4})


def test_labels_of_known_new_and_no_class() -> None:
    table = torch.arange(8.0).reshape(4, 2)  # three classes and the null row
    rows, kept = relabelled(table, NAMES, ("corgi", "emu", "cat"))
    assert kept == ("emu", "cat")
    assert torch.equal(rows, table[[3, 2, 0, 3]])
    # Without a null row: none is made, and a new class starts in the middle.
    rows, kept = relabelled(table[:3], NAMES, ("corgi", "emu"))
    assert torch.equal(rows, torch.stack([table[:3].mean(0), table[2]]))


def test_a_name_of_two_classes_is_no_class() -> None:
    rows, kept = relabelled(torch.eye(3), ("crane", "crane"), ("crane",))
    assert kept == ()
    assert torch.equal(rows, torch.eye(3)[[2, 2]])


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_classes_change_and_nothing_else(dropout: float) -> None:
    base = make_base(class_dropout_prob=dropout)
    before = {name: value.clone() for name, value in base.denoiser.network.state_dict().items()}
    adapted = adapt(base, "tuned", ("corgi", "dog"), 8)
    after = adapted.model.denoiser.network.state_dict()
    assert {n for n in after if not torch.equal(after[n], before[n])} == {TABLE}
    assert len(after[TABLE]) == (3 if dropout else 2)
    assert torch.equal(after[TABLE][1], before[TABLE][1])
    assert (adapted.kept, adapted.new, set(adapted.remade)) == (("dog",), ("corgi",), {TABLE})
    model = adapted.model
    assert (model.name, model.class_names, model.batch_size) == ("tuned", ("corgi", "dog"), 4)
    assert (model.denoiser.null(1) is None) == (dropout == 0)
    # A known class is drawn as before, at its new place.
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([500, 3])
    with torch.no_grad():
        was = base.denoiser.network(x, t, torch.tensor([1, 1]))
        now = model.denoiser.network(x, t, torch.tensor([1, 1]))
    torch.testing.assert_close(now, was, rtol=0, atol=0)


def test_the_same_classes_and_resolution_change_nothing() -> None:
    base = make_base()
    adapted = adapt(base, "tuned", NAMES, resolution_of(base))
    after = adapted.model.denoiser.network.state_dict()
    before = base.denoiser.network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (dict(adapted.remade), adapted.kept, adapted.new) == ({}, NAMES, ())


def test_another_resolution() -> None:
    adapted = adapt(make_base(), "tuned", NAMES, 12)
    network = adapted.model.denoiser.network
    assert set(adapted.remade) == {POSITIONS}
    assert adapted.model.denoiser.latent_shape == (3, 12, 12)
    assert torch.equal(network.pos_embed[0], sincos_positions(24, (6, 6)))
    assert not network.pos_embed.requires_grad
    with torch.no_grad():
        out = network(torch.randn(1, 3, 12, 12), torch.tensor([9]), torch.tensor([0]))
    assert out.shape == (1, 6, 12, 12)


def test_resolutions_that_do_not_fit() -> None:
    base = make_base()
    for resolution in (9, 0, -2):
        with pytest.raises(ValueError, match=f"resolution={resolution}: expected a multiple of 2"):
            adapt(base, "tuned", NAMES, resolution)
    base.denoiser.network.pos_embed.data += 1
    with pytest.raises(ValueError, match="not the published table"):
        adapt(base, "tuned", NAMES, 12)
    adapt(base, "tuned", NAMES, 8)
    with pytest.raises(ValueError, match="no classes"):
        adapt(base, "tuned", (), 8)
    with pytest.raises(ValueError, match="8 x 4 pixels: expected a square"):
        resolution_of(make_base(input_size=(8, 4)))


def test_freezing() -> None:
    network = make_base().denoiser.network
    frozen = freeze(network, ["t_embedder", "blocks.0.*", "blocks.*.attn.proj.bias"])
    assert frozen == tuple(name for name, p in network.named_parameters() if name in frozen)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in network.named_parameters()} - {*frozen, POSITIONS}
    assert "blocks.1.attn.proj.bias" in frozen and "blocks.1.attn.proj.weight" in trained
    assert any(name.startswith("y_embedder") for name in trained)


def test_a_module_is_not_the_beginning_of_a_name() -> None:
    network = make_base(depth=11).denoiser.network
    assert all(name.startswith("blocks.1.") for name in freeze(network, ["blocks.1"]))


def test_patterns_that_cannot_be() -> None:
    network = make_base().denoiser.network
    with pytest.raises(ValueError, match=r"'block\.0' matches no parameter.*t_embedder.*blocks\.0"):
        freeze(network, ["t_embedder", "block.0"])
    assert all(p.requires_grad for n, p in network.named_parameters() if n != POSITIONS)
    with pytest.raises(ValueError, match="nothing is left to train"):
        freeze(network, ["*"])


@pytest.mark.parametrize(
    ("process", "kind", "learn_sigma", "expected"),
    [
        (DDPM(), "eps", True, Hybrid),
        (DDPM(), "eps", False, MSE),
        (DDPM(), "v", False, MSE),
        (Flow(), "v", False, FlowMatching),
        (Flow(), "v", True, FlowMatching),
        (Flow(), "x_0", False, MSE),
    ],
)
def test_the_objective_follows_the_checkpoint(
    process: Process, kind: str, learn_sigma: bool, expected: type[Objective]
) -> None:
    base = make_base(process=process, kind=kind, learn_sigma=learn_sigma)
    denoiser = adapt(base, "tuned", ("corgi",), 8).model.denoiser
    assert (denoiser.process, denoiser.kind) == (process, kind)
    objective = default_objective(denoiser)
    assert type(objective) is expected
    objective.check(denoiser)


def test_the_report_counts() -> None:
    base = make_base()
    adapted = adapt(base, "tuned", ("corgi", "dog"), 12)
    network = adapted.model.denoiser.network
    freeze(network, ["x_embedder"])
    text = adaptation_report(base, adapted)
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    loaded = sum(sizes.values()) - 3 * 24 - 36 * 24
    frozen = 24 * 3 * 4 + 24
    assert "fine-tuning base (ema weights, sha256 01234567)" in text
    assert f"loaded   {loaded:,} parameters in {len(sizes) - 2} tensors" in text
    assert "label table of 3 classes: now 2, the null row is kept" in text
    assert "positions of 4 x 4 tokens: now 6 x 6" in text
    assert "1 known (dog), 1 new (corgi)" in text
    assert f"frozen   {frozen:,} parameters in 2 tensors (x_embedder.proj.weight, " in text
    assert f"trained  {sum(sizes.values()) - 36 * 24 - frozen:,} of" in text
