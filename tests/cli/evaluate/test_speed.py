"""``evaluate.py`` in another arithmetic than float32."""

from __future__ import annotations

import pytest
import torch

from tests.cli.evaluate.conftest import Evaluate

FEW = ("metrics=[fid]", "confidence.repeats=0", "cfg_scale=1.5")


def test_a_speed_is_told_and_measured_for_itself(draw: Evaluate) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        exact, fast = draw(*FEW), draw(*FEW, "speed=fast", "compile=false")
    finally:
        torch.set_float32_matmul_precision(before)
    assert "speed:" not in exact.out
    assert fast.out.count("speed: network bf16, TF32\n") == 1
    (one,), (other,) = exact.results, fast.results
    facts, others = one["facts"], other["facts"]
    assert (facts["trainer_precision"], others["trainer_precision"]) == ("32-true", "bf16-true")
    assert others["matmul"] == "high" and "matmul" not in facts
    first, second = one["metrics"]["fid"], other["metrics"]["fid"]
    assert first != second and abs(first - second) < 0.1 * first


def test_each_setting_of_a_sweep_has_its_own_products(
    draw: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    outcome = draw("-m", *FEW, "matmul=highest,high")
    assert outcome.code == 0, outcome.err
    assert set_to == ["highest", "high"]
    assert [row["facts"].get("matmul", "highest") for row in outcome.results] == ["highest", "high"]
