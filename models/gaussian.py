"""A diffusion model of a Gaussian, whose score is known in closed form: the oracle of tests.

Data are x0 ~ N(mean, std^2) in every dimension, pictures are the latents themselves. The adapter adds
`bias + gain * x` to the predicted noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.api import (
    Adapter,
    AdapterConfig,
    AdapterFile,
    Conditioning,
    DenoiserConfig,
    DiffusionModel,
    Randomness,
    SamplerConfig,
    UserError,
)
from harness.sampling import timesteps

PIPELINES = ()


def load(source: str, device: torch.device, dtype: torch.dtype, revision: str | None) -> GaussianModel:
    """The model with its default mean and deviation; there are no weights to read."""
    return GaussianModel(dtype=dtype)


class GaussianModel(DiffusionModel):
    """Exact denoiser of N(mean, std^2) with pictures of 3 channels and one pixel; prompts do not matter.

    Args:
        mean: Of every dimension.
        std: Of every dimension.
        dtype: Float64 for tests of identities.
    """

    def __init__(self, mean: float = 0.3, std: float = 0.5, dtype: torch.dtype = torch.float64) -> None:
        self.name = "gaussian"
        self.mean, self.std = mean, std
        self.latent_shape = (3, 1, 1)
        self.prediction_type = "epsilon"
        self.device, self.dtype = torch.device("cpu"), dtype
        self.training_timesteps = 1000
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self._alphas_cumprod: list[float] = torch.cumprod(1 - betas, 0).tolist()
        self._adapter: dict[str, nn.Parameter] = {}

    def configure(self, config: DenoiserConfig) -> None:
        """There is no network to compile, nor activations to recompute."""
        raise UserError(f"{self.name} is a formula: leave out --set denoiser...")

    def timesteps(self, config: SamplerConfig) -> Sequence[float]:
        """Those of a model with discrete timesteps."""
        return timesteps(self.training_timesteps, config)

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """Stable Diffusion's schedule."""
        return self._alphas_cumprod[int(t)] ** 0.5, (1 - self._alphas_cumprod[int(t)]) ** 0.5

    def condition(self, texts: Sequence[str]) -> Conditioning:
        """One constant per row."""
        return Conditioning({"constant": torch.zeros(len(texts), 1, dtype=self.dtype)})

    def denoise(self, x_BCHW: Tensor, t: float, condition: Conditioning, adapter: Adapter) -> Tensor:
        """E[noise | x_t], plus the adapter's affine term."""
        alpha, sigma = self.alpha_sigma(t)
        noise = sigma * (x_BCHW - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        if not self._adapter:
            return noise
        values = self._adapter if adapter.parameters is None else adapter.parameters
        return noise + adapter.scale * (values["bias"] + values["gain"] * x_BCHW)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """The identity."""
        return latents_BCHW

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """The identity."""
        return images_BCHW.to(self.dtype)

    def add_adapter(self, config: AdapterConfig, randomness: Randomness) -> None:
        """Zeros: the output does not change."""
        self._adapter = {
            name: nn.Parameter(torch.zeros(self.latent_shape, dtype=self.dtype)) for name in ("bias", "gain")
        }

    def load_adapter(self, path: Path) -> AdapterFile:
        """What `save_adapter` wrote."""
        file = path / "adapter.safetensors" if path.is_dir() else path
        try:
            values = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read as an adapter of {self.name}: {error}") from None
        found = {name: tuple(value.shape) for name, value in values.items()}
        if found != {"bias": self.latent_shape, "gain": self.latent_shape}:
            raise UserError(f"{file} holds {found}; expected bias and gain, each {self.latent_shape}")
        self._adapter = {name: nn.Parameter(value.to(self.dtype)) for name, value in values.items()}
        return AdapterFile("gaussian", hashlib.sha256(file.read_bytes()).hexdigest(), len(values), (), ())

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """`bias` and `gain`, each (3, 1, 1)."""
        return self._adapter

    def parameter_count(self) -> int:
        """None: the score is a formula."""
        return 0

    def save_adapter(self, directory: Path) -> None:
        """`adapter.safetensors`."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().contiguous() for k, v in self._adapter.items()}, directory / "adapter.safetensors")

    def fingerprint(self) -> str:
        """Of mean and standard deviation."""
        return hashlib.sha256(f"gaussian {self.mean} {self.std}".encode()).hexdigest()
