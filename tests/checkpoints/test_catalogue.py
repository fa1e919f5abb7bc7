"""The catalogue of the zoo: its entries fit the package, and say what is here."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sag_dit import catalogue
from sag_dit.checkpoints import load, zoo
from sag_dit.models import families


@pytest.mark.parametrize("name", catalogue.entries())
def test_entries_fit_the_package(name: str) -> None:
    entry = catalogue.entries()[name]
    if entry.kind != "autoencoder":
        assert entry.family in families() and entry.file and entry.data
        assert entry.resolution and entry.resolution % 8 == 0
    if entry.url is not None and "dropbox" not in entry.url:
        assert entry.url.endswith(f"/{entry.file}")


def test_no_name_is_given_twice() -> None:
    names = [*catalogue.entries(), *catalogue.aliases()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", catalogue.entries("bundled"))
def test_bundled_files_are_those_of_the_catalogue(name: str) -> None:
    (listed,) = (each for each in zoo.listed() if each.entry.name == name)
    assert listed.found is not None and listed.places == (str(listed.found),)
    content = listed.found.read_bytes()
    assert listed.entry.size == len(content)
    assert listed.entry.sha256 == hashlib.sha256(content).hexdigest() == load(name).sha256
    model = load(name)
    assert listed.entry.resolution == model.denoiser.latent_shape[-1] * model.codec.factor


def test_the_zoo_tells_where_it_looks_and_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(zoo.WEIGHTS_FOLDER, "weights")

    def listed(name: str) -> zoo.Listed:
        return next(each for each in zoo.listed() if each.entry.name == name)

    before = listed("DiT-XL-2")
    assert before.found is None and before.entry.licence == "CC-BY-NC-4.0"
    assert before.places == (
        str(tmp_path / "weights" / "DiT-XL-2-256x256.pt"),
        str(tmp_path / "weights" / "DiT-XL-2-256"),
        str(tmp_path / "pretrained_models" / "DiT-XL-2-256x256.pt"),
        str(tmp_path / "pretrained_models" / "DiT-XL-2-256"),
        "facebook/DiT-XL-2-256 in the hub's cache",
    )
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "DiT-XL-2-256x256.pt").touch()
    assert listed("DiT-XL-2").found == Path("weights/DiT-XL-2-256x256.pt")
    assert zoo.locate("DiT-XL-2").path == listed("DiT-XL-2").found
    assert listed("DiT-XL-2-512").found is None
    folder = tmp_path / "pretrained_models" / "sd-vae-ft-ema"
    folder.mkdir(parents=True)
    assert listed("sd-vae-ft-ema").found is None
    (folder / "config.json").write_text("{}")
    assert listed("sd-vae-ft-ema").found == Path("pretrained_models/sd-vae-ft-ema")
    assert zoo.locate_vae("ema") == Path("pretrained_models/sd-vae-ft-ema")
    assert not any(each.entry.kind == "upsampler" for each in zoo.listed())
