"""The hub: what is downloaded, how it is cached, and how it is checked."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sag_dit.checkpoints import hub, load
from sag_dit.checkpoints.files import sha256
from sag_dit.models import DiT
from tests.checkpoints.conftest import Same

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "a" * 40


@pytest.fixture
def site(pipeline: Path, vae_folder: Path) -> Iterator[str]:
    """A local server that answers as the hub does, with a published folder's many files."""
    for folder in ("transformer", "vae"):
        (pipeline / folder / "diffusion_pytorch_model.bin").write_bytes(b"\x80older")
        (pipeline / folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
    (pipeline / "README.md").write_text("read me")

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            names = [str(p.relative_to(pipeline)) for p in pipeline.rglob("*") if p.is_file()]
            headers = {}
            if "/resolve/" in path:
                body = (pipeline / path.split(f"/resolve/{COMMIT}/")[1]).read_bytes()
                tag = hashlib.sha256(body).hexdigest()
                headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "X-Linked-Etag": tag}
            elif "/tree/" in path:
                body = json.dumps(
                    [{"type": "file", "path": name, "size": 1, "oid": "b" * 40} for name in names]
                ).encode()
            elif path.startswith("/api/models/"):
                files = [{"rfilename": name} for name in names]
                body = json.dumps({"id": "x", "sha": COMMIT, "siblings": files}).encode()
            else:
                body = b"{}"
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_hub_download_is_small_cached_and_checked(
    site: str, tmp_path: Path, tiny_dit: DiT, same: Same
) -> None:
    # The address is read when the hub's client is imported: another process.
    program = (
        "import sys; from sag_dit.checkpoints import zoo; print(zoo.locate('DiT-XL-2').path); "
        "print('diffusers' in sys.modules, 'lightning' in sys.modules)"
    )
    environment = {"HF_ENDPOINT": site, "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **environment, "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    location, loaded = done.stdout.splitlines()
    assert loaded == "False False", "nothing that is not needed yet"
    folder = Path(location)
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    # From here on without the server: the cache is enough.
    model = load("facebook/DiT-XL-2-256")
    assert same(model.denoiser.network, tiny_dit)
    assert model.name == "DiT-XL-2-256" and load("DiT-XL-2").name == "DiT-XL-2"
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    blob = weights.resolve()
    assert blob.name == model.sha256
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=f"sha256 is .*, expected {model.sha256}.*delete {blob}"):
        load("DiT-XL-2")
    # An interrupted download is not taken for a whole one.
    blob.unlink()
    with pytest.raises(ValueError, match="at the hub: OfflineModeIsEnabled"):
        load("DiT-XL-2")


def test_shards_of_an_index_are_downloaded_with_it() -> None:
    names = [
        "config.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "other/diffusion_pytorch_model.bin",
    ]
    assert hub.needed_files(names, ("",)) == [
        "config.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model-*.safetensors",
    ]
    half = ["diffusion_pytorch_model.safetensors.index.fp16.json"]
    assert hub.needed_files(half, ("",)) == [*half, "diffusion_pytorch_model.fp16-*.safetensors"]


def test_sha256_of_several_files_depends_on_each(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(b"one")
    before = sha256(files)
    assert sha256(files[:1]) == hashlib.sha256(b"one").hexdigest() != before
    files[1].write_bytes(b"two")
    assert sha256(files) != before
