"""AdamW whose work on an embedding table grows with the rows that a batch reads, not with the table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from transformers import PreTrainedModel

WINDOW = 256
"""Steps after which all rows are brought up to date: what is remembered of the steps stays this small."""

CHUNK = 4096
"""Rows of a table that are brought up to date at once: temporaries stay in cache."""


class DeferredAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, whose moves of table rows without a gradient are made up for when the row is read again.

    A row that a batch does not touch has a gradient of zero, yet AdamW moves it, by what is left of its first moment.
    With m and v its moments when it was last touched, at step t, the moves of steps t + 1..t + n add up to::

        sum_k lr_s (beta1^k m / (1 - beta1^s)) / (sqrt(beta2^k v / (1 - beta2^s)) + eps),   s = t + k, k = 1..n
          ~ moved(t, n) m / (sqrt(v) + eps'),   moved(t, n) = sum_k lr_s (beta1 / sqrt(beta2))^k
                                                              sqrt(1 - beta2^s) / (1 - beta1^s)

    so that one number for all rows of the same age is enough. eps' is eps at the first missed step's scale: nine tenths
    of the sum come from the first 22 steps, over which that scale changes by a hundredth. A row that was never touched
    has no moments and is not moved.

    A table is deferred from `attach` to `detach`; in between its module is the one way to read it up to date.
    Whatever is not attached, and everything without weight decay that is, ends where AdamW ends, but for rounding and
    eps'. The state is that of AdamW.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self._tables: list[_Table] = []
        self.grad_scale: Tensor | None = None  # by this name fused AdamW knows what to divide gradients by

    def attach(self, module: nn.Embedding) -> bool:
        """Defers the rows of a table from now on, and has its gradients come as rows; returns whether it does.

        It does not where rows move without moments: with weight decay, of which no row is spared; nor on an
        accelerator, where the table is quickly passed over and looking for rows would wait for the device.
        """
        group = self.group_of(module.weight)
        if group is None or moves_all(group) or module.weight.device.type != "cpu":
            return False
        self._tables.append(_Table(module, self))
        return True

    def detach(self) -> None:
        """Returns nothing; brings all rows up to date, and the tables are as any other parameter again."""
        for table in self._tables:
            table.detach()
        self._tables = []

    def settle(self) -> None:
        """Returns nothing; brings all rows up to date, as they have to be before weights or state are copied."""
        for table in self._tables:
            table.settle()

    @property
    def tables(self) -> list[Tensor]:
        """The deferred ones; their gradients are sparse."""
        return [table.weight for table in self._tables]

    def clip(self, largest: float) -> Tensor:
        """The norm of all gradients; the next step takes them scaled down to `largest` if they are above.

        As `torch.nn.utils.clip_grad_norm_`, without a pass over all gradients of its own for the scaling.
        """
        grads = []
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
            grads.append(parameter.grad.values() if parameter.grad.is_sparse else parameter.grad)
        norm = torch.nn.utils.get_total_norm(grads)
        excess = (norm + 1e-6) / largest
        self.grad_scale = excess.float() if bool(excess > 1.0) else None  # float32 is what fused AdamW reads
        return norm

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of AdamW.

        Raises:
            ValueError: a closure, whose gradients would come too late.
        """
        if closure is not None:
            raise ValueError("step: DeferredAdamW takes no closure; compute the gradients before")
        grads = [weight.grad for weight in self.tables]
        for weight in self.tables:
            weight.grad = None
        loss = super().step()
        for table, grad in zip(self._tables, grads, strict=True):
            table.weight.grad = grad
            if grad is not None:
                table.step(grad if self.grad_scale is None else (grad / self.grad_scale).to(grad.dtype))
        self.grad_scale = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As of AdamW; all rows are brought up to date."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of AdamW; a table that the loaded options would move without a gradient is deferred no longer."""
        self.settle()
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["fused"] = True  # what scales gradients down as it reads them
        for table in [table for table in self._tables if moves_all(table.group)]:
            table.detach()
            self._tables.remove(table)

    def group_of(self, parameter: Tensor) -> dict[str, Any] | None:
        """The options of a parameter; None if it is not one of the optimizer's."""
        return next((group for group in self.param_groups if any(p is parameter for p in group["params"])), None)


def moves_all(group: dict[str, Any]) -> bool:
    """True if these options of AdamW move rows in ways that are not made up for."""
    return bool(group["weight_decay"] or group["amsgrad"])


