"""What ``benchmarks.torture`` counts, on programs whose faults are known; a short form of it."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import torture
from benchmarks.torture import Case, Moment, Setting, compared, undisturbed

PROGRAM = """
import json, os, subprocess, sys, time
from io import BytesIO
from pathlib import Path

from PIL import Image

way, image, again = sys.argv[1], Path("0.png"), Path("begun").exists()
Path("begun").touch()
whole = BytesIO()
Image.new("L", (64, 64), 7).save(whole, format="PNG")

if way == "duplicates" or not Path("manifest.jsonl").exists():
    with Path("manifest.jsonl").open("a") as lines:
        lines.write(json.dumps({"file": "0.png"}) + "\\n")
if Path("waits").exists() and not again:
    if way == "broken":
        image.write_bytes(whole.getvalue()[:50])
    if way in ("orphans", "goes on"):
        environment = {**os.environ, **({"LOCAL_RANK": "1"} if way == "goes on" else {})}
        code = "import time; open('ready', 'w').close(); time.sleep(60)"
        subprocess.Popen([sys.executable, "-c", code], env=environment)
        while not Path("ready").exists():
            time.sleep(0.01)
    Path("0.png.tmp").write_bytes(b"half")
    time.sleep(60)
if way == "failures" and again:
    sys.exit("no luck")
if way == "different" and again:
    Image.new("L", (64, 64), 8).save(image)
if not image.exists() and not (way == "missing" and again):
    image.write_bytes(whole.getvalue())
"""


class Last(random.Random):
    """Chooses the last rank."""

    def choice(self, seq: Sequence[Any]) -> Any:
        return seq[-1]


@pytest.mark.parametrize(
    ("way", "faults"),
    [
        ("well", {}),
        ("broken", {"broken": 1}),
        ("missing", {"missing": 1}),
        ("different", {"different": 1}),
        ("duplicates", {"duplicates": 1, "different": 1}),  # the manifest itself
        ("failures", {"failures": 1, "missing": 1}),
        ("orphans", {"orphans": 1}),
        ("goes on", {"failures": 1}),
    ],
)
def test_every_fault_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, faults: dict[str, int]
) -> None:
    monkeypatch.setattr(torture, "OUTLIVES", 3.0)
    monkeypatch.setattr(torture, "ENDS", 0.2)
    setting = Setting("program", ("-c", PROGRAM, way))
    undisturbed(setting, tmp_path / "whole")
    case = Case(setting, tmp_path / "case", Counter(), [])
    case.folder.mkdir()
    (case.folder / "waits").touch()

    assert case.kill(Last(), Moment(None, 1))
    case.repeat()
    for kind, what in compared(tmp_path / "whole", case.folder):
        case.note(kind, what)
    assert {key: case.counts[key] for key in torture.FAULTS if case.counts[key]} == faults
    assert (case.counts["kills"], case.counts["cut"]) == (1, 1)
    assert len(case.notes) == sum(faults.values())


@pytest.mark.slow
@pytest.mark.parametrize("only", ["sample on 2", "train on 1"])
def test_a_short_form_finds_nothing(tmp_path: Path, only: str) -> None:
    out = tmp_path / "found" / "torture.json"
    assert torture.main(["--kills", "2", "--only", only, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    counts = found["counts"][only]
    assert found["faults"] == []
    assert counts["kills"] == 2
    assert counts["files"] > 2
