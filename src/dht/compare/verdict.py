"""What the rows say about each claim, by the rules of the protocol: holds, tie or fails, rival by rival.

- The per-sample claim holds if our policy beats every rival that does not look at the row, at equal FLOPs.
- The efficiency claim is judged in seconds: our accuracy against each rival's at our inference seconds.
- The training claim is judged at equal training FLOPs and at equal training seconds.

Beaten means that the 95% interval of the paired differences over seeds lies above zero. An interval that holds zero is
a tie. One rival above us, outside the interval, and the claim fails. With fewer than `ENOUGH` seeds there is no claim,
only a tendency.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .statistics import compared, frontier_at, interval

ENOUGH = 5
"""Seeds that a claim needs."""

OURS = "dht"

PER_SAMPLE = ("fixed", "random", "hash", "length", "shuffled")
EFFICIENCY = (
    "static",
    "static-cut",
    "confidence-same",
    "confidence",
    "confidence-pruned",
    "patience",
    "patience-pruned",
)
TRAINING = ("dense-decay", "smaller-dense", "layer-dropout", "progressive")

CLAIMS = {
    "per-sample": "Deciding per sample beats every choice that does not look at the sample, at equal FLOPs.",
    "efficiency": "At equal seconds, it stands above static sub-networks and above confidence and patience exits.",
    "training": "At equal training cost, in FLOPs and in seconds, it stands above cheaper ways to train.",
}

CEILING = ("fixed",)
"""Rivals that may spend as much as we do and spend less only where validation says that more does not help them."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Versus:
    """Ours against one rival.

    Attributes:
        outcome: above, level, below, unmatched (the one that is ahead also spent clearly more, and the other's points
            do not reach that far) or not measured.
        difference: mean of our accuracy minus the rival's over `seeds` seeds. half: of its 95% interval.
        ours, theirs: mean costs that were compared, as fractions of dense.
    """

    rival: str
    measure: str
    outcome: str
    seeds: int = 0
    difference: float | None = None
    half: float | None = None
    ours: float | None = None
    theirs: float | None = None


@dataclass(frozen=True)
class Verdict:
    """One claim at one budget.

    Attributes:
        tendency: holds, tie, fails or open (a rival was not measured), whatever the number of seeds.
        seeds: the fewest that any rival was met on.
    """

    claim: str
    budget: float
    tendency: str
    seeds: int
    versus: tuple[Versus, ...]

    @property
    def word(self) -> str:
        """The verdict: the tendency if there are seeds enough for a claim."""
        return self.tendency if self.seeds >= ENOUGH or self.tendency == "open" else "not enough seeds"

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, the word and the sentence included."""
        return asdict(self) | {"word": self.word, "sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The verdict in plain words."""
        told = {
            "holds": "above every rival",
            "tie": f"not clearly above {_names(self.versus, 'level', 'unmatched')}",
            "fails": f"below {_names(self.versus, 'below')}",
            "open": f"not measured against {_names(self.versus, 'not measured')}",
        }[self.tendency]
        if self.word == self.tendency:
            return f"{self.word.capitalize()}: {told}."
        lean = {"holds": "a win", "tie": "a tie", "fails": "a loss"}[self.tendency]
        return f"Not enough seeds for a claim ({self.seeds} of {ENOUGH}); it tends to {lean}: {told}."


def _names(versus: Sequence[Versus], *outcomes: str) -> str:
    """The rivals with one of the outcomes, by what was held equal where that differs within the claim."""
    measures: dict[str, list[str]] = {v.measure: [] for v in versus}
    for v in versus:
        if v.outcome in outcomes:
            measures[v.measure].append(v.rival)
    if len(measures) == 1:
        return ", ".join(*measures.values())
    return "; ".join(f"{', '.join(names)} at equal {measure}" for measure, names in measures.items() if names)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """A verdict for every claim at every budget that our method was run at, in that order.

    Args:
        rows: the rows of `compare.json`.
    """
    found = []
    for claim, judge in (("per-sample", _per_sample), ("efficiency", _efficiency), ("training", _training)):
        for budget in sorted({row["budget"] for row in rows if row["method"] == OURS}, reverse=True):
            ours = {row["seed"]: row for row in rows if row["method"] == OURS and row["budget"] == budget}
            versus = tuple(judge(ours, rows, budget))
            # Every rival must have been met on as many seeds as a claim needs.
            seeds = min((v.seeds for v in versus if v.seeds), default=0)
            found.append(Verdict(claim, budget, _tendency(versus), seeds, versus))
    return found


def _tendency(versus: Sequence[Versus]) -> str:
    outcomes = {v.outcome for v in versus}
    if "below" in outcomes:
        return "fails"
    if "not measured" in outcomes:
        return "open"
    return "tie" if outcomes & {"level", "unmatched"} else "holds"


