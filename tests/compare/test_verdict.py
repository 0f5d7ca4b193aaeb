"""Statistics and verdicts on hand-made rows: every word of the protocol, reached by its rule."""

from __future__ import annotations

import doctest

import pytest
from scipy import stats

from dht.compare import dropping, regret, shapes, statistics
from dht.compare import settings as compare_settings
from dht.compare import verdict as rules
from dht.compare.statistics import T95, compared, frontier_at, interval
from dht.compare.verdict import EFFICIENCY, PER_SAMPLE, TRAINING, summaries, verdicts

SPREAD = (0.000, 0.004, -0.004, 0.002, -0.002)


def rows(method, accuracy, seeds=5, budget=0.26, noise=0.0, **costs):
    """Rows of one method: the same spread over seeds for all, plus `noise` of alternating sign."""
    costs = {
        "flops_fraction": 0.26,
        "time_fraction": 0.3,
        "train_flops_fraction": 0.26,
        "train_time_fraction": 0.4,
    } | costs
    return [
        {"method": method, "budget": budget, "seed": s, "accuracy": accuracy + SPREAD[s] + noise * (-1) ** s, **costs}
        for s in range(seeds)
    ]


def judged(claim, given):
    return next(v for v in verdicts(given) if v.claim == claim)


def all_rivals(names, accuracy, **changes):
    return [row for name in names for row in rows(name, accuracy, **changes)]


def test_intervals_are_students():
    values = [0.88, 0.87, 0.89, 0.86, 0.885]
    mean, half = interval(values)
    low, high = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-4)
    assert pytest.approx([stats.t.ppf(0.975, df) for df in range(1, 31)], abs=6e-4) == T95


def test_differences_are_paired():
    ours, theirs = [0.80, 0.90, 0.70, 0.85, 0.75], [0.79, 0.889, 0.691, 0.84, 0.741]
    assert compared([a - b for a, b in zip(ours, theirs, strict=True)])[0] == "above"
    assert interval(ours)[1] > 0.05, "unpaired, the intervals would overlap"


def test_the_per_sample_claim_holds():
    found = judged("per-sample", rows("dht", 0.88) + all_rivals(PER_SAMPLE, 0.86))
    assert (found.word, found.seeds) == ("holds", 5)
    assert found.sentence == "Holds: above every rival."
    assert [one.difference for one in found.versus] == pytest.approx([0.02] * 5)


def test_a_difference_inside_the_interval_is_a_tie():
    rivals = all_rivals(PER_SAMPLE[1:], 0.86) + rows("fixed", 0.878, noise=0.01)
    found = judged("per-sample", rows("dht", 0.88) + rivals)
    assert found.word == "tie"
    assert found.sentence == "Tie: not clearly above fixed."


def test_one_rival_above_us_and_the_claim_fails():
    found = judged("per-sample", rows("dht", 0.88) + all_rivals(PER_SAMPLE[1:], 0.86) + rows("fixed", 0.90))
    assert found.word == "fails"
    assert found.sentence == "Fails: below fixed."


def test_four_seeds_are_not_enough_for_any_word():
    found = judged("per-sample", rows("dht", 0.88, seeds=4) + all_rivals(PER_SAMPLE, 0.86, seeds=4))
    assert (found.word, found.tendency) == ("not enough seeds", "holds")
    assert found.sentence == "Not enough seeds for a claim (4 of 5); it tends to a win: above every rival."
    # Five seeds of ours do not make up for a rival that was met on three.
    found = judged("per-sample", rows("dht", 0.88) + all_rivals(PER_SAMPLE, 0.86, seeds=3))
    assert found.seeds == 3
    assert found.word == "not enough seeds"


def test_a_rival_that_was_not_run_leaves_the_claim_open():
    found = judged("per-sample", rows("dht", 0.88) + all_rivals(PER_SAMPLE[:-1], 0.86))
    assert found.word == "open"
    assert found.sentence == "Open: not measured against shuffled."


def test_ahead_by_spending_more_is_no_win():
    found = judged("per-sample", rows("dht", 0.88, flops_fraction=0.30) + all_rivals(PER_SAMPLE, 0.86))
    assert found.word == "tie"
    outcomes = {one.rival: one.outcome for one in found.versus}
    assert outcomes.pop("fixed") == "above", "it could have spent as much and chose not to"
    assert set(outcomes.values()) == {"unmatched"}


