"""Sentences of the report: computed from judgements and intervals, and never saying more than these do.

All sentences are Markdown; names from records are escaped.
"""

from __future__ import annotations

import numpy as np

from harness.report import formatting as f
from harness.report.account import data_date
from harness.report.analysis import DIVERSITY, Analysis, held_out_name
from harness.report.heatmap import base_correlations
from harness.report.records import HELD_OUT, Run
from harness.report.tables import arm_name
from harness.stats.comparisons import correlation_over_strata
from harness.stats.intervals import Interval, seed_t

ALPHA = 0.05


def scope(analysis: Analysis) -> str:
    """What all the numbers are about, in one sentence."""
    run = analysis.run
    suite, model, budget = run.plan.get("suite", {}), run.plan.get("model", {}), run.plan.get("budget", {})
    seeds = run.plan.get("seeds", [])
    rewards = f.joined([f"`{_code(reward)}`" for reward in run.training_rewards])
    spent = f"{f.count(float(budget['amount']))} {f.markdown(budget.get('unit', ''))}" if "amount" in budget else "one"
    tuning = (
        f" **This run evaluated no held-out prompts: wherever held-out prompts are named, the {run.judged} prompts are "
        "meant, and nothing here is a result.**"
    )
    untrained = f.joined([f"**{f.markdown(arm)}**" for arm in run.inference])
    name = f.markdown(model.get("name", "unknown"))
    trained = f.joined([f"**{f.markdown(arm)}**" for arm in run.arms if arm not in run.untrained])
    given = f.joined([f"**{f.markdown(arm)}**" for arm in run.given])
    does = f"fine-tune the model {name} on {rewards} with a budget of {spent} each"
    told = f"{trained} {does}" if trained else ""
    if untrained:
        told += "; " if trained else ""
        told += (
            f"{untrained} (†) change no weights of the model {name} and ask {rewards} while they generate"
            if len(run.inference) > 1
            else f"{untrained} (†) changes no weights of the model {name} and asks {rewards} while it generates"
        )
    if given:
        told += "; " if told else ""
        told += f"{given} (‡) {'were' if len(run.given) > 1 else 'was'} made elsewhere"
        told += "" if trained or untrained else f" and judged by {rewards} beside the model {name}"
    counted = f", {f.plural(len(seeds), 'training seed')}" if trained or untrained else ""
    return (
        f"{told}{counted}. All are scored on the "
        f"{f.plural(len(run.prompts('held-out')), 'held-out prompt')} of {f.markdown(suite.get('name', 'unknown'))}. "
        f"Run `{_code(run.name)}`, data of {data_date(run)}."
    ) + (tuning if run.judged != HELD_OUT else "")


def lead(analysis: Analysis) -> str:
    """What the verdicts compare."""
    budget = analysis.run.plan.get("budget", {}).get("unit", "budget")
    names = [f.markdown(reward) for reward in analysis.run.training_rewards]
    what = names[0] if len(names) == 1 else f"the training reward, averaged over {f.joined(names)},"
    unit = "reward queries" if budget == "queries" else f.markdown(budget)
    sd = "in base SD (the spread of the base model's pictures)"
    untrained = [f.markdown(arm) for arm in analysis.run.inference]
    apart = f" ({f.joined(untrained)} without any, at a price for each picture)" if untrained else ""
    if len(analysis.run.untrained) == len(analysis.run.arms) and not untrained:
        return f"By the gain on {what} over the base model, on the suite's held-out prompts, {sd}:"
    prompts = (
        "prompts that no method trained on" if analysis.run.judged == HELD_OUT else f"the {analysis.run.judged} prompts"
    )
    return f"With the same budget of {unit}{apart}, by the gain on {what} on {prompts}, {sd}:"


def verdicts(analysis: Analysis) -> list[str]:
    """One sentence per primary comparison."""
    if not analysis.primary:
        return ["Only one method was run: there is nothing to compare it with."]
    untrained, given = analysis.run.inference, analysis.run.given
    return [
        bold_verdict(j.sentence)
        + " † One of the two changes no weights." * ((j.arm in untrained) != (j.reference in untrained))
        + " ‡ What was made elsewhere has one instance: it may have been trained on these prompts, by any budget."
        * (j.arm in given or j.reference in given)
        for j in analysis.primary
    ]


