"""The models that the studio may load: named ones that are here, and files in chosen folders."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import sag_dit.api as api
from sag_dit.api import LoadedModel
from sag_dit.checkpoints import is_text, zoo
from sag_dit.guidance import Term

KEPT = 2
"""Models that stay in memory."""


@dataclass
class Library:
    """Loads checkpoints by name or path, each once, and nothing from outside of its folders.

    ``folders`` are those whose files may be read, ``device`` is where models compute. ``trusted``
    are checkpoints that whoever started the studio named, which may lie anywhere and be downloaded.

    Example:
        >>> "digits" in Library().choices()
        True
    """

    folders: Sequence[Path] = ()
    device: str = "cpu"
    trusted: tuple[str, ...] = ()
    uploads: Path | None = None
    _loaded: dict[str, LoadedModel] = field(default_factory=dict, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def choices(self) -> list[str]:
        """Return what can be chosen: named models that are on this machine, then the folders'."""
        named = [each.entry.name for each in zoo.listed() if each.found and _draws(each.entry.kind)]
        return [*dict.fromkeys([*self.trusted, *named, *self._own()])]

    def _own(self) -> Iterator[str]:
        for folder in self.folders:
            for path in sorted(folder.glob("*")) + sorted(folder.glob("*/*")):
                trained = (path / "checkpoints").is_dir() or (path / "model_index.json").is_file()
                if trained or (path.suffix in zoo.FILE_SUFFIXES and path.is_file()):
                    yield str(path)

    def inside(self, path: str | Path) -> Path:
        """Return a path as it really is.

        Raises:
            ValueError: it lies outside of the folders.
        """
        real = Path(path).expanduser().resolve()
        allowed = [*self.folders, *([self.uploads] if self.uploads else [])]
        if not any(real.is_relative_to(folder.resolve()) for folder in allowed):
            shown = ", ".join(map(str, self.folders)) or "no folder"
            raise ValueError(
                f"{path}: outside of the studio's folders ({shown}); start it with folder=FOLDER, "
                f"or upload the checkpoint"
            )
        return real

    def told(self, text: str) -> str:
        """Return a text in which uploads go by the names that they came with."""
        return text if self.uploads is None else re.sub(rf"{self.uploads}/\w+/", "", text)

    def allow(self, ckpt: str) -> None:
        """Refuse a checkpoint that is neither named, nor here, nor in a chosen folder.

        Raises:
            ValueError: it is elsewhere, or would have to be downloaded.
        """
        names = {each.entry.name: each for each in zoo.listed()}
        known = names.get(ckpt)
        if ckpt in self.trusted or (known is not None and known.found):
            return
        if known is not None:
            raise ValueError(
                f"ckpt={ckpt}: the weights are not on this machine, and the studio downloads "
                f"nothing; start it with ckpt={ckpt}, or draw with it once by sample.py"
            )
        self.inside(ckpt)

    def text(self, ckpt: str) -> bool:
        """Whether a checkpoint is asked with a prompt."""
        self.allow(ckpt)
        return is_text(ckpt)

    def load(self, ckpt: str, prompt: str | None = None) -> LoadedModel:
        """Return a model, of a text pipeline as one whose only class is the prompt.

        Raises:
            ValueError: it may not be loaded, or cannot be.
        """
        self.allow(ckpt)
        with self._lock:
            model = self._loaded.pop(ckpt, None)
            if model is None:
                text = is_text(ckpt)
                model = (
                    api.load_text(ckpt, prompt or " ", device=self.device)
                    if text
                    else api.load(ckpt, device=self.device)
                )
            self._loaded[ckpt] = model
            while len(self._loaded) > KEPT:
                del self._loaded[next(iter(self._loaded))]
        return model if prompt is None else model.prompted(prompt)

    def ready(self, terms: Mapping[str, Term]) -> dict[str, Term]:
        """Return methods with the models that they name loaded.

        Raises:
            ValueError: one may not be loaded, or cannot be.
        """
        for term in terms.values():
            name = getattr(term, "ckpt", None) or getattr(term, "classifier", None)
            if isinstance(name, str):
                self.allow(name)
        return api.with_models(terms)


def _draws(kind: str) -> bool:
    return kind in ("bundled", "model")
