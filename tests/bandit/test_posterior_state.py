"""The posterior as state: saved, moved, cast, cached, and merged across workers."""

import copy
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from dht.bandit import LinearPosterior

EXACT = {"rtol": 0.0, "atol": 0.0}


def rows(seed: int, count: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    weight = (torch.rand(count, 2, generator=generator) < 0.6).double()
    return context, weight, torch.randn(count, 2, 2, generator=generator, dtype=torch.float64)


def posterior(forgetting: float = 1.0, seed: int | None = 0) -> LinearPosterior:
    made = LinearPosterior(2, 3, 2, ridge=torch.tensor([0.3, 1.7]), forgetting=forgetting)
    if seed is not None:
        made.update(*rows(seed, 11))
    return made


def assert_same(a: LinearPosterior, b: LinearPosterior, rtol: float = 0.0) -> None:
    for (name, x), (_, y) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(a.mean(), b.mean(), rtol=100 * rtol, atol=100 * rtol)
    query = rows(99, 4)[0]
    torch.testing.assert_close(a.width(query), b.width(query), rtol=100 * rtol, atol=100 * rtol)


def test_state_dict_goes_out_and_in_bit_for_bit(tmp_path) -> None:
    saved = posterior()
    saved.mean()  # fills the cache, which must not travel
    state = saved.state_dict()
    assert set(state) == {"gram", "moment", "pulls", "clock", "ridge"}
    loaded = LinearPosterior(2, 3, 2)
    stale = loaded.mean()
    loaded.load_state_dict(state)
    assert not torch.equal(stale, loaded.mean())
    assert_same(loaded, saved)

    safetensors.torch.save_file(state, tmp_path / "policy.safetensors")
    from_file = LinearPosterior(2, 3, 2)
    from_file.load_state_dict(safetensors.torch.load_file(tmp_path / "policy.safetensors"))
    assert_same(from_file, saved)

    # Going on after loading is going on without the interruption.
    for resumed in (saved, loaded, from_file):
        resumed.update(*rows(1, 5))
    assert_same(loaded, saved)
    assert_same(from_file, saved)


def test_assigned_state_keeps_float64() -> None:
    saved = posterior()
    low = {name: t.bfloat16() if t.is_floating_point() else t for name, t in saved.state_dict().items()}
    loaded = LinearPosterior(2, 3, 2)
    loaded.load_state_dict(low, assign=True)
    assert {name: t.dtype for name, t in loaded.named_buffers()} == {n: t.dtype for n, t in saved.named_buffers()}
    torch.testing.assert_close(loaded.gram, saved.gram, rtol=1e-2, atol=1e-2)


def test_built_without_storage_then_loaded() -> None:
    saved = posterior()
    with torch.device("meta"):
        shell = LinearPosterior(2, 3, 2, ridge=torch.ones(2))
    assert shell.gram.is_meta
    shell.to_empty(device="cpu").load_state_dict(saved.state_dict())
    assert_same(shell, saved)
    with torch.device("meta"):
        shell = LinearPosterior(2, 3, 2, ridge=0.5)
    shell.load_state_dict(saved.state_dict(), assign=True)
    assert_same(shell, saved)


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.float(), torch.float32),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.type(torch.float16), torch.float16),
        (lambda m: m.to("cpu", torch.float16), torch.float16),
    ],
)
def test_casting_the_model_leaves_the_statistics_alone(cast, dtype: torch.dtype) -> None:
    model = cast(nn.Sequential(nn.Linear(3, 3), posterior()))
    assert model[0].weight.dtype == dtype  # the rest of the model did follow
    assert_same(model[1], posterior())
    assert model[1].clock.dtype == torch.int64
    assert {b.dtype for n, b in model[1].named_buffers() if n != "clock"} == {torch.float64}


def test_moving_the_model_moves_the_statistics() -> None:
    moved = nn.Sequential(posterior()).to("meta", torch.float16)[0]
    assert {b.device.type for b in moved.buffers()} == {"meta"}
    assert {n: b.dtype for n, b in moved.named_buffers()} == {n: b.dtype for n, b in posterior().named_buffers()}


def test_shared_memory_is_shared() -> None:
    shared = posterior()
    shared.share_memory()
    assert all(b.is_shared() for b in shared.buffers())
    shared.update(*rows(1, 3))
    assert all(b.is_shared() for b in shared.buffers())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_are_independent(copier) -> None:
    original = posterior()
    original.mean()
    twin = copier(original)
    assert_same(twin, original)
    twin.update(*rows(1, 4))
    assert_same(original, posterior())
    assert not torch.equal(twin.mean(), original.mean())


def test_cache_is_kept_while_nothing_changes_and_dropped_when_anything_does() -> None:
    cached = posterior()
    assert cached.factor() is cached.factor()
    for change in (
        lambda: cached.update(*rows(1, 2)),
        lambda: cached.merge(posterior(seed=3).snapshot(), []),
        lambda: cached.load_state_dict(posterior(seed=4).state_dict()),
        # In place and behind our back, as a broadcast of a distributed wrapper does it.
        lambda: cached.gram.mul_(2.0),
        lambda: cached.ridge.mul_(2.0),
        lambda: setattr(cached, "gram", cached.gram * 2),
    ):
        before = cached.factor()
        change()
        assert not torch.equal(cached.factor(), before)
        lower = cached.factor()
        torch.testing.assert_close(lower @ lower.mT, cached.precision)
    before = cached.mean()
    cached.moment.mul_(3.0)
    torch.testing.assert_close(cached.mean(), 3 * before)
    # PyTorch does not count a change through .data: that is what invalidate is for.
    cached.moment.data.mul_(2.0)
    cached.invalidate()
    torch.testing.assert_close(cached.mean(), 6 * before)


