"""The folder of a run: files that are whole or not there, and what is still missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sag_dit.files import atomic
from sag_dit.output.folder import SampleFolder, read_png, read_views, write_png, write_views
from sag_dit.sampling import Drawn, Request
from sag_dit.traces import StepView, Trace

SETTINGS = {"steps": 50, "guidance": {"sag": {"scale": 1.0}}, "request": {"seed": 0}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def image(seed: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 6, channels), dtype=np.uint8)


def requests(count: int) -> list[Request]:
    return [Request(i, 0, 0, stream=i) for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> SampleFolder:
    folder = SampleFolder(tmp_path / "run")
    folder.claim(SETTINGS, {})
    return folder


def test_atomic_writes_whole_files(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for text in ("first", "second"):
        with atomic(file) as temporary:
            temporary.write_text(text)
            assert not file.exists() or file.read_text() == "first"
        assert file.read_text() == text
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [None, "finished"])
def test_atomic_leaves_nothing_partial_after_an_exception(
    tmp_path: Path, error: type[BaseException], before: str | None
) -> None:
    file = tmp_path / "a.txt"
    if before is not None:
        file.write_text(before)
    with pytest.raises(error), atomic(file) as temporary:
        temporary.write_text("half of i")
        raise error
    assert (file.read_text() if file.exists() else None) == before
    assert names(tmp_path) == ([] if before is None else ["a.txt"])


def test_atomic_does_not_mask_why_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "no" / "a.txt") as temporary:
        temporary.write_text("x")
    with pytest.raises(KeyError, match="reason"), atomic(tmp_path / "a.txt"):
        raise KeyError("reason")


KILLED_WHILE_WRITING = """
    import os, signal, sys
    from pathlib import Path

    from PIL import Image

    from sag_dit.files import atomic

    with atomic(Path(sys.argv[1])) as temporary:
        Image.new("RGB", (64, 64), (7, 7, 7)).save(temporary, format="PNG")
        if sys.argv[2] == "kill":
            content = temporary.read_bytes()
            temporary.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_sigkill_while_writing_leaves_no_broken_image(tmp_path: Path) -> None:
    file = tmp_path / "images" / "000000.png"
    file.parent.mkdir()
    program = [sys.executable, "-c", textwrap.dedent(KILLED_WHILE_WRITING), str(file)]
    killed = subprocess.run([*program, "kill"], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = names(file.parent)  # half an image, which nobody takes for one
    assert not left.endswith(".png")
    subprocess.run([*program, "live"], check=True)
    assert (read_png(file) == 7).all()


def test_images_and_views_are_written_so(tmp_path: Path, written: list[Path]) -> None:
    write_png(tmp_path / "a.png", image(0))
    write_views(tmp_path / "a.npz", views())
    assert written == [tmp_path / "a.png", tmp_path / "a.npz"]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_byte(tmp_path: Path, channels: int) -> None:
    pixels = image(0, channels)
    write_png(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(read_png(tmp_path / "a.png"), pixels)
    assert names(tmp_path) == ["a.png"]


def test_a_broken_png_is_named_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    write_png(file, image(0))
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"a\.png cannot be read .* delete it and repeat"):
        read_png(file)


def views() -> list[StepView]:
    saliency = np.random.default_rng(0).random((2, 4, 3), dtype=np.float32)
    return [
        StepView(index, 10, 900.5 - index, saliency[i], saliency[i] > 0.5, 1.25)
        for i, index in enumerate((0, 7))
    ]


def test_views_come_back_as_they_were(tmp_path: Path) -> None:
    write_views(tmp_path / "a.npz", views())
    for found, expected in zip(read_views(tmp_path / "a.npz"), views(), strict=True):
        assert (found.index, found.count, found.t) == (expected.index, expected.count, expected.t)
        assert found.threshold == expected.threshold
        np.testing.assert_array_equal(found.saliency, expected.saliency)
        np.testing.assert_array_equal(found.mask, expected.mask)
        assert found.mask.dtype == np.bool_
    assert read_views(tmp_path / "none.npz") == ()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but no more", b"something else"])
def test_broken_views_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
        read_views(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("save", "changed"),
    [
        (np.savez, {"count": None}),
        (np.savez, {"t": np.array(["a", "b"])}),
        (np.savez, {"saliency": np.zeros(2)}),
        (np.savez, {"index": np.zeros(3)}),
        (np.savez_compressed, {"mask": np.zeros((2, 1000, 1000), bool)}),
    ],
)
def test_arrays_that_are_no_views_are_named(
    save: Callable[..., None], changed: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "a.npz"
    write_views(file, views())
    with np.load(file) as whole:
        arrays = {name: whole[name] for name in whole.files}
    save(file, **{n: each for n, each in {**arrays, **changed}.items() if each is not None})
    with pytest.raises(ValueError, match=r"a\.npz cannot be read .* delete it and repeat"):
        read_views(file)


def test_claiming_twice_with_equal_settings_is_allowed(folder: SampleFolder) -> None:
    folder.claim(SETTINGS, {"num_images": 9})
    record = yaml.safe_load((folder.path / "config.yaml").read_text())
    assert record == {"settings": SETTINGS, "config": {"num_images": 9}}
    assert names(folder.path) == ["config.yaml", "images", "maps", "unguided"]


@pytest.mark.parametrize(
    ("settings", "differences"),
    [
        ({**SETTINGS, "steps": 20}, ["steps: there 50, now 20"]),
        (
            {**SETTINGS, "guidance": {"sag": {"scale": 0.5}, "cfg": {"scale": 2.0}}},
            [
                "guidance.cfg.scale: there not set, now 2.0",
                "guidance.sag.scale: there 1.0, now 0.5",
            ],
        ),
        ({**SETTINGS, "guidance": {}}, ["guidance.sag.scale: there 1.0, now not set"]),
    ],
)
def test_other_settings_are_refused_and_only_differences_named(
    folder: SampleFolder, settings: dict[str, object], differences: list[str]
) -> None:
    before = (folder.path / "config.yaml").read_bytes()
    with pytest.raises(ValueError) as error:
        folder.claim(settings, {})
    message = str(error.value)
    assert message.startswith(f"out={folder.path} holds images of other settings:\n")
    assert message.splitlines()[1:-1] == [f"  {difference}" for difference in differences]
    assert (folder.path / "config.yaml").read_bytes() == before


def test_a_file_or_a_place_below_one_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"cannot be used as a folder of images .* choose"):
            SampleFolder(path).claim(SETTINGS, {})
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root"
)
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    SampleFolder(tmp_path).claim(SETTINGS, {})
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="permission"):
            SampleFolder(tmp_path).claim(SETTINGS, {})
    finally:
        tmp_path.chmod(0o700)


