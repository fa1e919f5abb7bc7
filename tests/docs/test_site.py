"""The pages in Markdown, as a forge shows them and as ``make docs`` builds them into a site."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sag_dit

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "sag_dit/**/*.md") for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\]\(([^)\s]+)|(?:src|href)=\"([^\"]+)")
OUTSIDE = re.compile(r"[a-z]+:")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/hooks.py, which no package holds."""
    for library in ("mkdocs", "griffe", "nbconvert"):
        pytest.importorskip(library, reason=f"{library} is not installed: pip install -e '.[docs]'")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def heading_names(text: str) -> set[str]:
    """The places on a page that a link can name, as forges and the site make them of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", each.lower()).strip().replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_of_the_repository(page: Path) -> None:
    for found in LINK.findall(page.read_text(encoding="utf-8")):
        target = found[0] or found[1]
        if OUTSIDE.match(target):
            continue
        name, _, anchor = target.partition("#")
        path = Path(os.path.normpath(page.parent / name)) if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in heading_names(path.read_text(encoding="utf-8")), target


def test_a_link_leads_to_the_page_of_its_file(hooks: ModuleType) -> None:
    assert hooks.place(ROOT / "README.md") == "index.md"
    assert hooks.place(ROOT / "docs" / "guidance.md") == "guidance.md"
    assert hooks.place(ROOT / "CONTRIBUTING.md") == "CONTRIBUTING.md"
    assert hooks.place(Path(__file__)) == "source/tests/docs/test_site.py.md"
    assert hooks.place(ROOT / "docs" / "images") == "source/docs/images/index.md"
    assert hooks.place(ROOT / "configs") == "source/configs/index.md"
    listing = hooks.shown(ROOT / "configs" / "logger")
    assert "- [wandb.yaml](logger/wandb.yaml)" in listing
    below = set(hooks.linked(listing, ROOT / "configs"))
    assert below == set((ROOT / "configs" / "logger").iterdir())


def test_the_api_has_every_public_name_and_every_part(hooks: ModuleType) -> None:
    pages = dict(hooks.reference())
    for name in sag_dit.__all__:
        assert f"[`{name}`]" in pages["reference/index.md"]
    parts = {
        path.stem
        for path in (ROOT / "sag_dit").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    expected = {f"reference/{part}.md" for part in parts - {"__init__", "__main__"}}
    assert pages.keys() == expected | {"reference/index.md"}


def test_docstrings_become_markdown(hooks: ModuleType, tmp_path: Path) -> None:
    import griffe

    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("from mine.inner import draw\n__all__ = ['draw']\n")
    (package / "inner.py").write_text(
        '''
def draw() -> int:
    """Draw as :func:`other` does, not :meth:`Nothing.here`.

    Example::

        draw()

    Raises:
        ValueError: never.
    """
def other() -> int:
    """Return a number.

    Example:
        >>> other()
        [1]
    """
'''
    )
    loaded = griffe.load(
        "mine", search_paths=[tmp_path], extensions=griffe.load_extensions(hooks.Docstrings)
    )
    drawn = loaded["inner.draw"].docstring.value
    assert "[`other`][mine.inner.other]" in drawn and "`Nothing.here`" in drawn
    assert ":meth:" not in drawn
    assert "```python\ndraw()\n```" in drawn and "\nRaises:\n" in drawn
    assert "```python\n>>> other()\n[1]\n```" in loaded["inner.other"].docstring.value
    # Once, where it is defined.
    assert loaded["inner.draw"].is_public and not loaded["draw"].is_public


def test_a_page_that_loads_from_elsewhere_is_found(hooks: ModuleType) -> None:
    fine = '<a href="https://example.org/">there</a><img src="a.png"><script src="b.js"></script>'
    assert hooks.outside(fine) == []
    for asked in (
        '<script async src="https://example.org/x"></script>',
        "<link rel=stylesheet href=https://example.org/x>",
        '<img alt="" src="https://example.org/x">',
    ):
        assert hooks.outside(fine + asked) == ["https://example.org/x"]


@pytest.mark.slow
def test_the_site_is_built_strictly(hooks: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    guidance = (tmp_path / "guidance.html").read_text(encoding="utf-8")
    assert 'href="source/tests/guidance/test_sag.py.html"' in guidance
    assert (tmp_path / "source/tests/guidance/test_sag.py.html").is_file()
    quickstart = (tmp_path / "quickstart.html").read_text(encoding="utf-8")
    assert "<iframe srcdoc=" in quickstart and "SAG 0.5" in quickstart
    api = (tmp_path / "reference" / "api.html").read_text(encoding="utf-8")
    assert 'id="sag_dit.api.LoadedModel.sample"' in api