def test_replaced_buffer_is_seen_even_at_the_same_version() -> None:
    cached = posterior(seed=None)
    before = cached.factor()
    cached.gram = cached.gram + 3.0 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(cached.factor()[0, 0, 0], torch.tensor(3.0 + 0.3).double().sqrt(), rtol=1e-6, atol=0.0)
    assert not torch.equal(cached.factor(), before)


def test_cache_is_not_pickled() -> None:
    original = posterior()
    size = len(pickle.dumps(original))
    original.mean()
    assert len(pickle.dumps(original)) == size


def test_inference_mode_neither_breaks_nor_fools_the_cache() -> None:
    plain, inference = posterior(), posterior()
    plain.update(*rows(1, 4))
    with torch.inference_mode():
        inference.mean()
        inference.update(*rows(1, 4))
        assert_same(inference, plain)
    plain.update(*rows(2, 4))
    inference.update(*rows(2, 4))
    assert_same(inference, plain)
    with torch.inference_mode():
        born = posterior()
        born.mean()
        born.update(*rows(1, 4))
        torch.testing.assert_close(born.factor() @ born.factor().mT, born.precision)


def test_merged_workers_equal_one_worker_that_saw_all_rows() -> None:
    base, everything = posterior(), posterior()
    start = base.snapshot()
    deltas = []
    for seed, count in ((1, 7), (2, 0), (3, 20)):
        worker = copy.deepcopy(base)
        worker.update(*rows(seed, count))
        everything.update(*rows(seed, count))
        deltas.append(worker.delta_since(start))
    base.update(*rows(8, 5))  # merge sets: what self has seen meanwhile is replaced
    base.merge(start, deltas)
    assert_same(base, everything, rtol=1e-12)
    assert base.clock.item() == 11 + 27
    base.merge(start, deltas[::-1])
    assert_same(base, everything, rtol=1e-12)


def test_merged_forgetful_workers_count_as_synchronous() -> None:
    gamma, base = 0.8, posterior(forgetting=0.8)
    start = base.snapshot()
    batches = [rows(1, 6), rows(2, 4)]
    deltas = []
    for batch in batches:
        worker = copy.deepcopy(base)
        worker.update(*batch)
        deltas.append(worker.delta_since(start))
    base.merge(start, deltas)
    # Row i of a worker with n rows weighs gamma^(n - 1 - i); the base ages by the longest worker, 6 rows.
    gram = gamma**6 * start["gram"].numpy()
    moment = gamma**6 * start["moment"].numpy()
    pulls = gamma**6 * start["pulls"].numpy()
    for context, weight, target in (tuple(t.numpy() for t in batch) for batch in batches):
        aged = weight * gamma ** np.arange(len(context) - 1, -1, -1)[:, None]
        gram = gram + np.einsum("bm,bf,bg->mfg", aged, context, context)
        moment = moment + np.einsum("bm,bf,bmo->mfo", aged, context, target)
        pulls = pulls + aged.sum(0)
    np.testing.assert_allclose(base.gram, gram, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(base.moment, moment, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(base.pulls, pulls, rtol=1e-12)
    assert base.clock.item() == 11 + 10


@pytest.mark.parametrize("forgetting", [1.0, 0.8])
def test_one_worker_merges_to_itself_and_none_to_the_base(forgetting: float) -> None:
    base = posterior(forgetting)
    worker = copy.deepcopy(base)
    worker.update(*rows(1, 9))
    start = base.snapshot()
    base.merge(start, [worker.delta_since(start)])
    assert_same(base, worker, rtol=1e-13)
    base.merge(start, [])
    assert_same(base, posterior(forgetting))


def test_snapshot_is_a_copy() -> None:
    live = posterior()
    taken = live.snapshot()
    live.update(*rows(1, 2))
    torch.testing.assert_close(taken["gram"], posterior().gram, **EXACT)


def test_wrong_snapshots_and_deltas_are_named() -> None:
    live = posterior()
    older = live.snapshot()
    live.update(*rows(1, 2))
    newer = live.snapshot()
    with pytest.raises(ValueError, match="snapshot is newer than the posterior: its clock is 2 rows ahead"):
        posterior().delta_since(newer)
    with pytest.raises(ValueError, match=r"snapshot: moment must have shape \[2, 3, 2\], got \[2, 3, 1\]"):
        live.delta_since(LinearPosterior(2, 3, 1).snapshot())
    with pytest.raises(ValueError, match=r"base_snapshot: gram must have shape \[2, 3, 3\], got nothing"):
        live.merge({}, [])
    with pytest.raises(ValueError, match=r"deltas\[1\]: gram must have shape \[2, 3, 3\], got \[1, 3, 3\]"):
        live.merge(older, [live.delta_since(older), LinearPosterior(1, 3, 2).snapshot()])
    for name, value in live.snapshot().items():
        torch.testing.assert_close(value, newer[name], **EXACT)
