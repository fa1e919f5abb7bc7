"""FDr: others' code, one network alone, several, real images, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sag_dit.evaluation.features import FeatureExtractor, Features
from sag_dit.evaluation.metrics import Moments, Statistics
from sag_dit.evaluation.ratios import FeatureSpace, FrechetRatio
from sag_dit.evaluation.suite import Suite
from sag_dit.study.setup import Ratio, Setups
from tests.evaluation import formulas
from tests.evaluation.formulas import made
from tests.evaluation.making import Tiny, pixels, reference_of

OTHERS = json.loads((Path(__file__).parent / "others.json").read_text())


class Known(FeatureExtractor):
    """Returns features that are known of each image by the number in its first pixels."""

    name, protocol = "known", {}

    def __init__(self, features: formulas.Array) -> None:
        super().__init__()
        self.features = torch.from_numpy(features)

    def forward(self, images: Tensor) -> Features:
        first = images[:, 0, 0].long()
        return Features(self.features[first[:, 0] + 256 * first[:, 1]])


def numbered(count: int) -> Tensor:
    """Images that hold their own number."""
    numbers = torch.arange(count)
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers % 256, numbers // 256
    return images


def statistics(features: formulas.Array) -> Statistics:
    moments = Moments()
    moments.update(torch.from_numpy(features))
    return moments.statistics()


def test_fd_loss() -> None:
    """As Jiawei-Yang/FD-loss at 5c03b81: compute_fid and the mean in eval_all_fds.py."""
    sets = [
        (made(2, 700, 24, 1.05, 0.05), made(1, 500, 24), made(11, 450, 24, 1.02)),
        (made(4, 700, 30, 0.9, 0.1), made(3, 500, 30, 0.9), made(12, 450, 30, 0.92)),
    ]
    spaces = []
    for images, reference, split in sets:
        real = formulas.frechet(split, reference)
        spaces.append(FeatureSpace(Known(images), statistics(reference), real, {}))
    metric = FrechetRatio(spaces)
    for chosen in torch.arange(700).tensor_split(3):
        metric.update(numbered(700)[chosen], chosen)
    assert float(metric.compute()) == pytest.approx(OTHERS["fdr"], rel=1e-6)


def spaces(*extractors: FeatureExtractor) -> list[FeatureSpace]:
    return [
        FeatureSpace.of(each, reference_of(each, seed=0), reference_of(each, seed=2))
        for each in extractors
    ]


def suite(*extractors: FeatureExtractor, groups: int | None = None, more: str = "fid") -> Suite:
    main = Tiny()
    reference = dataclasses.replace(reference_of(main), spaces=spaces(*extractors))
    return Suite(main, reference, (more, "fdr"), groups=groups)


def test_the_real_split_itself_has_1_and_the_reference_0() -> None:
    images = torch.arange(120)
    for seed, expected in ((2, 1.0), (0, 0.0)):
        metric = FrechetRatio(spaces(Tiny(), Tiny(seed=1)))
        metric.update(pixels(120, seed), images)
        assert float(metric.compute()) == pytest.approx(expected, abs=1e-9)


def test_it_is_the_mean_over_networks_of_fd_over_that_of_the_split() -> None:
    one, other = suite(Tiny()), suite(Tiny(seed=1))
    both = suite(Tiny(), Tiny(seed=1))
    for each in (one, other, both):
        for chosen in torch.arange(100).split(33):
            each.update(pixels(100, 1)[chosen], chosen)
    found = both.compute()["fdr"]
    assert found == pytest.approx((one.compute()["fdr"] + other.compute()["fdr"]) / 2)
    real = spaces(Tiny())[0].real
    assert one.compute()["fdr"] == pytest.approx(one.compute()["fid"] / real)
    # Halves of the images have their own, and a suite that forgot them has none.
    assert both.confidence(4)["fdr"][1] > 0
    both.reset()
    with pytest.raises(ValueError, match="0 images"):
        both.compute()


def test_a_split_that_is_the_reference_is_refused() -> None:
    extractor = Tiny()
    same = reference_of(extractor, seed=0)
    with pytest.raises(ValueError, match="expected real images that the reference does not hold"):
        FeatureSpace.of(extractor, same, same)


def test_features_alone_are_not_enough() -> None:
    with pytest.raises(ValueError, match="metrics=fdr looks at the images"):
        suite(Tiny()).update_features(Features(torch.zeros(2, 16)), torch.arange(2))


GREY = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)


def test_a_bundled_reference_brings_its_other_half() -> None:
    setups = Setups("cpu")
    found = setups.setup(GREY, metrics=["fdr"], fdr=Ratio(["digits"]))
    assert found.reference.name == "digits:report"
    (told,) = found.told()["fdr"]
    assert told["split"] == "digits:tune" and told["fd"] > 0
    stated = setups.setup(GREY, metrics=["fdr"], fdr=Ratio([Tiny()], "digits:train"))
    (other,) = stated.told()["fdr"]
    assert other["split"] == "digits:train" and other["network"]["name"] == "tiny"
    assert setups.setup(GREY, metrics=["fid"], fdr=Ratio(["digits"])).told()["fdr"] is None


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (None, r"metrics=fdr needs fdr.features=\[NAME,NAME\]"),
        (Ratio([]), "metrics=fdr needs"),
        (Ratio(["digits", "clippy"]), "fdr: features=clippy: expected one of"),
        (Ratio(["patches"]), r"fdr: .*the features `patches` expect uint8 images \(3, 32"),
        (Ratio(["digits"], "digits:report"), "real images that the reference does not hold"),
    ],
)
def test_what_fdr_lacks_is_said(ratio: Ratio | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setups("cpu").setup(GREY, metrics=["fid", "fdr"], fdr=ratio)


def test_a_reference_of_one_s_own_needs_a_split(tmp_path: Path) -> None:
    for name, seed in (("real", 0), ("other", 2)):
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels(60, seed).permute(0, 2, 3, 1).numpy())
    own, split = f"{tmp_path}/real.npz", f"{tmp_path}/other.npz"
    known = {"metrics": ["fdr"], "features": Tiny(), "reference": own}
    with pytest.raises(ValueError, match=r"fdr.split is not set: expected real images that .*real"):
        Setups("cpu").setup(GREY, fdr=Ratio([Tiny()]), **known)  # type: ignore[arg-type]
    found = Setups("cpu").setup(GREY, fdr=Ratio(["tiny"], split), **known)  # type: ignore[arg-type]
    assert found.told()["fdr"][0]["fd"] > 0
