"""The detector inside an npm package, read as text: against TensorFlow.js itself, on a tiny model and on the real one.

The expected numbers were computed once by @tensorflow/tfjs 4.22.0 (CPU backend, Node.js 20) with `loadLayersModel` on
the same topology and bytes, on pictures that `drawn` makes; sizes other than the network's were resized there by
`tf.image.resizeBilinear(..., alignCorners = true)`, as nsfwjs does. The real model's test runs where the environment
variable NSFWJS names the archive (npm pack nsfwjs@4.4.0).
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.api import UserError
from harness.prompts import Prompt
from rewards._tfjs import MalformedModelError, read_exports, read_weights
from rewards.nsfw import CLASSES, Nsfw

CPU, META = torch.device("cpu"), torch.device("meta")
PACKAGE = "nsfwjs-4.4.0.tgz"
PROMPT = Prompt("p", "a fox")


def convolution(name: str, source: str, kind: str = "Conv2D", **settings: Any) -> dict[str, Any]:
    """A layer of Keras."""
    config = {"name": name, "trainable": False, "strides": [1, 1], "padding": "same", "data_format": "channels_last"}
    config |= {"dilation_rate": [1, 1], "activation": "linear", "use_bias": False, "kernel_regularizer": None}
    return {"name": name, "class_name": kind, "config": config | settings, "inbound_nodes": [[[source, 0, 0, {}]]]}


def other(name: str, kind: str, *sources: str, **settings: Any) -> dict[str, Any]:
    """A layer without a convolution."""
    nodes = [[[source, 0, 0, {}] for source in sources]] if sources else []
    return {"name": name, "class_name": kind, "config": {"name": name, **settings}, "inbound_nodes": nodes}


NORM: dict[str, Any] = {"axis": -1, "momentum": 0.999, "epsilon": 0.001, "center": True, "scale": True}
RELU: dict[str, Any] = {"max_value": 6, "negative_slope": 0, "threshold": 0}


def topology() -> dict[str, Any]:
    """A model of every kind of layer that MobileNetV2 has, on pictures of 13x18; two windows are padded unevenly."""
    layers = [
        other("input_1", "InputLayer", batch_input_shape=[None, 13, 18, 3], dtype="float32", sparse=False),
        other("pad", "ZeroPadding2D", "input_1", padding=[[0, 1], [0, 1]], data_format="channels_last"),
        convolution("Conv1", "pad", filters=4, kernel_size=[3, 3], strides=[2, 2], padding="valid"),
        other("bn", "BatchNormalization", "Conv1", **NORM),
        other("relu", "ReLU", "bn", **RELU),
        convolution("deep", "relu", "DepthwiseConv2D", kernel_size=[3, 3], strides=[1, 1], depth_multiplier=1),
        convolution("point", "deep", filters=4, kernel_size=[1, 1]),
        other("sum", "Add", "relu", "point"),
        convolution("uneven", "sum", "DepthwiseConv2D", kernel_size=[3, 4], strides=[2, 2], depth_multiplier=2),
        other("bn_2", "BatchNormalization", "uneven", **NORM),
        other("relu_2", "ReLU", "bn_2", **RELU),
        other("pool", "AveragePooling2D", "relu_2", pool_size=[2, 2], strides=[2, 2], padding="valid")
        | {"config": {"pool_size": [2, 2], "strides": [2, 2], "padding": "valid", "data_format": "channels_last"}},
        other("flat", "Flatten", "pool", data_format="channels_last"),
        other("dense_1", "Dense", "flat", units=6, activation="relu", use_bias=True),
        other("dropout", "Dropout", "dense_1", rate=0.5),
        other("dense_2", "Dense", "dropout", units=5, activation="softmax", use_bias=True),
    ]
    config = {"name": "model_1", "layers": layers, "input_layers": [["input_1", 0, 0]]}
    config["output_layers"] = [["dense_2", 0, 0]]
    return {"keras_version": "2.2.4", "model_config": {"class_name": "Model", "config": config}}


def weights() -> tuple[list[dict[str, Any]], bytes]:
    """The manifest's groups, and the bytes: 8 bits each, but for the last bias."""
    shapes = {"Conv1/kernel": [3, 3, 3, 4], "deep/depthwise_kernel": [3, 3, 4, 1], "point/kernel": [1, 1, 4, 4]}
    shapes |= {f"bn/{part}": [4] for part in ("gamma", "beta", "moving_mean", "moving_variance")}
    shapes |= {"uneven/depthwise_kernel": [3, 4, 4, 2]}
    shapes |= {f"bn_2/{part}": [8] for part in ("gamma", "beta", "moving_mean", "moving_variance")}
    shapes |= {"dense_1/kernel": [16, 6], "dense_1/bias": [6], "dense_2/kernel": [6, 5]}
    ranges = {"gamma": (0.5, 0.004), "moving_variance": (0.3, 0.004)}
    entries: list[dict[str, Any]] = []
    data = b""
    for name, shape in shapes.items():
        least, scale = ranges.get(name.rpartition("/")[2], (-0.87334511607301, 0.006666756611244351))
        coding = {"min": least, "scale": scale, "dtype": "uint8"}
        entries.append({"name": name, "shape": shape, "dtype": "float32", "quantization": coding})
        data += bytes((i * i * 37 + 11 * i + len(data)) % 251 for i in range(math.prod(shape)))
    entries.append({"name": "dense_2/bias", "shape": [5], "dtype": "float32"})
    return [{"paths": ["group1-shard1of1"], "weights": entries}], data + struct.pack("<5f", 0.5, -0.25, 1, 0, -1)


