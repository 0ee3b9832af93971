"""Networks that TensorFlow.js layers models store inside JavaScript, rebuilt in torch without running any of it.

npm packages ship such a model as two files: one whose `exports` is an object literal (Keras' topology, and the names,
shapes and 8-bit scales of the weights), and one whose `exports` is the weights' bytes in base64. Both are read as text.
Pictures are (B, C, H, W) here and (B, H, W, C) there; weights are brought into torch's order.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

TOKEN = re.compile(
    r"""(?P<string>"(?:[^"\\]|\\.)*")|(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"""
    r"""|(?P<word>!0|!1|[A-Za-z_$][\w$]*)|(?P<mark>[][{}:,])"""
)
WORDS: dict[str, Any] = {"!0": True, "!1": False, "true": True, "false": False, "null": None}
Shape = tuple[int, ...]  # without the batch: (C, H, W), or (features,)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


class MalformedModelError(ValueError):
    """The text holds no model of this format; says why."""


def read_exports(script: str) -> Any:
    """The literal that a CommonJS script assigns to `exports`: objects, arrays, strings, numbers, true, false, null.

    Raises:
        MalformedModelError: It assigns something else, or nothing.
    """
    start = re.search(r"\w\.exports=(?=[\[{\"])", script)
    if start is None:
        raise MalformedModelError("it assigns no literal to `exports`")
    try:
        return _literal(script, start.end())[0]
    except RecursionError:
        raise MalformedModelError("its literal is nested too deeply") from None


def _literal(text: str, at: int) -> tuple[Any, int]:
    """The literal that starts at a position, and where it ends."""
    kind, token, end = _token(text, at)
    match kind, token:
        case "string", _:
            return _string(token), end
        case "number", _:
            return float(token) if re.search(r"[.eE]", token) else int(token), end
        case "word", _ if token in WORDS:
            return WORDS[token], end
        case "mark", "[":
            items: list[Any] = []
            while _token(text, end)[1] != "]":
                value, end = _literal(text, end)
                items.append(value)
                end = _after_comma(text, end, "]")
            return items, end + 1
        case "mark", "{":
            fields: dict[str, Any] = {}
            while (key := _token(text, end))[1] != "}":
                name = _string(key[1]) if key[0] == "string" else key[1]
                if _token(text, key[2])[1] != ":":
                    raise MalformedModelError(f"no value follows {name!r} at character {end}")
                fields[name], end = _literal(text, key[2] + 1)
                end = _after_comma(text, end, "}")
            return fields, end + 1
    raise MalformedModelError(f"{token!r} at character {at} is no literal")


def _after_comma(text: str, at: int, closing: str) -> int:
    """Behind a comma, or before the closing bracket."""
    token = _token(text, at)[1]
    if token not in (",", closing):
        raise MalformedModelError(f"{token!r} at character {at}, where a comma or {closing} should be")
    return at + 1 if token == "," else at


def _token(text: str, at: int) -> tuple[str, str, int]:
    """Kind and text of the token that starts at a position, and where it ends. There are no blanks in between."""
    match = TOKEN.match(text, at)
    if match is None or match.lastgroup is None:
        raise MalformedModelError(f"{text[at : at + 10]!r} at character {at} is not understood")
    return match.lastgroup, match.group(), match.end()


def _string(token: str) -> str:
    body = token[1:-1]
    return re.sub(r"\\(.)", lambda found: ESCAPES.get(found[1], found[1]), body) if "\\" in body else body


