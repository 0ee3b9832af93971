"""A run against a baseline: what was compared, what changed, what is missing, and what a build may conclude."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.errors import UserError, nearest
from harness.regression.costs import FACTOR, CostRow, cost_rows
from harness.regression.gating import ALPHA, Family, Row, common_rewards, gate_rows
from harness.regression.snapshot import Snapshot
from harness.report.account import flatten
from harness.report.records import BASE
from harness.stats.gate import GateOutcome

COMPARISON_SCHEMA = 1
MARGIN = 0.1
# From what a build must stop for to what needs no look.
SEVERITY = (
    *(GateOutcome.WORSE, GateOutcome.INCONCLUSIVE, GateOutcome.NOT_WORSE, GateOutcome.IMPROVED),
    *(GateOutcome.EQUIVALENT, GateOutcome.IDENTICAL),
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything that is said about a run and its baseline.

    Attributes:
        margin: Largest acceptable loss, in base SD of the baseline.
        rows, costs: What was compared.
        changes: What differs between the two besides results: versions, settings, platform, how cells ended.
        missing: What one of them lacks, so that it was not compared.
    """

    new: Snapshot
    baseline: Snapshot
    margin: float
    rows: tuple[Row, ...]
    costs: tuple[CostRow, ...]
    changes: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def deciding(self) -> tuple[Row, ...]:
        """Rows that the outcome rests on."""
        return tuple(row for row in self.rows if row.family is not Family.WATCHED)

    @property
    def outcome(self) -> GateOutcome:
        """The most severe of the deciding rows."""
        return min((row.outcome for row in self.deciding), key=SEVERITY.index)

    @property
    def undecided(self) -> bool:
        """Whether something was inconclusive or could not be compared at all."""
        return bool(self.missing) or any(row.outcome is GateOutcome.INCONCLUSIVE for row in self.deciding)

    @property
    def slower(self) -> tuple[CostRow, ...]:
        """Costs that are flagged."""
        return tuple(row for row in self.costs if row.flagged)


def compare(new: Snapshot, baseline: Snapshot, margin: float = MARGIN, also: Sequence[str] = ()) -> Comparison:
    """Compare two snapshots.

    Args:
        new: The run in question.
        baseline: What it must not fall behind.
        margin: Largest acceptable loss in base SD.
        also: Evaluation rewards that decide besides the training rewards, or `all`.

    Raises:
        UserError: The two are not comparable, or have nothing in common.
    """
    if not (math.isfinite(margin) and margin > 0):
        raise UserError(f"--margin {margin}: a loss in base SD above 0, such as {MARGIN}")
    _require_comparable(new, baseline)
    both = common_rewards(new, baseline)
    for name in also:
        if name not in both and name != "all":
            raise UserError(f"--rewards: {name!r} did not score both runs in one version; {nearest(name, both)}")
    rows = gate_rows(new, baseline, margin, both if "all" in also else also)
    missing = _missing(new, baseline)
    if not any(row.arm != BASE and row.family is not Family.WATCHED for row in rows):
        raise UserError(
            f"{new.name} and {baseline.name} have no finished arm in common that a deciding reward scored in both: "
            f"{'; '.join([f'{_labels(new)} against {_labels(baseline)}', *missing[:4]])}. "
            "Run what is missing, name rewards that decide with --rewards, or save a new baseline."
        )
    return Comparison(
        new, baseline, margin, tuple(rows), tuple(cost_rows(new, baseline)), tuple(_changes(new, baseline)),
        tuple(missing),
    )  # fmt: skip


