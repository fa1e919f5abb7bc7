"""Searches: what is chosen, what it is made of, and that an image depends on nobody else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

import sag_dit
from sag_dit.checkpoints import Model, from_denoiser
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import APG, CFG, SAG
from sag_dit.guidance.term import Asking, Question, Term
from sag_dit.models import DiT
from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM, Flow
from sag_dit.sampler import DDIM, Ancestral, EulerMaruyama, HeunFlow, Sampler, StridedDDIM
from sag_dit.sampler.diffusers import DiffusersSampler
from sag_dit.sampling import Request, Settings, draw, draw_batch, drawn
from sag_dit.search import BestOf, ClassVerifier, FKSteering, Judge
from sag_dit.search.fk import normalised, systematic
from tests.closeness import places_are_alike
from tests.pipelines import tiny

NAMES = tuple(f"class {i}" for i in range(10))
GUIDANCE = (APG(1.5, momentum=-0.5), SAG(0.5, every=2))
"""A method that remembers, and one that holds what it did."""


@pytest.fixture
def model(make_dit: Callable[..., DiT]) -> Model:
    network = make_dit(in_channels=3)
    denoiser = ClassConditional(network, DDPM(), x_0_range=(-1, 1), class_names=NAMES)
    return from_denoiser(denoiser, "tiny", defaults={"batch_size": 4})


@pytest.fixture
def flow(make_dit: Callable[..., DiT]) -> Model:
    network = make_dit(in_channels=3, learn_sigma=False)
    denoiser = ClassConditional(network, Flow(), kind="v")
    return from_denoiser(denoiser, "flow", defaults={"batch_size": 4})


def requests(indices: Sequence[int]) -> list[Request]:
    return [Request(i, 0, i % 10, stream=i) for i in indices]


def brightness(images: Tensor, condition: Tensor) -> Tensor:
    """A verifier that also looks at what was asked for."""
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
    return images.mean((1, 2, 3)) * (1 + condition)


def rounding(model: Model, rows: int = 4) -> int:
    """By how many levels a pixel may differ where the place in a batch changes the last bits."""
    x = torch.ones(1, *model.denoiser.latent_shape).cumsum(-1).sin()
    inputs = (x, torch.tensor([500]), torch.tensor([1]))
    network = model.denoiser.network
    alike = all(places_are_alike(network, *inputs, rows=each) for each in (rows, 2 * rows))
    return 0 if alike else 1


def assert_same(images: Tensor, others: Tensor, off: int) -> None:
    assert (images.int() - others.int()).abs().max() <= off


def test_particles_have_noise_of_their_own_and_the_first_is_the_images() -> None:
    alone = NoiseSource([5], [2]).normal(3, (4,))
    first = NoiseSource([5, 5], [2, 2], [((0, 0),), ((0, 1),)]).normal(3, (4,))
    assert torch.equal(first[0], alone[0])
    assert not torch.equal(first[1], alone[0])
    # A lineage is one particle's noise up to a draw, and another's from there on.
    both = NoiseSource([5], [2], [((0, 1), (3, 0))])
    assert torch.equal(both.normal(3, (4,)), alone)
    assert torch.equal(both.normal(2, (4,)), NoiseSource([5], [2], [((0, 1),)]).normal(2, (4,)))


def test_the_best_of_several_is_the_one_that_scores_best(model: Model) -> None:
    settings = Settings(steps=3, guidance=(CFG(1.5),), batch_size=4)
    asked = requests([0, 1, 2])
    each = torch.stack(
        [draw(model, [one.particle(k) for one in asked], settings) for k in range(3)]
    )
    assert torch.equal(each[0], draw(model, asked, settings))
    scores = torch.stack([brightness(own.float() / 255, torch.arange(3)) for own in each])
    batch = draw_batch(model, asked, replace(settings, search=BestOf(3, brightness)))
    best = scores.argmax(dim=0).tolist()
    assert len({*best}) > 1
    for place, number in enumerate(best):
        assert torch.equal(batch.images[place], each[number, place])
        assert batch.found[place].particle == number
        assert batch.found[place].score == pytest.approx(float(scores[number, place]))


SAMPLERS = [DDIM(1.0), StridedDDIM(0.5), Ancestral(), EulerMaruyama()]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda each: each.key)
def test_a_steered_image_is_the_one_that_its_noise_draws(
    model: Model, flow: Model, sampler: Sampler
) -> None:
    """So sampler and guidance went on for each particle as its ancestors had."""
    used = flow if isinstance(sampler, EulerMaruyama) else model
    search = FKSteering(2, brightness, every=1, temperature=0.01, potential="diff")
    settings = Settings(sampler, 8, GUIDANCE, batch_size=4, search=search)
    asked = requests([0, 1, 2])
    batch = draw_batch(used, asked, settings)
    assert max(len(each.lineage) for each in batch.found.values()) > 1
    again = [one._replace(lineage=batch.found[one.index].lineage) for one in asked]
    assert_same(batch.images, draw(used, again, settings), rounding(used))


def test_a_searched_image_is_the_same_in_any_company_and_on_any_rank(model: Model) -> None:
    for search in (BestOf(2, brightness), FKSteering(2, brightness, every=1, temperature=0.1)):
        settings = Settings(Ancestral(), 4, (CFG(1.5),), batch_size=4, search=search)
        whole = draw_batch(model, requests(range(4)), settings)
        ranks = [drawn(model, requests(range(4)), settings, rank=r, world=2) for r in (0, 1)]
        parts = [draw_batch(model, requests([3]), settings), *(b for rank in ranks for b in rank)]
        for part in parts:
            for row, one in enumerate(part.requests):
                assert_same(part.images[row], whole.images[one.index], rounding(model))
                assert part.found[one.index].lineage == whole.found[one.index].lineage
                assert part.found[one.index].score == pytest.approx(whole.found[one.index].score)


def test_twins_and_traces_belong_to_the_chosen_noise(model: Model) -> None:
    settings = Settings(Ancestral(), 4, (SAG(0.5),), batch_size=4, search=BestOf(3, brightness))
    asked = requests([0, 1])
    batch = draw_batch(model, asked, settings, twins=[0, 1], traced=[1])
    again = [one._replace(lineage=batch.found[one.index].lineage) for one in asked]
    plain = draw_batch(model, again, replace(settings, search=None), twins=[0, 1], traced=[1])
    for index in (0, 1):
        assert torch.equal(batch.twins[index], plain.twins[index])
    for ours, theirs in zip(batch.traces[1].steps, plain.traces[1].steps, strict=True):
        assert np.array_equal(ours.saliency, theirs.saliency)


def test_the_cost_that_is_told_is_paid(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, scored = 0, 0
    forward = type(model.denoiser.network).forward

    def counting(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal rows
        rows += len(x)
        return forward(self, x, *args, **kwargs)

    def verifier(images: Tensor, condition: Tensor) -> Tensor:
        nonlocal scored
        scored += len(images)
        return images.mean((1, 2, 3))

    for search in (BestOf(3, verifier), FKSteering(2, verifier, every=2)):
        settings = Settings(Ancestral(), 5, (CFG(1.5),), batch_size=4, search=search)
        cost = settings.cost(model.denoiser)
        rows = scored = 0
        with monkeypatch.context() as patch:
            patch.setattr(type(model.denoiser.network), "forward", counting)
            draw_batch(model, requests(range(4)), settings)
        assert rows == 4 * cost.passes
        assert scored == 4 * cost.scored
        assert f"{cost.scored} images scored to choose each" in str(cost)
        assert cost.relative == 2 * cost.particles


# The authors' FKD.resample (zacharyhorvitz/Fk-Diffusion-Steering, 9413005,
# text_to_image/fkd_diffusers/fkd_class.py) was run in float64 with lmbda=2.5, resample_frequency=2
# and torch.multinomial handing out these ancestors; reward_min_value was -1e9 for max. These are
# its weights, normalised, at the three times.
SCORES = [
    [0.126, -0.132, 0.64, 0.105],
    [-0.536, 0.362, 1.304, 0.947],
    [-0.704, -1.265, -0.623, 0.041],
]
FIRST = [0.1642525694444358, 0.08617717063225737, 0.5937184996614359, 0.15585176026187098]
AUTHORS: dict[Any, tuple[list[list[float]], list[list[int]]]] = {
    "max": (
        [
            FIRST,
            [0.03183428294968084, 0.11507036251920506, 0.6051908054716912, 0.24790454905942272],
            [0.2932869208610369, 0.2932869208610369, 0.2932869208610369, 0.12013923741688924],
        ],
        [[0, 2, 2, 2], [2, 2, 2, 3], [0, 0, 1, 2]],
    ),
    "sum": (
        [
            FIRST,
            [0.001844913066418469, 0.062955753730501, 0.6634358453971849, 0.2717634878058957],
            [0.19575655439810422, 0.04815244028368196, 0.23969608726147537, 0.5163949180567384],
        ],
        [[0, 2, 2, 2], [2, 2, 2, 3], [0, 2, 3, 3]],
    ),
    "diff": (
        [
            FIRST,
            [0.023580401139851572, 0.06158485049885281, 0.648989090485162, 0.2658456578761337],
            [0.054970781786112796, 0.013521781150275204, 0.06730952814504185, 0.8641979089185702],
        ],
        [[0, 2, 2, 2], [2, 2, 2, 3], [0, 3, 3, 3]],
    ),
}


@dataclass
class Given:
    """Stands for a judge: at each time it gives the next line of scores."""

    model: Any
    lines: list[list[float]]

    def __call__(self, images: Tensor, rows: Sequence[Request]) -> np.ndarray[Any, Any]:
        return np.array(self.lines.pop(0))


@pytest.mark.parametrize("potential", AUTHORS)
def test_weights_and_resampling_are_the_authors(
    model: Model, potential: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sag_dit.search import fk

    weights: list[list[float]] = []

    def noting(log_weights: Any) -> Any:
        weights.append(normalised(log_weights).tolist())
        return normalised(log_weights)

    monkeypatch.setattr(fk, "normalised", noting)
    search = FKSteering(4, every=2, temperature=1 / 2.5, potential=potential)
    rows = [Request(0, seed=7, label=0, stream=5).particle(k) for k in range(4)]
    given: Any = Given(model, [*SCORES])
    steering = fk.Steering(search, given, rows)
    found: list[list[int]] = []

    def exchange(step: Any) -> Tensor | None:
        places = steering.exchange(step)
        if places is not None:
            found.append(places.tolist())
        return places

    settings = Settings(Ancestral(), 8, batch_size=4)
    draw(model, rows, settings, exchange=exchange)
    expected, ancestors = AUTHORS[potential]
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert found == ancestors


def test_weights_are_kept_until_few_particles_carry_them(model: Model) -> None:
    """In equations: without resampling the weights of several times multiply."""
    from sag_dit.search.fk import Steering

    search = FKSteering(4, every=2, temperature=1.0, potential="diff", resample_below=0.0)
    given: Any = Given(model, [*SCORES])
    rows = [Request(0, seed=7, label=0, stream=5).particle(k) for k in range(4)]
    steering = Steering(search, given, rows)
    draw(model, rows, Settings(Ancestral(), 8, batch_size=4), exchange=steering.exchange)
    # The gains add up to the last score.
    np.testing.assert_allclose(normalised(steering.log_weights[0]), normalised(np.array(SCORES[2])))
    assert steering.lineages == [row.lineage for row in rows]


def test_systematic_resampling_is_fair_and_leaves_equal_weights_alone() -> None:
    weights = np.array([0.1, 0.45, 0.05, 0.4])
    for count in (*range(4),):
        numbers = np.linspace(0, 1, 401)[:-1] + 1 / 802
        mean = np.mean([(systematic(weights, u) == count).sum() for u in numbers])
        assert mean == pytest.approx(4 * weights[count], abs=0.01)
    assert systematic(np.full(4, 0.25), 0.3).tolist() == [0, 1, 2, 3]


class Brightness(Metric):
    """A metric of torchmetrics, one number for all images that it was given; lower is better."""

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0))

    def update(self, images: Tensor) -> None:
        self.total += images.mean()

    def compute(self) -> Tensor:
        return self.total  # type: ignore[return-value]


class WithLabels(Brightness):
    higher_is_better = True

    def update(self, images: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        self.total += images.mean() + labels.sum()


def test_a_metric_is_asked_about_one_image_at_a_time(model: Model) -> None:
    images = torch.arange(3, dtype=torch.uint8).mul(100)[:, None, None, None].expand(3, 3, 8, 8)
    asked = requests([0, 1, 2])
    expected = np.arange(3) * 100 / 255
    np.testing.assert_allclose(Judge(Brightness(), model, 4)(images, asked), -expected, rtol=1e-6)
    scores = Judge(WithLabels(), model, 4)(images, asked)
    np.testing.assert_allclose(scores, expected + np.arange(3), rtol=1e-6)


def test_the_bundled_classifier_tells_the_log_of_the_probability_of_the_class() -> None:
    digits = sag_dit.load("digits")
    out = digits.sample([3, 7], steps=5, search=BestOf(2))
    classifier = sag_dit.search.verifier.class_verifier(digits)
    assert isinstance(classifier, ClassVerifier)
    logits = classifier.classifier(out.tensor).logits.double()
    expected = logits.log_softmax(1)[[0, 1], [3, 7]]
    np.testing.assert_allclose([each.score for each in out.found], expected.numpy(), rtol=1e-4)
    assert out.settings["search"]["verifier"]["module"] == "classifier"
    assert "search=BestOf(num=2)" in out.about.python
    assert "search=best_of search.num=2" in out.about.command


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_a_verifier_of_a_text_model_is_told_the_prompts(tmp_path: Path) -> None:
    tiny.sd3(medium=False).save_pretrained(tmp_path)
    text = sag_dit.load_text(tmp_path, ["a fox", "a corgi"], size=(16, 16))
    told = set[tuple[str, int]]()

    def length(images: Tensor, prompts: list[str]) -> list[float]:
        told.update((prompt, len(prompts)) for prompt in prompts)
        assert images.shape == (len(prompts), 3, 16, 16)
        return [float(len(prompt)) for prompt in prompts]

    search = FKSteering(2, length, every=1)
    out = text.sample([1, 0], steps=3, sampler=EulerMaruyama(), search=search, batch_size=2)
    assert [each.score for each in out.found] == [7.0, 5.0]
    assert told == {("a fox", 2), ("a corgi", 2)}


def of_one_score(images: Tensor, condition: Tensor) -> Tensor:
    return images.mean()


def nan(images: Tensor, condition: Tensor) -> Tensor:
    return images.mean((1, 2, 3)) * float("nan")


def broken(images: Tensor, condition: Tensor) -> Tensor:
    raise KeyError("no such\nclass")


@dataclass(frozen=True)
class Forgetful(Term):
    """A method that remembers something without a row for each image."""

    scale: float = 1.0
    rows: int = field(default=3)

    def contribution(self, ask: Question) -> Asking:
        (base,) = yield (ask.base,)
        ask.memory["odd"] = torch.zeros(self.rows, 2)
        return 0 * base.v


@pytest.mark.parametrize(
    ("search", "sampler", "told"),
    [
        (BestOf(2, of_one_score), DDIM(), r"of_one_score returned \(\) for 2 images: expected one"),
        (BestOf(2, nan), DDIM(), "nan returned nan for image 0: expected finite scores"),
        (BestOf(2, broken), DDIM(), r"broken failed on two grey images \(KeyError: .*no such"),
        (BestOf(2, "classifer"), DDIM(), "search.verifier='classifer': expected classifier, or a"),
        (BestOf(2), DDIM(), "classifiers know the classes of digits, patches, emoji, not those of"),
        (FKSteering(2, brightness), DDIM(), "with sampler=ddim as it is set, copies of a particle"),
        (FKSteering(2, brightness), HeunFlow(), "sampler=heun_flow as it is set, copies"),
        (
            FKSteering(2, brightness),
            DiffusersSampler("euler_ancestral"),
            "sampler=euler_ancestral as it is set",
        ),
        (
            FKSteering(5, brightness),
            Ancestral(),
            "search.particles=5: .* batch_size=4; set batch_s",
        ),
        (FKSteering(2, brightness, every=20), Ancestral(), "search.every=20: no particle would be"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_drawn(
    model: Model, flow: Model, search: Any, sampler: Sampler, told: str
) -> None:
    used = flow if isinstance(sampler, HeunFlow) else model
    settings = Settings(sampler, 20, batch_size=4, search=search)
    with pytest.raises(ValueError, match=told) as error:
        settings.check(used)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: BestOf(1), r"search.num=1: expected 2 or more"),
        (lambda: FKSteering(1), r"search.particles=1: expected 2 or more"),
        (lambda: FKSteering(every=0), r"search.every=0: expected 1 or more"),
        (lambda: FKSteering(temperature=0.0), r"search.temperature=0.0: expected more than 0"),
        (lambda: FKSteering(potential="mean"), r"search.potential='mean': expected max, diff, sum"),
        (lambda: FKSteering(resample_below=2.0), r"search.resample_below=2.0: expected 0 to 1"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


def test_what_is_no_search_and_a_memory_without_rows_are_refused(model: Model) -> None:
    not_one: Any = 8
    with pytest.raises(ValueError, match=r"search=8: expected a search, such as BestOf\(8\)"):
        sag_dit.sample(model, [3], steps=2, search=not_one)
    search = FKSteering(2, brightness, every=1, temperature=0.01)
    settings = Settings(Ancestral(), 6, (Forgetful(),), batch_size=4, search=search)
    with pytest.raises(ValueError, match=r"Forgetful remembers a tensor .* leave Forgetful out"):
        draw_batch(model, requests([0, 1]), settings)


def test_a_search_is_told_by_its_options_and_its_verifier(model: Model) -> None:
    class Net(nn.Module):
        def forward(self, images: Tensor, condition: Tensor) -> Tensor:
            return images.mean((1, 2, 3))

    told = [
        search.identity(model)
        for search in (
            BestOf(2, brightness),
            BestOf(3, brightness),
            BestOf(2, nan),
            BestOf(2, Net()),
            FKSteering(2, brightness),
            FKSteering(2, brightness, temperature=0.5),
        )
    ]
    assert len({repr(each) for each in told}) == len(told)
    assert told[0] == {
        "name": "best_of",
        "num": 2,
        "verifier": f"{__name__}.brightness",
    }
