"""Node.js, the example's npm packages and Chromium, for the tests that run the browser example for real."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

__all__ = [
    "EXAMPLE",
    "chat_page",
    "encoded",
    "generated",
    "needs_chromium",
    "needs_node",
    "no_node",
    "pipeline_prompt",
    "refused",
    "served",
]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "browser"
DRIVER = Path(__file__).with_name("drive_page.mjs")
SECONDS = 240  # for one run of node or Chromium, on a busy machine


@cache
def no_node() -> str:
    """Why node cannot run the example, or nothing."""
    node = shutil.which("node")
    if node is None:
        return "Node.js is not installed"
    found = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    version = re.match(r"v(\d+)", found)
    if version is None or int(version[1]) < 20:
        return f"Node.js {found} is older than 20"
    if not (EXAMPLE / "node_modules" / "@huggingface" / "transformers").is_dir():
        return "the npm packages of examples/browser are not installed: make browser"
    return ""


@cache
def _chromium() -> str | None:
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


def _no_chromium() -> str:
    if reason := no_node():
        return reason
    if not (EXAMPLE / "node_modules" / "playwright-core").is_dir():
        return "playwright-core is not installed in examples/browser: make browser"
    return "" if _chromium() else "Chromium is not installed"


needs_node = pytest.mark.skipif(bool(no_node()), reason=no_node())
needs_chromium = pytest.mark.skipif(bool(_no_chromium()), reason=_no_chromium())


def _node(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["node", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)


def generated(folder: Path, **options: object) -> dict[str, Any]:
    """What `generate.mjs` prints for an exported folder; options are its own, e.g. `dtype="q4", max_tokens=8`."""
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    done = _node(EXAMPLE / "generate.mjs", folder, *flags)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def refused(script: str, *arguments: str | Path, code: int = 2) -> str:
    """The one line on stderr with which a script of the example gives up, with this exit code."""
    done = _node(EXAMPLE / script, *arguments)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    [line] = done.stderr.splitlines()
    return line


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """The example's server for `folder`; gives the port it listens on."""
    server = subprocess.Popen(
        ["node", str(EXAMPLE / "server.mjs"), str(folder), "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        yield int(line.rsplit(":", 1)[1].strip().rstrip("/"))
    finally:
        server.terminate()
        server.communicate(timeout=30)


def chat_page(port: int, **job: object) -> dict[str, Any]:
    """What the page showed in Chromium after doing `job`; see drive_page.mjs."""
    done = _node(DRIVER, str(_chromium()), f"http://localhost:{port}/", json.dumps(job))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


LIBRARY = """
import * as lib from "@huggingface/transformers";
lib.env.allowRemoteModels = false;
lib.env.useFSCache = false;
"""
PROMPT = """
const [folder, dtype, prompt] = process.argv.slice(1);
const pipe = await lib.pipeline("text-generation", folder, { dtype });
const found = { tokenizer: pipe.tokenizer.encode(prompt) };
const generate = pipe.model.generate.bind(pipe.model);
pipe.model.generate = (inputs) => {
  found.pipeline = inputs.input_ids.tolist()[0].map(Number);
  return generate(inputs);
};
await pipe(prompt, { max_new_tokens: 1 });
console.log(JSON.stringify(found));
"""
ENCODED = """
const [folder, texts] = process.argv.slice(1);
const tokenizer = await lib.AutoTokenizer.from_pretrained(folder);
console.log(JSON.stringify(JSON.parse(texts).map((text) => tokenizer.encode(text, { add_special_tokens: false }))));
"""


def pipeline_prompt(folder: Path, *, dtype: str, prompt: str) -> dict[str, list[int]]:
    """The ids of a prompt: in the tokenizer of Transformers.js, and as its text-generation pipeline feeds them."""
    return dict(_library(PROMPT, folder, dtype, prompt))


def encoded(folder: Path, texts: list[str]) -> list[list[int]]:
    """The ids of texts in the tokenizer of Transformers.js, none added."""
    return list(_library(ENCODED, folder, json.dumps(texts)))


def _library(script: str, folder: Path, *arguments: str) -> Any:
    command = ["node", "--input-type=module", "-e", LIBRARY + script, str(folder.resolve()), *arguments]
    done = subprocess.run(command, cwd=EXAMPLE, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
