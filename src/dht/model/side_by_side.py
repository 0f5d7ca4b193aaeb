"""Small groups side by side on a CPU: each thread runs the whole block for its own rows.

Otherwise all threads share every product, and one of a few rows leaves the others little to do. Workers use one thread
inside torch, which lets go of the interpreter while it computes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, groupby
from threading import Barrier, Lock

import torch
from torch import Tensor

from .linear import prefers_onednn

GROUPS = 4
"""Groups a thread from which on they are shared out: with fewer, one thread waits long for another."""
FEWEST = 256
"""Tokens from which on it is worth handing them over."""
SHARE = 1024
"""Tokens of a share, about: what more take for a while is given back to the system by malloc, and asked for again."""


def shares(work: Sequence[int], tokens: int) -> list[int]:
    """Numbers of consecutive groups that make shares of about equal work; one number = all threads run all together.

    Args:
        work: of each group, in any unit.
        tokens: of all groups.
    """
    threads = torch.get_num_threads()
    if threads < 2 or len(work) < GROUPS * threads or tokens < FEWEST or _observed():
        return [len(work)]
    count, total = threads * math.ceil(tokens / (threads * SHARE)), sum(work)
    middles = (end - own / 2 for own, end in zip(work, accumulate(work), strict=True))
    return [len(list(share)) for _, share in groupby(int(middle * count / total) for middle in middles)]


def _observed() -> bool:
    """True if somebody counts, records or profiles operations, which is done in one thread only."""
    modes, profiled = torch._C._len_torch_dispatch_stack(), torch._C._autograd._profiler_enabled()
    return bool(modes or profiled or torch.jit.is_tracing())  # type: ignore[attr-defined]


def side_by_side(runs: Sequence[Callable[[], Tensor]]) -> Tensor:
    """What `runs` return, end to end, without gradients; or the error of the first that fails.

    The caller's own threads rest meanwhile: after an operation that they shared they look out for the next one for
    milliseconds, and keep the processor from a worker. So it is the workers, too, who put the parts together.
    """
    workers = _workers(torch.get_num_threads())
    inference = torch.is_inference_mode_enabled()
    casts, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def run(call: Callable[[], Tensor]) -> Tensor:
        # These modes belong to a thread.
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", dtype, enabled=casts):
            return call()

    parts = list(workers.map(run, runs))
    counts = [len(part) for part in parts]
    whole = parts[0].new_empty(sum(counts), *parts[0].shape[1:])
    list(workers.map(run, map(partial, (place.copy_ for place in whole.split(counts)), parts)))
    return whole


_LOCK = Lock()
_POOLS: dict[int, ThreadPoolExecutor] = {}


def _workers(count: int) -> ThreadPoolExecutor:
    """`count` threads that stay; all callers share them, so that they are not more than the processors."""
    with _LOCK:
        if count not in _POOLS:
            prefers_onednn()  # is measured with the caller's threads, before a worker asks
            workers, all_here = ThreadPoolExecutor(count, "dht"), Barrier(count)

            def start(_: int) -> None:
                torch.get_num_threads()  # a thread's first call into torch sets its number
                torch.set_num_threads(1)
                all_here.wait()

            list(workers.map(start, range(count)))
            torch.set_num_threads(count)  # what a thread sets is also what later threads start with
            _POOLS[count] = workers
        return _POOLS[count]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOLS.clear)  # threads do not follow into a forked process
