"""Seconds, memory and utilisation of every weight-changing method at Stable Diffusion's size, on random weights.

    python -m benchmarks.real_sizes --out real-sizes            # a GPU; HPSv2's ViT-H-14 as the reward
    python -m benchmarks.real_sizes --size tiny --device cpu --methods draft-k,ddpo --out tiny-sizes

Speed and memory do not depend on what weights say, so none are downloaded: the parts of Stable Diffusion 1.4 and the
reward's network are built from their published configurations and saved once under --out. Each method is measured in a
process of its own, with gradient checkpointing and without; one that runs out of memory is a row that says so.

Utilisation is the floating-point operations of an update (as `torch.utils.flop_counter` counts them: matrix products,
convolutions and attention, recomputation included) per second, over the rate of a large matrix product in the same
dtype on the same device, measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH = 4
CONDITIONS = ("off", "on")
# By the name of the operator, first match: everything that is not one of these is elementwise or moves memory.
OPERATORS = {
    "attention": ("attention",),
    "convolutions": ("conv",),
    "matrix products": ("mm", "linear", "matmul"),
    "normalisation": ("norm",),
    "copies and casts": ("copy", "to_copy", "cat", "clone", "contiguous"),
}


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        steps: Of the sampler.
        guidance: Scale.
        rank: Of LoRA.
        iterations: Timed, after one that is not.
        matrix: Side of the matrices whose product gives the device's rate.
    """

    steps: int
    guidance: float
    rank: int
    iterations: int
    matrix: int


SIZES = {"sd14": Size(50, 7.5, 8, 3, 8192), "tiny": Size(2, 7.5, 2, 1, 256)}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure what the command line asks for; prints a table and writes `real-sizes.json`."""
    options = _options(arguments)
    out = Path(options.out)
    pipeline, reward = out / "pipeline", out / "reward"
    build_pipeline(pipeline, options.size)
    build_reward(reward, options.size)
    rows: list[dict[str, Any]] = []
    for method in options.methods.split(",") if options.methods else _trained_methods():
        for checkpointing in CONDITIONS:
            config = run_settings(method, checkpointing, options.size, options.device, options.dtype, pipeline, reward)
            rows.append({"method": method, "checkpointing": checkpointing, **_alone(config, options.size)})
            print(json.dumps(rows[-1]), flush=True)
            (out / "real-sizes.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    return rows


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.real_sizes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="sd14")
    parser.add_argument("--methods", default="", help="comma-separated; default: every method that changes weights")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", default="real-sizes", help="directory for weights (9 GB at sd14) and results")
    return parser.parse_args(arguments)


def _trained_methods() -> list[str]:
    from harness.registry import discover

    return [name for name, plugin in discover("methods").items() if plugin.attributes["kind"] == "training"]


def run_settings(
    method: str, checkpointing: str, size: str, device: str, dtype: str, pipeline: Path, reward: Path
) -> dict[str, Any]:
    """A run with one arm, whose optimiser steps see batches of `BATCH` pictures."""
    chosen = SIZES[size]
    return {
        "preset": "smoke",
        "model": str(pipeline),
        "suite": "animals",
        "rewards": ["hpsv2.1"],
        "reward_weights": {"hpsv2.1": str(reward)},
        "reward_dtype": "bfloat16" if dtype == "bfloat16" else "float32",
        "arms": [{"label": method, "method": method, "overrides": {**batches(method), "checkpointing": checkpointing}}],
        "sampler": {"steps": chosen.steps, "guidance": chosen.guidance},
        "adapter": {"rank": chosen.rank},
        "budget": {"amount": 10**6, "curve_points": []},
        "micro_batch": BATCH,
        "device": device,
        "dtype": dtype,
        "seeds": [0],
    }


def batches(method: str) -> dict[str, Any]:
    """Settings that make every optimiser step see `BATCH` pictures."""
    from harness.registry import load_method

    fields = load_method(method).Config.model_fields
    settings: dict[str, Any] = {}
    if "batch_size" in fields:
        settings["batch_size"] = BATCH
    if "rollout_size" in fields:
        updates = fields["updates_per_rollout"].default if "updates_per_rollout" in fields else 1
        settings["rollout_size"] = 2 * BATCH * updates if method == "d3po" else BATCH * updates
    if "group_size" in fields:
        settings["group_size"] = BATCH
    return settings


# --------------- weights


def build_pipeline(directory: Path, size: str) -> None:
    """A `StableDiffusionPipeline` with the configuration of Stable Diffusion 1.4 (or tiny) and random weights."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from harness.contracts.tiny import save_tiny_pipeline

    if (directory / "model_index.json").exists():
        return
    save_tiny_pipeline(directory if size == "tiny" else directory / "tiny")
    if size == "tiny":
        return
    torch.manual_seed(0)
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        ),
        tokenizer=CLIPTokenizer.from_pretrained(directory / "tiny" / "tokenizer", model_max_length=77),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)