def bold_verdict(sentence: str) -> str:
    """A judgement's sentence with what it says in bold, before the numbers."""
    said, colon, numbers = sentence.partition(": difference ")
    return f"**{f.markdown(said)}**{colon}{f.markdown(numbers)}" if colon else f.markdown(sentence)


def outcomes(analysis: Analysis) -> list[str]:
    """One sentence per method: its gain over the base model, and what stands beside it."""
    rewards = [reward for reward in analysis.run.training_rewards if reward in analysis.rewards]
    if not rewards:
        return ["The training rewards were not among the evaluation rewards: no gain can be stated."]
    target = f.markdown(rewards[0]) if len(rewards) == 1 else f"its training reward, mean of {len(rewards)} rewards"
    result = []
    for arm in analysis.run.arms:
        gain = analysis.pooled(arm, [(reward, reward) for reward in rewards])
        text = f"{arm_name(analysis.run, arm)}: {f.estimate(gain)} base SD over the base model on {target}{_side(gain)}"
        witnesses = [(reward, name) for reward in rewards if (name := held_out_name(analysis, reward))]
        if witnesses:
            text += f"; on the held-out measure {f.estimate(analysis.pooled(arm, witnesses))}"
        for name in analysis.gold():
            interval = analysis.pooled(arm, [(reward, name) for reward in rewards], standardise=False)
            base = f.significant(analysis.final(arm, rewards[0], name).base_mean)
            text += f"; {f.markdown(name)} (gold, base {base}) {f.estimate(interval)}"
        result.append(text + ".")
    return result


def _side(interval: Interval) -> str:
    if not np.isfinite(interval.half_width):
        return ""
    if interval.low > 0:
        return " (interval above 0)"
    return " (interval below 0)" if interval.high < 0 else " (interval includes 0)"


def warnings(analysis: Analysis) -> list[str]:
    """One sentence per training reward and measure that fell while the reward rose, naming every such method."""
    result = []
    for reward in analysis.run.training_rewards:
        for name in analysis.witnesses(reward):
            found = []
            for arm, matrix in analysis.matrices.items():
                i, j = matrix.rows.index(reward), matrix.columns.index(name)
                rose = reward in analysis.rewards and matrix.cells[i][matrix.columns.index(reward)].low > 0
                gain = analysis.final(arm, reward, name)
                if rose and matrix.adjusted_p[i, j] < ALPHA and gain.interval.estimate < 0:
                    found.append(f"**{f.markdown(arm)}** {f.estimate(gain.interval)}")
            if found:
                base = f.significant(analysis.final(analysis.run.arms[0], reward, name).base_mean)
                result.append(
                    f"**Bought at a price**: while {f.markdown(reward)} rose, {f.markdown(name)} "
                    f"({analysis.rewards[name].role}, base {base}) fell with {f.joined(found)}."
                )
    return result


def over_optimisation(analysis: Analysis) -> list[str]:
    """For every method and training reward: did held-out and gold measures fall while the proxy rose?"""
    result = []
    for reward in analysis.run.training_rewards:
        for arm in analysis.run.arms:
            found = _witnessed(analysis, arm, reward)
            if found:
                result.append(found)
    return result


def _witnessed(analysis: Analysis, arm: str, reward: str) -> str:
    witnesses = analysis.witnesses(reward)
    if reward not in analysis.rewards or not witnesses:
        return ""
    matrix = analysis.matrices[arm]
    i = matrix.rows.index(reward)
    proxy = matrix.cells[i][matrix.columns.index(reward)]
    rose = proxy.low > 0
    fell, held, rest = [], [], []
    for name in witnesses:
        j = matrix.columns.index(name)
        gain = analysis.final(arm, reward, name)
        role = analysis.rewards[name].role
        numbers = f"({role}; {f.estimate(gain.interval)} from {f.significant(gain.base_mean)})"
        p = float(matrix.adjusted_p[i, j])
        if p < ALPHA and gain.interval.estimate < 0:
            fell.append(f"{f.markdown(name)} **fell** {numbers}")
        elif p < ALPHA:
            held.append(f"{f.markdown(name)} rose {numbers}")
        elif np.isfinite(gain.interval.estimate):
            rest.append(f"{f.markdown(name)} {numbers}")
    parts = fell + held + ([f"after adjustment no change was shown in {f.joined(rest)}"] if rest else [])
    if not parts:
        return ""
    start = f"**{f.markdown(arm)}** {analysis.run.relation} {f.markdown(reward)}: "
    start += f"while the training reward rose ({f.estimate(proxy)} base SD), " if rose else ""
    if not rose:
        start += "the training reward fell" if proxy.high < 0 else "no rise of the training reward was shown"
        start += f" ({f.estimate(proxy)} base SD); "
    warning = " Part of the reward was gained at the expense of what it stands for." if fell and rose else ""
    return f"{start}{'; '.join(parts)}.{warning}"


