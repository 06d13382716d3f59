"""Means, differences and their spread over seeds; and plain words for what they show."""

import math
import statistics
from dataclasses import dataclass

from scipy import stats

from cutline.record import HEADLINE, Result, check_comparable
from cutline.study.plan import Plan
from cutline.study.runner import Cell

# With one seed there is no spread to judge by: below this relative difference we say that nothing was shown.
# (Across seeds, scores of the same arm in the built-in studies vary by about this much.)
ONE_SEED = 0.03


@dataclass
class Difference:
    """Paired over seeds, in the task's own units: mean of (better arm − other arm), standard deviation, and verdict."""

    mean: float
    spread: float | None
    seeds: int
    verdict: str  # "better", "worse", "no clear difference"


def scores(plan: Plan, found: dict[Cell, Result], task: str, arm: str) -> dict[int, float]:
    """Headline score by seed (mIoU in points, RMSE in metres). Raises `DataError` if protocols differ in the column."""
    check_comparable([r for c, r in found.items() if c.task == task])
    metric, factor, _ = HEADLINE[plan.tasks[task].task]
    return {c.seed: r.metrics[metric] * factor for c, r in found.items() if c.task == task and c.arm == arm}


def mean_spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (None for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def difference(plan: Plan, found: dict[Cell, Result], task: str, arm: str, other: str) -> Difference | None:
    """`arm` minus `other` on `task`, seed by seed; None while either is missing.

    Verdict with several seeds: the 95 % interval of the mean difference (Student's t) leaves out 0; with one: the
    difference exceeds 3 % of the score.
    """
    a, b = scores(plan, found, task, arm), scores(plan, found, task, other)
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    deltas = [a[s] - b[s] for s in seeds]
    mean, spread = mean_spread(deltas)
    n = len(seeds)
    if spread is None:
        clear = abs(mean) > ONE_SEED * abs(b[seeds[0]])
    else:
        clear = abs(mean) > stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n)
    good = (mean > 0) == HEADLINE[plan.tasks[task].task][2]
    verdict = ("better" if good else "worse") if clear else "no clear difference"
    return Difference(mean, spread, n, verdict)


def headline(plan: Plan, found: dict[Cell, Result]) -> str:
    """One sentence: on how many tasks the arm beats the other, and by how much."""
    if plan.compare is None:
        return ""
    arm, other = plan.compare
    verdicts = {t: difference(plan, found, t, arm, other) for t in plan.tasks}
    done = {t: d for t, d in verdicts.items() if d is not None}
    if not done:
        return "Nothing is scored yet."
    by = {v: [t for t, d in done.items() if d.verdict == v] for v in ("better", "worse", "no clear difference")}
    if not by["better"] and not by["worse"]:
        return f"{arm} shows no clear difference to {other} on any of {len(done)} tasks."
    parts = [f"{arm} beats {other} on {len(by['better'])} of {len(done)} tasks"]
    if by["worse"]:
        parts.append(f"loses on {len(by['worse'])} ({'; '.join(by['worse'])})")
    if by["no clear difference"]:
        parts.append(
            f"shows no clear difference on {len(by['no clear difference'])} ({'; '.join(by['no clear difference'])})"
        )
    return "; ".join(parts) + "."
