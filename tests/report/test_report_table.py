import io

import pytest
from rich.console import Console

from dht.report import print_report, summary_table
from dht.report.table import decimal, dense_row, duration, finite, percent, ratio


def printed(*things, width=80):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    for thing in things:
        console.print(thing)
    return console.file.getvalue()


def test_worst_case_numbers_are_not_truncated_at_80_columns(report):
    slow = {
        "name": "confidence at threshold 0.97, integrated search",
        "accuracy": 1.0,
        "flops_fraction": 1.0,
        "seconds": 1234567.0,
        "time_fraction": 9.99,
        "train_flops_fraction": 1.0,
        "train_seconds": 1234567.0,
        "train_time_fraction": 9.99,
        "mean_layers": 24.0,
        "mean_heads": 16.0,
    }
    text = printed(summary_table([slow, report | {"name": "dht"}, {}]))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for number in ("90.1%", "26.3%", "1.23 (34%)", "41.2%", "131 (47%)", "342.9 h (999%)", "24.00", "100.0%"):
        assert number in text
    letters = "".join(line[:16] for line in text.splitlines()).replace(" ", "")
    assert all(word in letters for word in ("confid", "search"))


def test_missing_fields_show_as_dashes_and_unknown_ones_are_ignored():
    text = printed(summary_table([{"name": "mine", "accuracy": None, "seconds": float("nan"), "novel": [1]}]))
    row = next(line for line in text.splitlines() if line.startswith("mine"))
    assert row.split() == ["mine", *["–"] * 7]


def test_markup_in_a_name_is_printed_as_it_is():
    assert "[red]x[/red]" in printed(summary_table([{"name": "[red]x[/red]"}])).replace("\n", "")


def test_time_ratio_is_derived_only_from_two_measured_times():
    assert ratio(None, 1.0, 4.0) == 0.25
    assert ratio(0.5, 1.0, 4.0) == 0.5
    assert ratio(None, None, 4.0) is None
    assert ratio(None, 1.0, 0.0) is None


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0.000 s"), (9.876, "9.88 s"), (99.94, "99.9 s"), (9999, "9999 s")]
)
def test_duration(value, text):
    assert duration(value) == text


def test_numbers_that_are_none_of_ours():
    assert [finite(value) for value in (True, "1", None, float("inf"), float("nan"))] == [None] * 5
    assert (percent("x"), decimal(None), duration(36_000.0)) == ("–", "–", "10.0 h")


def test_report_is_printed_with_dense_and_the_layers(report):
    console = Console(width=80, file=io.StringIO(), color_system=None)
    print_report(report, console)
    text = console.file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert [line.split()[0] for line in text.splitlines() if "(" in line and "%)" in line] == ["dense", "learned"]
    bars = {line.split()[0]: line.count("█") for line in text.splitlines() if "█" in line}
    counts = report["layers_histogram"]
    assert bars == {str(n): round(40 * count / max(counts)) for n, count in enumerate(counts) if count}


def test_report_without_anything(capsys):
    print_report({})
    assert "samples –, macro F1 –, budget –" in capsys.readouterr().out


def test_a_dense_report_is_one_row(report):
    console = Console(width=80, file=io.StringIO())
    print_report(report | {"policy": "dense"}, console)
    assert console.file.getvalue().count("dense ") == 1


def test_dense_row_reads_the_shape_off_the_report(report):
    row = dense_row(report)
    assert (row["mean_layers"], row["mean_heads"], row["seconds"]) == (6, 12, 3.619)
    assert dense_row({"layers_histogram": [0, 1, 2]})["mean_layers"] == 2
    assert dense_row({})["train_time_fraction"] is None
