"""The LoRA layers of a denoiser: attaching them, and which adapter acts in a pass."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from diffusers import ModelMixin
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from harness.api import Adapter, UserError

NAME = "default"
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Factors:
    """LoRA of one module: the update is scale * up @ down.

    Attributes:
        down: A, (rank, in) or (rank, in, kernel, kernel).
        up: B, (out, rank) or (out, rank, 1, 1).
        scale: alpha/rank, or what the file has in its place.
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Of the update."""
        return len(self.down)


@final
class Lora:
    """The adapter of a network of diffusers.

    Args:
        network: The frozen network; has no adapter yet.
    """

    def __init__(self, network: ModelMixin) -> None:
        self._network, self._compiled = network, False
        self._layers: dict[str, LoraLayer] = {}
        self._scales: dict[str, float] = {}
        self._acting = Adapter()

    # --------------- attaching

    def fresh(self, config: LoraConfig, seed: int, device: torch.device) -> None:
        """Replace the adapter by a new one, its initial values drawn from `seed`.

        Raises:
            ValueError: No module matches the targets.
        """
        if self._layers:
            self._network.delete_adapters(NAME)
            self._layers, self._scales = {}, {}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # peft draws globally
            torch.manual_seed(seed)
            self._network.add_adapter(config, adapter_name=NAME)
        self._layers = {
            name: module
            for name, module in self._network.named_modules()
            if isinstance(module, LoraLayer) and NAME in module.lora_A
        }
        self._scales = {name: layer.scaling[NAME] for name, layer in self._layers.items()}
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()

    def given(self, factors: Mapping[str, Factors], device: torch.device) -> None:
        """Replace the adapter by one with these factors, by module name.

        Raises:
            UserError: The network has no such modules, or they have other shapes; the present adapter stays.
        """
        self._check(factors)
        ranks = {name: pair.rank for name, pair in factors.items()}
        common = Counter(ranks.values()).most_common(1)[0][0]
        self.fresh(
            LoraConfig(
                r=common,
                lora_alpha=common,
                rank_pattern={f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common},
                target_modules="|".join(map(re.escape, factors)),
            ),
            seed=0,  # what is drawn is overwritten
            device=device,
        )
        assert self._layers.keys() == factors.keys()
        for name, layer in self._layers.items():
            pair, self._scales[name] = factors[name], factors[name].scale
            layer.lora_alpha[NAME] = pair.scale * pair.rank
            with torch.no_grad():
                layer.lora_A[NAME].weight.copy_(pair.down)
                layer.lora_B[NAME].weight.copy_(pair.up)

    def _check(self, factors: Mapping[str, Factors]) -> None:
        modules = {
            name: module.get_base_layer() if isinstance(module, LoraLayer) else module
            for name, module in self._network.named_modules()
        }
        kind = type(self._network).__name__
        unknown = [name for name in factors if not isinstance(modules.get(name), nn.Linear | nn.Conv2d)]
        if unknown:
            raise UserError(
                f"{listed(unknown)}: this {kind} has no such linear or convolutional layers, so that the adapter was "
                "made for another architecture; take the model that it was trained on"
            )
        misfits = []
        for name, pair in factors.items():
            out, *inside = modules[name].weight.shape
            if list(pair.down.shape[1:]) != inside or list(pair.up.shape) != [out, pair.rank, *[1] * len(inside[1:])]:
                shapes = f"{tuple(pair.up.shape)} and {tuple(pair.down.shape)}"
                misfits.append(f"{name} (factors {shapes}, weight {tuple(modules[name].weight.shape)})")
        if misfits:
            raise UserError(
                f"the adapter's factors do not fit the layers of this {kind}: {listed(misfits)}; take the model that "
                "it was trained on"
            )

    # --------------- what is attached

    def parameters(self) -> dict[str, nn.Parameter]:
        """The A and B factors by their name in the network."""
        return {name: p for name, p in self._network.named_parameters() if is_factor(name)}

    def folded(self) -> dict[str, Tensor]:
        """The factors as peft names them, with each layer's scale folded into B."""
        return {
            name: (tensor * (self._scales[name.partition(".lora_")[0]] if "lora_B" in name else 1.0)).detach()
            for name, tensor in get_peft_model_state_dict(self._network, adapter_name=NAME).items()
        }

    # --------------- which adapter acts

    def run(self, adapter: Adapter, inputs: Mapping[str, Any]) -> Any:
        """Call the network with this adapter."""
        self._act(adapter)
        if self._compiled:
            inputs = {name: self._as_tensor(value) for name, value in inputs.items()}
        if adapter.parameters is None:
            return self._network(**inputs)
        return functional_call(self._network, dict(adapter.parameters), (), dict(inputs))

    def _act(self, adapter: Adapter) -> None:
        self._acting = adapter
        strengths: dict[float, Any] = {scale: scale * adapter.scale for scale in self._scales.values()}
        if self._compiled:  # new tensors each time: graphs of earlier passes keep theirs
            strengths = {scale: self._as_tensor(strength) for scale, strength in strengths.items()}
        for name, layer in self._layers.items():
            layer.scaling[NAME] = strengths[self._scales[name]]

    def compile(self) -> None:
        """From now on run the network through torch.compile.

        Numbers that differ between passes are given as tensors: they become inputs of the compiled code, where a
        number would be compiled in.
        """
        self._network.compile()
        self._compiled = True

    def _as_tensor(self, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        dtype = torch.int64 if isinstance(value, int) else torch.float64
        return torch.tensor(value, dtype=dtype, device=self._network.device)

    def checkpoint_blocks(self) -> None:
        """From now on recompute the activations of the network's blocks in the backward pass.

        By then other passes may have had other adapters: each block is computed again with the one of its own pass.
        """
        prefixes = {module: f"{name}." for name, module in self._network.named_modules()}

        def checkpointed(block: nn.Module, *inputs: Any) -> Any:
            adapter = self._acting
            own: dict[str, Tensor] = {}
            if adapter.parameters is not None:
                prefix = prefixes[block]
                own = {
                    name.removeprefix(prefix): p for name, p in adapter.parameters.items() if name.startswith(prefix)
                }

            def compute(*inputs: Any) -> Any:
                with self._acting_as(adapter):
                    return functional_call(block, own, inputs)

            return checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False)

        self._network.enable_gradient_checkpointing(checkpointed)

    @contextmanager
    def _acting_as(self, adapter: Adapter) -> Iterator[None]:
        before = self._acting
        self._act(adapter)
        try:
            yield
        finally:
            self._act(before)


def is_factor(name: str) -> bool:
    """Whether a parameter of a network belongs to its adapter."""
    return ".lora_A." in name or ".lora_B." in name


def listed(names: list[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