def test_a_rival_that_spent_less_is_met_on_its_line():
    ours = rows("dht", 0.88, flops_fraction=0.30) + rows("dense", 0.92, budget=1.0, flops_fraction=1.0)
    rivals = all_rivals(PER_SAMPLE, 0.86, flops_fraction=0.2)
    # At our .30 each rival has .86 + .10 / .80 * (.92 - .86) = .8675; the fixed arm is met as it is.
    versus = {one.rival: one for one in judged("per-sample", ours + rivals).versus}
    assert {one.outcome for one in versus.values()} == {"above"}
    assert versus["hash"].difference == pytest.approx(0.88 - 0.8675)
    assert (versus["hash"].ours, versus["hash"].theirs) == pytest.approx((0.30, 0.30))
    assert versus["fixed"].difference == pytest.approx(0.02)
    near = [dict(row, accuracy=0.89) if row["method"] == "length" and row["seed"] else row for row in rivals]
    assert "length" in judged("per-sample", ours + near).sentence


def test_efficiency_is_judged_at_equal_seconds_on_the_rivals_line():
    dense = rows("dense", 0.90, budget=1.0, time_fraction=1.0)
    # At our .30 of the time each rival has .84 + (.30 - .20) / (1 - .20) * (.90 - .84) = .8475.
    rivals = all_rivals(EFFICIENCY, 0.84, time_fraction=0.2)
    found = judged("efficiency", rows("dht", 0.86) + rivals + dense)
    assert found.word == "holds"
    assert found.versus[0].difference == pytest.approx(0.86 - 0.8475)
    assert judged("efficiency", rows("dht", 0.84) + rivals + dense).word == "fails"
    # The same FLOPs and accuracies, but slower on the clock.
    assert judged("efficiency", rows("dht", 0.86, time_fraction=0.6) + rivals + dense).word == "fails"


def test_a_rival_without_seconds_is_not_judged_by_the_dense_model():
    dense = rows("dense", 0.90, budget=1.0, time_fraction=1.0)
    rivals = all_rivals(EFFICIENCY[1:], 0.84, time_fraction=0.2) + rows(EFFICIENCY[0], 0.84, time_fraction=None)
    found = judged("efficiency", rows("dht", 0.86) + rivals + dense)
    assert (found.word, found.versus[0].outcome) == ("open", "not measured")


def test_training_needs_flops_and_seconds():
    dense = rows("dense", 0.90, budget=1.0, train_flops_fraction=1.0, train_time_fraction=1.0)
    ours = rows("dht", 0.88, train_time_fraction=0.6)
    level = all_rivals(TRAINING, 0.86, train_time_fraction=0.3)
    # In FLOPs we are ahead; at our seconds the rivals' line has 0.86 + 0.3 / 0.7 * 0.04 = 0.877: still ahead.
    assert judged("training", ours + level + dense).word == "holds"
    slow = rows("dht", 0.88, train_time_fraction=0.9)
    found = judged("training", slow + level + dense)
    assert found.word == "fails"
    assert found.sentence.endswith("layer-dropout, progressive at equal training seconds.")
    # A point of its own at our seconds goes before the line.
    extra = rows("dense-decay-seconds", 0.89, train_time_fraction=0.6)
    found = judged("training", ours + level + dense + extra)
    assert [one.rival for one in found.versus if one.outcome == "below"] == ["dense-decay"]


def test_the_frontier_favours_the_rival_where_it_has_no_point():
    points = [(0.2, 0.80), (0.5, 0.86)]
    assert frontier_at(points, 0.05) == 0.80
    assert frontier_at(points, 0.35) == pytest.approx(0.83)
    assert frontier_at(points, 0.9) == 0.86


def test_summaries_have_means_and_intervals():
    entry = summaries(rows("dht", 0.88) + rows("dht", 0.80, budget=0.1))[0]
    assert entry["seeds"] == [0, 1, 2, 3, 4]
    assert entry["accuracy"] == pytest.approx(0.88)
    assert entry["accuracy_ci"] == pytest.approx(interval([0.88 + s for s in SPREAD])[1])
    assert entry["macro_f1"] is None


def test_the_examples_in_the_docstrings():
    from dht.compare import progress
    from dht.report import comparison

    for module in (statistics, rules, shapes, dropping, regret, compare_settings, progress, comparison):
        found = doctest.testmod(module)
        assert found.attempted, module.__name__
        assert not found.failed, module.__name__
