"""F10: where the variance of gains comes from, and what numbers of seeds would find."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from harness.report import formatting as f
from harness.report.analysis import Analysis
from harness.report.captions import Drawn
from harness.report.planning import Design, Pilot, Question, pilot, questions
from harness.report.style import GREY, INK, PALETTE, Look, looks, roomy
from harness.stats.power import detectable_difference
from harness.stats.variance import Contrast, contrast

PARTS = {
    "seed": "seeds",
    "seed_prompt": "seeds x prompts",
    "residual": "seeds x latents",
    "prompt": "prompts",
    "latent": "latents",
}
MOST_NAMED, MANY = 7, 8
OWN_TO_PROMPTS = ("prompt", "latent")
SEEDS = (3, 4, 5, 6, 8, 10, 15, 20, 30)
COLUMNS = (
    *("panel", "training_reward", "arm", "part", "component", "share_of_squared_error"),
    *("comparison", "target", "seeds", "detectable", "family", "n", "prompts", "latents"),
)


def variance_figure(analysis: Analysis, name: str) -> Drawn | None:
    """Bars of components for each arm, and detectable differences over seeds; None where no arm has two seeds."""
    found = pilot(analysis)
    if not found.varying or found.design.prompts < 2:
        return None
    rewards = analysis.run.training_rewards
    primary = [q for q in questions(found) if q.pooled]
    height = 0.9 + (0.34 if len(found.varying) <= MANY else 0.2) * len(found.varying)
    figure = Figure(figsize=(10.4, max(1.0 + height * len(rewards), 3.4)), layout=roomy())
    grid = figure.add_gridspec(len(rewards), 2, width_ratios=(1.25, 1))
    rows: list[dict[str, object]] = []
    for i, reward in enumerate(rewards):
        rows += _bars(figure.add_subplot(grid[i, 0]), found, reward, last=i == len(rewards) - 1)
    tall = 1 if len(found.varying) > 4 else 3  # rows of bars that the curves stand beside
    axes = figure.add_subplot(grid[:tall, 1])
    rows += _curves(axes, found.design, primary, looks(analysis.run.arms))
    figure.legend(handles=_legend(), loc="outside upper left", ncols=5)
    data = pd.DataFrame(rows, columns=list(COLUMNS))
    return Drawn(
        name, "Where the variance comes from", figure, data, _caption(found, len(primary)), _alt(found, data, primary)
    )


def _bars(axes: Axes, found: Pilot, reward: str, *, last: bool) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for y, arm in enumerate(found.varying):
        scores = found.scores[arm, reward]
        parts = contrast([scores], [1.0])
        shares, left = _shares(parts), 0.0
        for (part, share), colour in zip(shares.items(), PALETTE, strict=False):
            kept = share if np.isfinite(share) else 0.0
            hatch = "///" if part in OWN_TO_PROMPTS else None
            axes.barh(y, kept, left=left, height=0.62, color=colour, edgecolor="white", hatch=hatch, linewidth=0.5)
            left += kept
            side = parts.sides[0]
            rows.append(
                {
                    "panel": "components",
                    "training_reward": reward,
                    "arm": arm,
                    "part": part,
                    "component": getattr(side, part),
                    "share_of_squared_error": share,
                    "n": side.seeds,
                    "prompts": side.prompts,
                    "latents": side.latents,
                }
            )
    axes.set_yticks(range(len(found.varying)), list(found.varying))
    axes.tick_params(axis="y", length=0, labelsize=9 if len(found.varying) <= MANY else 7.5)
    axes.set_ylim(len(found.varying) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set_xlim(left=0)
    axes.set_title(reward)
    if last:
        axes.set_xlabel("squared standard error of the mean gain (base SD²)")
    return rows


def _shares(parts: Contrast) -> dict[str, float]:
    """What each component adds to the squared standard error of the mean, negative estimates as 0."""
    side = parts.sides[0]
    s, p, k = side.seeds, side.prompts, side.latents
    divisors = {"seed": s, "seed_prompt": s * p, "residual": s * p * k, "prompt": p, "latent": p * k}
    return {part: max(float(getattr(side, part)), 0.0) / divisors[part] for part in PARTS}


def _curves(axes: Axes, now: Design, asked: list[Question], look: dict[str, Look]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for question in asked:
        arm = question.arm
        for unseen in (False, True):
            designs = [Design(seeds, now.prompts, now.latents) for seeds in SEEDS]
            values = [question.detectable(design, unseen=unseen) for design in designs]
            axes.plot(
                SEEDS, values, "--" if unseen else "-", color=look[arm].colour, linewidth=1.6,
                marker=None if unseen else look[arm].marker, markersize=4,
            )  # fmt: skip
            rows += [
                {
                    "panel": "detectable",
                    "training_reward": question.reward,
                    "comparison": question.name,
                    "target": "unseen prompts" if unseen else "this suite",
                    "seeds": seeds,
                    "detectable": value,
                    "family": question.family,
                    "n": now.seeds,
                    "prompts": now.prompts,
                    "latents": now.latents,
                }
                for seeds, value in zip(SEEDS, values, strict=True)
            ]
    axes.axvline(now.seeds, color=GREY, linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(SEEDS))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid()
    axes.set_xlabel("seeds per arm")
    axes.set_ylabel("smallest difference found (base SD)")
    axes.set_title("80 % power")
    handles = [
        Line2D([], [], color=look[q.arm].colour, marker=look[q.arm].marker, markersize=4, label=q.name)
        for q in asked[:MOST_NAMED]
    ]
    handles += [
        Line2D([], [], color=INK, label="this suite"),
        Line2D([], [], color=INK, linestyle="--", label="unseen prompts"),
    ]
    axes.legend(handles=handles, loc="upper right", fontsize=7)
    return rows


def _legend() -> list[Patch]:
    return [
        Patch(facecolor=colour, edgecolor="white", hatch="///" if part in OWN_TO_PROMPTS else None, label=label)
        for (part, label), colour in zip(PARTS.items(), PALETTE, strict=False)
    ]


def _caption(found: Pilot, comparisons: int) -> str:
    now = found.design
    unnamed = f" The legend names {MOST_NAMED} of {comparisons} comparisons." if comparisons > MOST_NAMED else ""
    latent = (
        " Each prompt has one latent: what belongs to latents is in the parts of prompts." if now.latents == 1 else ""
    )
    return (
        "Left: what seeds, prompts and latents add to the squared standard error of the mean gain on the training "
        "reward (held-out prompts, unbiased estimates, negative ones shown as 0; all in the CSV). Hatched parts count "
        "for unseen prompts only: for this suite they are fixed. Right: smallest difference that a test at the level "
        "of Holm's first step finds with 80 % power, if only the number of seeds changed (none where a permutation "
        "test cannot reject); grey line: this run "
        f"({f.plural(now.seeds, 'training seed')}, {f.plural(now.prompts, 'prompt')}, "
        f"{f.plural(now.latents, 'latent')} each). With few seeds these numbers are rough.{latent}{unnamed}"
    )


def _alt(found: Pilot, data: pd.DataFrame, asked: list[Question]) -> str:
    bars = data[data["panel"] == "components"]
    suite = bars[~bars["part"].isin(OWN_TO_PROMPTS)]
    parts = []
    for (reward, arm), rows in suite.groupby(["training_reward", "arm"], sort=False):
        whole, seeds = rows["share_of_squared_error"].sum(), rows.loc[rows["part"] == "seed", "share_of_squared_error"]
        if whole > 0:
            parts.append(f"{arm} on {reward} {100 * float(seeds.sum()) / whole:.0f} %")
    found_now = [f"{q.name} {f.significant(q.detectable(found.design, unseen=False), 2)}" for q in asked]
    return (
        f"Share of seeds in the squared standard error for this suite: {f.joined(parts)}. Smallest difference found by "
        f"{found.design.seeds} seeds, in base SD: {f.joined(found_now)}."
    )


def smallest_detectable(analysis: Analysis) -> str:
    """The smallest differences that the run could have found: between arms, and gains over the base."""
    found = [j.detectable for j in analysis.primary if np.isfinite(j.detectable)]
    parts = []
    if found:
        least, most = f.significant(min(found), 2), f.significant(max(found), 2)
        spread = least if least == most else f"{least} to {most}"
        parts.append(f"between a method and {f.markdown(analysis.run.reference)} {spread} base SD, adjusted by Holm")
    rewards = [reward for reward in analysis.run.training_rewards if reward in analysis.rewards]
    gains = []
    for arm in analysis.run.arms:
        value = detectable_difference(analysis.pooled(arm, [(reward, reward) for reward in rewards]))
        if np.isfinite(value):
            gains.append(value)
    if gains:
        least, most = f.significant(min(gains), 2), f.significant(max(gains), 2)
        parts.append(f"as a gain over the base model {least if least == most else f'{least} to {most}'} base SD")
    if not parts:
        return "How small a difference could have been found cannot be told: no method has two seeds."
    return f"Smallest difference that could have been found, with 80 % power: {'; '.join(parts)}."
