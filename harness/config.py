"""What a run is: settings, presets, arms, and how the command line's words become them (no torch here)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from harness.errors import UserError, nearest
from harness.finding import Finding
from harness.prompts import Split

PRESETS = Path(__file__).resolve().parents[1] / "presets"


class SamplerConfig(BaseModel):
    """How a chain of denoising steps runs. Stored and reported, since each detail changes the numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(10, ge=1, le=1000, description="Sampling steps T.")
    spacing: Literal["trailing", "leading"] = Field(
        "trailing",
        description="Which of the training timesteps are visited: trailing starts at the last one, leading (with "
        "offset 1, as Stable Diffusion 1.x) ends at the first; sigma of the last step differs 3.3x between them. "
        "Flow models visit those of their own scheduler instead.",
    )
    eta: float = Field(
        0.0, ge=0.0, le=1.0, description="Noise of each step: 0 is DDIM (on flow models Euler), 1 ancestral."
    )
    guidance: float = Field(4.0, ge=0.0, description="Scale; 1 means none. Classifier-free, or told to the denoiser.")
    final_alpha: Literal["one", "first"] = Field(
        "one", description="Target of the last step: a clean latent (one), or alpha of training timestep 0 (first)."
    )

    @model_validator(mode="after")
    def _leading_covers_the_range(self) -> SamplerConfig:
        if self.spacing == "leading" and self.steps > 500:
            raise ValueError("leading spacing takes at most 500 steps (beyond, it would leave out the noisiest half)")
        return self


class AdapterConfig(BaseModel):
    """The shape of the LoRA adapter: one per run, so that all methods move the same parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(4, ge=1, description="LoRA rank.")
    alpha: float | None = Field(None, gt=0, description="LoRA alpha; the update is scaled by alpha/rank. None: rank.")
    targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), description="Modules that get an adapter: the attention projections."
    )


class DenoiserConfig(BaseModel):
    """How the denoiser computes; what it computes stays the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    compile: bool = Field(False, description="Run it through torch.compile; numbers change by rounding.")
    checkpoint_inside: bool = Field(
        False, description="Recompute the activations of its blocks in the backward pass: less memory, more time."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> DenoiserConfig:
        if self.compile and self.checkpoint_inside:
            raise ValueError(
                "compile and checkpoint_inside do not go together, since compiled code is recomputed as a whole; "
                "write checkpointing=on, which recomputes each sampling step"
            )
        return self


class OptimizerConfig(BaseModel):
    """AdamW and the clipping of the gradient's norm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float = Field(4e-4, gt=0, description="DRaFT, small scale: 4e-4.")
    weight_decay: float = Field(0.1, ge=0, description="DRaFT: 0.1.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's default; not stated in the DRaFT paper.")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's default; not stated in the DRaFT paper.")
    max_gradient_norm: float | None = Field(1.0, gt=0, description="Clip the gradient's norm to this; None: do not.")


class InferenceConfig(BaseModel):
    """Base of the `Config` of methods that change no weights; as `MethodConfig`, without an optimiser."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MethodConfig(InferenceConfig):
    """Base of a trained method's `Config`: frozen, unknown names refused; each field says where its default is from."""

    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)


class BudgetConfig(BaseModel):
    """What a cell may spend on training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Literal["queries", "denoiser_rows", "iterations", "seconds"] = Field(
        "queries", description="What is counted; a cell stops before an iteration that could exceed the amount."
    )
    amount: float = Field(256, gt=0, allow_inf_nan=False, description="How much of it.")
    curve_points: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(
        (32, 64, 128), description="Where along training the model is evaluated, in the budget's unit."
    )


class EvaluationConfig(BaseModel):
    """What every cell is scored on, in one fixed order and batch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: dict[Split, int] = Field(
        default={"training": 24, "held-out": 24}, description="Prompts of each split: the first ones of the suite."
    )
    latents: int = Field(2, ge=1, description="Pictures per prompt, from the shared noise bank.")
    curve_latents: int = Field(2, ge=1, description="The same at curve points (never more than `latents`).")
    diversity_prompts: int = Field(4, ge=0, description="Prompts of the diversity block (of the last split above).")
    diversity_latents: int = Field(8, ge=2, description="Pictures per prompt of the diversity block.")
    batch: int = Field(16, ge=1, description="Pictures per batch; part of the evaluation's identity.")

    @field_validator("prompts")
    @classmethod
    def _some(cls, prompts: dict[Split, int]) -> dict[Split, int]:
        if not prompts or min(prompts.values()) < 1:
            raise ValueError("each split that is named needs at least one prompt")
        return prompts