def diversity(analysis: Analysis) -> list[str]:
    """How the diversity within prompts changed."""
    base = analysis.gains.base_metric(DIVERSITY)
    if not np.isfinite(base):
        return []
    result = []
    for reward in analysis.run.training_rewards:
        found = [
            f"{f.markdown(arm)} {f.estimate(seed_t(analysis.diversity(arm, reward)), sign=False)}"
            for arm in analysis.run.arms
        ]
        where = f"Vendi score, {analysis.run.relation} {f.markdown(reward)} (base model {f.fixed(base, 2)})"
        result.append(f"{where}: {f.joined(found)}.")
    return result


def completeness(run: Run) -> str:
    """What is missing of the plan; empty for a complete run without divergence."""
    states = [cell.state for cell in run.cells]
    done, diverged, crashed = (states.count(state) for state in ("completed", "diverged", "crashed"))
    unfinished = len(states) - done - diverged - crashed
    if done == len(states) and run.base.counts:
        return ""
    parts = [f"{done} of {len(states)} planned cells are complete"]
    parts += [f"{diverged} diverged (counted with their last finite checkpoint)"] * bool(diverged)
    parts += [f"{crashed} crashed and must be run again"] * bool(crashed)
    parts += [f"{f.plural(unfinished, 'cell')} not finished"] * bool(unfinished)
    parts += ["the base model is not scored yet, so that there are no gains"] * (not run.base.counts)
    return f"{'; '.join(parts)}."


def threats(analysis: Analysis) -> list[str]:
    """What limits the conclusions, as far as the records tell."""
    run = analysis.run
    seeds = len(run.plan.get("seeds", []))
    found = []
    if seeds < 6:
        found.append(
            f"{f.plural(seeds, 'training seed')} for each method: rare failures stay unseen (a run that fails one time "
            f"in ten is missed with probability {0.9**seeds:.2f}), and spreads over seeds are rough."
        )
    floors = [j.smallest_adjusted_p for j in analysis.primary if j.smallest_adjusted_p > 0]
    if floors:
        least = max(floors)
        over = "which exceeds .05: no difference can be claimed, however large" if least > ALPHA else "at these seeds"
        found.append(f"The smallest adjusted p that the primary test can give is {f.p_value(least)}, {over}.")
    completed = completeness(run)
    if completed:
        found.append(f"{completed[0].upper()}{completed[1:]}")
    found.append(_model(run))
    found.append(
        "Intervals hold for this prompt suite and these rewards; other prompts, rewards or budgets may order the "
        "methods differently."
    )
    found += _correlated(analysis)
    if analysis.gains.one_latent:
        found.append(
            "Each prompt was scored with a single latent: the base SD is the spread over all pictures of the base "
            "model, prompts included, and standardised gains are smaller than with several latents."
        )
    found += _partial_gold(analysis)
    found += _rewards_of_a_seed(analysis)
    own = [str(arm["label"]) for arm in run.plan["arms"] if any("sampler" in key for key in arm.get("overrides", {}))]
    if own:
        found.append(f"{f.joined([f.markdown(a) for a in own])} changed the sampler, which the other methods did not.")
    found.append(
        "Methods share prompts and initial latents at equal seeds, so seed means may be positively correlated; the "
        "tests ignore this, which makes them conservative."
    )
    found.append("Seconds and memory depend on the machine and on what else ran on it; queries and rows do not.")
    return found