def read_weights(groups: list[Any], contents: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights by the manifest's names (`Conv1/kernel`), float32, in TensorFlow's order of dimensions.

    Eight-bit weights are value * scale + min, computed in double precision and then rounded, as tfjs does.

    Args:
        groups: The manifest: each group has `paths` and `weights`.
        contents: By path: the bytes in base64.

    Raises:
        MalformedModelError: Bytes are missing or left over, or in another coding.
    """
    weights: dict[str, Tensor] = {}
    try:
        for group in groups:
            data = b"".join(base64.b64decode(contents[path], validate=True) for path in group["paths"])
            at = 0
            for entry in group["weights"]:
                count, coding = math.prod(entry["shape"]), entry.get("quantization")
                if entry["dtype"] != "float32" or (coding is not None and coding["dtype"] != "uint8"):
                    raise MalformedModelError(f"{entry['name']} is coded otherwise than in float32 or 8 bits")
                size = count * (4 if coding is None else 1)
                part = np.frombuffer(data, np.dtype("<f4" if coding is None else np.uint8), count, at)
                values = part if coding is None else part.astype(np.float64) * coding["scale"] + coding["min"]
                weights[entry["name"]] = torch.from_numpy(values.astype(np.float32).reshape(entry["shape"]))
                at += size
            if at != len(data):
                raise MalformedModelError(f"{len(data) - at} bytes of weights are left over")
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        if isinstance(error, MalformedModelError):
            raise
        raise MalformedModelError(f"the weights do not fit their manifest: {error}") from None
    return weights


def torch_state(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names and in the order of dimensions of `LayersNetwork`."""
    orders: dict[str, dict[int, tuple[int, ...]]]
    orders = {"kernel": {4: (3, 2, 0, 1), 2: (1, 0)}, "depthwise_kernel": {4: (2, 3, 0, 1)}}
    state = {}
    for name, value in weights.items():
        layer, _, part = name.rpartition("/")
        order = orders.get(part, {}).get(value.ndim, tuple(range(value.ndim)))
        value = value.permute(order)
        if part == "depthwise_kernel":  # output channel c * multiplier + m, as in a grouped convolution
            value = value.flatten(0, 1)[:, None]
        state[f"layers.{layer}.{part}"] = value.contiguous()
    return state


@final
class LayersNetwork(nn.Module):
    """A Keras functional model that ends in a softmax, up to the argument of that: it gives logits.

    Args:
        topology: `modelTopology` of the file.

    Attributes:
        input_size: (H, W) of its pictures.
        outputs: How many classes it has.

    Raises:
        MalformedModelError: It has a layer, or a layer's setting, that is not understood.
    """

    def __init__(self, topology: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self._inputs: dict[str, list[str]] = {}
        shapes: dict[str, Shape] = {}
        try:
            config = topology["model_config"]["config"]
            ((self._first, _, _),), ((self._last, _, _),) = config["input_layers"], config["output_layers"]
            for entry in config["layers"]:
                name, settings = entry["name"], entry["config"]
                nodes = entry["inbound_nodes"]
                self._inputs[name] = [source[0] for source in nodes[0]] if nodes else []
                sources = [shapes[source] for source in self._inputs[name]]
                if len(nodes) > 1 or (settings.get("data_format") or "channels_last") != "channels_last":
                    raise MalformedModelError(f"the layer {name} is used twice, or has its channels first")
                self.layers[name], shapes[name] = _layer(name, entry["class_name"], settings, sources)
            activation = config["layers"][-1]["config"].get("activation")
            if config["layers"][-1]["name"] != self._last or activation != "softmax":
                raise MalformedModelError("its last layer is no softmax")
            self.input_size: tuple[int, int] = shapes[self._first][1:]  # type: ignore[assignment]
            self.outputs: int = shapes[self._last][0]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, MalformedModelError):
                raise
            raise MalformedModelError(f"the topology is not understood: {type(error).__name__}: {error}") from None

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, outputs)."""
        values = {self._first: images_BCHW}
        for name, layer in self.layers.items():
            if name != self._first:
                values[name] = layer(*(values[source] for source in self._inputs[name]))
        return values[self._last]


def _layer(name: str, kind: str, settings: Mapping[str, Any], sources: list[Shape]) -> tuple[nn.Module, Shape]:
    """The module of a layer and the shape of what it gives, from the shapes of what it takes.

    Raises:
        MalformedModelError: Not one of the layers of a MobileNetV2, or with a setting that those do not have.
    """
    match kind:
        case "InputLayer":
            height, width, channels = settings["batch_input_shape"][1:]
            return nn.Identity(), (channels, height, width)
        case "ZeroPadding2D":
            (top, bottom), (left, right) = settings["padding"]
            channels, height, width = sources[0]
            return nn.ZeroPad2d((left, right, top, bottom)), (channels, height + top + bottom, width + left + right)
        case "Conv2D" | "DepthwiseConv2D" if _plain(settings) and settings["dilation_rate"] == [1, 1]:
            convolution = _Convolution(settings, sources[0], kind == "DepthwiseConv2D")
            return convolution, convolution.shape
        case "BatchNormalization" if settings["axis"] in (-1, 3) and settings["center"] and settings["scale"]:
            return _Normalisation(sources[0][0], settings["epsilon"]), sources[0]
        case "ReLU" if not settings["negative_slope"] and not settings["threshold"] and settings["max_value"] == 6:
            return nn.ReLU6(), sources[0]
        case "Add" if len(set(sources)) == 1 and len(sources) == 2:
            return _Sum(), sources[0]
        case "Dropout":
            return nn.Identity(), sources[0]
        case "AveragePooling2D" if settings["padding"] == "valid":
            window, stride = tuple(settings["pool_size"]), tuple(settings["strides"])
            sides = [(n - k) // s + 1 for n, k, s in zip(sources[0][1:], window, stride, strict=True)]
            return nn.AvgPool2d(window, stride), (sources[0][0], *sides)
        case "Flatten":
            return _Flatten(), (math.prod(sources[0]),)
        case "Dense" if settings["activation"] in ("relu", "linear", "softmax") and settings["use_bias"]:
            return _Dense(sources[0][0], settings["units"], settings["activation"] == "relu"), (settings["units"],)
    raise MalformedModelError(f"the layer {name} of kind {kind} is none of a MobileNetV2")


def _plain(settings: Mapping[str, Any]) -> bool:
    """A convolution without bias and activation."""
    return settings["activation"] == "linear" and not settings["use_bias"]


@final
class _Convolution(nn.Module):
    """A convolution as TensorFlow pads it: with `same`, an odd number of zeros has its larger half right and below."""

    def __init__(self, settings: Mapping[str, Any], source: Shape, depthwise: bool) -> None:
        super().__init__()
        channels, *sides = source
        window, self._stride = tuple(settings["kernel_size"]), tuple(settings["strides"])
        if settings["padding"] not in ("same", "valid"):
            raise MalformedModelError(f"padding {settings['padding']!r}")
        missing = [0, 0]
        if settings["padding"] == "same":
            missing = [
                max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(sides, window, self._stride, strict=True)
            ]
        (top, bottom), (left, right) = [(total // 2, total - total // 2) for total in missing]
        self._padding = (left, right, top, bottom)
        outputs = channels * settings["depth_multiplier"] if depthwise else settings["filters"]
        self._groups = channels if depthwise else 1
        self._name = "depthwise_kernel" if depthwise else "kernel"
        self.register_parameter(self._name, nn.Parameter(torch.empty(outputs, channels // self._groups, *window)))
        reached = [
            (n + total - k) // s + 1 for n, total, k, s in zip(sides, missing, window, self._stride, strict=True)
        ]
        self.shape: Shape = (outputs, *reached)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        padded = F.pad(x_BCHW, self._padding) if any(self._padding) else x_BCHW
        return F.conv2d(padded, self.get_parameter(self._name), stride=self._stride, groups=self._groups)


@final
class _Normalisation(nn.Module):
    """Batch normalisation with stored statistics."""

    def __init__(self, channels: int, epsilon: float) -> None:
        super().__init__()
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            self.register_parameter(name, nn.Parameter(torch.empty(channels)))
        self._epsilon = epsilon

    def forward(self, x_BCHW: Tensor) -> Tensor:
        mean, variance, gamma, beta = (
            self.get_parameter(name) for name in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        return F.batch_norm(x_BCHW, mean, variance, gamma, beta, training=False, eps=self._epsilon)


@final
class _Dense(nn.Module):
    """A linear layer, and a ReLU where it has one."""

    def __init__(self, inputs: int, outputs: int, relu: bool) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.empty(outputs, inputs)), nn.Parameter(torch.empty(outputs))
        self._relu = relu

    def forward(self, x_BD: Tensor) -> Tensor:
        result = F.linear(x_BD, self.kernel, self.bias)
        return result.relu() if self._relu else result


@final
class _Flatten(nn.Module):
    """In TensorFlow's order: channels vary fastest."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.permute(0, 2, 3, 1).flatten(1)


@final
class _Sum(nn.Module):
    """Of two branches."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b
