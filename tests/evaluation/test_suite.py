"""The suite: five metrics of one pass, what it warns of, what it refuses, and how sure it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sag_dit.evaluation.features import BACKENDS, Features, exact, feature_networks
from sag_dit.evaluation.metrics import InceptionScore, halves
from sag_dit.evaluation.reference import Reference
from sag_dit.evaluation.suite import METRICS, MetricKind, Suite, usual_metrics
from tests.evaluation import formulas
from tests.evaluation.making import Tiny, pixels, reference_of


@pytest.fixture(scope="module")
def reference() -> Reference:
    return reference_of(Tiny())


def filled(reference: Reference, count: int = 100, **options: object) -> Suite:
    suite = Suite(Tiny(), reference, **options)  # type: ignore[arg-type]
    suite.update(pixels(count, 1), torch.arange(count))
    return suite


def features(images: Tensor) -> Features:
    with torch.no_grad():
        return Tiny()(images)


def test_five_metrics_of_one_pass(reference: Reference) -> None:
    real, seen = features(pixels(120, 0)), features(pixels(100, 1))
    assert real.spatial is not None and seen.spatial is not None and seen.logits is not None
    found = filled(reference, split_size=60).compute()
    assert tuple(found) == usual_metrics()
    precision, recall = formulas.precision_recall(real.pool.numpy(), seen.pool.numpy())
    assert found == pytest.approx(
        {
            "fid": formulas.frechet(real.pool.numpy(), seen.pool.numpy()),
            "sfid": formulas.frechet(real.spatial.numpy(), seen.spatial.numpy()),
            "is": formulas.inception_score(seen.logits.numpy(), 60),
            "precision": precision,
            "recall": recall,
        },
        rel=1e-6,
    )


def test_a_metric_is_its_computation_and_a_kind(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Width(InceptionScore):
        def value(self, groups: object = None) -> float:
            return float(self.sums.shape[2] - 2)

    kind = MetricKind(Width, "width", "pool", options=["split_size"])
    monkeypatch.setitem(METRICS, "width", kind)
    found = filled(reference, metrics=["width", "is"], groups=4)
    width = features(pixels(1, 1)).pool.shape[1]
    assert found.compute()["width"] == width
    assert found.confidence(2)["width"] == (width, 0)


def test_networks_are_those_with_a_configuration() -> None:
    folder = Path(__file__).parents[2] / "configs" / "features"
    assert {*feature_networks(), "auto"} == {file.stem for file in folder.glob("*.yaml")}


def test_batches_and_order_do_not_matter(reference: Reference) -> None:
    whole = filled(reference).compute()
    parts = Suite(Tiny(), reference)
    images = pixels(100, 1)
    for chosen in torch.randperm(100, generator=torch.Generator().manual_seed(0)).split(33):
        parts.update(images[chosen], chosen)
    parts.update(images[:0], torch.arange(0))
    assert parts.compute() == pytest.approx(whole, rel=1e-6)
    assert parts.count() == 100


def test_reset_forgets_images_and_keeps_the_reference(reference: Reference) -> None:
    suite = filled(reference)
    before = suite.compute()
    suite.reset()
    with pytest.raises(ValueError, match="0 images"):
        suite.compute()
    suite.update(pixels(100, 1), torch.arange(100))
    assert suite.compute() == before


def test_a_choice_of_metrics_needs_only_its_features() -> None:
    extractor = Tiny(spatial=False, logits=False)
    reference = reference_of(extractor)
    suite = Suite(extractor, reference, ("recall", "fid"))
    suite.update(pixels(50, 1), torch.arange(50))
    assert list(suite.compute()) == ["recall", "fid"]
    with pytest.raises(ValueError, match="no features for sfid"):
        Suite(extractor, reference, ("sfid",))
    score = Suite(extractor, reference, ("is",))
    with pytest.raises(ValueError, match="tiny has no features for is"):
        score.update(pixels(50, 1), torch.arange(50))
    statistics_alone = dataclasses.replace(reference, features=None)
    with pytest.raises(ValueError, match="no images, and precision needs images"):
        Suite(extractor, statistics_alone, ("precision",))
    with pytest.raises(ValueError, match="metrics=kid: expected fid, sfid"):
        Suite(extractor, reference, ("kid",))


def test_a_reference_of_another_network_is_refused(reference: Reference) -> None:
    with pytest.raises(ValueError, match="weights 'seed 0' and 'seed 1'; expected one network"):
        Suite(Tiny(seed=1), reference)


def test_images_that_come_twice_are_refused(reference: Reference) -> None:
    suite = filled(reference)
    suite.update(pixels(2, 2), torch.tensor([7, 200]))
    with pytest.raises(ValueError, match=r"1 indices came more than once, such as \[7\]"):
        suite.compute()


def test_features_that_are_not_finite_name_their_images(reference: Reference) -> None:
    suite = Suite(Tiny(), reference)
    seen = features(pixels(5, 1))
    seen.pool[3, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity for 1 images, indices \[13\]"):
        suite.update_features(seen, torch.arange(10, 15))
    with pytest.raises(ValueError, match="0 images"):  # nothing of the batch was added
        suite.compute()


def test_features_are_computed_in_full_precision(reference: Reference) -> None:
    suite = filled(reference)
    with torch.autocast("cpu", torch.bfloat16):
        careless = filled(reference)
    assert careless.compute() == suite.compute()
    assert not any(parameter.requires_grad for parameter in suite.extractor.parameters())


@pytest.mark.parametrize("precision", ["medium", "highest"])
def test_no_tf32_whatever_was_set_before(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        outside = [backend.fp32_precision for backend in BACKENDS]
        with exact(torch.device("cpu")):
            assert [backend.fp32_precision for backend in BACKENDS] == ["ieee"] * 4
            assert not torch.is_grad_enabled()
        assert [backend.fp32_precision for backend in BACKENDS] == outside
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_sound_protocol_has_no_warnings(reference: Reference) -> None:
    assert filled(reference).warnings() == []


def test_warnings_name_what_is_not_comparable(reference: Reference) -> None:
    protocol = {
        **reference.protocol,
        "sample_count": 50_000,
        "labels": {"classes": 2, "fewest": 5, "most": 50},
    }
    stricter = dataclasses.replace(reference, protocol=protocol)
    suite = Suite(Tiny(), stricter, split_size=6)
    suite.update(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(8))
    found = "\n".join(suite.warnings())
    for expected in (
        "8 images, but numbers published against images in memory are of 50,000",
        "fid: 8 images for 16 dimensions, so the covariance is singular",
        "fid: all images have the same features",
        "is: the score is 1",
        "is: the last split has 2 images and counts as much as those of 6",
        "its classes have 5 to 50 images",
    ):
        assert expected in found
    few = reference_of(Tiny(), count=10)
    assert any("10 reference images for 16" in each for each in filled(few).warnings())


def test_confidence_is_repeatable_and_needs_groups(reference: Reference) -> None:
    suite = filled(reference)
    first = suite.confidence(repeats=4)
    assert tuple(first) == usual_metrics()
    assert suite.confidence(repeats=4) == first
    assert suite.confidence(repeats=4, seed=1) != first
    with pytest.raises(ValueError, match="groups=1: no spread can be told"):
        filled(reference, groups=1).confidence()
    with pytest.raises(ValueError, match="groups=5: expected an even number"):
        filled(reference, groups=5).confidence()
    with pytest.raises(ValueError, match="repeats=1: expected 2 or more"):
        suite.confidence(repeats=1)


def test_confidence_is_the_value_on_halves(reference: Reference) -> None:
    suite = filled(reference, metrics=("is",), groups=4, split_size=5_000)
    logits = features(pixels(100, 1)).logits
    assert logits is not None
    from sag_dit.evaluation.metrics import group_of

    group = group_of(torch.arange(100), 4).numpy()
    values = [
        formulas.inception_score(logits.numpy()[np.isin(group, half)], 5_000)
        for half in halves(4, 6, 3)
    ]
    expected = (np.mean(values), np.std(values, ddof=1))
    assert suite.confidence(repeats=6, seed=3)["is"] == pytest.approx(expected, rel=1e-9)


def test_confidence_tells_the_spread_of_fresh_sets(reference: Reference) -> None:
    """The standard error from one set, averaged over sets, is the spread of FID over sets."""
    values, errors = [], []
    for seed in range(30):
        random = np.random.Generator(np.random.Philox(key=[seed, 2]))
        pool = torch.from_numpy(random.gamma(2.0, 0.2, (256, 16)).astype(np.float32))
        suite = Suite(Tiny(), reference, ("fid",))
        suite.update_features(Features(pool), torch.arange(256))
        values.append(suite.compute()["fid"])
        errors.append(suite.confidence(repeats=20)["fid"][1])
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.3)
