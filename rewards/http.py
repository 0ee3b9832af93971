"""A reward that another process computes: pictures and prompts go to a server, scores come back."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from harness.api import ConfiguredReward, Prompt, RewardConfig, UserError, WeightFile

BACKOFF = 0.5  # seconds: the second retry waits 1 s, the next 2, 4, 8, then 10 s each; the first does not wait
BACKOFF_MAX = 10
SHOWN = 200  # characters of an answer in a message
LARGEST = torch.finfo(torch.float32).max


class HttpConfig(RewardConfig):
    """Of `http`."""

    url: str = Field(description="Where to send pictures, as http://127.0.0.1:8000/score.")
    timeout: float = Field(60.0, gt=0, description="Seconds that one attempt may take to connect and to be answered.")
    retries: int = Field(4, ge=0, le=20, description="Further attempts after a failed connection, a time-out or a 5xx.")
    batch: int = Field(16, ge=1, description="Pictures of one request.")

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("write the whole address, as http://127.0.0.1:8000/score")
        return url


@final
class Http(ConfiguredReward):
    """What a server answers, in the server's own unit: for rewards in another environment, language or machine.

    Formula: the server's. Pictures are clamped to [0, 1], rounded to 8 bits and sent as PNG, so there is no gradient;
    a score of null becomes NaN. The protocol and a server to start from are in docs/reward-server.md. The settings are
    the reward's name in records, the address among them; the server's version is not known: let the address tell it.

    Raises:
        UserError: When scoring: the server cannot be reached in any attempt, refuses (4xx), fails in every attempt
            (5xx), or answers something else than one number or null for each picture.
    """

    name = "http"
    version = "1"
    differentiable = False
    role = "proxy"
    unit = "score"
    family = "named"
    Config = HttpConfig

    @classmethod
    def files(cls, config: Any) -> tuple[WeightFile, ...]:
        """None."""
        return ()

    def __init__(
        self, device: torch.device, config: HttpConfig, files: Mapping[str, Path], dtype: torch.dtype = torch.float32
    ) -> None:
        import urllib3

        self._config = config
        self._pool = urllib3.PoolManager()
        self._retry = urllib3.Retry(
            total=config.retries,
            status_forcelist=range(500, 600),
            allowed_methods={"POST"},
            backoff_factor=BACKOFF,
            backoff_max=BACKOFF_MAX,
            respect_retry_after_header=False,  # a server could ask for hours
            raise_on_status=False,
        )

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,); NaN where a picture is not finite, which is not sent, and where the server says null."""
        scores = torch.full((len(images_BCHW),), float("nan"))
        known = images_BCHW.isfinite().flatten(1).all(1).nonzero().flatten().tolist()
        levels = (images_BCHW.detach().float().clamp(0, 1) * 255).round().nan_to_num().to(torch.uint8)
        for start in range(0, len(known), self._config.batch):
            rows = known[start : start + self._config.batch]
            pictures = levels[rows].permute(0, 2, 3, 1).cpu().numpy()
            asked = {
                "images": [_png(Image.fromarray(picture)) for picture in pictures],
                "prompts": [prompts[row].text for row in rows],
                "metadata": [dict(prompts[row].metadata) for row in rows],
            }
            scores[rows] = torch.tensor(self._ask(asked), dtype=torch.float32)
        return scores.to(images_BCHW.device)

    def applies(self, prompt: Prompt) -> bool:
        """Always: the server says null where it has no score."""
        return True

    def _ask(self, asked: Mapping[str, list[Any]]) -> list[float]:
        """One request and its retries."""
        import urllib3

        config = self._config
        try:
            answer = self._pool.request(
                "POST",
                config.url,
                body=json.dumps(asked).encode(),
                headers={"Content-Type": "application/json"},
                timeout=urllib3.Timeout(total=config.timeout),
                retries=self._retry,
                redirect=False,
            )
        except urllib3.exceptions.HTTPError as error:
            reason = error.reason if isinstance(error, urllib3.exceptions.MaxRetryError) else error
            raise UserError(
                f"the reward server {config.url} gave no answer in {config.retries + 1} attempts of at most "
                f"{config.timeout:g} s ({reason}); is it running? See docs/reward-server.md"
            ) from None
        text = answer.data.decode("utf-8", "replace")
        if answer.status != 200:
            attempts = f" in {config.retries + 1} attempts" if answer.status >= 500 else ""
            raise UserError(f"the reward server {config.url} answered {answer.status}{attempts}: {text[:SHOWN]}")
        return self._read(text, len(asked["images"]))

    def _read(self, text: str, count: int) -> list[float]:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._unusable(f"no JSON ({error})", text) from None
        scores = content.get("scores") if isinstance(content, dict) else None
        if not isinstance(scores, list):
            raise self._unusable("no object with a list of scores", text)
        if len(scores) != count:
            raise self._unusable(f"{len(scores)} scores for {count} pictures", text)
        for score in scores:
            number = isinstance(score, int | float) and not isinstance(score, bool) and not abs(score) > LARGEST
            if score is not None and not number:
                raise self._unusable(f"the score {score!r:.40}, neither a number nor null", text)
        return [float("nan") if score is None else float(score) for score in scores]

    def _unusable(self, what: str, text: str) -> UserError:
        return UserError(
            f'the reward server {self._config.url} answered {what}; expected {{"scores": [one number or null for '
            f"each picture]}}, found: {text[:SHOWN]}"
        )


def _png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")
