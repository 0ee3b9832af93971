"""Floating-point operations of each unit that the meter counts: measured once a run, in a process of its own.

`torch.utils.flop_counter` counts matrix products, convolutions and fused attention, a multiplication and an addition
as two. Operations element by element, normalisation, resampling, the codec of a JPEG file, and whatever is not torch
count as nothing: a reward without any counted operation has 0 here, and reports name it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from harness.config import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

    from harness.api import DiffusionModel, Request, Reward, SamplerConfig

PICTURES = 2  # measured in one batch: more than one, so that whatever is shared is not all of it

Units = dict[str, float]


def denoiser_row(model: DiffusionModel, sampler: SamplerConfig, batch: Sequence[Request]) -> Units:
    """Of one row through the denoiser, in the middle of the chain, with the model's present adapter.

    Returns:
        `forward`; `backward` to the adapter's parameters alone; `backward_to_input` to these and to the latent, as in
        a chain that several steps are differentiated in. What a denoiser with `checkpoint_inside` computes again is no
        part of them: the meter counts those rows apart, and the two together are what was measured.
    """
    import torch

    from harness.api import Adapter
    from harness.sampling import initial_latents

    timesteps = model.timesteps(sampler)
    condition = model.condition([request.prompt.text for request in batch])
    model.condition([""] * len(batch))  # encoded once a run and kept: no part of a row
    parameters = list(model.adapter_parameters().values())
    rows = len(batch) * model.rows_per_latent(sampler.guidance)

    def passes(input_gradient: bool) -> tuple[float, float]:
        x = initial_latents(model, batch).requires_grad_(input_gradient)
        wanted = [x, *parameters] if input_gradient else parameters

        def forward() -> Tensor:
            t = timesteps[len(timesteps) // 2]
            with torch.enable_grad():
                return model.predict(x, t, condition, guidance=sampler.guidance, adapter=Adapter()).noise

        return _passes(forward, wanted)

    forward, backward = passes(False)
    to_input = passes(True)[1]
    again = forward if model.checkpoint_inside else 0.0
    measured = {"forward": forward, "backward": backward - again, "backward_to_input": to_input - again}
    return {name: flops / rows for name, flops in measured.items()}


def decoded_picture(model: DiffusionModel, batch: Sequence[Request]) -> Units:
    """Of one latent to a picture: `forward`, and `backward` to the latent."""
    from harness.sampling import initial_latents

    latents = initial_latents(model, batch).requires_grad_()
    forward, backward = _passes(lambda: model.decode(latents), [latents])
    return {"forward": forward / len(batch), "backward": backward / len(batch)}


def scored_picture(reward: Reward, images_BCHW: Tensor, batch: Sequence[Request]) -> Units:
    """Of one picture's score: `forward`, and `backward` to the picture, 0 where the reward has no gradient."""
    images = images_BCHW.detach().requires_grad_(reward.differentiable)
    prompts = [request.prompt for request in batch]
    reward(images, prompts)  # what it keeps by prompt is there from now on
    forward, backward = _passes(lambda: reward(images, prompts), [images] if reward.differentiable else [])
    return {"forward": forward / len(batch), "backward": backward / len(batch)}


def _passes(compute: Callable[[], Tensor], inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Operations of a forward pass, and of the backward pass from the sum of its output to these inputs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as forward:
        output = compute()
    with FlopCounterMode(display=False) as backward:
        if inputs:
            # An adapter may have parameters that do not act at this timestep.
            torch.autograd.grad(output.sum(), list(inputs), allow_unused=True)
    return float(forward.get_total_flops()), float(backward.get_total_flops())


def measure(config: RunConfig) -> dict[str, Units | dict[str, Units]]:
    """The content of flops.json: units of the run's model, with a fresh adapter, and of every training reward."""
    from harness.api import Randomness
    from harness.cell import request_stream
    from harness.grid import Grid

    # The counter sees the calls of torch, not what a compiler makes of them; what is computed is the same.
    plain = config.denoiser.model_copy(update={"compile": False})
    grid = Grid(config.model_copy(update={"workers": 1, "denoiser": plain}))
    model = grid.model
    model.add_adapter(config.adapter, Randomness(0, "initial adapter"))
    stream = request_stream(grid.training_prompts(), model.latent_shape, 0)
    batch = [next(stream) for _ in range(PICTURES)]
    return {
        "denoiser_row": denoiser_row(model, config.sampler, batch),
        "decode": decoded_picture(model, batch),
        "rewards": _rewards(grid.build_training_rewards(_components(grid.training_rewards)), model, batch),
    }


def _components(training_rewards: Mapping[str, Sequence[tuple[float, str]]]) -> list[str]:
    return [name for terms in training_rewards.values() for _, name in terms]


def _rewards(rewards: Mapping[str, Reward], model: DiffusionModel, batch: Sequence[Request]) -> dict[str, Units]:
    import torch

    from harness.sampling import initial_latents

    with torch.no_grad():
        images = model.decode(initial_latents(model, batch))
    return {name: scored_picture(reward, images, batch) for name, reward in rewards.items()}


if __name__ == "__main__":
    print(json.dumps(measure(RunConfig.model_validate_json(sys.argv[1]))))
