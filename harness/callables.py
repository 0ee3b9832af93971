"""Rewards of the DDPO lineage: a function of pictures, prompts and metadata, named by `path/to/file.py:function`."""

from __future__ import annotations

import hashlib
import inspect
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from harness.errors import UserError
from harness.prompts import Prompt
from harness.rewarding import Reward

FORM = "write def function(images, prompts, metadata) returning (scores, info), or a factory without arguments of one"


def reward_class(function: Callable[..., Any], reference: str) -> type[Reward]:
    """A reward that calls a function.

    The function is called as `function(images, prompts, metadata)`: a float32 tensor (B, 3, H, W) on the run's device,
    a tuple of B texts, and a tuple of B dictionaries of labels. It returns the scores, a tensor, an array or a list of
    B numbers, and a dictionary, which is not read. Or it takes no arguments and returns such a function, as the
    rewards of ddpo-pytorch do: then it is called once for each instance.

    Pictures are clamped to [0, 1] and no gradient is taken, unless the function has the attribute `differentiable`
    set to True (on the factory, if it is one): then pictures come as they are, nominally in [0, 1], and the scores must
    be a tensor that depends on them. A picture with a NaN or an infinity scores NaN in any case.

    Args:
        function: The function or the factory.
        reference: What the user wrote: the reward's name. The version is the start of the sha256 of its file.

    Raises:
        UserError: It takes other arguments. When scoring: it raises, or returns something else.
    """
    takes_pictures, takes_nothing = _accepts(function, 3), _accepts(function, 0)
    if not takes_pictures and not takes_nothing:
        raise UserError(f"{reference} takes other arguments than a reward; {FORM}")
    file = Path(inspect.getfile(function))
    has_gradient = getattr(function, "differentiable", False) is True

    @final
    class CallableReward(Reward):
        name = reference
        version = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        differentiable = has_gradient
        role = "proxy"
        unit = "score"
        family = "named"

        def __init__(self, device: torch.device) -> None:
            self._score = function if takes_pictures else _call(function, reference)
            if not callable(self._score):
                raise UserError(f"{reference} returned a {type(self._score).__name__}, not a function; {FORM}")

        def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            """Scores (B,), float32."""
            finite = images_BCHW.isfinite().flatten(1).all(1)
            images = images_BCHW.float()
            if not has_gradient:
                images = images.detach().nan_to_num().clamp(0, 1)
            texts = tuple(prompt.text for prompt in prompts)
            labels = tuple(dict(prompt.metadata) for prompt in prompts)
            with torch.set_grad_enabled(has_gradient and torch.is_grad_enabled()):
                result = _call(self._score, reference, images, texts, labels)
            scores = _scores(result, images, reference, has_gradient)
            if bad := (finite & ~scores.isfinite()).nonzero().flatten().tolist():
                raise UserError(f"{reference} returned {scores[bad[0]].item()} for a picture of {texts[bad[0]]!r}")
            return scores.where(finite, float("nan"))

        def applies(self, prompt: Prompt) -> bool:
            """Always: what the function needs of a prompt is its own matter."""
            return True

    CallableReward.__doc__ = function.__doc__
    return CallableReward


def _accepts(function: Callable[..., Any], count: int) -> bool:
    """Whether it can be called with so many arguments by position."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    return True


def _call(function: Callable[..., Any], reference: str, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{reference} raised {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        ) from error


def _scores(result: Any, images: Tensor, reference: str, has_gradient: bool) -> Tensor:
    """What was returned as a float32 tensor (B,) on the pictures' device."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise UserError(f"{reference} returned a {type(result).__name__} instead of the pair (scores, info)")
    try:
        scores = torch.as_tensor(result[0], device=images.device).float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{reference} returned scores that are no numbers: {error}") from None
    if scores.shape != (len(images),):
        raise UserError(f"{reference} returned scores of shape {tuple(scores.shape)} for {len(images)} pictures")
    if has_gradient and images.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
        raise UserError(
            f"{reference} says differentiable = True, but its scores do not depend on the pictures by torch"
        )
    return scores
