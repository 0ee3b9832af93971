"""What the page's explorer draws: numbers of the analysis in compact arrays. Nothing is computed in the browser."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from harness.report.analysis import Analysis
from harness.report.gains import SPENT, Curve, Gain
from harness.report.learning_curves import AXES, bands, centre
from harness.report.page.album import Album
from harness.report.pictures import median_seed
from harness.report.style import looks
from harness.stats.intervals import Interval, seed_t


def explorer(analysis: Analysis, album: Album, root: str) -> dict[str, Any] | None:
    """All numbers that can be chosen from; None where the base model was not scored, so that there are no gains.

    Args:
        analysis: Gains and intervals.
        album: The stored pictures.
        root: Address of the run's directory, relative to the page.
    """
    run = analysis.run
    trained = [reward for reward in run.training_rewards if reward in analysis.rewards]
    if not trained:
        return None
    names = list(analysis.rewards)
    look = looks(run.arms)
    return {
        "root": root,
        "relation": run.relation,
        "arms": [
            {"label": arm, "colour": look[arm].colour, "marker": look[arm].marker, "line": look[arm].line}
            for arm in run.arms
        ],
        "rewards": [
            {
                "name": name,
                "unit": info.unit,
                "role": info.role,
                "base": number(analysis.final(run.arms[0], trained[0], name).base_mean),
            }
            for name, info in analysis.rewards.items()
        ],
        "trained": [names.index(reward) for reward in trained],
        "witnesses": [[names.index(name) for name in analysis.witnesses(reward)] for reward in trained],
        "axes": [[currency, AXES[currency]] for currency in SPENT],
        "gains": [
            [[_gain(analysis.final(arm, reward, name)) for name in names] for arm in run.arms] for reward in trained
        ],
        "cells": [[[cell.name for cell in run.cells_of(arm, reward)] for arm in run.arms] for reward in trained],
        "shown": [[_shown(analysis, arm, reward) for arm in run.arms] for reward in trained],
        "curves": [[_curves(analysis, arm, reward, names) for arm in run.arms] for reward in trained],
        **album.records(trained),
    }


def _gain(gain: Gain) -> dict[str, Any] | None:
    """One arm on one reward: seeds, their gains, the interval, and both in base SD."""
    if not gain.exists:
        return None
    diverged = [i for i, state in enumerate(gain.states) if state == "diverged"]
    return {
        "seeds": list(gain.seeds),
        "values": numbers(gain.values),
        "interval": _interval(gain.interval),
        "standardised": numbers(gain.standardised),
        "standardised_interval": _interval(seed_t(gain.standardised)),
        "diverged": diverged,
    }


def _shown(analysis: Analysis, arm: str, reward: str) -> int | None:
    """Place of the seed whose pictures are seen first: the one of the report's own pictures."""
    seeds = analysis.final(arm, reward).seeds
    median = median_seed(analysis, arm, reward)
    return seeds.index(median) if median in seeds else None


def _curves(analysis: Analysis, arm: str, reward: str, names: list[str]) -> dict[str, Any] | None:
    """Curves of one arm on its training reward and that one's witnesses; None where there is only its end."""
    if arm in analysis.run.untrained:
        return None
    found = {name: analysis.gains.curve(arm, reward, name) for name in (reward, *analysis.witnesses(reward))}
    proxy = found[reward]
    if not proxy.seeds or proxy.values.shape[1] < 2:
        return None
    return {
        "seeds": list(proxy.seeds),
        "spent": [[numbers(row) for row in proxy.spent[currency]] for currency in SPENT],
        "mean_spent": [numbers(centre(proxy.spent[currency])) for currency in SPENT],
        "by_reward": {
            str(names.index(name)): _curve(curve)
            for name, curve in found.items()
            if curve.values.shape == proxy.values.shape and np.isfinite(curve.values).any()
        },
    }


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "values": [numbers(row) for row in curve.values],
        "bands": [_interval(interval) for interval in bands(curve)],
        "prompts": curve.prompts,
    }


def _interval(interval: Interval) -> list[float | None]:
    return numbers((interval.estimate, interval.low, interval.high))


def number(value: float) -> float | None:
    """Six significant digits; None where it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def numbers(values: Iterable[float]) -> list[float | None]:
    """The same for each."""
    return [number(float(value)) for value in values]


def script_json(content: Mapping[str, Any]) -> str:
    """JSON that cannot end the `script` element that it stands in, nor open a comment there."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
