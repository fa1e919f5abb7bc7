"""What the site holds beside docs/: the README, the API's pages, and the files that pages link to.

Links stand in the pages as a forge follows them, from file to file. Here they lead to the page of
the same file: a page of Markdown as it is, any other text as a listing.
"""

from __future__ import annotations

import inspect
import os
import posixpath
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from pkgutil import iter_modules
from textwrap import dedent
from typing import Any

import griffe
import nbformat
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

import sag_dit

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"""(\]\(|(?:src|href)=")([^)\s"#:]+)(?=[)\s"#])""")
"""A link to a file, in Markdown or in HTML, without the place on its page."""
EXAMPLE = re.compile(r"^Example::?\n+((?: +.*\n|\n)+)", re.MULTILINE)
ROLE = re.compile(r":\w+:`~?([\w.]+)`")
PICTURES = (".png", ".webp")
PAGES = (".md", ".ipynb", *PICTURES)
"""What the site shows as it is; of all other files it shows the text."""
HIDDEN = "---\nsearch: {exclude: true}\n---\n"


def place(path: Path) -> str:
    """Return where the page of a file or folder lies on the site."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        return f"source/{name}/index.md"
    if name == "README.md":
        return "index.md"
    if name.startswith("docs/") and path.suffix in PAGES:
        return name.removeprefix("docs/").replace(".ipynb", ".md")
    return name if path.suffix in PAGES else f"source/{name}.md"


def linked(text: str, folder: Path) -> Iterator[Path]:
    """Yield the files and folders that a page in a folder links to."""
    for _, target in LINK.findall(text):
        path = Path(os.path.normpath(folder / target))
        if path.exists() and path.is_relative_to(ROOT):
            yield path


def shown(path: Path) -> str:
    """Return the page of a file or folder, in Markdown with a forge's links."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        below = sorted(each for each in path.iterdir() if not each.name.startswith(("_", ".")))
        lines = [f"- [{each.name}]({path.name}/{each.name})" for each in below]
        return f"{HIDDEN}# {name}/\n\n" + "\n".join(lines)
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = f"(binary, {path.stat().st_size:,} bytes)"
    return f"{HIDDEN}# {name}\n\n``````{path.suffix.removeprefix('.')}\n{text}\n``````\n"


def executed(path: Path) -> tuple[str, dict[str, bytes]]:
    """Run a notebook, and return it in Markdown and the pictures that it drew, by their names.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources=where,
        startup_timeout=300,  # seconds, on a busy machine
        coalesce_streams=True,
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        # What libraries warn of on stderr concerns this machine alone.
        cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
        for output in cell.outputs:
            page = output.get("data", {}).get("text/html")
            if page:  # On one line, or what is empty in it would end the HTML for Markdown.
                output.data["text/html"] = f"<div>{page}</div>".replace("\n", "&#10;")
    text, made = MarkdownExporter().from_notebook_node(notebook)
    return text, made["outputs"]


def reference() -> Iterator[tuple[str, str]]:
    """Yield the API's pages: the public names, and one page for each part of the package."""
    lines = ["# API", "", "What `import sag_dit` offers:", ""]
    for name in sag_dit.__all__:
        thing = getattr(sag_dit, name)
        home = getattr(thing, "__module__", "sag_dit") + f".{name}"
        meaning = ROLE.sub(r"`\1`", inspect.getdoc(thing).partition("\n")[0])
        lines.append(f"- [`{name}`][{home}]: {meaning}")
    yield "reference/index.md", "\n".join(lines)
    for part in iter_modules(sag_dit.__path__):
        if part.name != "__main__":
            yield f"reference/{part.name}.md", f"::: sag_dit.{part.name}\n"


class Docstrings(griffe.Extension):
    """Docstrings in Markdown, and each thing once: where it is defined."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Turn examples into code and names into links; leave out what stands elsewhere too."""
        waiting: list[griffe.Object] = [pkg]
        for thing in waiting:
            if thing.docstring is not None:
                code = EXAMPLE.sub(_fenced, thing.docstring.value + "\n")
                thing.docstring.value = ROLE.sub(partial(_linked, thing), code)
            for member in thing.members.values():
                if isinstance(member, griffe.Object):
                    waiting.append(member)
                elif thing.is_module:
                    member.public = False


def _fenced(example: re.Match[str]) -> str:
    return f"Example:\n\n```python\n{dedent(example[1]).strip()}\n```\n"


def _linked(scope: griffe.Object, role: re.Match[str]) -> str:
    """Return a name as a link, or as code where it has no page to lead to."""
    head, dot, rest = role[1].partition(".")
    try:
        path = role[1] if head == "sag_dit" else scope.resolve(head) + dot + rest
        thing = scope.modules_collection[path]
        known = thing.has_docstring and not thing.name.startswith("_")
    except (KeyError, griffe.GriffeError):
        known = False
    return f"[`{role[1]}`][{thing.canonical_path}]" if known else f"`{role[1]}`"


CARDS = sorted(ROOT.glob("sag_dit/checkpoints/*/README.md"))
ORIGIN: dict[str, Path] = {}
"""The file or folder that a page of the site shows."""


def on_config(config: Any) -> None:
    """Fill in the parts of the navigation that follow from the package."""
    first, *rest = (page for page, _ in reference())
    parts = [{f"sag_dit.{posixpath.basename(page).removesuffix('.md')}": page} for page in rest]
    own = {"API": [{"Public names": first}, *parts], "Models": [place(card) for card in CARDS]}
    for entry in config.nav:
        for name in own.keys() & entry.keys():
            entry[name] = own[name]


def on_files(files: Files, config: Any) -> None:
    """Add the pages that are no files of docs/, and those of all that is linked to."""
    for page, text in reference():
        files.append(File.generated(config, page, content=text))
    for path in sorted(ROOT.glob("docs/*.ipynb")):
        text, pictures = executed(path)
        files.append(File.generated(config, place(path), content=text))
        ORIGIN[place(path)] = path
        for name, content in pictures.items():
            files.append(File.generated(config, name, content=content))
    told = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *CARDS]
    waiting = list(told)
    for path in waiting:
        uri, text = place(path), "" if path.suffix in PICTURES else shown(path)
        if files.get_file_from_path(uri) is None:
            how = {"content": text} if text else {"abs_src_path": str(path)}
            level = InclusionLevel.INCLUDED if path in told else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, uri, inclusion=level, **how))
        ORIGIN[uri] = path
        if path.is_dir() or path.suffix == ".md":
            waiting += {*linked(text, path.parent)}.difference(waiting)


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Lead the links to files to their pages."""
    origin = ORIGIN.get(page.file.src_uri)
    if origin is None:
        return markdown
    here = posixpath.dirname(page.file.src_uri)

    def led(link: re.Match[str]) -> str:
        path = Path(os.path.normpath(origin.parent / link[2]))
        known = place(path) in ORIGIN if path.is_relative_to(ROOT) and path.exists() else False
        return link[1] + posixpath.relpath(place(path), here or ".") if known else link[0]

    return LINK.sub(led, markdown)


def outside(page: str) -> list[str]:
    """Return what a page loads from other hosts; a link to follow loads nothing."""
    loaded = r"<(?:script|img|iframe|video|source|link)\b[^>]*?(?:src|href)=\"?(https?:[^\s\">]+)"
    return re.findall(loaded, page)


def on_post_page(output: str, page: Page, config: Any) -> None:
    """Refuse a page that asks anything of the network.

    Raises:
        PluginError: it does; what it asks for is named.
    """
    asked = outside(output)
    if asked:
        raise PluginError(f"{page.file.src_uri} loads {asked[0]}; the site works without a network")