def javascript(value: Any) -> str:
    """A literal as a minifier writes it: bare keys, !0 and !1, no zero before a point."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{javascript(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(javascript, value)) + "]"
    if isinstance(value, bool):
        return "!0" if value else "!1"
    if isinstance(value, float):
        return repr(value).replace("0.", ".", 1) if abs(value) < 1 else repr(value)
    return json.dumps(value)


def write(folder: Path, model: dict[str, Any], manifest: list[dict[str, Any]], data: bytes) -> dict[str, Path]:
    """An archive in the layout of the npm package."""
    content = {"format": "layers-model", "modelTopology": model, "weightsManifest": manifest}
    scripts = {"model": javascript(content), "group1-shard1of1": f'"{base64.b64encode(data).decode()}"'}
    with tarfile.open(folder / PACKAGE, "w:gz") as archive:
        for name, literal in scripts.items():
            script = f"!function(e){{module.exports=e()}}(function(){{return {{1:[function(e,a,n){{a.exports={literal}"
            script += "},{}]}});"
            member = tarfile.TarInfo(f"package/dist/models/mobilenet_v2/{name}.min.js")
            member.size = len(script)
            archive.addfile(member, io.BytesIO(script.encode()))
    return {PACKAGE: folder / PACKAGE}


def drawn(height: int, width: int, kind: int) -> Tensor:
    """Pictures (1, 3, H, W) with pixels of 8 bits, by a formula that any language can follow."""
    y, x, c = torch.arange(height).view(-1, 1, 1), torch.arange(width).view(1, -1, 1), torch.arange(3)
    if kind == 0:
        pixels = (x * 7 + y * 13 + c * 50 + (x * y) % 97) % 256
    else:
        pixels = torch.where(c == 0, (x // 9) * 11 % 256, (y * c) // 2 % 256)
    return (pixels.float() / 255).permute(2, 0, 1)[None]


TINY = {
    (13, 18, 0): [
        0.28449755907058716,
        0.10720212757587433,
        0.36423900723457336,
        0.15917548537254333,
        0.08488583564758301,
    ],
    (13, 18, 1): [0.2704380452632904, 0.1130487397313118, 0.3888791501522064, 0.1570228934288025, 0.0706111416220665],
    (40, 31, 0): [
        0.43903636932373047,
        0.13108499348163605,
        0.22808264195919037,
        0.09926658868789673,
        0.1025293618440628,
    ],
    (40, 31, 1): [
        0.28087812662124634,
        0.10876481235027313,
        0.37075042724609375,
        0.1586887687444687,
        0.08091788738965988,
    ],
    (9, 12, 0): [0.3237161934375763, 0.13093499839305878, 0.34329891204833984, 0.131781205534935, 0.0702686458826065],
    (9, 12, 1): [0.2670821249485016, 0.11436370015144348, 0.3945304751396179, 0.15641215443611145, 0.06761150062084198],
}
REAL = {
    (224, 224, 0): [
        0.9979526996612549,
        0.0012644337257370353,
        0.0007730876095592976,
        7.86519558458e-06,
        1.92587071979e-06,
    ],
    (224, 224, 1): [
        0.9456914067268372,
        0.013463017530739307,
        0.03871439769864082,
        0.0015597011661157012,
        0.0005714414874091744,
    ],
    (320, 256, 0): [
        0.6128722429275513,
        0.006079351995140314,
        0.3787984251976013,
        0.0015557627193629742,
        0.0006942205945961177,
    ],
    (320, 256, 1): [
        0.9156069755554199,
        0.014321628026664257,
        0.0672292485833168,
        0.0021674232557415962,
        0.0006747525185346603,
    ],
    (150, 300, 0): [
        0.4435110092163086,
        0.0019599171355366707,
        0.5528501272201538,
        0.0006372249918058515,
        0.001041720504872501,
    ],
    (150, 300, 1): [
        0.7464838624000549,
        0.02836558036506176,
        0.20763948559761047,
        0.014872124418616295,
        0.0026389413978904486,
    ],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model's archive."""
    return write(tmp_path_factory.mktemp("tiny"), topology(), *weights())


