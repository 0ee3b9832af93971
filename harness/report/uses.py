"""Tables of what becomes of a trained adapter: its own sampler, other strengths and steps, and when to stop."""

from __future__ import annotations

import numpy as np
import pandas as pd

from harness.report import formatting as f
from harness.report.analysis import Analysis
from harness.report.gains import OWN_SAMPLER, OWN_SAMPLER_BASE
from harness.report.records import DEFAULT_VARIANT
from harness.report.tables import Table, bounds
from harness.stats.intervals import seed_t


def own_sampler(analysis: Analysis) -> Table:
    """Gains with the sampler that a method trained with, for the methods where it is not the evaluation's."""
    headers = ("method", "trained on", "gain, its own sampler", "gain, the run's sampler")
    rows, data = [], []
    for arm in analysis.run.arms:
        for reward in analysis.run.training_rewards:
            own = seed_t(analysis.gains.own_sampler(arm, reward, reward))
            if np.isfinite(own.estimate):
                usual = analysis.final(arm, reward).interval
                rows.append((f"**{f.markdown(arm)}**", f.markdown(reward), f.estimate(own), f.estimate(usual)))
                data.append({"arm": arm, "training_reward": reward} | bounds("own", own) | bounds("usual", usual))
    note = (
        "Methods that explore with a stochastic sampler, generated with it: gain over the base model with the same "
        "sampler and noise, in the reward's unit, on held-out prompts, with 95 % t interval over seeds."
    )
    return Table("table-own-sampler" if rows else "", headers, tuple(rows), pd.DataFrame(data), note)


def variants(analysis: Analysis) -> Table:
    """Other uses of the same adapters: gains on the training reward and on its witnesses, beside the default's."""
    labels = [
        label for label in analysis.gains.variants() if label not in (DEFAULT_VARIANT, OWN_SAMPLER, OWN_SAMPLER_BASE)
    ]
    headers = ("method", "trained on", "variant", "scored by", "gain (base SD)", "of the default's gain")
    rows, data = [], []
    places = [(arm, trained) for arm in analysis.run.arms for trained in analysis.run.training_rewards]
    for arm, trained in places:
        for label in (DEFAULT_VARIANT, *labels) if labels else ():
            for scored in (trained, *analysis.witnesses(trained)):
                gain = analysis.gains.final(arm, trained, scored, variant=label)
                mean = seed_t(gain.standardised)
                if not np.isfinite(mean.estimate):
                    continue
                whole = seed_t(analysis.final(arm, trained, scored).standardised).estimate
                share = f.fixed(mean.estimate / whole, 2) if label != DEFAULT_VARIANT and abs(whole) > 0.05 else f.DASH
                texts = (f"**{f.markdown(arm)}**", f.markdown(trained), f.markdown(label), f.markdown(scored))
                rows.append((*texts, f.estimate(mean), share))
                data.append(
                    {"arm": arm, "training_reward": trained, "variant": label, "reward": scored}
                    | bounds("gain base SD", mean)
                )
    note = (
        "One training, several uses of its adapter: its strength at generation, the last steps only, or the adapter of "
        "the curve point that the validation prompts scored best (early stopping). Held-out prompts, 95 % t interval "
        "over seeds. Shares of gains below 0.05 base SD are left out."
    )
    return Table("table-variants" if rows else "", headers, tuple(rows), pd.DataFrame(data), note)


def partings(analysis: Analysis) -> Table:
    """Where along training each witness was best, and what it has lost since: the over-optimisation index."""
    headers = ("method", "trained on", "witness", "best after (queries)", "gain there", "at the end", "lost since")
    rows, data = [], []
    for arm in analysis.run.arms:
        for trained in analysis.run.training_rewards:
            for witness in analysis.witnesses(trained):
                curve = analysis.gains.curve(arm, trained, witness)
                if curve.values.shape[1] < 2 or not np.isfinite(curve.values).all():
                    continue
                sd = analysis.gains.sd(witness)
                gains = np.concatenate([np.zeros((len(curve.values), 1)), curve.values], axis=1) / sd
                spent = np.concatenate([[0.0], curve.spent["queries"].mean(axis=0)])
                best = int(gains.mean(axis=0).argmax())
                there, end = seed_t(gains[:, best]), seed_t(gains[:, -1])
                lost = seed_t(gains.max(axis=1) - gains[:, -1])
                texts = (f"**{f.markdown(arm)}**", f.markdown(trained), f.markdown(witness))
                at_best = "0 (base model)" if best == 0 else f.count(spent[best])
                shown = [f.estimate(value) if best or value is not there else "0" for value in (there, end)]
                rows.append((*texts, at_best, *shown, f.estimate(lost, sign=False)))
                data.append(
                    {"arm": arm, "training_reward": trained, "witness": witness, "best_queries": spent[best]}
                    | bounds("gain there", there)
                    | bounds("gain at the end", end)
                    | bounds("lost", lost)
                )
    note = (
        "In base SD, held-out prompts, the pictures that all points of a curve share. The best point is that of the "
        "mean over seeds; *lost since* is each seed's own best along training, the base included, less its end: above "
        "zero by chance, too, since a best is picked. 95 % t intervals over seeds."
    )
    return Table("table-partings" if rows else "", headers, tuple(rows), pd.DataFrame(data), note)