class VariantConfig(BaseModel):
    """Another way to generate with an adapter that was trained once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lora_scale: float = Field(1.0, ge=0, allow_inf_nan=False, description="Strength of the adapter; 0 is the base.")
    lora_steps: int | None = Field(
        None, ge=0, description="The adapter acts in the last this many sampling steps only; None: in all."
    )

    @property
    def label(self) -> str:
        """`lora-scale=0.5`, `lora-steps=4` or both: a label says all of a variant."""
        scale = [f"lora-scale={self.lora_scale:g}"] if self.lora_scale != 1 else []
        return " ".join(scale + ([] if self.lora_steps is None else [f"lora-steps={self.lora_steps}"]))

    @model_validator(mode="after")
    def _differs(self) -> VariantConfig:
        if not self.label:
            raise ValueError("a variant needs a lora_scale other than 1, or lora_steps")
        return self


class EarlyStoppingConfig(BaseModel):
    """Keep the adapter of the curve point that scores best on validation prompts, as the variant `early-stopping`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reward: str = Field(description="Rewards or metrics that judge it, e.g. emoji-clip-heldout, or a weighted sum.")
    prompts: int = Field(8, ge=1, description="Validation prompts, the first ones of the suite's split.")
    latents: int = Field(2, ge=1, description="Pictures per prompt.")


class MixConfig(BaseModel):
    """Adapters of one arm, trained on several rewards, mixed into one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: str
    weights: dict[str, float] = Field(description="Weight of each training reward's adapter.")
    rank: int | None = Field(None, ge=1, description="Of the mixed adapter; None: that of the run's adapters.")


Probe = Literal["gradient-norms", "gradient-variance"]


class ArmConfig(BaseModel):
    """A method with its overrides and a label."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    method: str
    overrides: dict[str, Any] = {}


