"""A comparison for machines and for people: JSON, tables in a terminal, Markdown, one HTML page.

sheet          plain JSON values, all that the others but the terminal draw from; `schema.json` describes them
distribution   the many figures of a file's positions as a histogram and as runs of positions
names          what a file is called where several are, and figures as text
terminal       tables for a console of 100 columns
markdown       a table for a model card
charts         the page's charts, with matplotlib (`looks`, `size`, `layers`, `steps`, `placing`, `svg`)
html           the page itself, with jinja2 (`page.html.j2`, `page.css`)
files          `--report FILE`: the kind by the name's ending, written whole or not at all
"""

from __future__ import annotations

from smolexport.parity.report.files import check_reports, write_reports
from smolexport.parity.report.html import render_html
from smolexport.parity.report.markdown import render_markdown
from smolexport.parity.report.sheet import json_schema, to_json
from smolexport.parity.report.terminal import render

__all__ = ["check_reports", "json_schema", "render", "render_html", "render_markdown", "to_json", "write_reports"]
