"""The example's server and files: what can be read through it, and that nothing in the page names another host."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from tests.browser.node_for_tests import EXAMPLE, needs_node, refused, served

SECRET = "not for the web"
ESCAPES = (
    "/model/../secret.txt",
    "/model/%2e%2e/secret.txt",
    "/model/%2e%2e%2fsecret.txt",
    "/model/..%5csecret.txt",
    "/model/link.txt",
    "/model/linked/secret.txt",
    "/../server.mjs",
    "/../node_modules/@huggingface/transformers/package.json",
    "/model/../../model/../secret.txt",
    "/%2e%2e/package.json",
    "/vendor/../server.mjs",
    "/vendor/%2e%2e/%2e%2e/package.json",
    "/vendor/constructor",
    "/vendor/transformers.js",
    "/model/config.json%00.txt",
    "/model/%ff",
    "/model",
    "/model/",
    "/model/.",
    "/model/onnx",
    "/model/onnx/",
    "/vendor/",
    "//secret.txt",
    "/model/..%252fsecret.txt",
    "/model/onnx/%2e%2e/%2e%2e%2fsecret.txt",
    "/model/onnx\\..\\..\\secret.txt",
    "/model//SECRET",
    "/model/%2fSECRET",
    "/SECRET",
)
# Names in the folder that a browser would take for a page, a picture or a script.
ALIVE = ("x.html", "X.HTML", "x.htm", "x.xhtml", "x.svg", "x.js", "x.mjs", "x.css", "x.xml", "x.pdf", "x", "x.wasm")
SAFE = {"application/json; charset=utf-8", "application/octet-stream", "text/plain; charset=utf-8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something shaped like an exported folder, with a file beside it that nobody should see, and links to that."""
    place = tmp_path_factory.mktemp("served")
    model = place / "model"
    (model / "onnx").mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "tokenizer.json").write_text("{}")
    (model / "onnx" / "model_q4.onnx").write_bytes(bytes(1000))
    (place / "secret.txt").write_text(SECRET)
    (model / "link.txt").symlink_to(place / "secret.txt")
    (model / "linked").symlink_to(place)
    for name in (*ALIVE, "chat_template.jinja", "merges.txt", "README.md", "page.json"):
        (model / name).write_text("<script>alert(1)</script>")
    return model


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    with served(folder) as port:
        yield port


def ask(port: int, path: str, method: str = "GET", host: str | None = None) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        # the path goes out as it is, dots and all
        connection.request(method, path, headers={} if host is None else {"Host": host})
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


@needs_node
@pytest.mark.parametrize("path", ESCAPES)
def test_nothing_outside_its_three_places_is_served(port: int, folder: Path, path: str) -> None:
    response, body = ask(port, path.replace("/SECRET", f"{folder.parent}/secret.txt"))
    assert (response.status, body) == (404, b"not found\n")


@needs_node
@pytest.mark.parametrize("host", ["localhost", "LocalHost", "127.0.0.1", "[::1]"])
def test_it_answers_to_its_own_address(port: int, host: str) -> None:
    assert ask(port, "/model/config.json", host=f"{host}:{port}")[0].status == 200


@needs_node
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "host",
    ["evil.test", "evil.test:PORT", "localhost", "localhost:1", "localhost.evil.test:PORT", "xlocalhost:PORT",
     "localhost:PORT.evil.test", "user@localhost:PORT", "localhost:PORT, evil.test", "0.0.0.0:PORT", ""],
)  # fmt: skip
def test_it_answers_to_no_other_name(port: int, host: str, method: str) -> None:
    """A page of another host whose name was made to mean 127.0.0.1 would be of the same origin as the server."""
    for path in ("/", "/model/config.json", "/vendor/transformers.min.js", "/nothing"):
        response, body = ask(port, path, method, host.replace("PORT", str(port)))
        said = b"" if method == "HEAD" else b"this server answers to localhost only\n"
        assert (response.status, body) == (421, said)
        assert "Access-Control-Allow-Origin" not in response.headers


@needs_node
@pytest.mark.parametrize("name", [*ALIVE, "chat_template.jinja", "merges.txt", "README.md", "page.json"])
def test_nothing_of_the_model_comes_alive(port: int, name: str) -> None:
    """The folder is a stranger's, the origin is the page's own."""
    response, body = ask(port, f"/model/{name}")
    assert (response.status, body) == (200, b"<script>alert(1)</script>")
    assert response.headers["Content-Type"] in SAFE
    assert (response.headers["Content-Type"] == "application/octet-stream") is (name in ALIVE)
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Content-Security-Policy"].endswith("; sandbox")


@needs_node
@pytest.mark.parametrize("path", ["/", "/model/config.json", "/model/", "/nothing"])
def test_a_head_is_a_get_without_its_body(port: int, path: str) -> None:
    (get, body), (head, nothing) = ask(port, path), ask(port, path, "HEAD")
    assert get.headers["Content-Length"] == str(len(body))
    assert (head.status, nothing) == (get.status, b"")
    assert {**dict(head.headers), "Date": ""} == {**dict(get.headers), "Date": ""}


@needs_node
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/main.js?dtype=q4", "text/javascript; charset=utf-8"),
        ("/vendor/transformers.min.js", "text/javascript; charset=utf-8"),
        ("/vendor/ort-wasm-simd-threaded.wasm", "application/wasm"),
        ("/model/config.json", "application/json; charset=utf-8"),
        ("/model/onnx/model_q4.onnx", "application/octet-stream"),
    ],
)
def test_its_files_come_isolated_and_from_here_only(port: int, path: str, kind: str) -> None:
    response, body = ask(port, path)
    assert (response.status, response.headers["Content-Type"]) == (200, kind)
    assert response.headers["Content-Length"] == str(len(body))
    assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    rules = dict(rule.split(" ", 1) for rule in response.headers["Content-Security-Policy"].split("; ") if " " in rule)
    for closed in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert rules.pop(closed) == "'none'"
    allowed = {word for words in rules.values() for word in words.split()}
    assert allowed <= {"'self'"} | ({"'wasm-unsafe-eval'"} if kind.startswith("text/javascript") else set())
    head, nothing = ask(port, path, "HEAD")
    assert (head.status, head.headers["Content-Length"], nothing) == (200, str(len(body)), b"")


@needs_node
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_it_only_reads(port: int, method: str) -> None:
    response, _ = ask(port, "/model/config.json", method)
    assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")


@needs_node
def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    assert refused("server.mjs") == "usage: node server.mjs FOLDER [--port 8080]"
    assert refused("server.mjs", tmp_path).startswith(f"{tmp_path}: no config.json")
    assert refused("generate.mjs", tmp_path).startswith("usage: node generate.mjs FOLDER")
    assert refused("generate.mjs", tmp_path, "--prompt", "x", "--dtype", "q9").startswith(
        'dtype "q9" is not one of q4,'
    )


def test_the_page_names_no_host() -> None:
    files = [path for path in (EXAMPLE / "public").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"index.html", "main.js", "worker.js", "style.css"}
    for path in files:
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|[\"'(]//|\bcdn\b", text), path.name


def test_the_packages_are_pinned_without_addresses() -> None:
    lock = json.loads((EXAMPLE / "package-lock.json").read_text("utf-8"))
    wanted = json.loads((EXAMPLE / "package.json").read_text("utf-8"))
    for name, version in (wanted["dependencies"] | wanted["devDependencies"]).items():
        assert lock["packages"][f"node_modules/{name}"]["version"] == version, name
    for name, package in lock["packages"].items():
        assert "resolved" not in package, name
        assert not name or package["integrity"].startswith("sha512-"), name
