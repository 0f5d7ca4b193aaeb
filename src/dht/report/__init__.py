"""Tables for a terminal and one self-contained HTML page, made from the plain dicts of a finished run."""

from dht.report.page import render_page
from dht.report.table import print_report, summary_table

__all__ = ["print_report", "render_page", "summary_table"]
