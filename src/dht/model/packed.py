"""Rows of different lengths laid end to end, so that no operation runs on padding outside attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor


@dataclass
class Packed:
    """Hidden states of the active rows, packed.

    What has to be known to launch an operation is known on the host: reading it off an accelerator would have the host
    wait until all work launched so far is done.

    Attributes:
        hidden: [S, D], tokens of row 0, then of row 1, ...
        lengths: int64 [R], tokens of each row; sums to S.
        rows: int64 [R], which row of the batch each one is.
    """

    hidden: Tensor
    lengths: Tensor
    rows: Tensor

    @cached_property
    def host_lengths(self) -> Tensor:
        """`lengths` on the host."""
        return self.lengths.cpu()

    @cached_property
    def host_rows(self) -> Tensor:
        """`rows` on the host."""
        return self.rows.cpu()

    @cached_property
    def starts(self) -> Tensor:
        """int64 [R], index in `hidden` of each row's first token."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def ends(self) -> Tensor:
        """int32 [R + 1], 0 and the index in `hidden` after each row's last token."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).int()

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest row; 0 with no rows."""
        return int(self.host_lengths.max()) if self.lengths.numel() else 0

    @cached_property
    def equal(self) -> bool:
        """True if all rows have the same length: padding is then only a reshape."""
        return self.max_length * self.lengths.numel() == self.hidden.shape[0]

    @cached_property
    def token_row(self) -> Tensor:
        """int64 [S], position among the active rows of each token's row."""
        return torch.repeat_interleave(self.lengths, output_size=self.hidden.shape[0])

    @cached_property
    def slot(self) -> Tensor:
        """int64 [S], place of each token in the padded [R * max_length] layout."""
        within = torch.arange(self.hidden.shape[0], device=self.lengths.device) - self.starts[self.token_row]
        return self.token_row * self.max_length + within

    @cached_property
    def mask(self) -> Tensor | None:
        """Bool [R, 1, 1, T], True at real tokens; None when no row is padded."""
        if self.equal:
            return None
        places = torch.arange(self.max_length, device=self.lengths.device)
        return (places < self.lengths[:, None])[:, None, None, :]

    @cached_property
    def tables(self) -> dict[tuple[str, float, int], tuple[Tensor, ...]]:
        """What follows from the layout alone and several layers need: filled by whoever works it out first."""
        return {}

    def near(self, window: int) -> Tensor | None:
        """`mask`, and no token further than `window` away: bool, broadcasts to [R, 1, T, T]; None if all attend to all.

        A padded place attends to everything: its result is dropped, but an empty softmax would spoil the gradients.
        """
        if self.max_length <= window + 1:
            return self.mask
        known = ("near", window, 0)
        if known not in self.tables:
            places = torch.arange(self.max_length, device=self.lengths.device)
            band = (places[:, None] - places).abs() <= window
            real = self.mask
            self.tables[known] = (band[None, None] if real is None else (band & real) | ~real.mT,)
        return self.tables[known][0]

    def lay_out(self, window: int | None) -> None:
        """Works out what attention needs of the layout, which the groups and layers that share it then find done."""
        _ = self.equal or self.slot, self.mask if window is None else self.near(window)

    def first(self) -> Tensor:
        """[R, D], each row's first token."""
        return self.hidden[self.starts]

    def mean(self) -> Tensor:
        """[R, D], mean over each row's tokens."""
        if self.equal:
            return self.hidden.view(self.lengths.numel(), self.max_length, self.hidden.shape[-1]).mean(1)
        total = self.hidden.new_zeros(self.lengths.numel(), self.hidden.shape[-1])
        return total.index_add(0, self.token_row, self.hidden) / self.lengths[:, None].to(self.hidden.dtype)

    def attended(self, scores: Tensor) -> Tensor:
        """[R, D], each row's tokens averaged with weights softmax(scores) over the row.

        Args:
            scores: float [S, H]; head h weighs the h-th of H equal slices of D. Equal scores give the mean.
        """
        rows, heads = self.lengths.numel(), scores.shape[-1]
        scores = scores.float()  # an exponential is not for half precision
        if self.equal:
            weight = scores.view(rows, self.max_length, heads).softmax(1).to(self.hidden.dtype)
            if self.hidden.is_cuda:
                return weighed_by_product(weight, self.hidden.view(rows, self.max_length, -1))
            tokens = self.hidden.view(rows, self.max_length, heads, self.hidden.shape[-1] // heads)
            return (tokens * weight[..., None]).sum(1).flatten(1)
        index = self.token_row[:, None].expand_as(scores)
        highest = scores.new_full((rows, heads), -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
        weight = (scores - highest[self.token_row]).exp()
        total = weight.new_zeros(rows, heads).index_add(0, self.token_row, weight)
        weight = (weight / total[self.token_row]).to(self.hidden.dtype)
        tokens = (self.hidden.view(len(scores), heads, -1) * weight[..., None]).flatten(1)
        return tokens.new_zeros(rows, tokens.shape[1]).index_add(0, self.token_row, tokens)

    def select(self, order: Tensor) -> Packed:
        """The rows `order` (int64 [R'], positions among the active rows, on the host), in that order."""
        there = order.to(self.rows.device, non_blocking=True)
        lengths, rows = self.lengths[there], self.rows[there]
        known = {}
        if not rows.is_cpu:
            known = {"host_lengths": self.host_lengths[order], "host_rows": self.host_rows[order]}
        if self.equal and self.rows.numel():
            hidden = self.hidden.view(self.rows.numel(), self.max_length, -1).index_select(0, there).flatten(0, 1)
            return Packed(hidden, lengths, rows).knowing(max_length=self.max_length, equal=True, **known)
        total = int(known.get("host_lengths", lengths).sum())
        starts = lengths.cumsum(0) - lengths
        shift = torch.repeat_interleave(self.starts[there] - starts, lengths, output_size=total)
        tokens = torch.arange(total, device=rows.device) + shift
        return Packed(self.hidden.index_select(0, tokens), lengths, rows).knowing(**known)

    def tokens_of(self, counts: list[int]) -> list[int]:
        """Tokens of consecutive groups of `counts` rows."""
        if len(counts) == 1:
            return [self.hidden.shape[0]]
        if self.equal:
            return [count * self.max_length for count in counts]
        lengths = iter(self.host_lengths.tolist())
        return [sum(islice(lengths, count)) for count in counts]

    def split(self, counts: list[int]) -> list[Packed]:
        """Consecutive groups of `counts` rows, as views."""
        if len(counts) == 1:
            return [self]
        names = ("lengths", "rows") if self.rows.is_cpu else ("lengths", "rows", "host_lengths", "host_rows")
        columns = zip(*(getattr(self, name).split(counts) for name in names), strict=True)
        groups = []
        for tokens, (lengths, rows, *host) in zip(self.hidden.split(self.tokens_of(counts)), columns, strict=True):
            group = Packed(tokens, lengths, rows).knowing(**dict(zip(names[2:], host, strict=True)))
            groups.append(group.knowing(max_length=self.max_length, equal=True) if self.equal else group)
        return groups

    def knowing(self, **known: Any) -> Packed:
        """Itself, with what need not be worked out from `lengths` and `rows` again, or be fetched from the device."""
        self.__dict__.update(known)
        return self

    def with_hidden(self, hidden: Tensor) -> Packed:
        """The same rows with other hidden states; the layout already worked out is kept."""
        new = Packed(hidden, self.lengths, self.rows)
        new.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("hidden", "lengths", "rows")})
        return new


def weighed_by_product(weight: Tensor, tokens: Tensor) -> Tensor:
    """[R, D], slice h of D summed over the tokens with the weights of head h.

    Every head weighs all of D, and all but its own slice is dropped: H times the arithmetic, which a GPU does not feel,
    and the tokens are read once and written never.

    Args:
        weight: [R, T, H].
        tokens: [R, T, D].
    """
    slices = (weight.mT @ tokens).unflatten(-1, (weight.shape[-1], -1))
    own: Tensor = slices.diagonal(dim1=1, dim2=2)
    return own.mT.flatten(1)
