"""InceptionV3 of 2015 as FID, sFID and the Inception Score know it: torch-fidelity's exact port."""

from __future__ import annotations

import io
import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from sag_dit.checkpoints.files import read_torch, sha256
from sag_dit.checkpoints.zoo import WEIGHTS_FOLDER, local_folders
from sag_dit.evaluation.features import FeatureExtractor, Features, check_images

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299
SPATIAL_CHANNELS = 7


class Inception(FeatureExtractor):
    """Pooled (2048), spatial (2023) and logit (1008) features as ADM's evaluator takes them.

    Images are scaled to 299 x 299 by TensorFlow 1's bilinear interpolation (no antialiasing, corner
    pixels not aligned, output pixel i at input i / scale), then (x - 128) / 128; grey ones become
    three equal channels. ADM's graph calls the features ``pool_3:0``, ``mixed_6/conv:0`` and
    ``softmax/logits/MatMul``. The second is the first branch of the block that torch calls
    ``Mixed_6d``, after its ReLU: 17 x 17 places of 192 channels, of which the first 7 are taken;
    values are ordered by row, column, channel, as in TensorFlow. Logits leave out the bias.

    ``weights`` is the file of torch-fidelity (the same as pytorch-fid's). If it is None it is
    looked for in $SAG_DIT_WEIGHTS, ./pretrained_models and torch's hub folder, then downloaded; in
    these places its sha256 is checked.

    Raises:
        ValueError: torch-fidelity is not installed, or the file is missing, damaged or foreign.

    Source: Szegedy et al., arXiv 1512.00567; openai/guided-diffusion, evaluations/evaluator.py.

    Example::

        features = Inception()(images)  # uint8 (b, 3, h, w)
        print(features.pool.shape)
    """

    name = "inception"
    protocol: Mapping[str, Any]

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        file = find_weights() if weights is None else Path(weights).expanduser()
        found = sha256([file]) if file.is_file() else ""
        if weights is None and found != SHA256:
            raise ValueError(
                f"{file}: sha256 is {found}, expected {SHA256}; the file is damaged: delete it and "
                f"repeat the command"
            )
        self.network = _inception(file)
        self._spatial: list[Tensor] = []
        branch = self.network.get_submodule("Mixed_6d.branch1x1")
        branch.register_forward_hook(lambda _, __, output: self._spatial.append(output))
        self.requires_grad_(False).eval()
        self.protocol = {
            "architecture": "InceptionV3 of 2015-12-05, torch-fidelity's port",
            "weights": found,
            "resize": f"{SIDE} x {SIDE}, bilinear as in TensorFlow 1, no antialiasing",
            "range": "(x - 128) / 128",
            # ADM's reference files hold statistics of this network with these weights.
            "adm_statistics": found == SHA256,
        }

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Features:
        """Return the features of images of one or three channels.

        Raises:
            ValueError: the images are not uint8, or have another number of channels.
        """
        check_images(images)
        try:
            pool, logits = self.network(images.expand(-1, 3, -1, -1))
            (spatial,) = self._spatial
        finally:
            self._spatial.clear()
        taken = spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pool, taken, logits)


def find_weights() -> Path:
    """Return where the weights lie, after downloading them if they lie nowhere.

    Raises:
        ValueError: they are nowhere and cannot be downloaded; the places are listed.
    """
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    folders = [*local_folders(), hub]
    for folder in folders:
        if (folder / FILE).is_file():
            return folder / FILE
    try:
        hub.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(hub / FILE), hash_prefix=SHA256)
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        places = ", ".join(str(folder.absolute()) for folder in folders)
        raise ValueError(
            f"Inception's weights are not here and could not be downloaded ({error})\n"
            f"looked for {FILE} in {places} (${WEIGHTS_FOLDER} names a further folder)\n"
            f"with a network elsewhere, download {URL} into one of them, or pass its path"
        ) from None
    return hub / FILE


def _inception(file: Path) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError:
        raise ValueError(
            "Inception's features need torch-fidelity: pip install -e '.[eval]'"
        ) from None
    # torch-fidelity would unpickle the file. It is given a copy of what was read without that.
    state = io.BytesIO()
    torch.save(read_torch(file), state)
    state.seek(0)
    try:
        network: nn.Module = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=state
        )
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{file}: no weights of Inception as torch-fidelity converts them ({reason}); expected "
            f"{FILE} from {URL}"
        ) from None
    return network
