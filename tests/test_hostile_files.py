"""Every reader of a text file, given what was made to harm it: one sentence that names the file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sag_dit.checkpoints import files
from sag_dit.checkpoints.formats import read_scheduler
from sag_dit.cli.run_identity import recorded_config
from sag_dit.codec import read_vae_config
from sag_dit.data.encoding import LatentFolder
from sag_dit.data.labels import read_labels
from sag_dit.data.requests import read_requests
from sag_dit.data.shards import read_index
from sag_dit.evaluation.images import ManifestRow
from sag_dit.study.results import Record, read_record, write_record
from sag_dit.training.loggers import CSVLog
from sag_dit.untrusted import read_json_lines, read_text

Read = Callable[[Path], Any]

DEEP = b"[" * 200_000 + b"]" * 200_000
READERS: dict[str, Read] = {
    "records/1f3a.json": lambda file: read_record(file.parent, "1f3a"),
    "manifest.jsonl": lambda file: list(read_json_lines(file, ManifestRow)),
    "latents/config.json": lambda file: LatentFolder(file.parent).claim({"size": 8}),
    "latents/records/00003.json": lambda file: LatentFolder(file.parents[1]).record(3),
    "latents/index.json": lambda file: read_index(file.parent),
    "run/config.yaml": lambda file: recorded_config(file.parent),
    "run/logs/metrics.csv": lambda file: CSVLog(file.parents[1], first_step=5),
    "requests.csv": lambda file: read_requests(file, ["cat", "dog"]),
    "vae/config.json": lambda file: read_vae_config(file.parent),
    "labels.csv": lambda file: read_labels(read_text(file), str(file)),
    "dataset.json": lambda file: read_labels(read_text(file), str(file)),
    "scheduler_config.json": read_scheduler,
    "model/config.json": files.read_json,
    "unet/diffusion_pytorch_model.safetensors.index.json": lambda file: files.weights_files(
        file.parent
    ),
}


def refusal(read: Read, file: Path, content: bytes) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read(file)
    told = str(caught.value)
    assert file.name in told and str(file.parent) in told
    assert len(told) < len(str(file)) * 2 + 500
    return told


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe{\x00", b"{}\xff", DEEP, b'{"a": ' + DEEP + b"}", b"1", b"[[1, 2], [3]]", b"\x00"],
    ids=["UTF-16", "Latin-1", "deep", "deep value", "number", "list", "null byte"],
)
def test_what_is_no_such_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    refusal(READERS[name], tmp_path / name, content)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("records/1f3a.json", {"metrics": {"fid": "x"}}, "metrics={fid: x}: expected a mapping"),
        ("records/1f3a.json", {"metrics": {}}, "spread is missing: .*delete it and repeat"),
        ("records/1f3a.json", {"metrics": 3}, "metrics=3: expected a mapping; delete it"),
        ("manifest.jsonl", {"index": 1e400, "label": 0}, "line 1: index=inf: expected a whole"),
        ("manifest.jsonl", {"index": 2**64, "label": 0}, "index=1844674.*: expected a whole"),
        ("manifest.jsonl", {"index": {}, "label": 0}, "index={}: expected a whole number"),
        ("manifest.jsonl", {"label": 0}, "line 1: index is missing"),
        ("latents/records/00003.json", {"file": "../x"}, "file=../x: expected the name of a file"),
        ("latents/index.json", {"format": 1, "shards": 3}, "config is missing"),
        ("run/config.yaml", {"settings": [1]}, r"settings=\[1\]: expected a mapping"),
        ("run/config.yaml", {"config": {"data": [1]}}, r"config.data=\[1\]: expected a mapping"),
        ("vae/config.json", {"block_out_channels": [0]}, r"block_out_channels=\[0\]: expected"),
        ("vae/config.json", {"block_out_channels": [8] * 90}, "expected 1 to 16 numbers"),
        ("vae/config.json", {"layers_per_block": 1e9}, "layers_per_block=1000000000.0: expected"),
        ("vae/config.json", {"scaling_factor": "a"}, "scaling_factor=a: expected a number"),
        ("scheduler_config.json", {"num_train_timesteps": 1e9}, "num_train_timesteps=1000000000"),
        ("scheduler_config.json", {"num_train_timesteps": "a"}, "num_train_timesteps=a: expected"),
        ("scheduler_config.json", {"beta_start": -1}, "beta_start=-1: expected a number, 0 to 1"),
        ("scheduler_config.json", {"beta_start": "a"}, "beta_start=a: expected a number"),
        ("scheduler_config.json", {"beta_schedule": []}, r"beta_schedule=\[\]: expected text"),
        ("scheduler_config.json", {"prediction_type": {}}, "prediction_type={}: expected text"),
        (
            "unet/diffusion_pytorch_model.safetensors.index.json",
            {"weight_map": {"a": "../../x"}},
            "expected names of files beside it",
        ),
    ],
)
def test_values_are_held_against_the_file_s_schema(
    name: str, content: dict[str, Any], told: str, tmp_path: Path
) -> None:
    kind = {"_class_name": "AutoencoderKL"} if name.startswith("vae") else {}
    text = json.dumps(content | kind).replace("Infinity", "1e999")
    refused = refusal(READERS[name], tmp_path / name, text.encode())
    assert re.search(told, refused), refused


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("step,loss\n1,2,3\n", "line 2: step='1': expected a row of 2 values"),
        ("step,loss\n1,2\nx,2\n", "line 3: step='x': expected .* number of its step; move it away"),
        ("loss\n1\n", "line 1: expected a column of steps; move it away"),
        ("step\n" + "1" * 200_000, "no row of CSV"),
    ],
)
def test_a_log_that_cannot_be_gone_on_with_is_named(lines: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "logs" / "metrics.csv"
    file.parent.mkdir()
    file.write_text(lines)
    with pytest.raises(
        ValueError, match=rf"metrics\.csv, {told}" if told.startswith("line") else told
    ):
        CSVLog(tmp_path)
    assert file.read_text() == lines


def test_a_log_whose_last_row_was_cut_is_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "metrics.csv"
    file.parent.mkdir()
    for before, after in (("", "step,loss"), ("step,loss\n7,0.5\n8", "step,loss 7,0.5 8, 9,0.25")):
        file.write_text(before)
        log = CSVLog(tmp_path, first_step=9)
        log.log_metrics({"loss": 0.25}, step=9)
        assert file.read_text().split() == [*after.split(), *["9,0.25"] * (not before)]


def test_a_number_that_is_not_finite_is_kept_as_null(tmp_path: Path) -> None:
    record = Record({"fid": float("nan")}, {"fid": 0.5}, {"seed": 0}, ("few images",), 2.0)
    write_record(tmp_path, "1f3a", record)
    again = read_record(tmp_path, "1f3a")
    assert again == Record({"fid": None}, {"fid": 0.5}, {"seed": 0}, ["few images"], 2.0)  # type: ignore[dict-item]
