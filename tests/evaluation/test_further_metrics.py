"""Density, coverage, kernel distances and Vendi: others' code, the formulas, known behaviour."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import metric_table
from sag_dit.evaluation import metrics as pr
from sag_dit.evaluation.kinds import METRICS, metric_names
from sag_dit.evaluation.metrics import group_of
from sag_dit.evaluation.suite import usual_metrics
from tests.evaluation import formulas
from tests.evaluation.formulas import made

REFERENCE, IMAGES = made(1, 500, 24), made(2, 700, 24, 1.05, 0.05)
# By the code of layer6ai-labs/dgm-eval at 74c79f7 (metrics/prdc.py with k = 5, mmd.py with one
# subset of the first 500 images, vendi.py) and of Jiawei-Yang/FD-loss at 5c03b81
# (frechet_distance/metrics.py with sigma = 10; mmd_scaled of ten times the features), in float64.
OTHERS = json.loads((Path(__file__).parent / "others.json").read_text())

FURTHER = [name for name, kind in METRICS.items() if kind.features == "pool" and not kind.usual]


def value(
    name: str, images: formulas.Array, reference: formulas.Array = REFERENCE, groups: int = 1
) -> float:
    """One metric of features that come in three batches, in no order."""
    kind = METRICS[name]
    against = () if kind.reference is None else (torch.from_numpy(reference),)
    metric = kind.metric(*against, groups=groups)
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for chosen in shuffled.tensor_split(3):
        metric.update(torch.from_numpy(images)[chosen], chosen)
    names = [n for n, each in METRICS.items() if each.metric is kind.metric]
    return float(metric.compute().reshape(-1)[names.index(name)])


@pytest.mark.parametrize("name", FURTHER)
def test_others_code(name: str) -> None:
    images = IMAGES[:500] if name == "kd" else IMAGES
    assert value(name, images) == pytest.approx(OTHERS[name], rel=1e-6)


def test_a_kernel_whose_width_matters_agrees_too() -> None:
    scaled = value("mmd", 10 * IMAGES, 10 * REFERENCE)
    assert scaled == pytest.approx(OTHERS["mmd_scaled"], rel=1e-6)


def test_torch_fidelity() -> None:
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_kid import kid_features_to_metric

    for name, kernel in (("kd", "poly"), ("mmd", "rbf")):
        found = kid_features_to_metric(
            torch.from_numpy(IMAGES[:500]).double(),
            torch.from_numpy(REFERENCE).double(),
            kid_subsets=1,
            kid_subset_size=500,
            kid_kernel=kernel,
            verbose=False,
        )["kernel_inception_distance_mean"]
        if name == "kd":
            assert value(name, IMAGES[:500]) == pytest.approx(found, rel=1e-6)
        else:  # Theirs leaves out each vector's kernel with itself, which is 1.
            pairs = [each.astype(np.float64) for each in (REFERENCE, IMAGES[:500])]
            own = [float(np.exp(-_apart(each, each) / 200).mean()) for each in pairs]
            shift = sum((1 - (500 * mean - 1) / 499) + mean - 1 for mean in own)
            assert value(name, IMAGES[:500]) == pytest.approx(1000 * (found + shift), rel=1e-6)


def _apart(u: formulas.Array, v: formulas.Array) -> formulas.Array:
    squared: formulas.Array = np.square(u[:, None] - v[None]).sum(2)
    return squared


def test_published_formulas() -> None:
    few, some = REFERENCE[:120], IMAGES[:150]
    expected = dict(
        zip(("density", "coverage"), formulas.density_coverage(few, some), strict=True),
        kd=formulas.kernel_distance(few, some),
        mmd=formulas.gaussian_distance(few, some),
        vendi=formulas.vendi(some),
    )
    assert expected.keys() == set(FURTHER)
    for name, number in expected.items():
        assert value(name, some, few) == pytest.approx(number, rel=1e-9), name


def test_copies_of_the_reference() -> None:
    # Itself and k - 1 others lie within each ball; the k-th is its surface, in or out by rounding.
    assert 1 <= value("density", REFERENCE) <= 1 + 1 / 5
    assert value("coverage", REFERENCE) == 1
    assert value("mmd", REFERENCE) == pytest.approx(0, abs=1e-9)
    assert value("kd", REFERENCE) < 0  # the unbiased estimate of 0 leaves the copies' pairs in


def test_one_image_again_and_again() -> None:
    same = np.repeat(REFERENCE[:1], 40, axis=0)
    assert value("vendi", same) == pytest.approx(1)
    # It crowds the balls of its neighbours, and hardly any other real image is covered.
    assert value("coverage", same) < 0.05 < value("density", same)
    assert value("mmd", same) > 10 * value("mmd", IMAGES)
    assert value("kd", same) > 10 * value("kd", IMAGES)


def test_images_far_from_the_reference() -> None:
    far = IMAGES + 100
    assert (value("density", far), value("coverage", far)) == (0, 0)
    assert 1500 < value("mmd", far) < 2000  # kernels near 1 within the sets, and none between


def test_vendi_counts_kinds_of_images() -> None:
    kinds = np.eye(24, dtype=np.float32)[np.arange(60) % 6]
    assert value("vendi", kinds) == pytest.approx(6)
    assert value("vendi", kinds * np.arange(1, 61, dtype=np.float32)[:, None]) == pytest.approx(6)


def test_unbiased_distances_do_not_depend_on_how_many_images_there_are() -> None:
    """Over random parts of a set, KD's mean is KD of the set; FD's is larger."""
    whole = formulas.made(21, 2000, 8)
    random = np.random.Generator(np.random.Philox(key=[22, 0]))
    parts = [whole[random.permutation(2000)[:50]] for _ in range(200)]
    other = formulas.made(23, 300, 8, 1.3)
    several = [value("kd", part, other) for part in parts]
    error = np.std(several) / np.sqrt(len(several))
    assert abs(np.mean(several) - value("kd", whole, other)) < 4 * error


@pytest.mark.parametrize("name", FURTHER)
def test_groups_and_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few, some = REFERENCE[:120], IMAGES[:150]
    whole = value(name, some, few)
    assert value(name, some, few, groups=8) == pytest.approx(whole, rel=1e-9)
    monkeypatch.setattr(pr, "BLOCK", 64)
    assert value(name, some, few) == pytest.approx(whole, rel=1e-9)
    # Some groups are measured as if the others were not there.
    kind = METRICS[name]
    against: tuple[Tensor, ...] = () if kind.reference is None else (torch.from_numpy(few),)
    metric = kind.metric(*against, groups=8)
    metric.update(torch.from_numpy(some), torch.arange(150))
    chosen = np.isin(group_of(torch.arange(150), 8).numpy(), [1, 4])
    alone = kind.metric(*against)
    alone.update(torch.from_numpy(some[chosen]), torch.arange(int(chosen.sum())))
    assert metric.value([1, 4]) == pytest.approx(alone.value(), rel=1e-9)


@pytest.mark.parametrize("name", FURTHER)
def test_too_few_images_are_refused(name: str) -> None:
    kind = METRICS[name]
    against: tuple[Tensor, ...] = () if kind.reference is None else (torch.from_numpy(REFERENCE),)
    with pytest.raises(ValueError, match="0 images: expected"):
        kind.metric(*against).value()


def test_a_reference_without_neighbours_is_refused() -> None:
    with pytest.raises(ValueError, match="5 reference images: expected more than k=5"):
        value("density", IMAGES, REFERENCE[:5])


def test_names_are_known_without_importing_a_metric() -> None:
    assert metric_names() == tuple(METRICS)
    assert usual_metrics() == ("fid", "sfid", "is", "precision", "recall")


def test_every_metric_says_what_stands_in_tables() -> None:
    for name, kind in METRICS.items():
        assert kind.tells and kind.cost and kind.source, name
        assert isinstance(kind.higher_is_better, bool), name


def test_the_page_has_the_table_of_metrics() -> None:
    assert metric_table.PAGE.read_text(encoding="utf-8") == metric_table.written(), (
        "run python -m benchmarks.metric_table"
    )