@pytest.fixture(scope="module")
def reward(files: dict[str, Path]) -> Nsfw:
    """The reward on the tiny model; building it draws nothing from torch's global generator."""
    before = torch.get_rng_state()
    made = Nsfw(CPU, Nsfw.Config(), files)
    assert torch.equal(before, torch.get_rng_state())
    return made


@pytest.mark.parametrize("case", TINY)
def test_a_model_of_every_layer_equals_tensorflow(files: dict[str, Path], case: tuple[int, int, int]) -> None:
    """Uneven padding, statistics, 8-bit and plain weights, the order of a flattened picture, the resizing."""
    expected = torch.tensor(TINY[case])
    for sexy, unsafe in ((False, expected[[1, 3]]), (True, expected[[1, 3, 4]])):
        scores = Nsfw(CPU, Nsfw.Config(sexy=sexy), files)(drawn(*case), [PROMPT])
        torch.testing.assert_close(scores, -unsafe.sum()[None], rtol=0, atol=2e-6)


def test_the_real_model_equals_tensorflow() -> None:
    """Each of the five probabilities, on pictures of several sizes."""
    if "NSFWJS" not in os.environ:
        pytest.skip("NSFWJS names no archive; npm pack nsfwjs@4.4.0 makes one")
    real = Nsfw(CPU, Nsfw.Config(), {PACKAGE: Path(os.environ["NSFWJS"])})
    assert sum(parameter.numel() for parameter in real._network.parameters()) == 2_619_461
    for case, expected in REAL.items():
        torch.testing.assert_close(real._probabilities(drawn(*case))[0], torch.tensor(expected), rtol=0, atol=1e-5)
    assert CLASSES == ("Drawing", "Hentai", "Neutral", "Porn", "Sexy")


def test_the_gradient_is_that_of_finite_differences(files: dict[str, Path]) -> None:
    """In double precision, through the resizing."""
    exact = Nsfw(CPU, Nsfw.Config(), files, torch.float64)
    pictures = torch.cat([drawn(20, 25, 1), drawn(22, 25, 1)[:, :, 2:]]).double().requires_grad_(True)
    prompts = [PROMPT] * 2
    (gradient,) = torch.autograd.grad(exact(pictures, prompts).sum(), pictures)
    direction = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        rise = exact(pictures + 1e-7 * direction, prompts) - exact(pictures - 1e-7 * direction, prompts)
    assert float((gradient * direction).sum()) == pytest.approx(float(rise.sum()) / 2e-7, rel=1e-5)
    assert (gradient.flatten(1).norm(dim=1) > 1e-4).all()


def test_a_score_depends_on_its_own_picture_only(reward: Nsfw) -> None:
    """Not on the prompt, nor on its company; a broken picture scores NaN alone."""
    pictures = torch.cat([drawn(16, 20, 0), drawn(16, 20, 1), drawn(16, 20, 0).flip(3)])
    scores = reward(pictures, [PROMPT] * 3)
    assert scores.dtype == torch.float32
    assert scores.shape == (3,)
    torch.testing.assert_close(reward(pictures[1:2], [Prompt("q", "")]), scores[1:2], rtol=0, atol=1e-6)
    for value in (float("nan"), float("inf")):
        broken = pictures.clone()
        broken[1, 2, 5, 5] = value
        found = reward(broken, [PROMPT] * 3)
        assert found.isnan().tolist() == [False, True, False]
        torch.testing.assert_close(found[[0, 2]], scores[[0, 2]], rtol=0, atol=1e-6)
    for shape in ((1, 1, 13, 18), (1, 4, 13, 18)):
        with pytest.raises(ValueError, match="floating point"):
            reward(torch.zeros(shape), [PROMPT])


def test_bfloat16_is_an_option(reward: Nsfw, files: dict[str, Path]) -> None:
    """The layers compute in it; the probabilities are in single precision."""
    scores = Nsfw(CPU, Nsfw.Config(), files, torch.bfloat16)(drawn(13, 18, 0), [PROMPT])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(drawn(13, 18, 0), [PROMPT]), rtol=0, atol=0.02)


