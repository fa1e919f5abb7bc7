"""FID, sFID, IS, precision and recall against three independent computations of them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sag_dit.evaluation import metrics as pr
from sag_dit.evaluation.metrics import (
    FrechetDistance,
    InceptionScore,
    Moments,
    PrecisionRecall,
    Statistics,
    frechet_distance,
    group_of,
)
from tests.evaluation import formulas
from tests.evaluation.formulas import made

# The sets whose numbers by openai/guided-diffusion's evaluator stand in adm.json: its own
# functions for statistics, Fréchet distance, score and manifolds, with a float64 NumPy session in
# the place of TensorFlow's.
REFERENCE, IMAGES = made(1, 500, 24), made(2, 700, 24, 1.05, 0.05)
SPATIAL_REFERENCE, SPATIAL = made(3, 500, 30), made(4, 700, 30, 0.9, 0.1)
WEIGHTS = np.random.Generator(np.random.Philox(key=[5, 0])).standard_normal((24, 12))
LOGITS = IMAGES.astype(np.float64) @ WEIGHTS
ADM = json.loads((Path(__file__).parent / "adm.json").read_text())


def tensor(values: formulas.Array) -> Tensor:
    return torch.from_numpy(values)


def moments(values: formulas.Array) -> Statistics:
    metric = Moments()
    metric.update(tensor(values))
    return metric.compute()


def fid(reference: formulas.Array, images: formulas.Array) -> float:
    metric = FrechetDistance(moments(reference))
    metric.update(tensor(images))
    return float(metric.compute())


def score(logits: formulas.Array, split: int) -> float:
    metric = InceptionScore(split)
    metric.update(tensor(logits), torch.arange(len(logits)))
    return float(metric.compute())


def shares(reference: formulas.Array, images: formulas.Array, k: int = 3) -> tuple[float, float]:
    metric = PrecisionRecall(tensor(reference), k)
    metric.update(tensor(images), torch.arange(len(images)))
    found = metric.compute()
    return float(found["precision"]), float(found["recall"])


def test_adms_evaluator() -> None:
    assert fid(REFERENCE, IMAGES) == pytest.approx(ADM["fid"], rel=1e-6)
    assert fid(SPATIAL_REFERENCE, SPATIAL) == pytest.approx(ADM["sfid"], rel=1e-6)
    assert score(LOGITS, 300) == pytest.approx(ADM["is"], rel=1e-6)
    assert shares(REFERENCE, IMAGES) == (ADM["precision"], ADM["recall"])


def test_published_formulas() -> None:
    assert fid(REFERENCE, IMAGES) == pytest.approx(formulas.frechet(REFERENCE, IMAGES), rel=1e-9)
    assert score(LOGITS, 300) == pytest.approx(formulas.inception_score(LOGITS, 300), rel=1e-12)
    for k in (1, 3, 5):
        assert shares(REFERENCE[:200], IMAGES[:240], k) == formulas.precision_recall(
            REFERENCE[:200], IMAGES[:240], k
        )


def test_torch_fidelity() -> None:
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(tensor(each).double()) for each in (IMAGES, REFERENCE)), False
    )
    ours = fid(REFERENCE, IMAGES)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    # Its splits are equal parts and ours have a fixed size: the same where these divide the set.
    theirs = isc_features_to_metric(tensor(LOGITS), splits=7, shuffle=False)
    assert score(LOGITS, 100) == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    theirs = prc_features_to_metric(tensor(IMAGES), tensor(REFERENCE), verbose=False)
    assert shares(REFERENCE, IMAGES) == pytest.approx(
        (theirs["precision"], theirs["recall"]), rel=1e-6
    )


def test_fewer_images_than_dimensions() -> None:
    reference, images = made(6, 90, 64), made(7, 20, 64, 1.2)
    few = made(8, 15, 64)
    assert fid(reference, images) == pytest.approx(formulas.frechet(reference, images), rel=1e-6)
    # Both singular: by the small matrix X Y^T of centred rows, whose singular values are the roots.
    x, y = (each.astype(np.float64) - each.mean(0, dtype=np.float64) for each in (images, few))
    roots = np.linalg.svd(x @ y.T, compute_uv=False).sum() / np.sqrt((20 - 1) * (15 - 1))
    apart = np.square(images.mean(0, dtype=np.float64) - few.mean(0, dtype=np.float64)).sum()
    traces = (x**2).sum() / 19 + (y**2).sum() / 14
    assert fid(few, images) == pytest.approx(apart + traces - 2 * roots, rel=1e-6)


def test_spectrum_over_ten_decades() -> None:
    random = np.random.Generator(np.random.Philox(key=[10, 0]))
    spread = np.logspace(0, -5, 60)
    bases = [np.linalg.qr(random.standard_normal((60, 60)))[0] for _ in range(2)]
    roots = [(basis * spread).T for basis in bases]
    a, b = (Statistics(None, torch.zeros(60).double(), tensor(f.T @ f)) for f in roots)
    exact = 2 * (spread**2).sum() - 2 * np.linalg.svd(roots[0] @ roots[1].T)[1].sum()
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_fid_of_known_normals(width: int) -> None:
    a = Statistics(None, torch.zeros(width).double(), torch.eye(width).double())
    b = Statistics(None, torch.ones(width).double(), 4 * torch.eye(width).double())
    # |1|^2 + (1 + 4 - 2 * 2) for each dimension.
    assert frechet_distance(a, b) == pytest.approx(2 * width)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_constant_features() -> None:
    constant, other = np.full((10, 4), 1000.0), np.full((12, 4), 1003.0)
    assert fid(constant, constant) == pytest.approx(0, abs=1e-9)
    assert fid(constant, other) == pytest.approx(36)
    assert score(np.ones((10, 5)), 5000) == pytest.approx(1)
    assert shares(constant, constant) == (1, 1)
    assert shares(constant, other) == (0, 0)


def test_classes_told_apart_count() -> None:
    logits = np.eye(4)[np.arange(40) % 4] * 1000
    assert score(logits, 5000) == pytest.approx(4)


@settings(max_examples=25)
@given(order=st.permutations(range(60)), cuts=st.lists(st.integers(0, 60), max_size=4))
def test_neither_batches_nor_order_matter(order: list[int], cuts: list[int]) -> None:
    images, logits = IMAGES[:60, :6], LOGITS[:60]
    whole = FrechetDistance(moments(REFERENCE[:, :6])), InceptionScore(25)
    parts = FrechetDistance(moments(REFERENCE[:, :6])), InceptionScore(25)
    sets = PrecisionRecall(tensor(REFERENCE[:80, :6])), PrecisionRecall(tensor(REFERENCE[:80, :6]))
    everything = torch.arange(60)
    whole[0].update(tensor(images))
    whole[1].update(tensor(logits), everything)
    sets[0].update(tensor(images), everything)
    edges = [0, *sorted(cuts), 60]
    for start, stop in pairwise(edges):
        chosen = torch.tensor(order[start:stop], dtype=torch.int64)
        parts[0].update(tensor(images)[chosen])
        parts[1].update(tensor(logits)[chosen], chosen)
        sets[1].update(tensor(images)[chosen], chosen)
    for one, other in zip(whole, parts, strict=True):
        assert float(one.compute()) == pytest.approx(float(other.compute()), rel=1e-9)
    assert sets[0].compute() == sets[1].compute()


def test_distances_are_taken_in_the_order_of_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that not even their last bits depend on who brought which image when."""
    seen: list[Tensor] = []
    original = pr.precision_recall

    def noting(reference: Tensor, images: Tensor, *rest: object) -> tuple[float, float]:
        seen.append(images)
        return original(reference, images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pr, "precision_recall", noting)
    metric = PrecisionRecall(tensor(REFERENCE[:50]))
    for chosen in torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(25):
        metric.update(tensor(IMAGES)[chosen], chosen)
    metric.compute()
    assert torch.equal(seen[0], tensor(IMAGES[:60]))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shares(REFERENCE, IMAGES)
    radii = pr.squared_radii(tensor(IMAGES), 3)
    monkeypatch.setattr(pr, "BLOCK", 64)
    assert shares(REFERENCE, IMAGES) == whole
    torch.testing.assert_close(pr.squared_radii(tensor(IMAGES), 3), radii)


