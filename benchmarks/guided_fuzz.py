"""The inputs of `faults.py --fuzz`, grown by code coverage instead of drawn: needs `pip install atheris`.

`python benchmarks/guided_fuzz.py 20000` feeds so many to the loaders and settings; the count goes to
`benchmarks/results/faults.json`.
"""

# ruff: noqa: E402  (what the tests share with this script lies in their folder)
from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import atheris

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "faults.json"
sys.path.insert(0, str(ROOT / "tests"))

with atheris.instrument_imports(include=["dht._rows", "dht.data", "dht.config", "dht.errors", "dht.hf.configuration"]):
    import hostile

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dht._files import write_json


def main() -> None:
    """Feeds until the count is reached; every input is one of three kinds."""
    count, seen, crashes = int(sys.argv[1]), Counter[str](), []
    folder = Path(tempfile.mkdtemp())
    kinds = {
        "data files": (hostile.FILE, lambda file: hostile.check_file(folder, file)),
        "settings": (hostile.SETTINGS, hostile.check_settings),
        "configurations": (hostile.CONFIG, hostile.check_config),
        "lines to predict": (st.lists(hostile.JSON_LINE, max_size=3), hostile.check_lines),
    }
    either = st.one_of(*(st.tuples(st.just(name), strategy) for name, (strategy, _) in kinds.items()))

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(either)
    def feed(example: Any) -> None:
        name, value = example
        try:
            seen["taken" if kinds[name][1](value) else "refused"] += 1
        except Exception as error:
            seen["crashed"] += 1
            crashes.append(f"{name}: {error!r:.300} from {value!r:.300}")
        if sum(seen.values()) >= count:
            finish(seen, crashes)

    atheris.Setup(
        [sys.argv[0], "-seed=1", f"-runs={count * 1000}", "-max_len=4096", "-len_control=0"],
        feed.hypothesis.fuzz_one_input,
    )
    atheris.Fuzz()


def finish(seen: Counter[str], crashes: list[str]) -> None:
    """Writes the counts and ends the process, which the fuzzer itself would never do."""
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    guided = {"inputs": sum(seen.values()), "crashed": 0, **dict(sorted(seen.items())), "crashes": crashes[:5]}
    write_json(RESULT, result | {"guided_fuzz": guided})
    print(json.dumps(guided), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
