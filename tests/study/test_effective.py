"""Effective scales: what guidance does to predictions, and which CFG does as much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from sag_dit.checkpoints import Model
from sag_dit.data.requests import make_requests
from sag_dit.guidance import CFG, SAG, Asking, Question, Term
from sag_dit.sampling import Request, Settings, draw
from sag_dit.study import compare
from sag_dit.study.effective import CFGScale, effect, like, matches
from tests.study.models import small_model


@dataclass(frozen=True)
class Sideways(Term):
    """Moves v at right angles to CFG's direction, ``scale`` times as far."""

    def contribution(self, ask: Question) -> Asking:
        cond, null = yield ask.base, ask.required_null()
        d = (cond.v - null.v).flatten(1)
        other = d.roll(1, dims=1)
        other = other - (other * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True) * d
        other = other * (d.norm(dim=1) / other.norm(dim=1))[:, None]
        return self.scale * other.reshape(cond.v.shape)


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model()


@pytest.fixture(scope="module")
def requests(model: Model) -> Sequence[Request]:
    return make_requests(5, 3, None, model.class_names)


def settings(model: Model, *terms: Term) -> Settings:
    return Settings.of(model, steps=3, guidance=terms, batch_size=4)


@pytest.mark.parametrize("scale", [0.5, 1.7, 4.0])
def test_the_effective_scale_of_cfg_is_its_scale(
    model: Model, requests: Sequence[Request], scale: float
) -> None:
    found = effect(model, settings(model, CFG(scale)), requests)
    assert found.along == pytest.approx(scale, rel=1e-4)
    assert found.share == pytest.approx(math.copysign(1, scale - 1), abs=1e-4)
    assert found.size > 0


def test_without_guidance_nothing_changes(model: Model, requests: Sequence[Request]) -> None:
    found = effect(model, settings(model), requests)
    assert (found.along, found.size, found.share) == (1, 0, 0)


def test_a_change_at_right_angles_is_as_large_but_not_along(
    model: Model, requests: Sequence[Request]
) -> None:
    found = effect(model, settings(model, Sideways(0.7)), requests)
    assert found.along == pytest.approx(1, abs=1e-4)
    assert found.share == pytest.approx(0, abs=1e-4)
    both = effect(model, settings(model, Sideways(0.7), CFG(1.7)), requests)
    assert both.along == pytest.approx(1.7, rel=1e-3)
    assert both.share == pytest.approx(0.5**0.5, rel=1e-3)


def test_cfg_is_found_by_the_size_of_its_change(model: Model, requests: Sequence[Request]) -> None:
    scales = CFGScale(model, settings(model), requests)
    wanted = effect(model, settings(model, CFG(3.3)), requests).size
    assert scales.of_size(wanted) == pytest.approx(3.3, rel=0.02)
    tried = len(scales.known)
    assert scales.of_size(wanted) == pytest.approx(3.3, rel=0.02)
    assert len(scales.known) == tried
    assert scales.of_size(0.0) == 1
    assert scales.of_size(1e9) == 50


def test_each_setting_is_matched_in_effect_steps_and_passes(
    model: Model, requests: Sequence[Request]
) -> None:
    guided = settings(model, Sideways(0.7), CFG(1.7), Sideways(0.0))
    plain, alone = settings(model), settings(model, CFG(3.0))
    found = matches(model, {"plain": plain, "CFG 3": alone, "mine": guided}, requests)
    assert [name.partition(", ")[2] for name in found] == ["w of mine", "size of mine"]
    along, sized = found.values()
    assert along == settings(model, CFG(1.7))
    # Two equal parts at right angles are longer than one by the root of two; CFG alone draws other
    # images, on which it does a little less or more.
    (cfg,) = sized.guidance
    assert cfg.scale == pytest.approx(1 + 0.7 * 2**0.5, abs=0.15)
    # A method that costs another number of passes is matched in that too.
    costly = settings(model, SAG(0.5, branch="cond"), CFG(1.7))
    found = matches(model, {"SAG": costly}, requests)
    (passes,) = [how for name, how in found.items() if "passes" in name]
    assert costly.cost(model.denoiser).passes == 9
    assert passes.cost(model.denoiser).passes in (8, 10)


@pytest.mark.parametrize(
    ("scale", "passes", "wanted"),
    [(1.01, None, ((), 20)), (1.01, 60.0, ((), 60)), (-3.0, None, ((CFG(0.0),), 20)),
     (1e9, 60.0, ((CFG(50.0),), 30)), (1.33, 1.0, ((CFG(1.35),), 1))],
)  # fmt: skip
def test_cfg_is_like_another_method(
    scale: float, passes: float | None, wanted: tuple[tuple[Term, ...], int]
) -> None:
    found = like(Settings(steps=20, guidance=(CFG(7.0),)), scale, passes)
    assert (found.guidance, found.steps) == wanted


def test_a_comparison_has_the_matches_below(model: Model) -> None:
    found = compare(
        model, {"plain": [], "SAG": [SAG(0.5)]}, num_images=10, steps=2, batch_size=10, matched=3,
        metrics=["fid"], repeats=0, progress=False,
    )  # fmt: skip
    names = [result.name for result in found]
    assert names[:2] == ["plain", "SAG"]
    assert any(name.endswith("w of SAG") for name in names)
    assert any(name.endswith("size of SAG") for name in names)
    with pytest.raises(ValueError, match="matched=-1"):
        compare(model, {"plain": []}, matched=-1)


def test_watching_changes_no_pixel(model: Model, requests: Sequence[Request]) -> None:
    how = replace(settings(model, CFG(2.0)), batch_size=5)
    before = draw(model, requests, how)
    effect(model, how, requests)
    assert torch.equal(draw(model, requests, how), before)
