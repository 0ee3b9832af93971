"""How different the pictures of a batch look: mean pairwise LPIPS."""

from __future__ import annotations

import hashlib
import importlib.util
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from harness.api import ConfiguredReward, Prompt, RewardConfig, UserError, WeightFile
from rewards._preprocessing import as_pictures, known, normalised
from rewards._weights import build_strictly, read_state

BACKBONE, HEADS = "alexnet-owt-7be5be79.pth", "alex.pth"
HEADS_SHA256 = "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"
# Of pictures in [-1, 1]: ImageNet's mean and deviation as LPIPS writes them.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
CHANNELS = (64, 192, 384, 256, 256)
TAPS = (1, 4, 7, 9, 11)  # AlexNet's five ReLUs
SMALLEST = 31  # of a side: below it nothing is left after the second pooling
EPSILON = 1e-10


@final
class _Settings(RewardConfig):
    """It has none."""


@final
class _AlexNet(nn.Module):
    """AlexNet's convolutions under torchvision's names; the last pooling and the classifier have no part in LPIPS."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d, e = CHANNELS
        self.features = nn.Sequential(
            nn.Conv2d(3, a, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(a, b, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(b, c, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(c, d, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(d, e, 3, padding=1),
            nn.ReLU(),
        )

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """What leaves the five ReLUs."""
        seen = []
        for index, layer in enumerate(self.features):
            x_BCHW = layer(x_BCHW)
            if index in TAPS:
                seen.append(x_BCHW)
        return seen


@final
class _Heads(nn.Module):
    """A weight for each channel of each layer, under LPIPS' names."""

    def __init__(self) -> None:
        super().__init__()
        for index, channels in enumerate(CHANNELS):
            convolution = nn.Conv2d(channels, 1, 1, bias=False)
            self.add_module(f"lin{index}", nn.Sequential(OrderedDict(model=nn.Sequential(nn.Identity(), convolution))))

    def forward(self, differences: Sequence[Tensor]) -> Tensor:
        """Distances (B,) from the squared differences in each layer: weighted, averaged over places, summed."""
        parts = [
            head(difference).mean((1, 2, 3)) for head, difference in zip(self.children(), differences, strict=True)
        ]
        return torch.stack(parts).sum(0)


