"""Stable Diffusion 1.x and 2.x, and everything else stored as a diffusers `StableDiffusionPipeline`.

The embedded emoji model takes exactly this path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPTextModel, CLIPTokenizer

from harness.api import Adapter, AdapterConfig, Conditioning, DiffusionModel, PredictionType, Randomness, UserError

PIPELINES = ("StableDiffusionPipeline",)
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def load(source: str, device: torch.device, dtype: torch.dtype, revision: str | None) -> StableDiffusion:
    """The model stored in a directory or known by a hub id."""
    return StableDiffusion(source, device, dtype, revision)


class StableDiffusion(DiffusionModel):
    """A latent diffusion model with a UNet, an AutoencoderKL and a CLIP text encoder.

    Args:
        source: A local directory in the layout of `StableDiffusionPipeline`, or a hub id (`HF_HOME` and
            `HF_HUB_OFFLINE` are honoured). Only safetensors are read.
        device: Where to run.
        dtype: Dtype of the frozen weights and of latents; the adapter stays float32.
        revision: Of a hub id.

    Raises:
        UserError: The directory lacks a part, or a part cannot be loaded.
    """

    def __init__(
        self, source: str, device: torch.device, dtype: torch.dtype = torch.float32, revision: str | None = None
    ) -> None:
        self.name = Path(source).name if Path(source).is_dir() else source
        self.device, self.dtype = device, dtype
        parts = _load_parts(source, dtype, revision)
        self.unet: UNet2DConditionModel = parts["unet"].to(device).eval().requires_grad_(False)
        self.vae: AutoencoderKL = parts["vae"].to(device).eval().requires_grad_(False)
        self.text_encoder: CLIPTextModel = parts["text_encoder"].to(device).eval().requires_grad_(False)
        self.tokenizer: CLIPTokenizer = parts["tokenizer"]
        scheduler = parts["scheduler"]
        self.prediction_type: PredictionType = scheduler.config.prediction_type
        self.training_timesteps = int(scheduler.config.num_train_timesteps)
        self._alphas_cumprod: list[float] = scheduler.alphas_cumprod.double().tolist()
        side = int(self.unet.config.sample_size)
        self.latent_shape = (int(self.unet.config.in_channels), side, side)
        self._texts: dict[str, Tensor] = {}
        self._lora_layers: list[LoraLayer] = []

    def alpha_sigma(self, t: int) -> tuple[float, float]:
        """Square roots of alphas_cumprod and of its complement."""
        cumulative = self._alphas_cumprod[t]
        return cumulative**0.5, (1 - cumulative) ** 0.5

    def condition(self, texts: Sequence[str]) -> Conditioning:
        """Last hidden states of the text encoder, (B, L, D); over-long prompts are cut to the tokenizer's length."""
        missing = sorted(set(texts) - self._texts.keys())
        if missing:
            tokens = self.tokenizer(
                missing,
                padding="max_length",
                truncation=True,
                max_length=self.tokenizer.model_max_length,
                return_tensors="pt",
            )
            with torch.no_grad():
                hidden = self.text_encoder(tokens.input_ids.to(self.device))[0]
            self._texts.update(zip(missing, hidden.to(self.dtype), strict=True))
        return Conditioning({"encoder_hidden_states": torch.stack([self._texts[text] for text in texts])})

    def denoise(self, x_BCHW: Tensor, t: int, condition: Conditioning, adapter: Adapter) -> Tensor:
        """The UNet with the adapter at the strength that this call asks for."""
        for layer in self._lora_layers:
            layer.scaling["default"] = layer.lora_alpha["default"] / layer.r["default"] * adapter.scale
        inputs = {"sample": x_BCHW, "timestep": t, "return_dict": False, **condition.tensors}
        if adapter.parameters is None:
            output: Tensor = self.unet(**inputs)[0]
        else:
            output = functional_call(self.unet, dict(adapter.parameters), (), inputs)[0]
        return output

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Latents to pictures in [0, 1] nominally, at least float32."""
        images: Tensor = self.vae.decode(latents_BCHW / self.vae.config.scaling_factor, return_dict=False)[0]
        return images.to(torch.promote_types(images.dtype, torch.float32)) / 2 + 0.5

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Pictures to the mean of the posterior, scaled."""
        posterior = self.vae.encode((images_BCHW * 2 - 1).to(self.dtype)).latent_dist
        latents: Tensor = posterior.mean * self.vae.config.scaling_factor
        return latents

    def add_adapter(self, config: AdapterConfig, randomness: Randomness) -> None:
        """LoRA through peft: A Gaussian with standard deviation 1/rank, B zero.

        Raises:
            UserError: No module of the UNet matches the targets.
        """
        if self._lora_layers:
            self.unet.delete_adapters("default")
            self._lora_layers = []
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha or config.rank,
            init_lora_weights="gaussian",
            target_modules=list(config.targets),
        )
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # peft draws from the global generator
            torch.manual_seed(randomness.integer("adapter", below=2**63))
            try:
                self.unet.add_adapter(lora, adapter_name="default")
            except ValueError as error:
                raise UserError(f"the adapter cannot be attached to {self.name}: {error}") from error
        self._lora_layers = [module for module in self.unet.modules() if isinstance(module, LoraLayer)]
        for parameter in self.adapter_parameters().values():
            parameter.data = parameter.data.float()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The A and B factors by their name in the UNet."""
        return {name: p for name, p in self.unet.named_parameters() if ".lora_A." in name or ".lora_B." in name}

    def save_adapter(self, directory: Path) -> None:
        """`pytorch_lora_weights.safetensors`; alpha/rank is folded into B, so that every reader applies it once."""
        factors = {
            name: (tensor * (layer_scale if "lora_B" in name else 1.0)).detach().cpu().contiguous()
            for name, tensor in get_peft_model_state_dict(self.unet).items()
            for layer_scale in [self._lora_layers[0].lora_alpha["default"] / self._lora_layers[0].r["default"]]
        }
        directory.mkdir(parents=True, exist_ok=True)
        StableDiffusionPipeline.save_lora_weights(directory, unet_lora_layers=factors, safe_serialization=True)

    def fingerprint(self) -> str:
        """Hash of the weights of all parts (adapter excluded), the tokenizer's vocabulary and the noise schedule."""
        digest = hashlib.sha256()
        for part in (self.unet, self.vae, self.text_encoder):
            for name, tensor in sorted(part.state_dict().items()):
                if ".lora_" in name:
                    continue
                digest.update(name.replace(".base_layer", "").encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        digest.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        digest.update(repr((self.prediction_type, self._alphas_cumprod, self.vae.config.scaling_factor)).encode())
        return digest.hexdigest()


def _load_parts(source: str, dtype: torch.dtype, revision: str | None) -> dict[str, Any]:
    local = Path(source)
    if local.is_dir():
        absent = [part for part in PARTS if not (local / part).is_dir()]
        if absent:
            raise UserError(
                f"{source} is no StableDiffusionPipeline directory: it lacks {', '.join(absent)}. "
                f"Expected the folders {', '.join(PARTS)}, as `pipeline.save_pretrained` writes them."
            )
    common: dict[str, Any] = {} if revision is None else {"revision": revision}
    weights = {"torch_dtype": dtype, "use_safetensors": True, **common}
    try:
        return {
            "unet": UNet2DConditionModel.from_pretrained(source, subfolder="unet", **weights),
            "vae": AutoencoderKL.from_pretrained(source, subfolder="vae", **weights),
            "text_encoder": CLIPTextModel.from_pretrained(source, subfolder="text_encoder", **weights),
            "tokenizer": CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **common),
            "scheduler": DDPMScheduler.from_pretrained(source, subfolder="scheduler", **common),
        }
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"the model {source!r} cannot be loaded: {first}. Give a local directory written by "
            "`StableDiffusionPipeline.save_pretrained` (safetensors), or a hub id that is cached or reachable."
        ) from error
