"""A comparison as a report: JSON, tables for a terminal, Markdown, an HTML page, JUnit XML.

schema     results as JSON values, and the JSON Schema of them (`python -m smolexport.parity.report` prints it)
tables     the tables, described once; `terminal`, `markdown` and `html` (`page.html.j2`, `page.css`) draw them
charts     the page's charts, with matplotlib (`charts.mplstyle`); `svg` makes them part of the page
junit      the verdicts as JUnit XML
files      `--report FILE`, whose format follows from the file name, and `--junit FILE`
"""

from __future__ import annotations

from smolexport.parity.report.files import check_reports, write_reports
from smolexport.parity.report.html import render_html
from smolexport.parity.report.markdown import render_markdown
from smolexport.parity.report.schema import json_schema, to_json
from smolexport.parity.report.terminal import render

__all__ = ["check_reports", "json_schema", "render", "render_html", "render_markdown", "to_json", "write_reports"]
