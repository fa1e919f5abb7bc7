"""What blocks put out is used again at later steps, of each branch its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sag_dit.attention import InputEdit
from sag_dit.checkpoints import Model, from_denoiser
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import (
    CFG,
    PAG,
    SAG,
    SEG,
    SLG,
    TPG,
    Autoguidance,
    Cache,
    GuidedDenoiser,
    Question,
    Term,
    cost_of,
)
from sag_dit.guidance.pag import IdentityAttention
from sag_dit.guidance.slg import Skip
from sag_dit.guidance.term import Asking
from sag_dit.identity import settings as identity_of
from sag_dit.models import DiT
from sag_dit.models.dit.network import modulate
from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM, Flow, Prediction, Step
from sag_dit.profiling import profiling
from sag_dit.sampler import DDIM, HeunFlow, Sampler
from sag_dit.sampling import Pixels, Request, Settings, draw_batch
from sag_dit.traces import Maps
from sag_dit.training.fitting import network_fits
from sag_dit.training.timing import told as timing
from tests.closeness import assert_near
from tests.guidance.every import small_dit
from tests.guidance.test_unet_methods import small_unet

WITHIN = 1e-9
"""Of float64, in which rounding hides nothing."""
IMAGES = 2
LABELS = torch.tensor([1, 2])
"""One object, as in a run: what is asked of it at each step is the same question."""


@pytest.fixture(scope="module")
def model() -> ClassConditional:
    return ClassConditional(small_dit(depth=3, learn_sigma=True).double(), DDPM())


@pytest.fixture(scope="module")
def drawing() -> Model:
    """One that draws images of three channels."""
    network = small_dit(in_channels=3, learn_sigma=False)
    return from_denoiser(ClassConditional(network, DDPM(), x_0_range=(-1.0, 1.0)), "tiny")


def step_of(model: ClassConditional, index: int, count: int, evaluations: int = 1) -> Step:
    grid = model.process.grid(count)
    return Step(index, count, grid[index], grid[index + 1], evaluations)


def x_at(index: int) -> Tensor:
    """What is denoised at an evaluation, which moves along with it."""
    place = torch.arange(IMAGES * 4 * 64, dtype=torch.float64).reshape(IMAGES, 4, 8, 8)
    return torch.sin(place * 1.7 + 0.3 * index)


def along(
    model: ClassConditional,
    terms: Sequence[Term] = (),
    cache: Cache | None = None,
    *,
    labels: Tensor = LABELS,
    scale: float = 1.0,
    at: Sequence[int] = range(9),
    **options: Any,
) -> list[Prediction]:
    """The predictions of a run whose images at evaluations ``at`` are given, not drawn."""
    guided = GuidedDenoiser(model, terms, cache=cache, **options)
    steps = [step_of(model, number, len(at)) for number in range(len(at))]
    return [guided(scale * x_at(i), s, labels) for i, s in zip(at, steps, strict=True)]


@contextmanager
def computed(*models: ClassConditional) -> Iterator[list[int]]:
    """The rows of each pass in which attention of a first block has run."""
    rows: list[int] = []
    handles = [
        each.network.blocks[0].attn.register_forward_pre_hook(
            lambda _, args: rows.append(len(args[0]))
        )
        for each in models
    ]
    yield rows
    for handle in handles:
        handle.remove()


# What the papers say.

ORIGINAL = {
    Cache(2, order=1): [
        [2.319965, -1.483694, -1.4315973, 0.3941372],
        [1.5921268, -1.7580489, -0.5135719, 0.4731324],
        [1.2938616, -1.7284656, 0.2857193, 0.1987104],
        [-0.6501507, 1.3934751, 0.5723662, -0.4982168],
        [-1.2504066, 1.709486, 1.0110376, -1.3114215],
        [-0.757203, 0.8219139, 1.5658867, -2.166483],
        [0.0778367, 0.2155754, 0.5823282, -2.3637148],
        [-1.9556616, 1.0961579, -1.0893595, -0.6290688],
        [-1.682174, 1.9255708, -0.9058333, -0.1611059],
    ],
    Cache(3, order=2): [
        [2.319965, -1.483694, -1.4315973, 0.3941372],
        [1.5921268, -1.7580489, -0.5135719, 0.4731324],
        [1.2938616, -1.7284656, 0.2857193, 0.1987104],
        [1.1180591, -0.8100505, 0.5382969, -0.3140131],
        [-0.9701874, 1.2781036, 1.5740998, -2.0201189],
        [-1.069629, 1.5935711, 1.4991336, -2.2464727],
        [0.0524206, 1.702166, 0.3991781, -2.3060306],
        [-1.9556616, 1.0961579, -1.0893595, -0.6290688],
        [-1.7697157, 1.9867668, -1.1669794, 0.0765183],
    ],
}
"""Every fifth value of what TaylorSeer-DiT's own DiT puts out at each of nine steps: models.py with
taylor_utils and cache_functions of github.com/Shenyi-Z/TaylorSeer, commit 288776d, in float64."""


@pytest.mark.parametrize("cache", ORIGINAL)
def test_taylorseer_agrees_with_its_authors_code(cache: Cache) -> None:
    sizes = {"input_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}
    network = DiT(**sizes, num_classes=3, learn_sigma=False).double().eval()  # type: ignore[arg-type]
    for number, (name, weight) in enumerate(sorted(network.named_parameters())):
        if name != "pos_embed":
            angle = torch.arange(weight.numel(), dtype=torch.float64) * (1 + number) * 0.7 + number
            spread = 0.1 if weight.ndim == 1 else 1.5 / weight[0].numel() ** 0.5
            weight.data = (torch.sin(angle) * spread).reshape(weight.shape)
    model = ClassConditional(network.requires_grad_(False), DDPM())
    guided = GuidedDenoiser(model, cache=cache)
    label = torch.tensor([1])
    for i, expected in enumerate(ORIGINAL[cache]):
        x = torch.sin(torch.arange(16, dtype=torch.float64) * 0.9 + 0.3 * i).reshape(1, 1, 4, 4)
        levels = [model.process.level(900 - 100 * each) for each in (i, i + 1)]
        eps = guided(x, Step(i, 9, *levels), label).eps
        # The embedding of the time is float32 in both: at t = 900 its phase rounds by 3e-5, and how
        # depends on the processor.
        assert_near(eps.flatten()[::5], torch.tensor(expected, dtype=torch.float64), 1e-5)


@pytest.mark.parametrize(
    ("cache", "full"),
    [
        (Cache(2), [0, 2, 4, 6, 8]),
        (Cache(3), [0, 3, 6]),
        (Cache(2, order=1), [0, 1, 3, 5, 7]),
        (Cache(3, order=1), [0, 1, 4, 7]),
        (Cache(3, order=3), [0, 1, 4, 7]),
    ],
)
def test_outputs_are_continued_as_a_taylor_series(
    model: ClassConditional, cache: Cache, full: list[int]
) -> None:
    """Written out: modulations of the step at hand, outputs of the last computed one and before."""
    network: Any = model.network
    found = along(model, cache=cache)
    known: list[tuple[int, list[list[Tensor]]]] = []
    for i in range(9):
        level = step_of(model, i, 9).level
        x = network.x_embedder(x_at(i)) + network.pos_embed
        c = network.t_embedder(level.times(x_at(i))) + network.y_embedder(LABELS)
        outputs: list[list[Tensor]] = []
        for number, block in enumerate(network.blocks):
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c).chunk(
                6, dim=1
            )
            if i in full:
                attended = block.attn(modulate(block.norm1(x), shift_a, scale_a))
            else:
                attended = series(known, number, 0, i, cache.order)
            x = x + gate_a[:, None] * attended
            if i in full:
                mixed = block.mlp(modulate(block.norm2(x), shift_m, scale_m))
            else:
                mixed = series(known, number, 1, i, cache.order)
            x = x + gate_m[:, None] * mixed
            outputs.append([attended, mixed])
        if i in full:
            known.append((i, outputs))
        eps = network.unpatchify(network.final_layer(x, c))[:, :4]
        assert_near(found[i].eps, eps, WITHIN)


def series(
    known: list[tuple[int, list[list[Tensor]]]], block: int, part: int, at: int, order: int
) -> Tensor:
    """sum_k d_k j^k / k!, each d_k a quotient of differences of d_(k-1)."""

    def derivative(k: int, upto: int) -> Tensor:
        number, outputs = known[upto]
        if k == 0:
            return outputs[block][part]
        earlier = known[upto - 1][0]
        return (derivative(k - 1, upto) - derivative(k - 1, upto - 1)) / (number - earlier)

    last = len(known) - 1
    j = at - known[last][0]
    terms = [derivative(k, last) * j**k / math.factorial(k) for k in range(min(order, last) + 1)]
    return torch.stack(terms).sum(0)


# Each branch keeps its own.


@dataclass(frozen=True)
class Instead(Term):
    """Replaces the prediction by that of other edits, or of an image of its own."""

    edits: tuple[Any, ...] = ()
    times: float = 1.0

    def contribution(self, ask: Question) -> Asking:
        other = ask.base.edited(*self.edits)
        if self.times != 1:
            other = other.at(self.times * other.x_t)
        good, found = yield ask.base, other
        return self.scale * (found.v - good.v)


SKIP, BLIND = Skip("blocks.1"), IdentityAttention("blocks.1.attn")
CACHES = (Cache(2), Cache(3, order=1))


@pytest.mark.parametrize("cache", CACHES)
def test_a_branch_never_reads_what_another_left(model: ClassConditional, cache: Cache) -> None:
    """Together they are what each is in a run of its own."""
    null = model.null(IMAGES)
    assert null is not None
    given = [each.v for each in along(model, cache=cache)]
    unconditional = [each.v for each in along(model, cache=cache, labels=null)]
    skipped = [each.v for each in along(model, [Instead(1.0, (SKIP,))], cache)]
    blind = [each.v for each in along(model, [Instead(1.0, (BLIND,))], cache)]
    larger = [each.v for each in along(model, cache=cache, scale=1.2)]
    smaller = [each.v for each in along(model, cache=cache, scale=0.8)]
    terms = [
        CFG(2.0),
        SLG(0.4, layers=1),
        PAG(0.7, layers=1),
        Instead(0.5, times=1.2),
        Instead(0.3, times=0.8),
    ]
    for max_rows in (None, 2 * IMAGES):
        together = along(model, terms, cache, max_rows=max_rows)
        for i, found in enumerate(together):
            expected = (
                given[i]
                + 1.0 * (given[i] - unconditional[i])
                + 0.4 * (given[i] - skipped[i])
                + 0.7 * (given[i] - blind[i])
                + 0.5 * (larger[i] - given[i])
                + 0.3 * (smaller[i] - given[i])
            )
            assert_near(found.v, expected, WITHIN)


def test_what_is_kept_of_edits_is_not_what_the_plain_network_says(
    model: ClassConditional,
) -> None:
    for edit in (SKIP, BLIND):
        plain, edited = (
            along(model, cache=Cache(2)),
            along(model, [Instead(1.0, (edit,))], Cache(2)),
        )
        for one, other in zip(plain, edited, strict=True):
            assert (one.v - other.v).abs().max() > 1e-3


def test_another_model_keeps_its_own(model: ClassConditional) -> None:
    worse = ClassConditional(small_dit(seed=9, depth=1, learn_sigma=True).double(), DDPM())
    cache = Cache(3, order=1)
    strong, weak = along(model, cache=cache), along(worse, cache=cache)
    with computed(model, worse) as rows:
        found = along(model, [Autoguidance(2.0, worse=worse)], cache)
    assert rows == [IMAGES] * 8
    for good, bad, each in zip(strong, weak, found, strict=True):
        assert_near(each.v, good.v + (good.v - bad.v), WITHIN)


def test_the_evaluations_of_a_step_keep_apart() -> None:
    model = ClassConditional(small_dit().double(), Flow(), kind="v")
    cache = Cache(2, order=1)
    guided = GuidedDenoiser(model, [CFG(2.0)], cache=cache)
    pairs = [step_of(model, i, 12, evaluations=2) for i in range(12)]
    together = [guided(x_at(i), each, LABELS).v for i, each in enumerate(pairs)]
    for first in (0, 1):
        alone = GuidedDenoiser(model, [CFG(2.0)], cache=cache)
        for number, i in enumerate(range(first, 12, 2)):
            step = replace(pairs[i], index=number, evaluations=1)
            assert_near(together[i], alone(x_at(i), step, LABELS).v, WITHIN)


def test_a_run_begins_with_nothing(model: ClassConditional) -> None:
    """One that is asked from the beginning again computes what it is asked."""
    guided = GuidedDenoiser(model, cache=Cache(3))
    for index in (0, 1, 0, 5, 3):
        step = step_of(model, index, 9)
        with computed(model) as rows:
            found = guided(x_at(index), step, LABELS).v
        assert bool(rows) == (index != 1)
        if rows:
            assert_near(found, model(x_at(index), step.level, LABELS).v, WITHIN)


# Off is off.


@pytest.mark.parametrize("cache", [None, Cache(), Cache(1, order=2)])
def test_off_leaves_no_bit(model: ClassConditional, cache: Cache | None) -> None:
    terms = [CFG(2.0), SAG(0.5), PAG(0.3)]
    for found, plain in zip(along(model, terms, cache), along(model, terms), strict=True):
        assert torch.equal(found.v, plain.v)


def test_a_branch_that_is_kept_is_computed_as_it_is_without(model: ClassConditional) -> None:
    terms = [CFG(2.0), SLG(0.3, layers=1)]
    cached, plain = along(model, terms, Cache(2)), along(model, terms)
    for i in range(0, 9, 2):
        assert torch.equal(cached[i].v, plain[i].v)
    assert not torch.equal(cached[1].v, plain[1].v)


# What runs, and what it costs.

RUNS: dict[str, tuple[list[Term], Cache, list[float]]] = {
    "nothing": ([], Cache(2), [1, 0, 1, 0, 1, 0, 1, 0, 1, 0]),
    "order 1": ([], Cache(3, 1), [1, 1, 0, 0, 1, 0, 0, 1, 0, 0]),
    "longer than the run": ([], Cache(100), [1, *[0] * 9]),
    "CFG": ([CFG(2.0)], Cache(2), [2, 0] * 5),
    # SAG's second image is a branch as well, and its mask is that of the last computed step.
    "CFG and SAG": ([CFG(2.0), SAG(0.5)], Cache(2), [3, 0] * 5),
    "PAG, SEG, SLG": ([PAG(0.5), SEG(0.5), SLG(0.5)], Cache(3), [4, 0, 0] * 3 + [4]),
    # Where a method begins, the step is computed.
    "an interval": (
        [SAG(0.5, interval=(0.5, 1))],
        Cache(2),
        [1, 0, 1, 0, 1, 2, 2, 0, 2, 0],
    ),
    # With an order above 0, what it asks is continued once it was computed twice.
    "an interval, order 1": (
        [SAG(0.5, interval=(0.3, 1))],
        Cache(3, 1),
        [1, 1, 0, 2, 2, 0, 0, 2, 0, 0],
    ),
    "an interval on the beat, order 1": (
        [SAG(0.5, interval=(0.4, 1))],
        Cache(3, 1),
        [1, 1, 0, 0, 2, 2, 0, 2, 0, 0],
    ),
    "an interval that ends": (
        [CFG(2.0, interval=(0, 0.3))],
        Cache(2),
        [2, 0, 2, 0, 1, 0, 1, 0, 1, 0],
    ),
    # What holds its contribution asks where the cache computes.
    "every 2 beside": (
        [SAG(0.5, interval=(0.5, 1), every=2)],
        Cache(2),
        [1, 0, 1, 0, 1, 2, 2, 0, 2, 0],
    ),
    "every 2 beside, order 1": (
        [CFG(2.0, every=2), SAG(0.5, interval=(0.5, 1), every=2)],
        Cache(2, 1),
        [2, 2, 0, 2, 0, 3, 0, 3, 0, 3],
    ),
    "every 4 beside": ([CFG(2.0, every=4)], Cache(2), [2, 0, 1, 0, 2, 0, 1, 0, 2, 0]),
    "every 3 beside": ([PAG(0.5, every=3)], Cache(2), [2, 0, 1, 2, 1, 0, 2, 0, 1, 2]),
    # New tensors at each step are new questions.
    "TPG": ([TPG(0.5)], Cache(2), [2] * 10),
    "TPG, every 2": ([TPG(0.5, every=2)], Cache(2), [2, 0] * 5),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_told_is_what_runs(model: ClassConditional, name: str) -> None:
    terms, cache, expected = RUNS[name]
    assert_costs(model, terms, cache, DDIM(), 10, expected)


def test_cost_of_a_solver_of_two_evaluations() -> None:
    model = ClassConditional(small_dit(), Flow(), kind="v")
    expected = [2, 2, 0, 0, 2, 2, 0, 0, 2]
    assert_costs(model, [CFG(2.0)], Cache(2), HeunFlow(), 5, expected)


def assert_costs(
    model: ClassConditional,
    terms: list[Term],
    cache: Cache,
    sampler: Sampler,
    steps: int,
    expected: list[float],
) -> None:
    noise = NoiseSource([0], [0])
    guided = GuidedDenoiser(model, terms, noise=noise, cache=cache)
    label, rows = torch.tensor([3]), list[int]()

    def ask(x: Tensor, step: Step) -> Prediction:
        with computed(model) as passes:
            found = guided(x, step, label)
        rows.append(sum(passes))
        return found

    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    x = x.to(next(model.network.parameters()).dtype)
    for _ in sampler.steps(ask, x, model.process, steps, noise):
        pass
    assert rows == expected
    cost = cost_of(model, terms, sampler, steps, cache=cache)
    assert list(cost.rows) == expected
    assert [bool(each) for each in cost.rounds] == [each > 0 for each in expected]


def test_the_cost_is_said_relative_to_a_run_without(model: ClassConditional) -> None:
    cost = cost_of(model, [CFG(2.0)], DDIM(), 10, cache=Cache(2))
    assert str(cost) == "10 passes of the network for each image"
    assert str(cost_of(model, [], DDIM(), 10, cache=Cache(2))).startswith("0.5 x unguided, 5 pass")


@pytest.mark.parametrize(
    ("terms", "steps", "told"),
    [
        ((CFG(2.0),), 4, None),
        ((TPG(0.5), CFG(2.0)), 4, "tpg asks at every step what cannot be kept; give it every"),
        ((), 1, "there are too few steps"),
    ],
)
def test_where_nothing_is_saved_a_sentence_says_why(
    model: ClassConditional, terms: tuple[Term, ...], steps: int, told: str | None
) -> None:
    settings = Settings(DDIM(), steps, terms, cache=Cache(2))
    found = settings.useless(model)
    assert found is None if told is None else found is not None and told in found
    assert replace(settings, cache=Cache()).useless(model) is None


def test_a_profile_counts_passes_that_ran(model: ClassConditional) -> None:
    with profiling() as profile:
        along(model, cache=Cache(3))
    assert profile.rows["network, round 1"] == 3 * IMAGES
    assert profile.rows["network, continued"] == 6 * IMAGES
    lines = timing(profile, 10**9, torch.device("cpu"))
    assert any(f"network: {3 * IMAGES} rows" in line for line in lines)


# Pixels depend on nothing else.


def test_what_a_caller_reads_is_true_and_changes_nothing(model: ClassConditional) -> None:
    layer = ("blocks.1.attn", "map")
    read = GuidedDenoiser(model, [CFG(2.0), SAG(0.5)], cache=Cache(3))
    plain = GuidedDenoiser(model, [CFG(2.0), SAG(0.5)], cache=Cache(3))
    for i in range(6):
        step = step_of(model, i, 6)
        # At some steps only, as the pictures of a run ask.
        captures = [layer] if i in (1, 3, 4) else []
        found = read(x_at(i), step, LABELS, captures)  # type: ignore[arg-type]
        assert torch.equal(found.v, plain(x_at(i), step, LABELS).v)
        if captures:
            alone = GuidedDenoiser(model)(x_at(i), step, LABELS, captures)  # type: ignore[arg-type]
            name = "base/blocks.1.attn:map"
            assert_near(found.attention[name], alone.attention[name])


def test_an_image_depends_on_its_own_seed(drawing: Model) -> None:
    how = Settings(DDIM(), 6, (CFG(2.0), SAG(0.5)), batch_size=3, cache=Cache(2, order=1))
    wanted = Request(5, 1, 3, 5)

    def drawn(*others: Request, **options: Any) -> Tensor:
        return draw_batch(drawing, [wanted, *others], how, **options).images[0]

    alone = drawn()
    assert torch.equal(alone, drawn(Request(6, 1, 4, 6), Request(7, 1, 9, 7)))
    maps = Maps(layers=("blocks.1.attn",), steps=3)
    assert torch.equal(alone, drawn(traced=[5], twins=[5], maps=maps))


class Turned(InputEdit):
    """An edit without a tensor, inside of a block, whose effect would be lost."""

    def edit_input(self, x: Tensor) -> Tensor:
        return -x


def test_an_edit_of_what_runs_at_each_step_is_no_part_of_what_is_kept(
    model: ClassConditional,
) -> None:
    terms = [Instead(1.0, (Turned("blocks.1.adaLN_modulation"),))]
    for found, plain in zip(along(model, terms, Cache(3)), along(model, terms), strict=True):
        assert_near(found.v, plain.v, WITHIN)


def test_beside_compiled_blocks(model: ClassConditional) -> None:
    torch._dynamo.reset()
    compiled = ClassConditional(small_dit(depth=3, learn_sigma=True).double(), DDPM())
    for block in compiled.network.blocks:
        block.compile(fullgraph=True, backend="eager")
    terms = [CFG(2.0), PAG(0.7), SLG(0.3, layers=2)]
    cache = Cache(2, order=1)
    for found, expected in zip(
        along(compiled, terms, cache), along(model, terms, cache), strict=True
    ):
        assert_near(found.v, expected.v, WITHIN)


def test_memory_is_tried_with_what_is_kept(drawing: Model) -> None:
    with computed(drawing.denoiser) as rows:  # type: ignore[arg-type]
        assert network_fits(drawing, Settings(DDIM(), 10, (CFG(2.0),), cache=Cache(2, order=1)))
    assert rows == [2 * 16] * 3


# What is refused.


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"every": 0}, "cache.every=0: expected 1 or more"),
        ({"every": 1.5}, "cache.every=1.5: expected a whole number"),
        ({"every": 2, "order": 5}, "cache.order=5: expected 0 to 4"),
        ({"every": 2, "order": -1}, "cache.order=-1"),
        ({"every": 2, "order": True}, "cache.order=True: expected a whole number"),
    ],
)
def test_values_that_mean_nothing_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Cache(**wrong)


class Whole(DiT):
    """A network of somebody who has written the forward pass anew."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, t, y)


