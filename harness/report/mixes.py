"""Mixed adapters: their records, their gains, and the table that puts them beside the adapters they were mixed from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.report import formatting as f
from harness.report.analysis import Analysis
from harness.report.gains import Gains
from harness.report.records import HELD_OUT, load_run, weights
from harness.report.tables import Table, bounds
from harness.stats.effects import gain, standardised
from harness.stats.intervals import seed_t
from harness.stats.seed_means import seed_scores

Mix = Mapping[str, Any]


def mix_difference(gains: Gains, scores: pd.DataFrame, mix: Mix, reward: str) -> dict[int, float]:
    """Gain over the base model in the reward's unit, on identical prompts and latents, by seed of the mix.

    Seeds without such a score have NaN.
    """
    rows = _rows(scores[scores["cell"].isin([f"mix--{mix['slug']}--seed{seed}" for seed in mix["seeds"]])], reward)
    tuned = seed_scores(
        rows["score"].to_numpy(dtype=np.float64),
        seed=rows["seed"].to_numpy(dtype=np.int64),
        prompt=rows["prompt_id"].to_numpy(dtype=str),
        picture=rows["noise_id"].to_numpy(dtype=np.int64),
    )
    base = gains.base_scores(reward, HELD_OUT)
    means = gain(tuned, base).means if len(rows) and len(base.seeds) else ()
    found = dict(zip(tuned.seeds, means, strict=False))
    return {int(seed): float(found.get(int(seed), np.nan)) for seed in mix["seeds"]}


def mix_gain(gains: Gains, scores: pd.DataFrame, mix: Mix, reward: str) -> dict[int, float]:
    """The same in units of the base model's spread within a prompt."""
    found = mix_difference(gains, scores, mix, reward)
    values = standardised(list(found.values()), gains.sd(reward))
    return dict(zip(found, values.tolist(), strict=True))


def _rows(scores: pd.DataFrame, reward: str) -> pd.DataFrame:
    """Scores by one reward; by a weighted sum, where only its components were scored."""
    rows = scores[scores["reward"] == reward]
    terms = weights(reward)
    if len(rows) or not terms or not set(terms) <= set(scores["reward"]):
        return rows
    parts = scores[scores["reward"].isin(list(terms))]
    wide = parts.pivot(index=["seed", "prompt_id", "noise_id"], columns="reward", values="score").dropna()
    total = sum(wide[part] * weight for part, weight in terms.items())
    return wide.index.to_frame(index=False).assign(score=pd.Series(total).to_numpy())


def mixes_table(analysis: Analysis, scores: pd.DataFrame, mixes: Sequence[Mix]) -> Table:
    """Each mix on each evaluation reward, beside the gains of the adapters that it was mixed from."""
    trained = [reward for reward in analysis.run.training_rewards if any(reward in mix["weights"] for mix in mixes)]
    headers = ("mix", "rank", "error", "evaluated on", "gain of the mix", *(f"{f.markdown(r)} alone" for r in trained))
    rows, data = [], []
    for mix in mixes:
        errors = [float(mix["error"][str(seed)]["all"]) for seed in mix["seeds"]]
        worst = max(float(mix["error"][str(seed)]["worst"]) for seed in mix["seeds"])
        rank = f"{mix['rank']} of {mix['exact_rank']}" if mix["rank"] < mix["exact_rank"] else f"{mix['rank']} (exact)"
        name = f"**{f.markdown(mix['arm'])}** {f.markdown(mix['training_reward'])}"
        for reward in analysis.rewards:
            mixed = seed_t(list(mix_gain(analysis.gains, scores, mix, reward).values()))
            alone = {r: seed_t(analysis.final(mix["arm"], r, reward).standardised) for r in mix["weights"]}
            own = [f.estimate(alone[r]) if r in alone else f.DASH for r in trained]
            rows.append((name, rank, f.spread(errors, 2), f.markdown(reward), f.estimate(mixed), *own))
            record: dict[str, object] = {"arm": mix["arm"], "mix": mix["training_reward"], "rank": mix["rank"]}
            record |= {"exact_rank": mix["exact_rank"], "error": float(np.mean(errors)), "worst_module_error": worst}
            record |= {"seeds": len(mix["seeds"]), "reward": reward} | bounds("gain", mixed)
            for r, interval in alone.items():
                record |= bounds(f"{r} alone", interval)
            data.append(record)
    note = (
        "Adapters of one arm, trained on several rewards, as one: the weighted sum of their products B A, at the rank "
        "shown. Error: what that rank leaves out of the sum, relative to it (Frobenius norm over all modules; mean, "
        "smallest and largest over seeds). Gains over the base model on held-out prompts in base SD, mean over "
        "training seeds with 95 % t interval; alone: the adapter trained on that reward, with weight 1."
    )
    missing = [f"{f.markdown(m['training_reward'])} lacks {_seeds(m['left_out'])}" for m in mixes if m["left_out"]]
    note += f" Seeds are left out where a cell is not completed: {'; '.join(missing)}." if missing else ""
    return Table("table-mixes" if rows else "", headers, tuple(rows), pd.DataFrame(data), note)


def _seeds(left_out: Mapping[str, str]) -> str:
    return f"seed{'s' if len(left_out) > 1 else ''} {f.joined(list(left_out))}"


def summary(folder: Path, name: str) -> Iterator[str]:
    """Lines for a person: gains of one mix of a run directory, beside those of the adapters it was mixed from."""
    run = load_run(folder)
    gains, scores, mixes = Gains(run), run.mixed, run.mixes
    mix = next(mix for mix in mixes if mix["slug"] == name)
    seeds = ", ".join(str(seed) for seed in mix["seeds"])
    errors = f.spread([float(error["all"]) for error in mix["error"].values()], 2)
    yield f"{mix['arm']}: {mix['training_reward']}, rank {mix['rank']} of at most {mix['exact_rank']}, error {errors}"
    yield f"gain over the base model on held-out prompts, mean over seeds {seeds}:"
    table = [("reward", "unit", "mix", *(f"{reward} alone" for reward in mix["weights"]))]
    for info in gains.run.rewards:
        found = [np.array(list(mix_difference(gains, scores, mix, info.name).values()))]
        found += [gains.final(mix["arm"], reward, info.name).values for reward in mix["weights"]]
        means = [values[np.isfinite(values)].mean() if np.isfinite(values).any() else np.nan for values in found]
        table.append((info.name, info.unit, *(f"{mean:+.3g}" if np.isfinite(mean) else f.DASH for mean in means)))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        words = [row[i].ljust(widths[i]) if i < 2 else row[i].rjust(widths[i]) for i in range(len(row))]
        yield "  " + "  ".join(words).rstrip()
    yield f"mixed adapters: {folder / 'mixes' / name}/seed*/adapter"
