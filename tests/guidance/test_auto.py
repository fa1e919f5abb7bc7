"""Autoguidance: another model, or an earlier checkpoint of the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sag_dit import checkpoints
from sag_dit.api import with_models
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, SAG, Autoguidance, GuidedDenoiser
from sag_dit.identity import weights
from sag_dit.models import DiT
from sag_dit.process import DDPM, Flow
from tests.closeness import assert_near
from tests.guidance.every import MODELS, WORSE, batch, guided, small_dit
from tests.guidance.reference import counted, step_at


@pytest.mark.parametrize("model", ["eps", "flow"])
def test_it_extrapolates_from_the_worse_model(model: str) -> None:
    good, worse = MODELS[model], WORSE[model]
    x, y = batch()
    for index in (0, 9):
        step = step_at(good.process, index)
        strong, weak = good(x, step.level, y).v, worse(x, step.level, y).v
        found = guided(good, [Autoguidance(2.5, worse=worse)], step).v
        assert_near(found, weak + 2.5 * (strong - weak))


def test_each_model_has_batches_of_its_own() -> None:
    good, worse = MODELS["eps"], WORSE["eps"]
    with counted(good) as rows, counted(worse) as worse_rows:
        terms = [Autoguidance(2.0, worse=worse), CFG(2.0), SAG(1.0)]
        guided(good, terms, step_at(good.process, 4))
    assert (rows, worse_rows) == ([6, 3], [3])


def saved(path: Path, network: DiT) -> str:
    """A checkpoint in the official layout."""
    torch.save(network.state_dict(), path)
    path.with_suffix(".json").write_text('{"model": {"num_heads": 2}}')
    return str(path)


def test_a_checkpoint_is_read_once_and_known_by_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = ClassConditional(small_dit(learn_sigma=True), DDPM())
    network = small_dit(seed=9, learn_sigma=True, depth=1)
    first, second = (saved(tmp_path / name, network) for name in ("a.pt", "b.pt"))
    reads: list[str] = []
    load = checkpoints.load_denoiser
    monkeypatch.setattr(
        checkpoints, "load_denoiser", lambda path, ema: reads.append(path) or load(path, ema=ema)
    )
    step = step_at(good.process, 4)
    given = Autoguidance(2.0, worse=ClassConditional(network, DDPM()))
    expected = guided(good, [given], step).v
    named = {
        "off": Autoguidance(1.0, ckpt="nowhere.pt"),
        "cfg": CFG(2.0),
        **{path: Autoguidance(2.0, ckpt=path) for path in (first, second)},
    }
    # Two rows of a comparison.
    terms = [with_models(named) for _ in range(2)]
    assert reads == [first, second]
    assert (terms[0]["off"], terms[0]["cfg"]) == (named["off"], named["cfg"])
    for row in terms:
        assert_near(guided(good, [row[first]], step).v, expected)
    identity = terms[0][first].identity(good)
    assert identity == terms[0][second].identity(good)
    # A folder's name neither tells where the weights lie nor which of a file's they are.
    assert (identity["ckpt"], identity["ema"]) == (None, None)
    assert identity["worse"] == weights(ClassConditional(network, DDPM()))


def test_a_term_takes_the_model_itself_and_says_how() -> None:
    told = r"worse=sag_dit.load\('a.pt'\).denoiser"
    with pytest.raises(ValueError, match=told):
        GuidedDenoiser(MODELS["eps"], [Autoguidance(2.0, ckpt="a.pt")])
    with pytest.raises(ValueError, match=r"ema=None: expected true, false or a number"):
        Autoguidance(2.0, ckpt="a.pt", ema=None)


def test_models_that_answer_other_questions_are_refused() -> None:
    good = MODELS["eps"]
    for worse, message in (
        (ClassConditional(small_dit(input_size=16), DDPM()), "latent_shape"),
        (ClassConditional(small_dit(), Flow(), kind="v"), "process"),
        (ClassConditional(small_dit(num_classes=3), DDPM()), "num_classes is 3.*10"),
        (good, "the model itself"),
        (ClassConditional(small_dit(), DDPM()), "the model itself"),
    ):
        with pytest.raises(ValueError, match=message):
            GuidedDenoiser(good, [Autoguidance(2.0, worse=worse)])
    sure = ClassConditional(small_dit(seed=9, class_dropout_prob=0.0), DDPM())
    for branch in ("null", "auto"):
        with pytest.raises(ValueError, match=r"the worse model has no null condition.*'cond'"):
            GuidedDenoiser(good, [Autoguidance(2.0, worse=sure, branch=branch)])
    GuidedDenoiser(good, [Autoguidance(2.0, worse=sure)])
    for options in ({}, {"ckpt": "a.pt", "worse": WORSE["eps"]}):
        with pytest.raises(ValueError, match=r"guidance.auto.ckpt=PATH"):
            Autoguidance(2.0, **options)
    assert Autoguidance(1.0).off
