"""How a training divides its budget of FLOPs: calibration, imitation, steps, held-out rows; known beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .policy.budget import Schedule

STEP = 1.4
"""What a step spends, in units of the budget: fewer steps that run deeper teach more than many shallow ones
(decision 14)."""

IMITATION = 0.18
"""Share of the training budget that narrow layers imitate themselves for, at most; no more than the steps get."""

FEWEST = 0.15
"""Share of the steps of all epochs that is taken at least, if little data leaves no budget beside the fixed costs."""

ENOUGH = 300
"""Steps below which a step takes fewer rows: more small steps teach more than few large ones (decision 14)."""

FEWEST_ROWS = 8
"""Rows that a step takes at least, unless it was told to take fewer."""

SHORT = 2.0
"""Passes over the data below which training needs no dropout: no row is seen often enough to be learned by heart."""

CROPPED = 0.7
"""Share of the steps that read long rows cut short; the others read them whole (decision 16)."""

BACKWARD = 2.0
"""FLOPs of a backward pass in units of its forward."""


@dataclass(frozen=True)
class Spending:
    """What a training may spend on what.

    Attributes:
        steps: optimizer steps. rows: of a batch.
        share: of the rows of all epochs, those that are trained on.
        schedule: fraction of dense FLOPs that a step aims at.
        imitation: FLOPs for imitation.
        cropped: steps, the first ones, in which long rows are cut.
    """

    steps: int
    rows: int
    share: float
    schedule: Schedule
    imitation: float
    cropped: int = 0


def divide(
    budget: float,
    train_budget: float,
    *,
    epoch: float,
    epochs: float,
    whole: int,
    rows: int,
    fixed: float,
    surveys: float = 0.0,
    probes: float = 0.0,
    imitates: bool = True,
    warm_start: float = 0.0,
    settle: float = 0.0,
    crop: float = 1.0,
) -> Spending:
    """The spending at which calibration, imitation, steps and all held-out rows come to `train_budget`.

    Args:
        budget: fraction of dense FLOPs at which the model will serve, in (0, 1].
        train_budget: FLOPs of the whole training as a fraction of `epochs` of dense training, above 0.
        epoch: forward FLOPs of the dense model on all training rows.
        epochs: passes over them that the dense model would take. whole: optimizer steps in them, of batches of `rows`.
        fixed: FLOPs before and after the steps.
        surveys: share of the steps that run everything.
        probes: forward FLOPs on held-out rows, as a share of the steps' dense forward.
        imitates: False if no layer runs narrow.
        warm_start, settle: of the steps' schedule.
        crop: what cut rows cost of whole ones, in (0, 1].

    >>> spending = divide(0.26, 0.26, epoch=1.0, epochs=3.0, whole=300, rows=32, fixed=0.1, imitates=False)
    >>> spending.steps, spending.rows, spending.schedule.budget
    (312, 21, 0.364)
    """
    dense = (1 + BACKWARD) * epoch * epochs
    schedule = Schedule(min(1.0, round(STEP * budget, 4)), warm_start, settle)
    free = max(train_budget * dense - fixed, 0.0)
    imitation = min(IMITATION * train_budget * dense, free / 2) if imitates else 0.0
    steered = schedule.spent() - (1 - crop) * schedule.spent(CROPPED)
    run = 1 - (1 - crop) * CROPPED  # of what whole rows cost, in a survey
    each = (steered * (1 - surveys) + run * surveys + probes / (1 + BACKWARD)) * dense
    share = min(1.0, max(FEWEST, (free - imitation) / each))
    taken, wanted = share * whole, min(ENOUGH, whole)
    fewer = rows if taken >= wanted else max(min(rows, FEWEST_ROWS), math.floor(rows * taken / wanted))
    steps = max(1, math.floor(taken * rows / fewer))
    cropped = round(CROPPED * steps) if crop < 1 else 0
    return Spending(steps, fewer, steps * fewer / (whole * rows), schedule, imitation, cropped)