@final
class LpipsDiversity(ConfiguredReward):
    """How different the picture looks from the others of its batch: its mean LPIPS distance to them, by AlexNet.

    Formula: r_i = mean over j != i of d(x_i, x_j); d = sum over AlexNet's five ReLU layers of the mean over places of
    sum_c w_c (u_c(x_i) - u_c(x_j))^2, u the layer's output divided by its length over channels, w the published heads
    of version 0.1. The mean of r over a batch is the mean over its pairs. Range: from 0 (equal pictures), no upper
    bound; larger is more diverse. The prompt is not read.

    A batch is what is scored in one call, whatever its prompts: in training the pictures that a method holds at once
    (`micro_batch`), in evaluation `evaluation.batch` neighbours in the fixed order of prompts and latents. A score
    therefore belongs to its neighbours, too: it is meant for training towards diversity. Evaluated, it is reproducible
    (order and batch are part of the evaluation's hash) and its mean compares the cells of one run, but it must not be
    compared between runs with other suites, batches or numbers of latents, nor between a curve's points and the final
    pictures; what reports call diversity (within each prompt) has no such limits. The only picture of a batch scores
    NaN. One that is not finite scores NaN and is left out of the others' means.

    Pictures: any size from 31x31, not resized (distances depend on the size, 64x64 in the paper); 2x - 1, shifted and
    scaled by LPIPS' constants; nothing is clamped.

    Weights: torchvision's AlexNet, `alexnet-owt-7be5be79.pth` (BSD-3-Clause), and LPIPS' heads `alex.pth` (Zhang et al.
    2018, arXiv:1801.03924, BSD-2-Clause) beside it, or else those inside the PyPI package lpips 0.1.4 if it is there.

    Raises:
        UserError: The files do not hold what is expected, or there are no heads.
    """

    name = "lpips-diversity"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "LPIPS"
    family = "named"
    Config = _Settings

    @classmethod
    def files(cls, config: _Settings) -> tuple[WeightFile, ...]:
        """AlexNet, and the heads unless the package lpips has them."""
        return (
            WeightFile(
                BACKBONE,
                where="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth (BSD-3-Clause; 244 MB; the name "
                "ends in the start of its sha256)",
            ),
            WeightFile(
                HEADS,
                sha256=HEADS_SHA256,
                where="the PyPI package lpips 0.1.4 as lpips/weights/v0.1/alex.pth (BSD-2-Clause)",
                optional=True,
            ),
        )

    def __init__(
        self, device: torch.device, config: _Settings, files: Mapping[str, Path], dtype: torch.dtype = torch.float32
    ) -> None:
        self._dtype = dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        backbone, heads = files[BACKBONE], files.get(HEADS) or _packaged_heads()
        state = {name: value for name, value in read_state(backbone).items() if not name.startswith("classifier.")}
        self._backbone: Any = build_strictly(_AlexNet, state, backbone, device, dtype)
        self._heads: Any = build_strictly(_Heads, read_state(heads), heads, device, exact)
        self._exact = exact

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), from 0; NaN where a picture is not finite, or no other one is.

        Raises:
            ValueError: The pictures are no floating-point (B, 3, H, W).
            UserError: They are smaller than 31x31.
        """
        images = as_pictures(images_BCHW)
        if min(images.shape[-2:]) < SMALLEST:
            height, width = images.shape[-2:]
            raise UserError(f"lpips-diversity needs pictures of at least {SMALLEST}x{SMALLEST}, not {height}x{width}")
        finite = images.isfinite().flatten(1).all(1)
        layers = self._directions(torch.where(finite.view(-1, 1, 1, 1), images, 0))
        # Every pair once: a row with those after it.
        totals = torch.zeros(len(images), dtype=self._exact, device=images.device)
        for row in range(len(images) - 1):
            distances = self._heads([(layer[row + 1 :] - layer[row]).square() for layer in layers])
            distances = torch.where(finite[row] & finite[row + 1 :], distances, 0)
            totals = totals + torch.cat([totals.new_zeros(row), distances.sum()[None], distances])
        others = finite.sum() - 1
        return known(torch.where(others > 0, totals / others, float("nan")), images)

    def _directions(self, images_BCHW: Tensor) -> list[Tensor]:
        """Each layer's outputs as unit vectors over channels."""
        pixels = normalised(2 * images_BCHW - 1, SHIFT, SCALE)
        seen = [layer.to(self._exact) for layer in self._backbone(pixels.to(self._dtype))]
        return [layer / (torch.linalg.vector_norm(layer, dim=1, keepdim=True) + EPSILON) for layer in seen]

    def applies(self, prompt: Prompt) -> bool:
        """Always: the prompt is not read."""
        return True


def _packaged_heads() -> Path:
    """Where the installed package lpips has its heads; it is not imported.

    They are no part of the version, which files that are given are, so that only the published ones do.

    Raises:
        UserError: It is not installed, or holds others.
    """
    package = importlib.util.find_spec("lpips")
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder) / "weights" / "v0.1" / HEADS
        if path.is_file():
            if hashlib.sha256(path.read_bytes()).hexdigest() != HEADS_SHA256:
                raise UserError(
                    f"{path} is not the published {HEADS} (sha256 {HEADS_SHA256}); put the one to use beside {BACKBONE}"
                )
            return path
    raise UserError(
        f"lpips-diversity needs LPIPS' heads: put {HEADS} beside {BACKBONE}, or install the package that holds it: "
        "pip install --no-deps lpips==0.1.4"
    )
