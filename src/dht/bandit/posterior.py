"""Sufficient statistics of one linear-Gaussian regression per arm, all arms in one batched tensor.

Shape letters: B rows, M arms, m selected arms, F features, O targets.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dht.errors import NonFiniteError

Arms = slice | Tensor | None
"""A selection of arms: None (all), a slice, or a LongTensor [m] of arm indices."""

_STATISTICS = ("gram", "moment", "pulls", "clock")


class LinearPosterior(nn.Module):
    """The posterior over the weights of one ridge regression per arm, as float64 sufficient statistics.

    For arm a, with phi the context of row s, w its weight, r its targets and t the last row seen::

        gram_a = sum_s gamma^(t-s) w phi phi^T      A_a       = ridge_a I + gram_a
        moment_a = sum_s gamma^(t-s) w phi r^T      theta_hat_a = A_a^-1 moment_a

    The prior is kept out of `gram`: it is never forgotten and never added twice, so updating with a batch equals
    updating with its rows one by one, and statistics of several workers add. All targets share A.

    Forgetting runs on one global clock, a tick a row: a row that updates no arm still ages every arm.
    Only `update`, `merge` and loading a state change the buffers. The buffers keep float64 (int64 for `clock`) under
    `.half()` or `.to(dtype)`; only their device follows. Results are float64 on the device of the buffers.

    Args:
        num_arms: M >= 1.
        num_features: F >= 1.
        num_targets: O >= 1.
        ridge: prior precision, > 0 and finite; a float, or a tensor [] or [M] for one per arm.
        forgetting: gamma in (0, 1]; 1 never forgets.

    Raises:
        ValueError: a size below 1, a ridge not positive and finite or of a wrong shape, gamma outside (0, 1].

    Source: LinUCB, Li, Chu, Langford & Schapire 2010, algorithm 1 (disjoint), with weights, several targets and a
        ridge other than 1; discounting as D-LinUCB, Russac, Vernade & Cappe 2019, except that the prior term stays
        constant and one matrix A serves both the estimate and the width.

    >>> posterior = LinearPosterior(num_arms=2, num_features=1, ridge=1.0)
    >>> posterior.update(torch.tensor([[2.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]))
    >>> posterior.mean().flatten().tolist()  # arm 0: 2 * 3 / (1 + 2 * 2); arm 1 has seen nothing
    [1.2, 0.0]
    """

    gram: Tensor
    moment: Tensor
    pulls: Tensor
    clock: Tensor
    ridge: Tensor

    def __init__(
        self,
        num_arms: int,
        num_features: int,
        num_targets: int = 1,
        ridge: float | Tensor = 1.0,
        forgetting: float = 1.0,
    ) -> None:
        super().__init__()
        for name, size in (("num_arms", num_arms), ("num_features", num_features), ("num_targets", num_targets)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0.0 < forgetting <= 1.0:
            raise ValueError(f"forgetting must be in (0, 1], got {forgetting}; 1 never forgets")
        self.num_arms, self.num_features, self.num_targets = num_arms, num_features, num_targets
        self.forgetting = float(forgetting)
        self.register_buffer("gram", torch.zeros(num_arms, num_features, num_features, dtype=torch.float64))
        self.register_buffer("moment", torch.zeros(num_arms, num_features, num_targets, dtype=torch.float64))
        self.register_buffer("pulls", torch.zeros(num_arms, dtype=torch.float64))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ridge", _ridge_per_arm(ridge, num_arms))
        self._cache: dict[str, Tensor] = {}
        self._cached_for: list[tuple[Tensor, int]] = []

    def extra_repr(self) -> str:
        """The sizes and gamma, for `repr`."""
        return (
            f"num_arms={self.num_arms}, num_features={self.num_features}, num_targets={self.num_targets}, "
            f"forgetting={self.forgetting}"
        )

    @property
    def precision(self) -> Tensor:
        """A = ridge I + gram, symmetric, float64 [M, F, F]."""
        # A matrix product rounds (f, g) and (g, f) differently; the mean of both is symmetric to the bit.
        return (self.gram + self.gram.mT) / 2 + self.ridge[:, None, None] * _eye(self.num_features, self.gram.device)

    def factor(self, arms: Arms = None) -> Tensor:
        """Lower Cholesky factors L with L L^T = A, float64 [m, F, F]; cached until the statistics change.

        Where rounding has made A indefinite, the smallest relative jitter that repairs it is added to that arm only.

        Raises:
            ValueError: an arm whose statistics no jitter can repair (not finite, or far from positive definite).
        """
        return self._select(self._cached("factor"), arms)

    def mean(self, arms: Arms = None) -> Tensor:
        """theta_hat = A^-1 moment, float64 [m, F, O]; cached until the statistics change."""
        return self._select(self._cached("mean"), arms)

    def predict(self, context: Tensor, arms: Arms = None) -> Tensor:
        """The expected targets of every row under every arm, theta_hat^T phi, float64 [B, m, O].

        Args:
            context: phi, any float dtype and device, [B, F].
            arms: which arms; see `Arms`.

        Raises:
            ValueError: context is not [B, F].
        """
        return self._predict(self._context(context), arms)

    def width(self, context: Tensor, arms: Arms = None) -> Tensor:
        """How uncertain the prediction is, sqrt(phi^T A^-1 phi), float64 [B, m], >= 0.

        Args:
            context: phi, any float dtype and device, [B, F].
            arms: which arms; see `Arms`.

        Raises:
            ValueError: context is not [B, F].
        """
        return self._width(self._context(context), arms)

    def sample(self, sigma: float, generator: torch.Generator, arms: Arms = None, target: int = 0) -> Tensor:
        """One joint draw theta_tilde ~ N(theta_hat, sigma^2 A^-1), float64 [m, F].

        Args:
            sigma: scale of the exploration, >= 0; 0 gives the mean.
            generator: the only randomness; it may live on another device than the buffers.
            arms: which arms; see `Arms`.
            target: which target's weights, in [0, O).

        Raises:
            ValueError: sigma is negative or not finite, or there is no such target.
        """
        if not (math.isfinite(sigma) and sigma >= 0.0):
            raise ValueError(f"sigma must be finite and >= 0, got {sigma}")
        if not 0 <= target < self.num_targets:
            raise ValueError(f"target must be in [0, {self.num_targets}), got {target}")
        lower = self.factor(arms)
        # Drawn where the generator lives, so that the CPU and an accelerator explore alike.
        noise = torch.randn(*lower.shape[:2], 1, generator=generator, device=generator.device, dtype=torch.float64)
        # A^-1 = L^-T L^-1, so L^-T z has covariance A^-1.
        spread = torch.linalg.solve_triangular(lower.mT, noise.to(lower.device), upper=True).squeeze(-1)
        return self.mean(arms)[..., target].add(spread, alpha=sigma)

    def update(self, context: Tensor, weight: Tensor, target: Tensor) -> None:
        """Returns nothing; adds weight[b, m] phi_b phi_b^T and weight[b, m] phi_b target[b, m]^T to every arm m.

        A weight of 0 means that the arm was not chosen for the row: its target is not read and may be NaN. Several
        arms of a row may have weight (semi-bandit). The rows are taken in order, the last one is the most recent:
        one call with B rows equals B calls with one row. B = 0 changes nothing.

        Args:
            context: phi, any float dtype and device, [B, F], finite.
            weight: any dtype (a boolean mask is fine) and device, [B, M], finite and >= 0.
            target: any dtype and device, [B, M, O], or [B, M] when O is 1; finite where weight is not 0.

        Raises:
            ValueError: a wrong shape, or a row with a value that is not allowed; the message names the first such
                row, and the statistics are as they were. A value that is not finite, or that would make a statistic
                so, is a `NonFiniteError`.
        """
        phi = self._context(context)
        w = self._cast(weight)
        r = self._cast(target)
        rows = phi.shape[0]
        if w.shape != (rows, self.num_arms):
            raise ValueError(f"weight must be [B, M] = {[rows, self.num_arms]}, got {list(w.shape)}")
        if self.num_targets == 1 and r.ndim == 2:
            r = r.unsqueeze(-1)
        if r.shape != (rows, self.num_arms, self.num_targets):
            expected = [rows, self.num_arms, self.num_targets]
            raise ValueError(f"target must be [B, M, O] = {expected}, got {list(target.shape)}")
        if rows == 0:
            return
        if not self._add(phi, w, r):
            # Something is amiss, or a target that nobody reads is not finite: looked at more closely only now.
            r = torch.where((w != 0).unsqueeze(-1), r, 0.0)
            _refuse_bad_rows(phi, w, r)
            self._add(phi, w, r, sound=True)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the statistics `gram`, `moment`, `pulls` and `clock`, for `delta_since` and `merge`."""
        return {name: getattr(self, name).clone() for name in _STATISTICS}

    @torch.no_grad()
    def delta_since(self, snapshot: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the rows since the snapshot S_0 have added: S - gamma^n S_0, and n itself as `clock`.

        Args:
            snapshot: what `snapshot` returned earlier, on this posterior or on the one it was copied from.

        Raises:
            ValueError: a statistic is missing or has the wrong shape, or the snapshot is newer than this posterior.
        """
        base = self._statistics(snapshot, "snapshot")
        rows = int(self.clock - base["clock"])
        if rows < 0:
            raise ValueError(f"snapshot is newer than the posterior: its clock is {-rows} rows ahead")
        keep = self.forgetting**rows
        delta = {name: getattr(self, name) - keep * base[name] for name in _STATISTICS if name != "clock"}
        return delta | {"clock": self.clock - base["clock"]}

    @torch.no_grad()
    def merge(self, base_snapshot: Mapping[str, Tensor], deltas: Sequence[Mapping[str, Tensor]]) -> None:
        """Returns nothing; sets the statistics to the base S_0 advanced by the deltas of all workers.

        merged = gamma^(max n_w) S_0 + sum_w delta_w, and `clock` counts the rows of all workers. With gamma = 1 this
        is one worker that saw all rows, in any order. With gamma < 1 the workers count as synchronous: row i of one
        worker is as old as row i of another, and the base ages by the longest of them, not by their sum.

        Args:
            base_snapshot: the `snapshot` that all workers started from.
            deltas: one `delta_since(base_snapshot)` per worker; the order changes nothing beyond rounding.

        Raises:
            ValueError: a statistic is missing or has the wrong shape; the statistics are as they were.
        """
        base = self._statistics(base_snapshot, "base_snapshot")
        parts = [self._statistics(delta, f"deltas[{i}]") for i, delta in enumerate(deltas)]
        keep = self.forgetting ** max((int(part["clock"]) for part in parts), default=0)
        for name in _STATISTICS:
            total = base[name] * (1 if name == "clock" else keep)
            for part in parts:
                total = total + part[name]
            getattr(self, name).copy_(total)
        self.invalidate()

    def invalidate(self) -> None:
        """Returns nothing; drops what was computed from the statistics.

        Needed only after a change that PyTorch does not count, such as one through `.data`.
        """
        self._cache, self._cached_for = {}, []

    def _cached(self, name: str) -> Tensor:
        sources = (self.gram, self.moment, self.ridge)
        # Inference tensors have no version; what changes those (update, load, move) invalidates explicitly.
        current = [(t, 0 if t.is_inference() else t._version) for t in sources]
        same = len(self._cached_for) == len(current) and all(
            old is new and then == now for (old, then), (new, now) in zip(self._cached_for, current, strict=True)
        )
        if not same:
            self._cache, self._cached_for = {}, current
        return self._derived(name)

    def _derived(self, name: str) -> Tensor:
        if name not in self._cache:
            self._cache[name] = getattr(self, f"_{name}")()
        return self._cache[name]

    def _factor(self) -> Tensor:
        # The factorisation reads the lower triangle alone, so nothing has to be symmetric to the bit.
        precision = self.gram.clone()
        precision.diagonal(dim1=1, dim2=2).add_(self.ridge[:, None])
        lower: Tensor
        lower, info = torch.linalg.cholesky_ex(precision)
        # Depending on the backend a NaN passes the factorisation, so it is looked for in the result.
        sound = not any(info.tolist()) and math.isfinite(float(lower.sum()))
        return lower if sound else _repaired(self.precision)

    def _inverse_factor(self) -> Tensor:
        # X L^T = I, so X^T = L^-1: solved from this side it comes out in the order in which `_width` reads it.
        lower = self._derived("factor").mT
        eye = _eye(self.num_features, lower.device)
        transposed: Tensor = torch.linalg.solve_triangular(lower, eye, upper=True, left=False)
        return transposed.mT

    def _mean(self) -> Tensor:
        return torch.cholesky_solve(self.moment, self._derived("factor"))

    def _weights(self) -> Tensor:
        """The means as `_predict` multiplies with them, [F, M, O]."""
        return self._derived("mean").transpose(0, 1).contiguous()

    def _predict(self, phi: Tensor, arms: Arms) -> Tensor:
        weights = self._cached("weights")
        if arms is not None:
            weights = weights[:, arms.to(weights.device) if isinstance(arms, Tensor) else arms]
        return (phi @ weights.flatten(1)).view(phi.shape[0], weights.shape[1], self.num_targets)

    def _width(self, phi: Tensor, arms: Arms) -> Tensor:
        # ||L^-1 phi||: with L^-1 cached, a decision costs one matrix product and never subtracts. The norm runs over
        # what lies side by side in memory: over strides it takes ten times as long.
        inverse = self._select(self._cached("inverse_factor"), arms)
        whitened = (phi @ inverse.flatten(0, 1).T).view(phi.shape[0], *inverse.shape[:2])
        norm: Tensor = torch.linalg.vector_norm(whitened, dim=2)
        return norm

    def _add(self, phi: Tensor, w: Tensor, r: Tensor, sound: bool = False) -> bool:
        """Whether the rows were added: not if a value is out of bounds, unless the rows are known to be `sound`.

        Raises:
            NonFiniteError: sound rows whose sum overflows.
        """
        rows, keep, least = phi.shape[0], 1.0, w.amin()
        if self.forgetting < 1.0:
            age = torch.arange(rows - 1, -1, -1, dtype=torch.float64, device=w.device)
            w, keep = w * (self.forgetting**age).unsqueeze(-1), self.forgetting**rows
        share = w.unsqueeze(-1)
        gram = _sums(phi, share * phi.unsqueeze(1)).add(self.gram, alpha=keep)
        moment = _sums(phi, share * r).add(self.moment, alpha=keep)
        flat = phi.reshape(-1)
        # What is not finite spreads to the sums.
        total, squares = float(gram.sum() + moment.sum()), float(flat.dot(flat))
        if not (math.isfinite(total) and math.isfinite(squares) and float(least) >= 0):
            if not sound:
                return False
            _refuse_overflow(gram, moment)
        # In place: the buffers stay the tensors that a distributed wrapper or a shared-memory worker holds.
        self.gram.copy_(gram)
        self.moment.copy_(moment)
        self.pulls.copy_(w.sum(dim=0).add(self.pulls, alpha=keep))
        self.clock.add_(rows)
        self.invalidate()
        return True

    def _select(self, values: Tensor, arms: Arms) -> Tensor:
        if arms is None:
            return values
        return values[arms.to(values.device) if isinstance(arms, Tensor) else arms]

    def _cast(self, values: Tensor) -> Tensor:
        return values.detach().to(device=self.gram.device, dtype=torch.float64)

    def _context(self, context: Tensor) -> Tensor:
        if context.ndim != 2 or context.shape[1] != self.num_features:
            raise ValueError(f"context must be [B, F] with F = {self.num_features}, got {list(context.shape)}")
        return self._cast(context)

    def _statistics(self, statistics: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
        for name in _STATISTICS:
            expected = list(getattr(self, name).shape)
            got = list(statistics[name].shape) if name in statistics else "nothing"
            if got != expected:
                raise ValueError(f"{what}: {name} must have shape {expected}, got {got}")
        return {name: statistics[name].to(self.gram.device) for name in _STATISTICS}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearPosterior:
        # `.half()` or `.to(bfloat16)` on the model around it must not round the statistics: only the device follows.
        for name, buffer in self._buffers.items():
            assert buffer is not None
            moved = fn(buffer)
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        self.invalidate()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # With assign=True the loaded tensors replace the buffers, whatever their dtype.
        for name, buffer in self._buffers.items():
            assert buffer is not None
            self._buffers[name] = buffer.to(torch.int64 if name == "clock" else torch.float64)
        self.invalidate()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": {}, "_cached_for": []}


def _ridge_per_arm(ridge: float | Tensor, num_arms: int) -> Tensor:
    if isinstance(ridge, Tensor):
        if ridge.shape not in ((), (num_arms,)):
            raise ValueError(f"ridge must have shape [] or [M] = [{num_arms}], got {list(ridge.shape)}")
        values = ridge.detach().to(torch.float64).expand(num_arms).clone()
        bad = [] if values.is_meta else [v for v in values.tolist() if not (math.isfinite(v) and v > 0)]
    else:
        values = torch.full((num_arms,), float(ridge), dtype=torch.float64)
        bad = [] if math.isfinite(ridge) and ridge > 0 else [float(ridge)]
    if bad:
        raise ValueError(f"ridge must be finite and > 0, got {bad[0]}")
    return values


def _sums(phi: Tensor, sides: Tensor) -> Tensor:
    """sum_b phi_b sides_bm^T for every arm, [M, F, S], from [B, F] and [B, M, S]."""
    # Arms side by side: one wide product [F, B] @ [B, M S] instead of M small ones.
    wide = phi.T @ sides.flatten(1)
    return wide.view(phi.shape[1], *sides.shape[1:]).transpose(0, 1)


def _refuse_bad_rows(phi: Tensor, w: Tensor, r: Tensor) -> None:
    bad_context = ~phi.square().sum(dim=1).isfinite()
    bad_weight = ~(w.isfinite() & (w >= 0)).all(dim=1)
    bad_target = ~r.isfinite().flatten(1).all(dim=1)
    bad = bad_context | bad_weight | bad_target
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0])
    if bad_context[row]:
        problem = "context has a non-finite value or one whose square overflows float64"
    elif bad_weight[row]:
        problem = "weight has a negative or non-finite value; allowed: finite and >= 0"
    else:
        problem = "target has a non-finite value for an arm whose weight is not 0"
    raise (ValueError if problem.startswith("weight") else NonFiniteError)(f"row {row}: {problem}")


def _refuse_overflow(gram: Tensor, moment: Tensor) -> None:
    broken = ~(gram.isfinite().flatten(1).all(dim=1) & moment.isfinite().flatten(1).all(dim=1))
    if bool(broken.any()):
        arm = int(broken.nonzero()[0])
        raise NonFiniteError(f"arm {arm}: the sum of its rows overflows float64; scale contexts and targets down")


@functools.cache
def _eye(size: int, device: torch.device) -> Tensor:
    # An ordinary tensor, whatever mode the first caller is in.
    with torch.inference_mode(False):
        return torch.eye(size, dtype=torch.float64, device=device)


def _repaired(precision: Tensor) -> Tensor:
    """Lower factors of [M, F, F]; escalating jitter, relative to each arm's largest diagonal entry, where it fails."""
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(precision)
    scale = precision.diagonal(dim1=-2, dim2=-1).amax(dim=-1)
    jitter = precision.shape[-1] * torch.finfo(torch.float64).eps
    eye = _eye(precision.shape[-1], precision.device)
    # From rounding level up to 1e-6: what needs more than that is a corrupt state, not rounding.
    while bool((info != 0).any()) and jitter < 1e-6:
        retried, retried_info = torch.linalg.cholesky_ex(precision + jitter * scale[:, None, None] * eye)
        failed = (info != 0)[:, None, None]
        lower, info = torch.where(failed, retried, lower), torch.where(info != 0, retried_info, info)
        jitter *= 10.0
    broken = (info != 0) | ~lower.isfinite().flatten(1).all(dim=1)
    if bool(broken.any()):
        arm = int(broken.nonzero()[0])
        raise ValueError(f"arm {arm}: the precision matrix is not finite or not positive definite; corrupt state?")
    return lower
