"""What a policy is: anything that decides before every layer and may observe what came of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..cost import CostModel
from ..model.packed import Packed
from ..plan import Decision, Mode, Trace


@dataclass
class View:
    """What a policy sees before layer `layer` + 1.

    Attributes:
        layer: layers already run, 0..N-1.
        packed: the active rows' hidden states.
        logits: [R, C] of the exit just reached, or None (exits not computed, or no lexical one before layer 1).
        previous: [R, C] of the exit before that, or None.
        input_ids, attention_mask: [B, T], the whole batch as it came in.
        trace: what was decided and executed so far.
        mode: exploit, explore or probe.
    """

    layer: int
    packed: Packed
    logits: Tensor | None
    previous: Tensor | None
    input_ids: Tensor
    attention_mask: Tensor
    trace: Trace
    mode: Mode = "exploit"

    @property
    def rows(self) -> Tensor:
        """int64 [R], the active rows' positions in the batch."""
        return self.packed.rows

    @property
    def lengths(self) -> Tensor:
        """int64 [R], tokens of the active rows."""
        return self.packed.lengths


class Policy(nn.Module):
    """Base class. `decide` never changes state; `observe` is the only writer."""

    name: str = "policy"
    num_features: int = 0
    """F of the contexts that decisions carry; 0 for a policy that does not learn."""
    reads_exits: bool = False
    """True if `decide` needs the logits of every exit passed."""
    trains_exits: bool = True
    """True if training adds the loss of every exit passed, False if only the last one counts."""

    def decide(self, view: View) -> Decision:
        """What each active row does next."""
        raise NotImplementedError

    def decision_flops(self, layer: int, cost: CostModel) -> float:
        """The policy's own arithmetic per row for one decision, in FLOPs."""
        return 0.0

    def observe(self, trace: Trace, quality: Tensor, at_once: Tensor | None = None) -> None:
        """Learns from a trace.

        Args:
            quality: float [B, N] in [0, 1] of each visited exit.
            at_once: float [B], of the lexical exit; None = it was not read.
        """


def run_all(view: View, heads: int) -> Decision:
    """The decision to run every active row with every unit."""
    return Decision(
        sets=torch.ones(1, heads, dtype=torch.bool), choice=torch.zeros(view.rows.numel(), dtype=torch.long)
    )


def nobody(rows: Tensor, heads: int) -> Decision:
    """The decision for no rows: `rows` is empty."""
    return Decision(sets=torch.ones(1, heads, dtype=torch.bool), choice=rows)
