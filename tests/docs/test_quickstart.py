"""The notebook docs/quickstart.ipynb, run as a reader runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def test_it_is_kept_without_results_and_its_links_lead_somewhere() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    text = "".join(line for cell in cells for line in cell["source"])
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    assert targets and all((NOTEBOOK.parent / target).exists() for target in targets)


@pytest.mark.slow
def test_it_runs_and_shows_images_gallery_and_numbers() -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient: pip install -e '.[dev]'")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(ROOT)}}
    client = nbclient.NotebookClient(
        notebook, kernel_name="python3", resources=where, startup_timeout=300
    )
    client.execute()
    shown: dict[str, Any] = {
        cell.id: [each.data for each in cell.outputs if "data" in each]
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert "0.7 M parameters, 10 classes" in shown["load"][0]["text/plain"]
    assert shown["sample"][0]["text/html"].count("<img ") == 2
    assert "image/png" in shown["tensor"][0]
    assert shown["gallery"][0]["text/html"].startswith("<iframe srcdoc=")
    (table,) = shown["compare"]
    for name in ("unguided", "SAG 0.5", "CFG 1.5"):
        assert name in table["text/html"] and name in table["text/plain"]
