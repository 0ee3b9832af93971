"""How a cell is scored: the same prompts, latents, sampler, batches and reward code for every cell of a run.

Scores are those of the clamped 8-bit pictures that are stored: scoring the file gives the record.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from harness import store
from harness.api import DiffusionModel, Embedding, Generation, Prompt, Randomness, Request, Reward
from harness.config import EvaluationConfig
from harness.metering import Generate
from harness.metrics.diversity import pairwise_distance, vendi_score
from harness.reward_sources import RewardSource

Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Evaluated:
    """One (prompt, latent) pair of an evaluation and the split that it belongs to."""

    split: str
    request: Request


@dataclass(frozen=True)
class Score:
    """One picture scored by one reward."""

    split: str
    prompt: Prompt
    noise_id: int
    reward: str
    score: float


def noise_bank(model: DiffusionModel, prompt: Prompt, noise_id: int) -> Request:
    """The request that every cell of every run is evaluated on."""
    noise = Randomness(0, "noise bank").normal(model.latent_shape, prompt.id, noise_id)
    return Request(prompt, noise_id, noise)


def to_8_bit(images_BCHW: Tensor) -> Pictures:
    """Clamp to [0, 1] and round, (B, H, W, 3); not-a-number becomes black (its latents are kept for the record)."""
    finite = torch.nan_to_num(images_BCHW.float(), nan=0.0, posinf=1.0, neginf=0.0)
    pixels: Pictures = (finite.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def from_8_bit(pictures: Pictures, device: torch.device) -> Tensor:
    """Float (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device).float() / 255


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 are float32 inside: cuDNN's convolutions round to TF32 by default, matrix products do not."""
    cudnn, before = torch.backends.cudnn, torch.backends.cudnn.allow_tf32
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


class Evaluator:
    """Generates and scores.

    Args:
        model: The unmetered model.
        sources: The rewards by name; the instances are its own, not those that training uses, and built when needed.
        embedding: For diversity.
        splits: Prompts by split, in order.
        config: How many of what.
        generation: The run's sampler.
    """

    def __init__(
        self,
        model: DiffusionModel,
        sources: Mapping[str, RewardSource],
        embedding: Embedding,
        splits: Mapping[str, Sequence[Prompt]],
        config: EvaluationConfig,
        generation: Generation,
    ) -> None:
        self.model, self.sources, self.embedding = model, sources, embedding
        self.splits, self.config, self.generation = splits, config, generation

    @cached_property
    def rewards(self) -> dict[str, Reward]:
        """Instances by name, in float32."""
        return {name: source.build(self.model.device) for name, source in self.sources.items()}

    @property
    def versions(self) -> dict[str, str]:
        """What identifies the numbers of each reward: its version, and its weights where it has any."""
        return {name: source.version for name, source in self.sources.items()}

    def final_requests(self) -> list[Evaluated]:
        """All prompts of all splits with all latents."""
        return self._requests(list(self.splits), self.config.latents)

    def curve_requests(self) -> list[Evaluated]:
        """The last split (held-out) with the curve's latents: a subset of the final requests."""
        return self._requests([list(self.splits)[-1]], min(self.config.curve_latents, self.config.latents))

    def variant_requests(self) -> list[Evaluated]:
        """The last split (held-out) with all latents: a subset of the final requests."""
        return self._requests([list(self.splits)[-1]], self.config.latents)

    def own_sampler_requests(self) -> list[Evaluated]:
        """The last split (held-out) with one latent."""
        return self._requests([list(self.splits)[-1]], 1)

    def _requests(self, splits: Sequence[str], latents: int) -> list[Evaluated]:
        return [
            Evaluated(split, noise_bank(self.model, prompt, noise_id))
            for split in splits
            for prompt in self.splits[split]
            for noise_id in range(latents)
        ]

    @torch.no_grad()
    def pictures(
        self,
        generate: Generate,
        requests: Sequence[Request],
        progress: Callable[[float], None] | None = None,
        generation: Generation | None = None,
    ) -> tuple[Pictures, NDArray[np.float32]]:
        """8-bit pictures (N, H, W, 3) and latents (N, C, H, W), in fixed batches."""
        pictures, latents = [], []
        for start in range(0, len(requests), self.config.batch):
            part = generate(requests[start : start + self.config.batch], generation or self.generation)
            pictures.append(to_8_bit(self.model.decode(part)))
            latents.append(part.float().cpu().numpy())
            if progress is not None:
                progress(min(1.0, (start + self.config.batch) / len(requests)))
        return np.concatenate(pictures), np.concatenate(latents)

    @torch.no_grad()
    def score(self, pictures: Pictures, evaluated: Sequence[Evaluated], names: Sequence[str] = ()) -> list[Score]:
        """Scores by every reward (or those named) that applies to the prompt, in float32."""
        scores = []
        for start in range(0, len(evaluated), self.config.batch):
            part = evaluated[start : start + self.config.batch]
            images = from_8_bit(pictures[start : start + self.config.batch], self.model.device)
            for name in names or self.sources:
                reward = self.rewards[name]
                rows = [i for i, item in enumerate(part) if reward.applies(item.request.prompt)]
                if rows:
                    with full_precision():
                        values = reward(images[rows], [part[i].request.prompt for i in rows])
                    scores += [
                        Score(part[i].split, part[i].request.prompt, part[i].request.noise_id, name, value)
                        for i, value in zip(rows, values.double().tolist(), strict=True)
                    ]
        return scores

    def diversity(self, generate: Generate) -> list[dict[str, Any]]:
        """Vendi score and mean pairwise distance within each prompt of the diversity block."""
        rows: list[dict[str, Any]] = []
        last = self.splits[list(self.splits)[-1]]
        n = self.config.diversity_latents
        for prompt in last[: self.config.diversity_prompts]:
            requests = [noise_bank(self.model, prompt, noise_id) for noise_id in range(n)]
            pictures, _ = self.pictures(generate, requests)
            with torch.no_grad():
                vectors = self.embedding(from_8_bit(pictures, self.model.device)).double().cpu().numpy()
            for metric, value in (("vendi", vendi_score(vectors)), ("pairwise_distance", pairwise_distance(vectors))):
                rows.append({"metric": metric, "prompt_id": prompt.id, "value": value, "n": n})
        return rows


def picture_path(directory: Path, prompt_id: str, noise_id: int, point: str = "final") -> Path:
    """Where a picture of the end, or of a point of the curve, is stored below a cell's directory."""
    return directory / "images" / point / f"{prompt_id}--{noise_id}.png"


def save_pictures(directory: Path, pictures: Pictures, evaluated: Sequence[Evaluated], point: str = "final") -> None:
    """One PNG per picture."""
    for pixels, item in zip(pictures, evaluated, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        path = picture_path(directory, item.request.prompt.id, item.request.noise_id, point)
        store.write_bytes(path, buffer.getvalue())


def load_pictures(directory: Path, evaluated: Sequence[Evaluated]) -> Pictures:
    """What `save_pictures` stored, (N, H, W, 3)."""
    return np.stack(
        [np.asarray(Image.open(picture_path(directory, i.request.prompt.id, i.request.noise_id))) for i in evaluated]
    )
