"""The straight line: requests become images, each by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import sag_dit
from sag_dit import sampling
from sag_dit.checkpoints import Model, from_denoiser
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, PAG, SAG, Term
from sag_dit.models import DiT
from sag_dit.process import DDPM, Flow
from sag_dit.sampler import DDIM, Ancestral, EulerFlow, HeunFlow, SampleStep
from sag_dit.sampling import (
    Request,
    Settings,
    _tell_which,
    draw,
    draw_batch,
    drawn,
    labels_of,
    trajectory,
)
from sag_dit.traces import Maps
from tests.closeness import places_are_alike

NAMES = tuple(f"class {i}" for i in range(10))


@pytest.fixture
def model(make_dit: Callable[..., DiT]) -> Model:
    denoiser = ClassConditional(
        make_dit(in_channels=3), DDPM(), x_0_range=(-1, 1), class_names=NAMES
    )
    return from_denoiser(denoiser, "tiny", defaults={"batch_size": 3})


def requests(indices: Sequence[int], seed: int = 0) -> list[Request]:
    return [Request(i, seed, i % 10, stream=i) for i in indices]


SETTINGS = Settings(
    sampler=Ancestral(),
    steps=3,
    guidance=(CFG(scale=1.5), SAG(scale=1.0)),
    batch_size=4,
)


def test_an_image_is_the_same_in_any_company(model: Model) -> None:
    """Other neighbours, another place in the batch, and padding, bit for bit.

    Where the processor has it that a place changes the last bits, a pixel may be one level off.
    """
    x, y = torch.ones(1, *model.denoiser.latent_shape).cumsum(-1).sin(), torch.tensor([1])
    network, t = model.denoiser.network, torch.tensor([500])
    off = 0 if all(places_are_alike(network, x, t, y, rows=rows) for rows in (4, 8)) else 1
    alone = {i: draw(model, requests([i]), SETTINGS)[0] for i in range(5)}
    for company in ([0, 1, 2, 3], [3, 0], [4, 2, 0]):
        images = draw(model, requests(company), SETTINGS)
        assert torch.equal(images[0], alone[company[0]])
        for index, image in zip(company, images, strict=True):
            assert (image.int() - alone[index].int()).abs().max() <= off
    assert len({image.numpy().tobytes() for image in alone.values()}) == 5


def test_seed_stream_and_class_each_change_the_image(model: Model) -> None:
    base = Request(0, seed=0, label=3, stream=0)
    others = [
        Request(0, seed=1, label=3, stream=0),
        Request(0, seed=0, label=3, stream=1),
        Request(0, seed=0, label=4, stream=0),
    ]
    image, *changed = draw(model, [base, *others], SETTINGS)
    assert all(not torch.equal(image, other) for other in changed)
    # The index only says where the image goes.
    moved = draw(model, [Request(7, seed=0, label=3, stream=0)], SETTINGS)[0]
    assert torch.equal(moved, image)


def test_watch_sees_every_step_and_changes_nothing(model: Model) -> None:
    seen: list[SampleStep] = []
    watched = draw(model, requests([0, 1]), SETTINGS, seen.append)
    assert torch.equal(watched, draw(model, requests([0, 1]), SETTINGS))
    assert [(step.step.index, step.step.count) for step in seen] == [(0, 3), (1, 3), (2, 3)]
    assert seen[0].x.shape == (4, 3, 8, 8)  # padded to the compute batch


def test_drawing_leaves_no_gradients_and_no_mode_behind(model: Model) -> None:
    model.denoiser.requires_grad_(True)
    images = draw(model, requests([0]), SETTINGS)
    assert images.dtype == torch.uint8
    assert all(parameter.grad is None for parameter in model.denoiser.parameters())
    assert torch.is_grad_enabled()


def test_sample_is_index_i_of_the_set(model: Model) -> None:
    images = sag_dit.sample(model, ["class 3", 7, "1", 0], steps=3, seed=5)
    assert images.shape == (4, 3, 8, 8)
    # The model recommends compute batches of 3, so that the fourth comes in a second one.
    plain = Settings(DDIM(), 3, batch_size=3)
    for index, label in enumerate((3, 7, 1, 0)):
        alone = draw(model, [Request(index, 5, label, stream=index)], plain)[0]
        assert (images[index].int() - alone.int()).abs().max() <= 1


@pytest.mark.parametrize("count", [0, 5])
def test_a_batch_holds_one_request_up_to_the_batch_size(model: Model, count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} requests in one batch: expected 1 to batch_siz"):
        draw(model, requests(range(count)), SETTINGS)


def test_an_image_that_breaks_is_named_with_its_step(model: Model) -> None:
    """Its neighbours are not."""
    table = model.denoiser.network.y_embedder.embedding_table.weight
    table.data[2] = float("nan")
    table.data[5] = float("inf")
    message = r"image 2, 5 became NaN or infinite at step 1 of 3 \(t = 999\.0\)"
    with pytest.raises(ValueError, match=message):
        draw(model, requests([0, 2, 5]), SETTINGS)
    draw(model, requests([0, 1]), SETTINGS)


def test_a_step_that_breaks_later_is_named(model: Model) -> None:
    class Overflowing(DDIM):
        def steps(self, *arguments: object, **options: object) -> object:  # type: ignore[override]
            for step in super().steps(*arguments, **options):  # type: ignore[arg-type]
                if step.step.index == 1:
                    step.x[0] = float("inf")
                yield step

    settings = Settings(Overflowing(), steps=4, batch_size=2)
    seen: list[int] = []
    with pytest.raises(ValueError, match=r"image 8 became NaN or infinite at step 2 of 4"):
        for step in trajectory(model, requests([8, 9]), settings):
            seen.append(step.step.index)
    assert seen == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: expected 1 or more"),
        ({"steps": -1}, "steps=-1: expected 1 or more"),
        ({"batch_size": 0}, "batch_size=0: expected 1 or more"),
        ({"max_rows": 0}, "max_rows=0: expected 1 or more"),
    ],
)
def test_settings_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(steps=1001), "steps=1001: expected a whole number from 1 to 1000"),
        (Settings(guidance=(SAG(scale=1, layer="blocks.7"),)), "layer 'blocks.7' does not exist"),
        (Settings(guidance=(CFG(scale=2, channels=4),)), "channels=4: the model has 3"),
    ],
)
def test_settings_that_do_not_suit_the_model(
    model: Model, settings: Settings, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings.check(model)


def test_a_term_that_is_off_is_not_asked_whether_it_suits(model: Model) -> None:
    Settings(guidance=(SAG(scale=0, layer="blocks.7"), CFG(scale=1, channels=4))).check(model)


def test_sample_refuses_before_it_draws(model: Model) -> None:
    with pytest.raises(ValueError, match="class 10 does not exist"):
        sag_dit.sample(model, [0, 10])
    with pytest.raises(ValueError, match="batch_size=0: expected 1 or more"):
        sag_dit.sample(model, [0], batch_size=0)


def test_sample_needs_a_class(model: Model) -> None:
    with pytest.raises(ValueError, match="expected at least one class"):
        sag_dit.sample(model, [])


@hypothesis_settings(max_examples=50)
@given(st.lists(st.integers(0, 9)))
def test_labels_by_number_text_and_name_agree(labels: list[int]) -> None:
    assert labels_of(labels, NAMES) == labels
    assert labels_of([str(label) for label in labels], NAMES) == labels
    assert labels_of([NAMES[label] for label in labels], NAMES) == labels


def test_a_flow_is_solved_by_euler_unless_another_sampler_is_asked_for(
    make_dit: Callable[..., DiT],
) -> None:
    network = make_dit(learn_sigma=False, depth=1, in_channels=3)
    flow = ClassConditional(network, Flow(), kind="v", x_0_range=(-1, 1), class_names=NAMES)
    model = from_denoiser(flow, "tiny", defaults={"batch_size": 2})
    asked = {"steps": 2, "guidance": (CFG(2.0),)}
    images = sag_dit.sample(model, [3, 4], **asked)
    assert torch.equal(images, sag_dit.sample(model, [3, 4], sampler=EulerFlow(), **asked))
    assert not torch.equal(images, sag_dit.sample(model, [3, 4], sampler=HeunFlow(), **asked))
    with pytest.raises(ValueError, match=r"sampler=ddim.*use sampler=euler_flow"):
        sag_dit.sample(model, [3, 4], sampler=DDIM(), **asked)


FOLDERS = ("0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9")
"""As folders are sorted."""


def test_a_number_is_the_label_and_a_text_the_name(caplog: pytest.LogCaptureFixture) -> None:
    _tell_which.cache_clear()
    assert labels_of([2, 2], FOLDERS) == [2, 2]
    assert caplog.messages == [
        'class 2 is number 2, named 10; in quotes, "2" is the class of that name, number 4'
    ]
    caplog.clear()
    assert labels_of(["2"], FOLDERS) == [4]
    assert caplog.messages == [
        'class "2" is the class of that name, number 4; without quotes, 2 is number 2'
    ]
    caplog.clear()
    # What would be no class as the one is one as the other.
    assert labels_of([2016, "1", 0], ("2015", "2016")) == [1, 1, 0]
    assert labels_of(["207"], [f"class {number}" for number in range(1000)]) == [207]
    assert not caplog.messages


@pytest.mark.parametrize("wanted", [-1, 10, "10", "-1", "dog", "", 1.5, None, True])
def test_what_is_no_class(wanted: object) -> None:
    with pytest.raises(ValueError, match="does not exist: expected a number from 0 to 9"):
        labels_of([wanted], NAMES)  # type: ignore[list-item]


@pytest.mark.parametrize(("wanted", "hint"), [("hart", "'heart'"), ("Pizza", "'pizza'")])
def test_a_name_that_is_nearly_a_class_is_offered(wanted: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"such as 'heart', 'pizza'; did you mean {hint}"):
        labels_of([wanted], ("heart", "pizza"))
    with pytest.raises(ValueError, match=r"such as 'heart', 'pizza'$"):
        labels_of(["submarine"], ("heart", "pizza"))


def test_the_bundled_model_draws_the_digits_it_is_asked_for() -> None:
    """Read by the nearest real digit, which is right for 98 of 100 held-out ones."""
    from sag_dit.data.digits import digits

    real, labels = digits("train")
    held_out, truth = digits("held_out")

    def read(images: torch.Tensor) -> torch.Tensor:
        distances = torch.cdist(images.flatten(1).float(), real.flatten(1).float())
        return labels[distances.argmin(dim=1)]

    assert (read(held_out) == truth).float().mean() > 0.97
    wanted = torch.arange(10).repeat(3)
    images = sag_dit.sample(sag_dit.load("digits"), wanted.tolist(), steps=25)
    assert (read(images) == wanted).sum() >= 26  # of 30
    assert len(images.flatten(1).unique(dim=0)) == 30


# --- batches of a set -----------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "world"), [(9, 2), (12, 3), (3, 2)])
def test_ranks_share_the_batches_of_a_set_and_draw_as_often(
    model: Model, monkeypatch: pytest.MonkeyPatch, count: int, world: int
) -> None:
    whole = draw_all(model, count)
    calls: list[int] = []
    line = sampling.draw

    def counting(model: Model, batch: Sequence[Request], *rest: Any) -> Tensor:
        calls.append(batch[0].index)
        return line(model, batch, *rest)

    monkeypatch.setattr(sampling, "draw", counting)
    found: dict[int, Tensor] = {}
    turns = []
    for rank in range(world):
        calls.clear()
        for batch in drawn(model, requests(range(count)), SETTINGS, rank=rank, world=world):
            assert not found.keys() & set(batch.indices.tolist())
            found |= dict(zip(batch.indices.tolist(), batch.images, strict=True))
        turns.append(len(calls))
    assert turns == [math.ceil(math.ceil(count / 4) / world)] * world
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[index], image) for index, image in whole.items())


def draw_all(model: Model, count: int) -> dict[int, Tensor]:
    """The images of a set by index, drawn by one rank."""
    batches = drawn(model, requests(range(count)), SETTINGS)
    return {
        index: image
        for batch in batches
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
    }


@pytest.mark.parametrize(
    ("guidance", "key"),
    [
        ([], None),
        ([SAG(0.5)], None),
        ([SAG(0.5), SAG(0.3, interval=(0.5, 1.0))], None),
        ([CFG(1.0), SAG(0.5)], None),
        ([CFG(1.5), SAG(0.5)], "sag"),
        ([CFG(1.5), SAG(0.5), PAG(1.0)], "sag"),
        ([CFG(1.5), PAG(1.0)], "pag"),
    ],
)
def test_one_of_several_methods_is_spared(guidance: list[Term], key: str | None) -> None:
    assert replace(SETTINGS, guidance=tuple(guidance)).spared == key


def test_a_second_twin_is_drawn_without_one_method(model: Model) -> None:
    terms = (SAG(0.5), CFG(1.5), SAG(0.3, interval=(0.5, 1.0)))
    both, wanted = replace(SETTINGS, guidance=terms), requests([4, 6, 7])
    batch = draw_batch(model, wanted, both, twins=[6], spare=both.spared)
    assert torch.equal(batch.images, draw(model, wanted, both))
    assert torch.equal(batch.twins[6], draw_batch(model, wanted, both, twins=[6]).twins[6])
    assert batch.spared.keys() == {"sag"} and batch.spared["sag"].keys() == {6}
    alone = draw(model, requests([6]), replace(SETTINGS, guidance=(CFG(1.5),)))[0]
    assert torch.equal(batch.spared["sag"][6], alone)


def test_a_set_is_drawn_with_its_twins_and_traces_by_the_one_loop(model: Model) -> None:
    wanted = requests(range(5))  # in two batches
    plain = [*drawn(model, wanted, SETTINGS)]
    both = [*drawn(model, wanted, SETTINGS, twins=True, traced=True)]
    for batch, with_twins in zip(plain, both, strict=True):
        assert torch.equal(batch.images, with_twins.images)
        assert not batch.twins and not batch.spared and not batch.traces
        alone = draw(model, batch.requests, replace(SETTINGS, guidance=()))
        without = draw(model, batch.requests, SETTINGS.without("sag"))
        assert torch.equal(torch.stack([*with_twins.twins.values()]), alone)
        assert torch.equal(torch.stack([*with_twins.spared["sag"].values()]), without)
        assert [*with_twins.twins] == [*with_twins.traces] == batch.indices.tolist()


def test_a_batch_comes_with_the_twins_and_traces_that_are_named(model: Model) -> None:
    wanted = requests([4, 6, 7])
    batch = draw_batch(model, wanted, SETTINGS, twins=[7, 9], traced=[4])
    assert torch.equal(batch.images, draw(model, wanted, SETTINGS))
    assert batch.twins.keys() == {7} and batch.traces.keys() == {4}
    unguided = draw(model, requests([7]), replace(SETTINGS, guidance=()))[0]
    assert torch.equal(batch.twins[7], unguided)
    assert not torch.equal(batch.twins[7], batch.images[2])
    trace = batch.traces[4]
    assert [view.index for view in trace.steps] == [0, 1, 2] and trace.maps is None
    with_maps = draw_batch(model, wanted, SETTINGS, traced=[4], maps=Maps(steps=2, query=None))
    assert torch.equal(with_maps.images, batch.images)
    maps = with_maps.traces[4].maps
    assert maps is not None and maps.steps == (0, 2)
