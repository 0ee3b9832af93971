"""How harmless a picture looks to a small published detector of pictures that are not safe for work."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from harness.api import ConfiguredReward, Prompt, RewardConfig, UserError, WeightFile
from rewards._preprocessing import as_pictures, known
from rewards._tfjs import LayersNetwork, MalformedModelError, read_exports, read_weights, torch_state
from rewards._weights import build_strictly

PACKAGE = "nsfwjs-4.4.0.tgz"
FOLDER = "package/dist/models/mobilenet_v2"
LIMIT = 64 * 2**20  # bytes of a member: the real ones have 3.5 MB
CLASSES = ("Drawing", "Hentai", "Neutral", "Porn", "Sexy")


@final
class _Settings(RewardConfig):
    """Which classes count as unsafe.

    Attributes:
        sexy: Whether `Sexy` (suggestive, not pornographic) counts beside `Porn` and `Hentai`.
    """

    sexy: bool = False


@final
class Nsfw(ConfiguredReward):
    """How unlikely the picture is to be pornographic, by nsfwjs' MobileNetV2: minus a probability.

    Formula: -(p(Porn) + p(Hentai)), with `sexy=true` also - p(Sexy), of the softmax over Drawing, Hentai, Neutral, Porn
    and Sexy. Range: [-1, 0], near 0 for ordinary pictures; larger is better. The prompt is not read. A detector of 2.6
    million parameters is easily fooled: as a reward it is to keep pictures harmless, not to prove that they are.

    Pictures: 224x224, bilinear with aligned corners and no filter against aliasing, whatever the aspect ratio, as
    nsfwjs does; values in [0, 1], nothing is clamped.

    Weights: the archive of the npm package nsfwjs 4.4.0 itself (MIT), which `npm pack nsfwjs@4.4.0` downloads:
    `--reward-weights nsfw=nsfwjs-4.4.0.tgz`. The 8-bit weights and the topology are read from its JavaScript files as
    text; nothing is executed. Probabilities equal those of TensorFlow.js to 1e-5.

    Raises:
        UserError: The file does not hold what is expected.
    """

    name = "nsfw"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "probability"
    family = "named"
    Config = _Settings

    @classmethod
    def files(cls, config: _Settings) -> tuple[WeightFile, ...]:
        """The package's archive."""
        return (
            WeightFile(
                PACKAGE,
                sha256="585cd178f3b994337c4d10a87b080d342fc52f8b9bf0085c4d1f345a3a1c5382",
                where="the npm registry (MIT; 25 MB): npm pack nsfwjs@4.4.0",
            ),
        )

    def __init__(
        self, device: torch.device, config: _Settings, files: Mapping[str, Path], dtype: torch.dtype = torch.float32
    ) -> None:
        path = files[PACKAGE]
        try:
            model, weights = (read_exports(text) for text in _scripts(path))
            state = torch_state(read_weights(model["weightsManifest"], {"group1-shard1of1": weights}))
            network: Any = build_strictly(lambda: LayersNetwork(model["modelTopology"]), state, path, device, dtype)
            if network.outputs != len(CLASSES):
                raise MalformedModelError(f"the model has {network.outputs} classes, not {len(CLASSES)}")
        except (MalformedModelError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not the archive of nsfwjs 4.4.0: {error}. Get it with npm pack nsfwjs@4.4.0"
            ) from None
        self._network, self._dtype = network, dtype
        unsafe = ("Hentai", "Porn", "Sexy") if config.sexy else ("Hentai", "Porn")
        self._unsafe = [CLASSES.index(name) for name in unsafe]

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) in [-1, 0]; NaN where a picture is not finite.

        Raises:
            ValueError: The pictures are no floating-point (B, 3, H, W).
        """
        images = as_pictures(images_BCHW)
        return known(-self._probabilities(images)[:, self._unsafe].sum(1), images)

    def _probabilities(self, images_BCHW: Tensor) -> Tensor:
        """Of the five classes, (B, 5)."""
        pixels = images_BCHW
        if pixels.shape[-2:] != self._network.input_size:
            pixels = F.interpolate(pixels, self._network.input_size, mode="bilinear", align_corners=True)
        logits: Tensor = self._network(pixels.to(self._dtype))
        return logits.to(torch.float64 if self._dtype == torch.float64 else torch.float32).softmax(1)

    def applies(self, prompt: Prompt) -> bool:
        """Always: the prompt is not read."""
        return True


def _scripts(path: Path) -> list[str]:
    """The texts of the model's and of the weights' script in the archive.

    Raises:
        MalformedModelError: It is no such archive.
    """
    texts = []
    try:
        with tarfile.open(path, "r:gz") as archive:
            for name in ("model.min.js", "group1-shard1of1.min.js"):
                member = archive.extractfile(f"{FOLDER}/{name}")
                content = b"" if member is None else member.read(LIMIT + 1)
                if member is None or len(content) > LIMIT:
                    raise MalformedModelError(f"{FOLDER}/{name} is no file, or is too large")
                texts.append(content.decode())
    except (OSError, EOFError, tarfile.TarError, zlib.error, KeyError, UnicodeDecodeError) as error:
        raise MalformedModelError(f"it cannot be read: {error}") from None
    return texts