def test_networks_that_keep_nothing_are_refused() -> None:
    own = Whole(8, hidden_size=16, depth=1, num_heads=2, num_classes=10, learn_sigma=False)
    for model in (small_unet(), ClassConditional(own, DDPM())):
        name = type(model.network).__name__
        with pytest.raises(ValueError, match=rf"cache.every=2: a {name} cannot keep"):
            GuidedDenoiser(model, cache=Cache(2))
        GuidedDenoiser(model, cache=Cache(1))


def test_shared_prefixes_are_refused_beside(model: ClassConditional, drawing: Model) -> None:
    with pytest.raises(ValueError, match=r"cache\.every=2 beside share_prefixes=true"):
        GuidedDenoiser(model, cache=Cache(2), share_prefixes=True)
    with pytest.raises(ValueError, match=r"cache\.every=2 beside share_prefixes=true"):
        Settings(share_prefixes=True, cache=Cache(2)).check(drawing)


def test_a_run_is_named_by_it_only_where_it_is_on(drawing: Model) -> None:
    def named(cache: Cache) -> dict[str, Any]:
        return identity_of(Pixels.of(drawing, Settings(cache=cache), {}, {}))

    plain = named(Cache())
    assert "cache" not in plain
    assert named(Cache(1, order=2)) == plain
    assert named(Cache(2, order=1)) == plain | {"cache": {"every": 2, "order": 1}}
