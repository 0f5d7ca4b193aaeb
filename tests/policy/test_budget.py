"""The budget's schedule, the price's dual ascent, and serving another budget from the measured curve."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dht.policy.budget import HIGHEST, LOWEST, Schedule, dual_ascent, price_for


def test_schedule_starts_high_falls_and_holds():
    schedule = Schedule(0.26, start=0.6, settle=0.4)
    values = [schedule.at(i / 100) for i in range(101)]
    assert values[0] == 0.6
    assert values[20] == pytest.approx(0.43), "half-way down at half the settling time"
    assert all(a >= b for a, b in pairwise(values))
    assert set(values[40:]) == {0.26}


def test_schedule_never_starts_below_the_budget():
    assert Schedule(0.8, start=0.6, settle=0.4).at(0.0) == 0.8
    assert Schedule(0.5, start=1.0, settle=0.0).at(0.0) == 0.5


@given(price=st.floats(LOWEST, HIGHEST), fraction=st.floats(0, 1), target=st.floats(0.01, 1))
def test_price_moves_against_the_overspend(price, fraction, target):
    after = dual_ascent(price, fraction, target, rate=0.2)
    assert LOWEST <= after <= HIGHEST
    if fraction > target:
        assert after >= price or after == HIGHEST
    if fraction < target:
        assert after <= price or after == LOWEST


def test_below_zero_the_steps_are_larger():
    assert dual_ascent(0.1, 0.2, 0.3, rate=0.1) == pytest.approx(0.09)
    assert dual_ascent(-0.1, 0.2, 0.3, rate=0.1) == pytest.approx(-0.14)


def test_price_finds_the_budget_of_a_responding_policy():
    """A policy that spends exp(-3 price): the price settles where that is the budget."""
    price = 0.02
    for _ in range(200):
        price = dual_ascent(price, math.exp(-3 * price), 0.26, rate=0.2)
    assert math.exp(-3 * price) == pytest.approx(0.26, abs=0.005)


def test_price_for_inverts_a_curve():
    prices = torch.logspace(-3, 1, 9, dtype=torch.float64)
    fractions = torch.exp(-0.5 * prices)
    shuffled = torch.randperm(9)
    for budget in (0.1, 0.26, 0.5, 0.9):
        found = price_for(budget, prices[shuffled], fractions[shuffled])
        position = torch.searchsorted(prices, found)
        assert prices[position - 1] <= found <= prices[position]
        assert fractions[position] <= budget <= fractions[position - 1]
    assert price_for(0.001, prices, fractions) == pytest.approx(10.0), "below the curve: the dearest price measured"
    assert price_for(1.0, prices, fractions) == pytest.approx(1e-3), "above it: the cheapest"


def test_price_for_survives_a_noisy_curve():
    prices = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)
    assert 0.01 <= price_for(0.5, prices, torch.tensor([0.6, 0.7, 0.2], dtype=torch.float64)) <= 1.0
