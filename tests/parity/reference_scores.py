"""What the reference packages say of the pictures and prompts that make_checkpoints.py wrote.

Runs in the reference environment, one reward a process, with HF_HOME on the cache that make_checkpoints.py made:

    python reference_scores.py DIRECTORY hpsv2|pickscore|aesthetic|imagereward

Writes DIRECTORY/reference/NAME.json, the scores by pair, and for those that cut a square out of the resized picture
that square, as its network gets it: DIRECTORY/reference/NAME/PICTURE.png.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from make_checkpoints import stub_turtle
from PIL import Image
from torch import Tensor


def main(directory: Path, name: str) -> None:
    """Score every pair, and write what came out."""
    stub_turtle()
    torch.load = functools.partial(torch.load, mmap=True)  # only for memory: the packages read whole files
    pairs = json.loads((directory / "pictures" / "pairs.json").read_text(encoding="utf-8"))
    paths = [directory / "pictures" / f"{picture}.png" for picture, _ in pairs]
    prompts = [prompt for _, prompt in pairs]
    squares = directory / "reference" / name
    squares.mkdir(parents=True, exist_ok=True)
    found = REFERENCES[name](directory, paths, prompts, squares)
    (directory / "reference" / f"{name}.json").write_text(json.dumps(found))


def hpsv2(directory: Path, paths: list[Path], prompts: list[str], squares: Path) -> dict[str, list[float]]:
    """`hpsv2.score` as users call it; it reads its files again at every call."""
    import hpsv2

    def score(version: str, count: int) -> list[float]:
        return [
            float(hpsv2.score(str(path), prompt, hps_version=version)[0])
            for path, prompt in zip(paths[:count], prompts[:count], strict=True)
        ]

    return {"v2.1": score("v2.1", len(paths)), "v2.0": score("v2.0", 2)}


def pickscore(directory: Path, paths: list[Path], prompts: list[str], squares: Path) -> dict[str, list[float]]:
    """The recipe of PickScore's README with transformers' CLIPModel.

    Its AutoProcessor was, when PickScore was published, the processor of PIL pictures and the fast tokenizer. The slow
    one repairs Unicode and HTML entities where ftfy is installed, so that scores depended on what else was.
    """
    from transformers import AutoModel, CLIPImageProcessor, CLIPProcessor, CLIPTokenizerFast

    processor = CLIPProcessor(
        CLIPImageProcessor.from_pretrained(directory / "pickscore"),
        CLIPTokenizerFast.from_pretrained(directory / "pickscore"),
    )
    network = AutoModel.from_pretrained(directory / "pickscore").eval()
    scores, cosines = [], []
    for path, prompt in zip(paths, prompts, strict=True):
        pixels = processor(images=[Image.open(path)], return_tensors="pt")
        save_square(pixels["pixel_values"][0], squares / path.name)
        text = processor(text=[prompt], padding=True, truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            seen = network.get_image_features(**pixels)
            seen = seen / torch.norm(seen, dim=-1, keepdim=True)
            read = network.get_text_features(**text)
            read = read / torch.norm(read, dim=-1, keepdim=True)
            cosine = (read @ seen.T)[0]
            scores.append((network.logit_scale.exp() * cosine).item())
            cosines.append(cosine.item())
    return {"score": scores, "cosine": cosines}


def aesthetic(directory: Path, paths: list[Path], prompts: list[str], squares: Path) -> dict[str, list[float]]:
    """image-reward's AestheticScore, which is LAION's predictor on OpenAI's own code for CLIP."""
    import clip
    from ImageReward.models.AestheticScore import AestheticScore
    from safetensors.torch import load_file

    state = openai_layout(load_file(directory / "aesthetic" / "model.safetensors"))
    network = clip.model.build_model(state).float()
    clip.load = lambda *arguments, **options: (network, clip.clip._transform(224))  # the original downloads
    scorer = AestheticScore(download_root="", device="cpu").eval()
    scorer.mlp.load_state_dict(torch.load(directory / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth"))
    scores = []
    for path in paths:
        save_square(scorer.preprocess(Image.open(path)), squares / path.name)
        with torch.no_grad():
            scores.append(scorer.score("", str(path)))
    return {"score": scores}


def openai_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers' CLIPModel to those of OpenAI's code."""
    renamed = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T,
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "visual.proj": state["visual_projection.weight"].T,
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        renamed[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        renamed[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
    for tower, prefix, layers in (("text_model", "", 12), ("vision_model", "visual.", 24)):
        for layer in range(layers):
            old, new = f"{tower}.encoder.layers.{layer}", f"{prefix}transformer.resblocks.{layer}"
            for kind in ("weight", "bias"):
                parts = [state[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                renamed[f"{new}.attn.in_proj_{kind}"] = torch.cat(parts)
                renamed[f"{new}.attn.out_proj.{kind}"] = state[f"{old}.self_attn.out_proj.{kind}"]
                for one, other in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):
                    renamed[f"{new}.{one}.{kind}"] = state[f"{old}.{other}.{kind}"]
                for one, other in (("c_fc", "fc1"), ("c_proj", "fc2")):
                    renamed[f"{new}.mlp.{one}.{kind}"] = state[f"{old}.mlp.{other}.{kind}"]
    return renamed


def imagereward(directory: Path, paths: list[Path], prompts: list[str], squares: Path) -> dict[str, list[float]]:
    """`ImageReward.load(...).score`, and the gradient of its differentiable path for the first picture."""
    import ImageReward

    files = directory / "imagereward"
    model = ImageReward.load(str(files / "ImageReward.pt"), device="cpu", med_config=str(files / "med_config.json"))
    model.requires_grad_(False)
    scores = []
    for path, prompt in zip(paths, prompts, strict=True):
        save_square(model.preprocess(Image.open(path)), squares / path.name)
        scores.append(model.score(prompt, str(path)))
    text = model.blip.tokenizer(prompts[:1], padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    pixels = model.preprocess(Image.open(paths[0]))[None].requires_grad_()
    model.score_gard(text.input_ids, text.attention_mask, pixels).sum().backward()
    np.save(squares / "gradient.npy", pixels.grad.numpy())
    return {"score": scores}


def save_square(pixels_CHW: Tensor, path: Path) -> None:
    """As PNG, what preprocessing made of a picture; it has to be a square of 8 bits, normalised."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    values = (pixels_CHW * std + mean) * 255
    assert values.shape == (3, 224, 224)
    assert (values - values.round()).abs().max() < 1e-3
    Image.fromarray(values.round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)


REFERENCES = {"hpsv2": hpsv2, "pickscore": pickscore, "aesthetic": aesthetic, "imagereward": imagereward}

if __name__ == "__main__":
    assert os.environ.get("HF_HUB_OFFLINE") == "1", "nothing is fetched here"
    main(Path(sys.argv[1]), sys.argv[2])
