"""A comparison as a report: JSON, tables for a terminal, Markdown, an HTML page, JUnit XML.

All of them are made from the same `results.Comparison`.

schema     results as JSON values, and the JSON Schema of them (`python -m smolexport.parity.report` prints it)
names      names of models, and figures as text
terminal   tables of 100 columns
markdown   tables for a model card
html       the page, with jinja2 (`page.html.j2`, `page.css`) and charts
charts     the charts, with matplotlib (`calibration_chart`, `styles`, `label_layout`, `svg`)
files      `--report FILE`: the format follows from the file name
junit      the verdicts as JUnit XML
"""

from __future__ import annotations

from smolexport.parity.report.files import check_reports, write_reports
from smolexport.parity.report.html import render_html
from smolexport.parity.report.markdown import render_markdown
from smolexport.parity.report.schema import json_schema, to_json
from smolexport.parity.report.terminal import render

__all__ = ["check_reports", "json_schema", "render", "render_html", "render_markdown", "to_json", "write_reports"]