def clearly_more(cost: float, than: float) -> bool:
    """True if `cost` exceeds `than` by more than a twentieth of it and by more than .015 of dense.

    Static shapes come in steps of one head unit in one layer, and validation is not test: costs are never quite equal.

    >>> clearly_more(0.27, 0.26), clearly_more(0.30, 0.26), clearly_more(0.11, 0.10)
    (False, True, False)
    """
    return cost > 1.05 * than and cost > than + 0.015


def _paired(
    rival: str, ours: Mapping[int, Row], rows: Sequence[Row], budget: float, cost: str, measure: str
) -> Versus:  # fmt: skip
    """Our rows against the rival's rows of the same budget, seed by seed, its cost matched beforehand.

    Matched on validation, that is: a rival that spent clearly less on test is met on the line through its points
    instead, where these reach our cost.
    """
    theirs = {row["seed"]: row for row in rows if row["method"] == rival and row["budget"] == budget}
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return Versus(rival, measure, "not measured")
    outcome, difference, half = compared([ours[s]["accuracy"] - theirs[s]["accuracy"] for s in seeds])
    spent = interval([ours[s][cost] for s in seeds])[0], interval([theirs[s][cost] for s in seeds])[0]
    free = rival in CEILING
    if outcome == "above" and not free and clearly_more(*spent):
        reached = [
            any(
                row["seed"] == seed and row["method"] in (rival, "dense") and row[cost] >= ours[seed][cost]
                for row in rows
            )
            for seed in seeds
        ]
        if all(reached):
            return _along_frontier(rival, (rival,), {seed: ours[seed] for seed in seeds}, rows, cost, measure)
        outcome = "unmatched"
    elif outcome == "below" and clearly_more(*reversed(spent)):
        outcome = "unmatched"
    return Versus(rival, measure, outcome, len(seeds), difference, half, *spent)


def _along_frontier(
    rival: str, methods: Sequence[str], ours: Mapping[int, Row], rows: Sequence[Row], cost: str, measure: str
) -> Versus:
    """Our rows against the rival's accuracy at our cost, read off its points of the same seed, dense among them."""
    differences, spent = [], []
    for seed, own in sorted(ours.items()):
        points = [
            (row[cost], row["accuracy"])
            for row in rows
            if row["seed"] == seed and row["method"] in (*methods, "dense") and row.get(cost) is not None
        ]
        has_rival = any(row["method"] in methods and row["seed"] == seed and row.get(cost) is not None for row in rows)
        if has_rival and own.get(cost) is not None:
            differences.append(own["accuracy"] - frontier_at(points, own[cost]))
            spent.append(own[cost])
    if not differences:
        return Versus(rival, measure, "not measured")
    outcome, difference, half = compared(differences)
    mean = interval(spent)[0]
    return Versus(rival, measure, outcome, len(differences), difference, half, mean, mean)


def _per_sample(ours: Mapping[int, Row], rows: Sequence[Row], budget: float) -> Iterable[Versus]:
    return [_paired(rival, ours, rows, budget, "flops_fraction", "FLOPs") for rival in PER_SAMPLE]


def _efficiency(ours: Mapping[int, Row], rows: Sequence[Row], budget: float) -> Iterable[Versus]:
    return [_along_frontier(rival, (rival,), ours, rows, "time_fraction", "seconds") for rival in EFFICIENCY]


def _training(ours: Mapping[int, Row], rows: Sequence[Row], budget: float) -> Iterable[Versus]:
    for rival in TRAINING:
        yield _paired(rival, ours, rows, budget, "train_flops_fraction", "training FLOPs")
    for rival in TRAINING:
        points = (rival, f"{rival}-seconds")
        yield _along_frontier(rival, points, ours, rows, "train_time_fraction", "training seconds")


FIELDS = (
    "accuracy", "macro_f1", "flops_fraction", "flops_fraction_p95", "time_fraction", "train_flops_fraction",
    "train_time_fraction", "arm_entropy", "policy_time_fraction", "mean_layers", "mean_heads", "latency_fraction",
    "time_fraction_128", "peak_bytes",
)  # fmt: skip


def summaries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry a method and budget: seeds, and for every field its mean and half width over them."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["budget"]), []).append(row)
    found = []
    for (method, budget), members in groups.items():
        entry: dict[str, Any] = {"method": method, "budget": budget, "seeds": sorted(row["seed"] for row in members)}
        for name in FIELDS:
            values = [row[name] for row in members if row.get(name) is not None]
            mean, half = interval(values) if values else (None, None)
            entry[name], entry[f"{name}_ci"] = mean, half
        found.append(entry)
    return found