class RunConfig(BaseModel):
    """A grid of cells (arm x training reward x seed) on one model, suite and budget."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[str, ...] = ()
    arms: tuple[ArmConfig, ...] = ()
    rewards: tuple[str, ...] = Field(("emoji-3d",), description="What is trained on: one cell for each.")
    evaluation_rewards: tuple[str, ...] = Field(
        (), description="Rewards that score every cell beside those trained on and those of the model's family; or all."
    )
    reward_weights: dict[str, str] = Field(
        {}, description="Where a reward's weights are: a file, a directory, or owner/name@revision; default: the hub."
    )
    reward_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of reward networks while training on them; evaluation is always float32."
    )
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    model: str = "emoji"
    revision: str | None = None
    suite: str | None = Field(None, description="None: the model's own suite.")
    preset: str = "quick"
    reference: str | None = Field(None, description="Label of the arm that others are compared with; None: the first.")
    budget: BudgetConfig = BudgetConfig()
    sampler: SamplerConfig = SamplerConfig()
    adapter: AdapterConfig = AdapterConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    settings: dict[str, dict[str, Any]] = Field(
        default={}, description="Hyper-parameters by method; an arm's own overrides come after these."
    )
    variants: tuple[VariantConfig, ...] = Field((), description="Further ways to generate with each trained adapter.")
    early_stopping: EarlyStoppingConfig | None = None
    mixes: tuple[MixConfig, ...] = Field((), description="Mixtures of trained adapters, evaluated after the cells.")
    probes: tuple[Probe, ...] = Field((), description="What is measured at the start, middle and end of training.")
    findings: tuple[Finding, ...] = Field((), description="Claims, and the statements that the report judges them by.")
    micro_batch: int = Field(16, ge=1, description="Pictures in memory at once while training.")
    checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="Gradient checkpointing per sampling step; auto: where activations exceed the limit."
    )
    activation_limit_gib: float = Field(1.0, gt=0, description="For `checkpointing: auto`.")
    out: Path | None = Field(None, description="Directory of the run; None: results/<preset>-<hash>.")
    workers: int | None = Field(None, ge=1, description="Processes; None: one per core, or one per GPU.")
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    keep_images: Literal["final", "none"] = "final"
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="Where metrics are streamed to, too (docs/trackers.md); JSON lines are always written."
    )
    timing: bool = Field(True, description="Time each arm alone in a fresh process, for the cost table.")
    timing_repetitions: int = Field(1, ge=1, description="Fresh processes for each arm; the table shows their median.")

    @field_validator("variants")
    @classmethod
    def _each_once(cls, variants: tuple[VariantConfig, ...]) -> tuple[VariantConfig, ...]:
        return tuple({variant.label: variant for variant in variants}.values())

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("seeds repeat")
        return seeds

    def all_arms(self) -> tuple[ArmConfig, ...]:
        """One arm per method, then the named ones.

        Raises:
            UserError: There is none, or two share a label.
        """
        arms = (*(ArmConfig(label=_plugin_label(name), method=name) for name in self.methods), *self.arms)
        if not arms:
            raise UserError("nothing to run: give --methods draft,ddpo (`python -m harness list methods`) or --arm")
        labels = [arm.label for arm in arms]
        for label in labels:
            if label == "base":
                raise UserError("no arm can be labelled 'base': that is the model before training; take another label")
            if labels.count(label) > 1:
                raise UserError(
                    f"two arms are labelled {label!r}; give each a label of its own (--arm label: ..., label=PATH)"
                )
        return arms


def _plugin_label(name: str) -> str:
    return Path(name.partition(":")[0]).stem if name.partition(":")[0].endswith(".py") else name


def parse_seeds(text: str) -> tuple[int, ...]:
    """`5` is seeds 0 to 4, `0,3,7` a list, `1000-1004` a range.

    Raises:
        UserError: The text is none of these.
    """
    seeds: tuple[int, ...] = ()
    if re.fullmatch(r"\s*\d+\s*", text):
        seeds = tuple(range(int(text)))
    elif match := re.fullmatch(r"\s*(\d+)-(\d+)\s*", text):
        seeds = tuple(range(int(match[1]), int(match[2]) + 1))
    elif re.fullmatch(r"[\d\s]+(,[\d\s]*)+", text):
        seeds = tuple(int(part) for part in text.split(",") if part.strip())
    if not seeds:
        raise UserError(f"--seeds {text!r}: give a count (5), a list (0,3,7) or a range (5-9) of seeds from 0 on")
    return seeds


def parse_arm(text: str) -> ArmConfig:
    """`label: method key=value key=value`.

    Raises:
        UserError: The text has another form.
    """
    label, colon, rest = text.partition(":")
    words = rest.split()
    if not colon or not label.strip() or not words or any("=" not in word for word in words[1:]):
        raise UserError(f"--arm {text!r} is not understood: write 'K=5: draft-k k=5' (label: method key=value ...)")
    overrides: dict[str, Any] = {}
    for word in words[1:]:
        key, _, value = word.partition("=")
        _assign(overrides, key.split("."), _scalar(f"--arm {text!r}", value))
    return ArmConfig(label=label.strip(), method=words[0], overrides=overrides)


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Parts between separators that are in no square brackets: those belong to a reward's settings."""
    return re.split(rf"{re.escape(separator)}(?![^\[]*\])", text)


def parse_budget(text: str) -> dict[str, Any]:
    """`queries=256`, `denoiser_rows=50000`, `iterations=64` or `seconds=60`."""
    unit, _, amount = text.partition("=")
    try:
        return {"unit": unit, "amount": float(amount)}
    except ValueError:
        raise UserError(f"--budget {text!r} is not understood: write queries=256, iterations=64 ...") from None


def parse_variants(scales: str, steps: str) -> list[dict[str, Any]]:
    """`0.5,0.75` and `3,5`: one variant each.

    Raises:
        UserError: Not numbers.
    """
    try:
        found: list[dict[str, Any]] = [{"lora_scale": float(word)} for word in scales.split(",") if word.strip()]
        return found + [{"lora_steps": int(word)} for word in steps.split(",") if word.strip()]
    except ValueError:
        raise UserError(f"--lora-scale {scales!r} --lora-steps {steps!r}: write numbers, as 0.5,0.75 and 3,5") from None