def _require_comparable(new: Snapshot, baseline: Snapshot) -> None:
    changed = _differences(baseline.identity, new.identity)
    if changed:
        shown = "; ".join(changed[:6]) + ("; ..." if len(changed) > 6 else "")
        raise UserError(
            f"{new.name} is not comparable with {baseline.name}: {shown}. "
            "Run with the settings of the baseline, or save a new one."
        )
    if not set(new.pairs) & set(baseline.pairs):
        raise UserError(
            f"{new.name} is not comparable with {baseline.name}: they have no evaluated prompt and latent in common. "
            "Run with the settings of the baseline, or save a new one."
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    was, now = flatten(old), flatten(new)
    keys = [key for key in dict.fromkeys([*was, *now]) if _plain(was.get(key)) != _plain(now.get(key))]
    return [f"{prefix}{key} {_word(was.get(key))} → {_word(now.get(key))}" for key in keys]


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def _word(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text[:12] + "…" if len(text) == 64 else text  # a fingerprint


def _labels(snapshot: Snapshot) -> str:
    return ", ".join(str(arm["label"]) for arm in snapshot.arms)


def _changes(new: Snapshot, baseline: Snapshot) -> list[str]:
    """What a reader has to know besides the numbers."""
    found = []
    theirs = {arm["label"]: arm for arm in baseline.arms}
    for arm in new.arms:
        label = str(arm["label"])
        if label in theirs:
            old = {key: value for key, value in theirs[label].items() if key != "label"}
            now = {key: value for key, value in arm.items() if key != "label"}
            found += _differences(old, now, f"{label}: ")
    found += _differences(baseline.platform, new.platform, "platform: ")
    for cell in baseline.cells:
        ours = new.find(cell.arm, cell.reward).get(cell.seed)
        if ours is not None and ours.state != cell.state:
            found.append(f"{cell.arm} on {cell.reward}, seed {cell.seed}: {cell.state} → {ours.state}")
    return found


def _missing(new: Snapshot, baseline: Snapshot) -> list[str]:
    """Arms, cells, rewards and scores that one side lacks; seeds where those of the others are compared in pairs."""
    found = []
    ours, theirs = ({str(arm["label"]) for arm in side.arms} for side in (new, baseline))
    found += [f"arm {label}: not in the new run" for label in sorted(theirs - ours)]
    for reward in baseline.training_rewards:
        if reward not in new.training_rewards:
            found.append(f"training reward {reward}: not in the new run")
            continue
        lost = [a for a in sorted(theirs & ours) if baseline.find(a, reward) and not new.find(a, reward)]
        found += [f"{label} on {reward}: no finished cell in the new run" for label in lost]
    if not new.find(BASE, ""):
        found.append("the base model: not evaluated in the new run")
    found += [f"reward {name}: does not score the new run" for name in baseline.base_sd if name not in new.base_sd]
    found += [
        f"reward {name}: version {baseline.rewards.get(name)} in the baseline, {new.rewards.get(name)} in the new run"
        for name in baseline.base_sd
        if name in new.base_sd and name not in common_rewards(new, baseline)
    ]
    found += _gaps(new, baseline)
    found += [f"cell {name}: not finished in the new run" for name in new.missing if name != BASE]
    found += [f"cell {name}: not finished in the baseline" for name in baseline.missing]
    return found


def _gaps(new: Snapshot, baseline: Snapshot) -> list[str]:
    """Seeds of the baseline that the new run did not plan though it has others of them, and cells without a score."""
    found = []
    for arm in (str(arm["label"]) for arm in baseline.arms):
        for reward in baseline.training_rewards:
            ours, theirs = new.find(arm, reward), baseline.find(arm, reward)
            common, lost = ours.keys() & theirs.keys(), sorted(theirs.keys() - ours.keys())
            if lost and len(common) > 1:
                found.append(f"{arm} on {reward}: seeds {', '.join(map(str, lost))} of the baseline")
            for side, cells in (("new run", ours), ("baseline", theirs)):
                scored = {s: cell.scored[reward].value for s, cell in cells.items() if reward in cell.scored}
                empty = sorted(s for s, value in scored.items() if not math.isfinite(value))
                if empty:
                    found.append(f"{arm} on {reward}: seeds {', '.join(map(str, empty))} have no score in the {side}")
    return found


def new_to_baseline(comparison: Comparison) -> list[str]:
    """Arms that have no baseline yet."""
    known = {arm["label"] for arm in comparison.baseline.arms}
    return [str(arm["label"]) for arm in comparison.new.arms if arm["label"] not in known]


def unbumped(comparison: Comparison) -> list[str]:
    """Methods whose numbers changed with neither version, settings, seeds nor platform: a version was forgotten."""
    same = {
        str(arm["label"]): str(arm["method"])
        for arm in comparison.new.arms
        if _plain(arm) in [_plain(other) for other in comparison.baseline.arms]
    }
    moved = [row.arm for row in comparison.rows if row.golden.startswith("differs")]
    if BASE in moved:
        return []  # the model or the sampler moved, and every method with it
    return list(dict.fromkeys(same[arm] for arm in moved if arm in same))


def record(comparison: Comparison) -> dict[str, Any]:
    """The content of comparison.json (results/README.md)."""

    def side(snapshot: Snapshot) -> dict[str, Any]:
        return {"name": snapshot.name, "run": snapshot.run, "until": snapshot.until, "git": dict(snapshot.git)}

    rows = [{**asdict(row), "difference": _bounds(row)} for row in comparison.rows]
    content: dict[str, Any] = _finite(
        {
            "schema": COMPARISON_SCHEMA,
            "new": side(comparison.new),
            "baseline": side(comparison.baseline),
            "margin": comparison.margin,
            "alpha": ALPHA,
            "cost_factor": FACTOR,
            "outcome": comparison.outcome,
            "rows": rows,
            "costs": [asdict(row) for row in comparison.costs],
            "changes": list(comparison.changes),
            "missing": list(comparison.missing),
            "new_arms": new_to_baseline(comparison),
        }
    )
    return content


def _bounds(row: Row) -> dict[str, float]:
    return {key: getattr(row.difference, key) for key in ("estimate", "low", "high", "level")}


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
