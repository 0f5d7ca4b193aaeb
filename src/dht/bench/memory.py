"""Peak memory of one call: bytes of tensors alive at once, above those alive before it.

On a GPU that is what `torch.cuda.max_memory_allocated` counts. On a CPU it is the running sum of what torch's profiler
saw allocated and freed: the same definition, where the process' resident size would mix in what the allocator keeps for
later. Weights, and slices of them kept from earlier calls, were there before. Buffers inside libraries (oneDNN's
scratch) are not seen on a CPU, and many small groups run one after the other while this looks on. Never measured in a
timed call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's start and stop are no news


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak of bytes in tensors during `call`, above what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    assert seen.profiler is not None
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):  # backward allocates in a thread of its own
        alive += change.nbytes()
        peak = max(peak, alive)
    return peak