class _Table:
    """One table, what its rows have missed, and when they were up to date.

    Attributes:
        taken: steps since all rows were up to date.
        upto: int64 [V], how many of these each row has seen.
        moved: float64 [WINDOW + 1], moved[j] is what the steps after the j-th come to.
        eps: float64 [WINDOW + 1], eps for rows that have seen j of the steps.
    """

    def __init__(self, module: nn.Embedding, optimizer: DeferredAdamW) -> None:
        self.module, self.weight, self.optimizer = module, module.weight, optimizer
        self.taken = 0
        self.upto = torch.zeros(len(module.weight), dtype=torch.int64)
        self.moved = torch.zeros(WINDOW + 1, dtype=torch.float64)
        self.eps = torch.zeros(WINDOW + 1, dtype=torch.float64)
        self._sparse, module.sparse = module.sparse, True
        self._hook = module.register_forward_pre_hook(lambda _, inputs: self.catch_up(inputs[0].flatten()))

    def detach(self) -> None:
        self.settle()
        self._hook.remove()
        self.module.sparse = self._sparse

    @property
    def group(self) -> dict[str, Any]:
        """Its options; loading a state puts others in their place."""
        group = self.optimizer.group_of(self.weight)
        assert group is not None
        return group

    @property
    def state(self) -> dict[str, Tensor]:
        """What AdamW keeps of it; made at its first step."""
        state: dict[str, Tensor] = self.optimizer.state[self.weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        return state

    @torch.no_grad()
    def step(self, grad: Tensor) -> None:
        """AdamW on the rows that have a gradient; the others are owed a move more."""
        grad, state, group = grad.coalesce(), self.state, self.group
        rows, held = grad.indices()[0], (self.weight, state["exp_avg"], state["exp_avg_sq"])
        self.catch_up(rows)
        weight, mean, square = (whole.index_select(0, rows) for whole in held)
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        adamw(
            [weight], [grad.values()], [mean], [square], [], [state["step"]], fused=group["fused"], amsgrad=False,
            beta1=beta1, beta2=beta2, lr=lr, weight_decay=0.0, eps=group["eps"], maximize=group["maximize"],
        )  # fmt: skip
        for whole, part in zip(held, (weight, mean, square), strict=True):
            whole.index_copy_(0, rows, part)
        now, ratio = float(state["step"]), beta1 / math.sqrt(beta2)
        scale = math.sqrt(1 - beta2**now)
        # A row that had seen j of the `taken` steps before missed this one as the (taken + 1 - j)-th.
        ages = torch.arange(self.taken + 1, 0, -1, dtype=torch.float64)
        self.moved[: self.taken + 1] += lr * scale / (1 - beta1**now) * ratio**ages
        self.eps[self.taken] = group["eps"] * scale / math.sqrt(beta2)
        self.taken += 1
        self.upto[rows] = self.taken
        if self.taken == WINDOW:
            self.settle()

    @torch.no_grad()
    def catch_up(self, rows: Tensor) -> None:
        """Makes the moves that `rows` (int64 [n], any number of times) have missed."""
        if not self.taken:
            return
        rows = rows[self.upto[rows] < self.taken].unique()
        if not len(rows):
            return
        seen, state = self.upto[rows], self.state
        missed = (self.taken - seen).double()
        held = (self.weight, state["exp_avg"], state["exp_avg_sq"])
        weight, mean, square = (whole.index_select(0, rows) for whole in held)
        size, eps = (column[seen].to(weight.dtype)[:, None] for column in (self.moved, self.eps))
        weight.addcdiv_(size * mean, square.sqrt().add_(eps), value=1.0 if self.group["maximize"] else -1.0)
        for part, beta in zip((mean, square), self.group["betas"], strict=True):
            part.mul_((beta**missed).to(part.dtype)[:, None])
        for whole, part in zip(held, (weight, mean, square), strict=True):
            whole.index_copy_(0, rows, part)
        self.upto[rows] = self.taken

    def settle(self) -> None:
        """All rows are up to date."""
        for rows in torch.arange(len(self.upto)).split(CHUNK):
            self.catch_up(rows)
        self.taken = 0
        self.upto.zero_()
        self.moved.zero_()


def optimizer_of(model: nn.Module, lr: float) -> DeferredAdamW:
    """What `GuardedTrainer` updates a model with, for steps outside of it; `update` takes one."""
    optimizer = DeferredAdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    words = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if isinstance(words, nn.Embedding):
        optimizer.attach(words)
    return optimizer


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Returns nothing; clips the gradients to the training loop's own default, takes a step and drops the gradients."""
    if isinstance(optimizer, DeferredAdamW) and optimizer.tables:
        optimizer.clip(1.0)
    else:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
