"""The suite on several ranks, one of them without images, against a single process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from sag_dit.evaluation.ratios import FeatureSpace
from sag_dit.evaluation.suite import METRICS, Suite
from tests.evaluation.making import Tiny, pixels, reference_of

COUNT = 90


def measure(images: range, batch: int) -> dict[str, object]:
    extractor, other = Tiny(), Tiny(seed=1)
    space = FeatureSpace.of(other, reference_of(other), reference_of(other, seed=2))
    reference = dataclasses.replace(reference_of(extractor), spaces=[space])
    verifiers = {"bright": lambda shown, condition: shown.mean((1, 2, 3))}
    names = (*METRICS, *verifiers)
    suite = Suite(extractor, reference, names, verifiers=verifiers, split_size=40)
    every = pixels(COUNT, 1)
    for start in range(images.start, images.stop, batch):
        chosen = torch.arange(start, min(start + batch, images.stop))
        suite.update(every[chosen], chosen)
    found: dict[str, object] = {
        "metrics": suite.compute(),
        "warnings": suite.warnings(),
        "confidence": suite.confidence(repeats=3),
        "count": suite.count(),
    }
    # The states are the rank's own again, so that more images can follow.
    suite.update(pixels(1, 2), torch.tensor([1000 + images.start]))
    found["later"] = suite.count() - COUNT
    return found


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    # The last rank has nothing; the others unequal shares.
    edges = {2: [0, COUNT, COUNT], 3: [0, 20, COUNT, COUNT]}[world]
    found = measure(range(edges[rank], edges[rank + 1]), batch=32)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_with_one_process(world: int, tmp_path: Path) -> None:
    alone = measure(range(COUNT), batch=COUNT)
    # Forked, so that no rank has to import torch again.
    multiprocessing.start_processes(  # type: ignore[no-untyped-call]
        work, (world, str(tmp_path)), nprocs=world, start_method="fork"
    )
    for rank in range(world):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-9)
        for name in ("recall", "coverage", "kd"):  # of images in one order, bit for bit
            assert found["metrics"][name] == alone["metrics"][name]  # type: ignore[index]
        assert found["warnings"] == alone["warnings"]
        assert found["count"] == alone["count"] == COUNT
        assert found["later"] == world
        for name, (mean, spread) in alone["confidence"].items():  # type: ignore[attr-defined]
            assert found["confidence"][name] == pytest.approx([mean, spread], rel=1e-6)