def _model(run: Run) -> str:
    model = run.plan.get("model", {})
    size = model.get("parameters")
    text = f"One model only ({f.markdown(model.get('name', 'unknown'))}"
    if not isinstance(size, (int, float)):
        return text + "): what holds for it may not hold for others."
    text += f", {f.significant(size / 1e6, 2)} million parameters)"
    return text + (": a small one; larger models may behave differently." if size < 2e8 else ": others may differ.")


def _correlated(analysis: Analysis) -> list[str]:
    names = list(analysis.rewards)
    table = base_correlations(analysis)
    pairs = [
        f"{f.markdown(names[i])} and {f.markdown(names[j])} ({f.fixed(float(table[i, j]), 2)})"
        for i in range(len(names))
        for j in range(i + 1, len(names))
        if abs(table[i, j]) >= 0.5
        and (names[i] in analysis.run.training_rewards or names[j] in analysis.run.training_rewards)
    ]
    if not pairs:
        return []
    return [f"Correlated over base pictures, so that a gain on one is partly a gain on the other: {f.joined(pairs)}."]


def _rewards_of_a_seed(analysis: Analysis) -> list[str]:
    """What the pooled test assumes, and what the seeds say about it."""
    run = analysis.run
    if len(run.training_rewards) < 2 or len(run.arms) < 2:
        return []
    values = {arm: [analysis.final(arm, r).standardised for r in run.training_rewards] for arm in run.arms}
    pairs = [(values[arm], values[run.reference]) for arm in run.arms if arm != run.reference]
    found = correlation_over_strata(pairs)
    seen = (
        f"over the seeds of this run their differences are correlated by {f.fixed(found, 2, sign=True)} on average, a "
        "rough number"
        if np.isfinite(found)
        else "this run has too few seeds to tell"
    )
    text = (
        "The primary test takes trainings of one seed on different rewards to be independent, although they share "
        f"prompts and latents; {seen}. Where seeds lucky on one reward are lucky on others, it claims too much (at a "
        "correlation of .3 false alarms of 15 % instead of 5 %)."
    )
    return [text]


def _partial_gold(analysis: Analysis) -> list[str]:
    run = analysis.run
    total = len(run.prompts("held-out"))
    result = []
    for name in analysis.gold():
        scored = analysis.gains.base_scores(name, "held-out").prompts_scored
        if scored < total:
            result.append(
                f"{f.markdown(name)} applies to {scored} of {total} held-out prompts; missing elsewhere, not zero."
            )
    return result


def how_to_read(analysis: Analysis) -> list[str]:
    """Five lines about units, intervals and families."""
    run = analysis.run
    held_out = [analysis.final(arm, reward) for arm in run.arms for reward in run.training_rewards]
    prompts = max((gain.prompts for gain in held_out), default=0)
    pictures = max((gain.pictures for gain in held_out), default=0)
    pairs = sum(map(len, analysis.secondary.values()))
    spread = "over prompts and latents" if analysis.gains.one_latent else "within a prompt"
    unit = (
        f"**Unit of replication**: the training seed. Pictures ({pictures} a seed) are averaged within prompts and "
        f"prompts ({prompts}) within a seed before anything is inferred."
    )
    gain = (
        "**Gain**: score minus the base model's score for the same prompt and initial latent, on prompts never trained "
        f"on. A *base SD* is the spread of the base model's pictures {spread}."
    )
    families = (
        f"**Verdicts**: primary family of {f.plural(len(analysis.primary), 'comparison')} with the reference "
        f"{f.markdown(run.reference)} (exact permutation test), secondary family of {f.plural(pairs, 'pair')} (Welch), "
        "both adjusted by Holm; everything else is exploratory. *Better* and *worse* need adjusted p < .05 and an "
        "interval of P(better) that excludes one half."
    )
    absence = (
        "**Not separated** does not mean equal: the difference that 80 % power needs stands beside it. *Equivalent* "
        "means a difference within ±0.1 base SD was shown."
    )
    interval = "**[a, b]**: 95 % Student t interval over seeds, for this suite, not adjusted for several comparisons."
    return [unit, gain, interval, families, absence]


def _code(text: str) -> str:
    """Text for a code span: no backticks, one line."""
    return " ".join(text.replace("`", "'").split())