def changed(change: Callable[[dict[str, Any], list[dict[str, Any]]], None], folder: Path) -> dict[str, Path]:
    """The tiny model's archive after a change of its topology or manifest."""
    model, (manifest, data) = topology(), weights()
    change(model["model_config"]["config"], manifest)
    return write(folder, model, manifest, data)


CHANGES: dict[str, Callable[[dict[str, Any], list[dict[str, Any]]], Any]] = {
    r"lacks layers\.bn\.beta \(4,\); has besides layers\.bn\.gemma": lambda config, manifest: manifest[0]["weights"][
        4
    ].update(name="bn/gemma"),
    "bytes of weights are left over": lambda config, manifest: manifest[0]["weights"].pop(),
    "do not fit their manifest": lambda config, manifest: manifest[0]["weights"].append(
        {"name": "more", "shape": [9], "dtype": "float32"}
    ),
    "layer sum of kind Multiply is none": lambda config, manifest: config["layers"][7].update(class_name="Multiply"),
    "layer relu of kind ReLU is none": lambda config, manifest: config["layers"][4]["config"].update(max_value=None),
    "its last layer is no softmax": lambda config, manifest: config["layers"].append(other("x", "Dropout", "dense_2")),
    "the topology is not understood: KeyError": lambda config, manifest: config["layers"].pop(3),
    "coded otherwise": lambda config, manifest: manifest[0]["weights"][0].update(dtype="int32"),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_does_not_fit_is_refused(tmp_path: Path, message: str) -> None:
    """Other names, shapes, codings, layers; on the meta device, which reads but builds nothing."""
    with pytest.raises(UserError, match=message):
        Nsfw(META, Nsfw.Config(), changed(CHANGES[message], tmp_path))


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    """A model of the same kind that tells four classes apart."""
    model, (manifest, data) = topology(), weights()
    model["model_config"]["config"]["layers"][-1]["config"].update(units=4)
    manifest[0]["weights"][-1].update(shape=[4])
    manifest[0]["weights"][-2].update(shape=[6, 4])
    with pytest.raises(UserError, match="the model has 4 classes, not 5"):
        Nsfw(META, Nsfw.Config(), write(tmp_path, model, manifest, data[:-10]))


def test_the_meta_device_accepts_what_fits(files: dict[str, Path]) -> None:
    """Without a network being filled."""
    assert {parameter.device.type for parameter in Nsfw(META, Nsfw.Config(), files)._network.parameters()} == {"meta"}


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b\x08\x00broken", b"not an archive"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """And the message says how to get the right one."""
    (tmp_path / PACKAGE).write_bytes(content)
    with pytest.raises(
        UserError, match=r"is not the archive of nsfwjs 4\.4\.0: it cannot be read.*npm pack nsfwjs@4\.4\.0"
    ):
        Nsfw(META, Nsfw.Config(), {PACKAGE: tmp_path / PACKAGE})


def test_literals_are_read_and_code_is_not() -> None:
    """Every form that a minifier writes; a call, a sum and a cut text are refused."""
    text = r'a.exports={a:[1,-.5,8e-7,2.5],"b c":{},$d:!0,e:!1,f:null,g:"x\"y\\n"},{}'
    expected = {"a": [1, -0.5, 8e-7, 2.5], "b c": {}, "$d": True, "e": False, "f": None, "g": 'x"y\\n'}
    assert read_exports(text) == expected
    for bad in (
        "e.exports={a:f()}",
        "e.exports={a:1+1}",
        "e.exports={a:[1,2",
        "e.exports=[" * 2,
        "var x=1",
        "e.exports={a}",
    ):
        with pytest.raises(MalformedModelError):
            read_exports(bad)
    with pytest.raises(MalformedModelError, match="nested too deeply"):
        read_exports("e.exports=" + "[" * 100_000)


def test_eight_bits_are_scaled_in_double_precision() -> None:
    """The value times the scale, plus the least; rounded once."""
    coding = {"min": -0.87334511607301, "scale": 0.006666756611244351, "dtype": "uint8"}
    entry = {"name": "x", "shape": [3], "dtype": "float32", "quantization": coding}
    found = read_weights([{"paths": ["p"], "weights": [entry]}], {"p": base64.b64encode(bytes([0, 131, 255])).decode()})
    exact = [
        -0.87334511607301,
        131 * 0.006666756611244351 - 0.87334511607301,
        255 * 0.006666756611244351 - 0.87334511607301,
    ]
    assert torch.equal(found["x"], torch.tensor(exact, dtype=torch.float64).float())