RUN_SECTIONS = ("sampler", "adapter", "denoiser", "budget", "evaluation", "early_stopping")


def parse_set(items: Sequence[str]) -> dict[str, Any]:
    """`draft-k.k=5`, `sampler.steps=20`, `micro_batch=4`: the nested settings that these words mean.

    Raises:
        UserError: An item has no `=`.
    """
    result: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--set {item!r} is not understood: write method.key=value or sampler.steps=20")
        path = key.strip().split(".")
        if len(path) > 1 and path[0] not in RUN_SECTIONS:
            path = ["settings", *path]
        _assign(result, path, _scalar(f"--set {item!r}", value))
    return result


def parse_set_of_method(items: Sequence[str]) -> dict[str, Any]:
    """`k=5`, `optimizer.learning_rate=1e-3`: the settings of one method.

    Raises:
        UserError: An item has no `=`.
    """
    result: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--set {item!r} is not understood: write k=5, the name of one of the method's settings")
        _assign(result, key.strip().split("."), _scalar(f"--set {item!r}", value))
    return result


def _scalar(where: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{where}: the value {value!r} is no YAML scalar or list") from None


def _assign(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(
                f"{key} is given a value and, as {'.'.join(path)}, settings of its own; give one of the two"
            )
    tree[path[-1]] = value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, section by section.

    An optimiser's setting may stand without its section (`learning_rate`); with it, it displaces one without.
    """
    result = {key: value for key, value in base.items() if key not in over.get("optimizer", ())}
    for key, value in over.items():
        known = result.get(key)
        both = isinstance(value, Mapping) and isinstance(known, Mapping) and key != "prompts"
        result[key] = merge(known, value) if both else value  # type: ignore[arg-type]
    return result


def load_yaml(path: Path, what: str) -> dict[str, Any]:
    """A mapping from a YAML file.

    Raises:
        UserError: The file is absent, unreadable, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the {what} {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"the {what} {path} is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UserError(f"the {what} {path} must hold a mapping of settings")
    return content


def presets() -> dict[str, Path]:
    """The named experiments."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


EMBEDDED_MODEL = "emoji"


def preset_settings(name: str, model: str) -> dict[str, Any]:
    """The settings of a preset for a model.

    An experiment that serves the embedded model and others alike has three further keys: `extends` names the preset it
    builds on for each (`emoji` or `other`), and below `emoji` and `other` stands what only the one or the others get.

    Raises:
        UserError: There is no such preset.
    """
    known = presets()
    if name not in known:
        raise UserError(f"there is no preset {name!r}; {nearest(name, list(known))}")
    own = {key: value for key, value in load_yaml(known[name], "preset").items() if key != "description"}
    kind = "emoji" if model == EMBEDDED_MODEL else "other"
    extends, special = own.pop("extends", {}), {key: own.pop(key, {}) for key in ("emoji", "other")}
    base = preset_settings(extends[kind], model) if extends else {}
    return merge(merge(base, own), special[kind])


def resolve(passed: Mapping[str, Any]) -> RunConfig:
    """Defaults, then the preset, then what was passed.

    Raises:
        UserError: An unknown preset or setting, or a value out of range; names what and what would be right.
    """
    name = str(passed.get("preset", "quick"))
    preset = preset_settings(name, str(passed.get("model", EMBEDDED_MODEL)))
    try:
        return RunConfig.model_validate(merge({**preset, "preset": name}, passed))
    except ValidationError as error:
        raise UserError(explain(error, RunConfig)) from None


def explain(error: ValidationError, model: type[BaseModel], where: str = "", also: Sequence[str] = ()) -> str:
    """The first problem of a validation in one sentence, with the nearest known name (of a field, or of `also`)."""
    # An unknown name explains why another is missing.
    problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        unknown = str(problem["loc"][-1])
        owner: Any = model
        for part in problem["loc"][:-1]:
            field = getattr(owner, "model_fields", {}).get(str(part))
            owner = field.annotation if field is not None else owner
        return f"there is no setting {where}{path}; {nearest(unknown, [*getattr(owner, 'model_fields', {}), *also])}"
    if problem["type"] == "missing":
        return f"{where}{path} must be given"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}{path}={problem['input']!r}: {message[:1].lower()}{message[1:]}"