@pytest.mark.parametrize("period", [1, 10])
def test_groups_are_balanced_and_add_up(period: int) -> None:
    indices = torch.arange(3200)
    group = group_of(indices, 8, period)
    assert group.bincount().tolist() == [400] * 8
    if period == 10:  # every group has as many images of each class, that is index % 10
        assert (group * 10 + indices % 10).bincount().tolist() == [40] * 80
    else:  # no group has one class alone
        assert ((group * 10 + indices % 10).bincount(minlength=80) > 0).all()
    metric = FrechetDistance(moments(REFERENCE), groups=8, period=period)
    metric.update(tensor(IMAGES), torch.arange(700))
    assert float(metric.compute()) == pytest.approx(fid(REFERENCE, IMAGES), rel=1e-9)
    some = group_of(torch.arange(700), 8, period) < 3
    assert metric.value([0, 1, 2]) == pytest.approx(fid(REFERENCE, IMAGES[some.numpy()]), rel=1e-9)
    split = InceptionScore(300, groups=8, period=period)
    split.update(tensor(LOGITS), torch.arange(700))
    assert float(split.compute()) == pytest.approx(score(LOGITS, 300), rel=1e-12)


def test_memory_does_not_grow_with_images() -> None:
    metrics = Moments(), InceptionScore()
    for start in range(0, 700, 7):
        metrics[0].update(tensor(IMAGES[start : start + 7]))
        metrics[1].update(tensor(LOGITS[start : start + 7]), torch.arange(start, start + 7))
    sizes = [sum(getattr(metric, name).numel() for name in metric._defaults) for metric in metrics]
    assert sizes == [1 + 24 + 24**2, 12 + 3]


