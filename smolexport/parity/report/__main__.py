"""`python -m smolexport.parity.report` prints the JSON Schema of `smolexport compare --json`."""

from __future__ import annotations

import json
import sys

from smolexport.parity.report.schema import json_schema

if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
