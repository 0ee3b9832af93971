"""What latent diffusion models share: a denoiser with LoRA, an AutoencoderKL, encoded prompts, parts read from disk."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, ModelMixin
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.api import (
    Adapter,
    AdapterConfig,
    AdapterFile,
    Conditioning,
    DenoiserConfig,
    DiffusionModel,
    Randomness,
    UserError,
)
from models._adapter_files import read_adapter
from models._lora import Lora, is_factor
from models._parts import Layout, load_parts

LATENTS = {"sample", "hidden_states"}  # what UNets and transformers call them


class LatentDiffusion(DiffusionModel):
    """A denoiser of an AutoencoderKL's latents that is told what text encoders say.

    Subclasses say how a prompt is encoded, what the denoiser is called with, and which noise levels it knows.

    Args:
        source: A local directory in the layout of the family's pipeline, or a hub id (`HF_HOME` and `HF_HUB_OFFLINE`
            are honoured). Only safetensors are read.
        device: Where to run.
        dtype: Dtype of the denoiser. The adapter stays float32. Latents and the autoencoder are float32 where this is
            shorter: log-probabilities of steps need the one, half precision overflows in the other; text encoders are
            float32 where this is float16.
        revision: Of a hub id.

    Attributes:
        denoiser: The UNet or transformer, frozen but for the adapter.
        vae: The autoencoder, frozen.
        text_encoders: Frozen, by folder.
        tokenizers: By folder.
        scheduler: As stored; only its settings are used.
        settings: The content of `model_index.json`.

    Raises:
        UserError: The directory lacks a part, or a part cannot be loaded.
    """

    layout: ClassVar[Layout]

    denoiser: ModelMixin
    vae: AutoencoderKL
    text_encoders: dict[str, PreTrainedModel]
    tokenizers: dict[str, Any]
    scheduler: Any
    settings: Mapping[str, Any]

    def __init__(
        self, source: str, device: torch.device, dtype: torch.dtype = torch.float32, revision: str | None = None
    ) -> None:
        self.name = Path(source).name if Path(source).is_dir() else source
        self.device, self._denoiser_dtype = device, dtype
        self.dtype = torch.promote_types(dtype, torch.float32)
        parts = load_parts(source, self.layout, dtype, revision)
        self.denoiser, self.vae = _frozen(parts.denoiser, device), _frozen(parts.vae, device)
        self.text_encoders = {folder: _frozen(encoder, device) for folder, encoder in parts.text_encoders.items()}
        self.tokenizers, self.scheduler, self.settings = parts.tokenizers, parts.scheduler, parts.settings
        if self.vae.config.latents_mean is not None or self.vae.config.latents_std is not None:
            raise UserError(f"{self.name}: an autoencoder with latents_mean and latents_std is not supported")
        self.training_timesteps = int(self.scheduler.config.num_train_timesteps)
        self._texts: dict[str, dict[str, Tensor]] = {}
        self._lora = Lora(self.denoiser)

    def configure(self, config: DenoiserConfig) -> None:
        """Compile the denoiser, or recompute its blocks."""
        self.checkpoint_inside = config.checkpoint_inside
        if config.checkpoint_inside:
            self._lora.checkpoint_blocks()
        if config.compile:
            self._lora.compile()

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """What the denoiser is told about each prompt: tensors with a leading dimension B, any floating dtype."""

    @abstractmethod
    def identity(self) -> tuple[object, ...]:
        """What determines the pictures beside weights and vocabularies, with a `repr` that tells it apart."""

    def condition(self, texts: Sequence[str]) -> Conditioning:
        """What `encode_texts` gives, in the denoiser's dtype; each text is encoded once."""
        missing = sorted(set(texts) - self._texts.keys())
        if missing:
            with torch.no_grad():
                encoded = {name: rows.to(self._denoiser_dtype) for name, rows in self.encode_texts(missing).items()}
            for row, text in enumerate(missing):
                self._texts[text] = {name: rows[row] for name, rows in encoded.items()}
        rows = [self._texts[text] for text in texts]
        return Conditioning({name: torch.stack([row[name] for row in rows]) for name in rows[0]})

    def network(self, adapter: Adapter, **inputs: Any) -> Tensor:
        """The denoiser's output in the latents' dtype, with the adapter at the strength that this call asks for."""
        for latents in LATENTS & inputs.keys():
            inputs[latents] = inputs[latents].to(self._denoiser_dtype)
        output: Tensor = self._lora.run(adapter, {**inputs, "return_dict": False})[0]
        return output.to(self.dtype)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Latents to pictures in [0, 1] nominally, at least float32."""
        latents = latents_BCHW.to(self.vae.dtype) / self.vae.config.scaling_factor + self._shift
        images: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return images / 2 + 0.5

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Pictures to the mean of the posterior, shifted and scaled."""
        posterior = self.vae.encode((images_BCHW * 2 - 1).to(self.vae.dtype)).latent_dist
        latents: Tensor = (posterior.mean - self._shift) * self.vae.config.scaling_factor
        return latents.to(self.dtype)

    @property
    def _shift(self) -> float:
        return self.vae.config.shift_factor or 0.0

    def add_adapter(self, config: AdapterConfig, randomness: Randomness) -> None:
        """LoRA through peft: A Gaussian with standard deviation 1/rank, B zero.

        Raises:
            UserError: No module of the denoiser matches the targets.
        """
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha or config.rank,
            init_lora_weights="gaussian",
            target_modules=list(config.targets),
        )
        try:
            self._lora.fresh(lora, randomness.integer("adapter", below=2**63), self.device)
        except ValueError as error:
            raise UserError(f"the adapter cannot be attached to {self.name}: {error}") from error

    def load_adapter(self, path: Path) -> AdapterFile:
        """LoRA of diffusers, of peft, of older attention processors, or of kohya's trainer.

        Raises:
            UserError: The file cannot be read, or a part of it has no place in the denoiser.
        """
        factors, found = read_adapter(path, self.layout.denoiser[0], self._converted)
        self._lora.given(factors, self.device)
        return found

    def _converted(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Mapping[str, float]]:
        """Names of other trainers as diffusers names them, with the alphas of UNets in kohya's layout."""
        read: Any = self.layout.pipeline
        converted, *others = read.lora_state_dict(state, unet_config=self.denoiser.config, return_lora_metadata=True)
        return converted, (others[0] or {}) if len(others) == 2 else {}  # transformers have their metadata alone

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The A and B factors by their name in the denoiser."""
        return self._lora.parameters()

    def parameter_count(self) -> int:
        """Of the denoiser."""
        return sum(p.numel() for name, p in self.denoiser.named_parameters() if not is_factor(name))

    def save_adapter(self, directory: Path) -> None:
        """`pytorch_lora_weights.safetensors`; alpha/rank is folded into B, so that every reader applies it once."""
        factors = {name: factor.cpu().contiguous() for name, factor in self._lora.folded().items()}
        directory.mkdir(parents=True, exist_ok=True)
        layers = {f"{self.layout.denoiser[0]}_lora_layers": factors}
        self.layout.pipeline.save_lora_weights(directory, **layers, safe_serialization=True)

    def fingerprint(self) -> str:
        """Hash of the weights of all parts (adapter excluded), the tokenizers' vocabularies and `identity`."""
        digest = hashlib.sha256()
        for part in (self.denoiser, self.vae, *self.text_encoders.values()):
            for name, tensor in sorted(part.state_dict().items()):
                if is_factor(name):
                    continue
                digest.update(name.replace(".base_layer", "").encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for tokenizer in self.tokenizers.values():
            digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
        digest.update(repr(self.identity()).encode())
        return digest.hexdigest()


def _frozen(module: Any, device: torch.device) -> Any:
    return module.to(device).eval().requires_grad_(False)