def test_memory_does_not_grow_with_the_greatest_index() -> None:
    """Indices may be any numbers: a split that has no image takes no room."""
    near, far = InceptionScore(100), InceptionScore(100)
    near.update(tensor(LOGITS[:300]), torch.arange(300))
    for number, start in ((2, 9 * 10**15), (0, 0), (1, 7 * 10**10)):  # in no order
        chosen = slice(100 * number, 100 * number + 100)
        far.update(tensor(LOGITS[chosen]), torch.arange(start, start + 100))
    assert far.sums.shape == near.sums.shape
    assert far.splits.tolist() == [0, 7 * 10**8, 9 * 10**13]
    assert float(far.compute()) == pytest.approx(score(LOGITS[:300], 100), rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    images = tensor(IMAGES[:8]).clone()
    images[5, 2] = bad
    with pytest.raises(ValueError, match=r"rows \[5\] of the batch, hold NaN"):
        Moments().update(images)
    with pytest.raises(ValueError, match="hold NaN"):
        InceptionScore().update(images, torch.arange(8))
    with pytest.raises(ValueError, match="all finite"):
        PrecisionRecall(tensor(REFERENCE)).update(images, torch.arange(8))
    with pytest.raises(ValueError, match="all finite"):
        PrecisionRecall(images)


def test_too_few_images_are_refused() -> None:
    one = Moments()
    one.update(tensor(IMAGES[:1]))
    with pytest.raises(ValueError, match="1 images: expected 2 or more"):
        one.compute()
    with pytest.raises(ValueError, match="3 images: expected more than k=3"):
        shares(REFERENCE, IMAGES[:3])
    with pytest.raises(ValueError, match="3 reference images: expected more than k=3"):
        shares(REFERENCE[:3], IMAGES)
    with pytest.raises(ValueError, match=r"24 and 30 dimensions"):
        fid(SPATIAL_REFERENCE, IMAGES)
