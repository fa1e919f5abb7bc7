"""Verifiers as metrics: functions, modules and torchmetrics' metrics, by images and conditions."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from sag_dit.checkpoints import load
from sag_dit.evaluation.scores import verifier_identity
from sag_dit.evaluation.suite import Suite
from sag_dit.evaluation.verifiers import verified
from sag_dit.study import compare
from sag_dit.study.setup import check_metrics
from tests.evaluation.making import Tiny, pixels, reference_of


def brightness(images: Tensor, condition: object, factor: float = 1.0) -> Tensor:
    return factor * images.mean((1, 2, 3))


def matches(images: Tensor, labels: Tensor) -> Tensor:
    return labels.double()


class Darkness(Metric):
    """A metric of torchmetrics, which returns one number for a whole batch."""

    higher_is_better = False
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        self.sums += torch.stack([1 - images.mean((1, 2, 3)).sum() / len(images), torch.ones(())])

    def compute(self) -> Tensor:
        return self.sums[0] / self.sums[1]


class Weighted(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, images: Tensor, condition: object) -> Tensor:
        return self.weight * images.mean((1, 2, 3))


def suite(**verifiers: Any) -> Suite:
    extractor = Tiny()
    names = ("fid", *verifiers)
    return Suite(extractor, reference_of(extractor), names, verifiers=verifiers, groups=4)


def test_a_metric_is_the_mean_of_scores_over_images_in_unequal_batches() -> None:
    images = pixels(60, 1)
    found = suite(
        bright=brightness,
        module=Weighted(2.0),
        twice=partial(brightness, factor=2),
        dark=Darkness(),
    )
    for chosen in torch.arange(60).split(25):
        found.update(images[chosen], chosen, chosen % 10)
    mean = float((images.double() / 255).mean())
    values = found.compute()
    assert values["bright"] == pytest.approx(mean, rel=1e-6)
    assert values["module"] == values["twice"] == pytest.approx(2 * mean, rel=1e-6)
    assert values["dark"] == pytest.approx(1 - mean, rel=1e-6)
    middle, error = found.confidence(6)["bright"]
    assert middle == pytest.approx(mean, rel=0.1) and 0 < error < 0.1


def test_scores_see_what_each_image_was_drawn_from() -> None:
    found = suite(label=matches)
    labels = torch.arange(60) % 7
    for chosen in torch.arange(60).split(25):
        found.update(pixels(60, 1)[chosen], chosen, labels[chosen])
    assert found.compute()["label"] == pytest.approx(float(labels.double().mean()))


def test_a_model_s_images_come_with_their_classes() -> None:
    seen: list[Any] = []

    def noting(images: Tensor, labels: Tensor) -> Tensor:
        assert images.dtype == torch.float32 and 0 <= images.min() <= images.max() <= 1
        seen.extend(labels.tolist())
        return labels.double()

    model = load("digits")
    found = compare(
        model, {"plain": []}, num_images=20, classes=[3, 7], steps=2, metrics=["fid", "vendi"],
        verifiers={"noting": noting}, progress=False,
    )  # fmt: skip
    assert seen == [3, 7] * 10
    assert list(found["plain"].metrics) == ["fid", "vendi", "noting"]
    assert found["plain"].metrics["noting"] == 5


def test_direction_and_label_are_the_verifier_s() -> None:
    assert verified("bright", brightness).higher_is_better is True
    assert verified("dark", Darkness()).higher_is_better is False
    named = Weighted(1.0)
    named.label = "weighted brightness"  # type: ignore[assignment]
    assert verified("weighted", named).label == "weighted brightness"


def test_what_scores_depend_on_is_told() -> None:
    one, other = verifier_identity(Weighted(1.0)), verifier_identity(Weighted(2.0))
    assert one != other and one == verifier_identity(Weighted(1.0))
    assert str(verifier_identity(brightness)).endswith("brightness")
    assert verifier_identity(partial(brightness, factor=3.0))[-1] == {"factor": 3.0}


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        (lambda images, _: images.mean(), r"odd returned \(\) for 10 images: expected one score"),
        (lambda images, _: images.mean((1, 2, 3)) / 0, r"odd returned NaN or infinity for 10"),
    ],
)
def test_what_is_no_score_is_refused(verifier: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suite(odd=verifier).update(pixels(10, 1), torch.arange(10))


def test_names_are_words_that_no_metric_has() -> None:
    check_metrics(["fid", "bright"], ["bright"])
    with pytest.raises(ValueError, match=r"verifiers.fid: expected a name that no metric has"):
        check_metrics(None, ["fid"])
    with pytest.raises(ValueError, match=r"verifiers.bright: float cannot be called"):
        verified("bright", 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="metrics=dull: expected fid"):
        check_metrics(["dull"], ["bright"])