def test_missing_are_images_and_for_the_gallery_twins(folder: SampleFolder) -> None:
    for index in (0, 1, 3):
        write_png(folder.image(index), image(index))
    write_png(folder.twin(1), image(1))
    (folder.path / "images" / ".000002.png.123.tmp").write_bytes(b"half")
    wanted = requests(5)
    assert [r.index for r in folder.missing(wanted, gallery=0)] == [2, 4]
    assert [r.index for r in folder.missing(wanted, gallery=2)] == [0, 2, 4]


def test_files_are_named_by_index(folder: SampleFolder) -> None:
    assert folder.image(12).relative_to(folder.path) == Path("images/000012.png")
    assert folder.twin(1234567).relative_to(folder.path) == Path("unguided/1234567.png")
    assert folder.views(0).relative_to(folder.path) == Path("maps/000000.npz")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The order in which files got their names."""
    order: list[Path] = []
    replace: Callable[..., None] = os.replace

    def noting(source: Path, target: Path) -> None:
        order.append(Path(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", noting)
    return order


def test_writer_writes_the_image_last(folder: SampleFolder, written: list[Path]) -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 8, 6), dtype=torch.uint8, generator=random)
    twin = torch.randint(0, 256, (3, 8, 6), dtype=torch.uint8, generator=random)
    drawn = Drawn(
        requests(2), images, twins={0: twin}, traces={0: Trace(tuple(views())), 1: Trace()}
    )
    folder.write(drawn)
    # An image says that its request is done, so its views and twin have to be there before.
    assert written == [folder.views(0), folder.twin(0), folder.image(0), folder.image(1)]
    for index in (0, 1):
        np.testing.assert_array_equal(
            read_png(folder.image(index)), images[index].permute(1, 2, 0).numpy()
        )
    np.testing.assert_array_equal(read_png(folder.twin(0)), twin.permute(1, 2, 0).numpy())
    assert not folder.views(1).exists()


def test_writer_writes_grey_images_as_grey(folder: SampleFolder) -> None:
    folder.write(Drawn(requests(1), torch.full((1, 1, 8, 8), 77, dtype=torch.uint8)))
    with Image.open(folder.image(0)) as found:
        assert (found.mode, found.size) == ("L", (8, 8))
