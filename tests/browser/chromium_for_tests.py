"""A page in headless Chromium, with nothing but Chromium: what it asks of the network, and what it looks like inside.

Chromium is given a proxy that answers only for the two pages of the test and writes down every request, so whatever the
page would load from anywhere is seen here and gets no further.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

__all__ = ["chromium", "needs_chromium_alone", "opened"]

HOST = "report.test"
SECONDS = 240
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-default-apps", "--no-first-run", "--disable-quic",
)  # fmt: skip
# The page runs in a frame: its own rules forbid scripts, so the page around it looks at it.
AROUND = """<!DOCTYPE html><meta charset="utf-8"><pre id="seen"></pre>
<iframe src="/page" style="width: WIDTHpx; height: 900px; border: 0"></iframe>
<script>
addEventListener("load", () => {
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  const box = (element) => { const { width, height } = element.getBoundingClientRect(); return [width, height]; };
  const style = (element, name) => view.getComputedStyle(element)[name];
  const texts = [...page.querySelectorAll("svg text")];
  document.querySelector("#seen").textContent = JSON.stringify({
    title: page.title,
    width: page.documentElement.clientWidth,
    wanted: page.documentElement.scrollWidth,
    scrolling: [...page.querySelectorAll(".wide")].filter((one) => one.scrollWidth > one.clientWidth).length,
    beyond: [...page.querySelectorAll("td, th")].filter(
      (one) => one.getBoundingClientRect().right > page.documentElement.clientWidth,
    ).map((one) => one.textContent),
    charts: [...page.querySelectorAll("figure svg")].map(box),
    captions: page.querySelectorAll("figure figcaption").length,
    shapes: [...page.querySelectorAll("figure svg")].map((one) => one.querySelectorAll("path, use, text").length),
    outside: texts.filter((one) => {
      const own = one.getBoundingClientRect(), all = one.closest("svg").getBoundingClientRect();
      return own.left < all.left - 4 || own.right > all.right + 4;
    }).map((one) => one.textContent),
    loaded: view.performance.getEntriesByType("resource").map((one) => one.name),
    scripts: page.scripts.length,
    paper: style(page.body, "backgroundColor"),
    ink: style(page.body, "color"),
    label: texts.length ? style(texts[0], "fill") : null,
    tables: page.querySelectorAll("table").length,
  });
});
</script>
"""


@cache
def chromium() -> str | None:
    """Chromium's path."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


needs_chromium_alone = pytest.mark.skipif(chromium() is None, reason="Chromium is not installed")


def opened(page: str, *, width: int = 1200, dark: bool = False) -> dict[str, Any]:
    """What Chromium shows of `page` in a window of `width` pixels; `requests` are all that it asked for."""
    requests: list[str] = []
    pages = {f"http://{HOST}/": AROUND.replace("WIDTH", str(width)), f"http://{HOST}/page": page}
    with _proxy(pages, requests) as port, tempfile.TemporaryDirectory(prefix="smolexport-chromium-") as profile:
        done = subprocess.run(
            [
                str(chromium()), *FLAGS, f"--user-data-dir={profile}", f"--proxy-server=127.0.0.1:{port}",
                "--proxy-bypass-list=<-loopback>", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--window-size={width + 100},1000", "--virtual-time-budget=10000", "--dump-dom", f"http://{HOST}/",
            ],
            capture_output=True, text=True, check=False, timeout=SECONDS,
        )  # fmt: skip
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert seen, done.stderr[-2000:]
    return {**json.loads(unescape(seen[1])), "requests": requests}


@contextmanager
def _proxy(pages: dict[str, str], requests: list[str]) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            body = pages.get(self.path, "").encode()
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_CONNECT(self) -> None:
            requests.append(self.path)
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