def build_reward(directory: Path, size: str) -> None:
    """Random weights of HPSv2.1 in its layout: ViT-H-14, or two layers."""
    import open_clip
    import torch

    file = directory / "HPS_v2.1_compressed.pt"
    if file.exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    config = open_clip.get_model_config("ViT-H-14")
    if size == "tiny":
        config["embed_dim"] = 32
        config["vision_cfg"] = {"image_size": 28, "layers": 1, "width": 32, "head_width": 16, "patch_size": 14}
        config["text_cfg"] |= {"width": 32, "heads": 2, "layers": 1}
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    torch.save({"state_dict": open_clip.CLIP(**config).state_dict()}, file)


# --------------- measuring


def _alone(config: dict[str, Any], size: str) -> dict[str, Any]:
    """What `measure` gives in a process of its own, or why it gave nothing."""
    command = [sys.executable, "-m", "benchmarks.real_sizes", "measure", json.dumps(config), size]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    lines = done.stderr.strip().splitlines() or ["no message"]
    memory = any("OutOfMemoryError" in line for line in lines)
    return {"failed": "out of memory" if memory else lines[-1]}


def measure(settings: dict[str, Any], size: str) -> dict[str, Any]:
    """Seconds an iteration and an optimiser step, peak memory, utilisation, and the shares of operators, in percent."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.utils.flop_counter import FlopCounterMode

    from harness.api import TrainedFineTuner
    from harness.assembly import assemble
    from harness.cell import request_stream
    from harness.config import resolve
    from harness.grid import Grid, pick_dtype
    from harness.metering import Meter
    from harness.records import peak_memory_mib

    grid = Grid(resolve(settings))
    device, dtype = grid.model.device, pick_dtype(grid.config)
    (label,) = grid.arms
    tuner = assemble(grid, grid.arms[label], "hpsv2.1", grid.build_training_rewards(["hpsv2.1"]), Meter(), seed=0)
    assert isinstance(tuner, TrainedFineTuner)
    stream = request_stream(grid.training_prompts(), grid.model.latent_shape, 0)
    pictures = tuner.requests_per_iteration

    def iterate() -> None:
        tuner.iterate([next(stream) for _ in range(pictures)])
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    iterate()
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    chosen = SIZES[size]
    hook = register_optimizer_step_post_hook(count)
    clock = time.perf_counter()
    for _ in range(chosen.iterations):
        iterate()
    seconds = (time.perf_counter() - clock) / chosen.iterations
    hook.remove()
    peak = peak_memory_mib()  # before anything below takes memory of its own
    with FlopCounterMode(display=False) as counter:
        iterate()
    rate = matrix_rate(device, dtype, chosen.matrix)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": grid.config.dtype,
        "torch": torch.__version__,
        "pictures": pictures,
        "updates": steps / chosen.iterations,
        "seconds_per_iteration": seconds,
        "seconds_per_update": seconds * chosen.iterations / steps,
        "peak_memory_gib": peak / 1024,
        "teraflops": counter.get_total_flops() / seconds / 1e12,
        "matrix_teraflops": rate / 1e12,
        "utilisation": counter.get_total_flops() / seconds / rate,
        "shares": shares(iterate, device.type),
    }


def matrix_rate(device: Any, dtype: Any, side: int) -> float:
    """Floating-point operations a second of the product of two square matrices."""
    import torch

    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> float:
        clock = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - clock

    product()
    return 2.0 * side**3 / min(product() for _ in range(10))


def shares(iterate: Any, device: str) -> dict[str, float]:
    """Where the device's time of an iteration goes, in percent, by kind of operator."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=kinds) as profiler:
        iterate()
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            kind = next(
                (kind for kind, parts in OPERATORS.items() if any(p in event.key for p in parts)), "elementwise"
            )
            spent[kind] += own
    total = sum(spent.values())
    return {kind: round(100 * value / total, 1) for kind, value in sorted(spent.items(), key=lambda item: -item[1])}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line for each method and checkpointing."""
    lines = [
        "| method | checkpointing | pictures, updates an iteration | s an update | peak GiB | utilisation | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| `{row['method']}` | {row['checkpointing']} | "
        if "failed" in row:
            lines.append(f"{start}{row['failed']} | | | | |")
            continue
        where = ", ".join(f"{kind} {share:.0f} %" for kind, share in list(row["shares"].items())[:4])
        lines.append(
            f"{start}{row['pictures']}, {row['updates']:g} | {row['seconds_per_update']:.3g} | "
            f"{row['peak_memory_gib']:.3g} | {100 * row['utilisation']:.0f} % of "
            f"{row['matrix_teraflops']:.3g} TFLOP/s | {where} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(json.loads(sys.argv[2]), sys.argv[3])))
    else:
        main()
