"""What a running comparison shows on stderr: a bar with the time left, or a line a job where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .run import Report


@contextmanager
def shown_progress(console: Console) -> Iterator[Report]:
    """A `Report` that shows what was done and how long the rest will take if it goes on at this pace."""
    started = time.monotonic()
    bar = Progress(
        BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
        TextColumn("{task.fields[left]} left  {task.description}"), console=console,
    )  # fmt: skip
    task = bar.add_task("", total=1.0, left="?")

    def report(said: str, done: float, total: float) -> None:
        left = clock((time.monotonic() - started) / done * (total - done)) if done else "?"
        if console.is_terminal:
            bar.update(task, completed=done, total=max(total, 1e-9), description=escape(said[:70]), left=left)
        else:
            share = 100 * done / total if total else 100.0
            console.print(f"dht: {share:.0f}%, {left} left: {said}", highlight=False, markup=False, soft_wrap=True)

    if not console.is_terminal:
        yield report
        return
    with bar:
        yield report


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds.

    >>> clock(3723.4), clock(59)
    ('1:02:03', '0:00:59')
    """
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
