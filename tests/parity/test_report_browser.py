"""The page in a real browser: it is whole by itself, fits, and follows the scheme of who reads it."""

from __future__ import annotations

import re

import pytest

from smolexport.parity.report import render_html
from tests.browser.chromium_for_tests import HOST, needs_chromium_alone, opened
from tests.parity.test_report_files import hostile

pytestmark = needs_chromium_alone
OWN = {f"http://{HOST}/", f"http://{HOST}/page"}


# What Chromium asks by itself, whatever it shows.  That the page names no host at all is tested beside its text.
ITS_OWN = re.compile(r"(https?://)?([\w-]+\.)*(google|googleapis|gstatic)\.com[:/]|http://report\.test/favicon\.ico")


def asked(seen):
    """Requests of the page."""
    return {url for url in seen["requests"] if not ITS_OWN.match(url)}


@pytest.fixture(scope="module")
def light(rich_page):
    return opened(rich_page)


def brightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_nothing_is_asked_of_the_network(light):
    assert asked(light) == OWN
    assert light["loaded"] == []
    assert light["scripts"] == 0


def test_the_proxy_sees_what_a_page_would_load(rich_page):
    """The test above can fail: the same page with an image from elsewhere, its own rules taken out."""
    leaky = re.sub(r"<meta http-equiv[^>]*>", "", rich_page).replace(
        "</body>", "<img src='http://x.test/a.png'></body>"
    )
    assert "http://x.test/a.png" in asked(opened(leaky))
    # and the page's rules alone would have kept it
    kept = rich_page.replace("</body>", "<img src='http://x.test/a.png'><script>top.x = 1</script></body>")
    assert asked(opened(kept)) == OWN


def test_every_chart_is_there(light):
    assert light["title"] == "Parity of demo"
    assert len(light["charts"]) == light["captions"] == 6
    for (width, height), shapes in zip(light["charts"], light["shapes"], strict=True):
        assert width > 900
        assert height > 100
        assert shapes > 20
    assert light["outside"] == []
    assert light["tables"] == 5


def test_nothing_is_wider_than_the_window(light):
    assert light["width"] == 1200
    assert light["wanted"] <= 1200
    assert light["scrolling"] == 0
    assert light["beyond"] == []


def test_a_phone_scrolls_only_within_tables(rich_page):
    narrow = opened(rich_page, width=390)
    assert narrow["wanted"] <= 390
    assert all(width <= 390 for width, _ in narrow["charts"])


def test_a_printed_sheet_is_whole(rich_page):
    """On A4 between its margins, where nothing can scroll."""
    printed = opened(rich_page.replace("@media print", "@media all"), width=703)
    assert printed["wanted"] <= 703
    assert printed["beyond"] == []


def test_both_schemes_can_be_read(light, rich_page):
    dark = opened(rich_page, dark=True)
    assert brightness(light["paper"]) - brightness(light["ink"]) > 150
    assert brightness(dark["ink"]) - brightness(dark["paper"]) > 150
    assert brightness(light["label"]) < 100
    assert brightness(dark["label"]) > 180
    assert asked(dark) == OWN


def test_hostile_names_stay_text(rich):
    seen = opened(render_html(hostile(rich)))
    assert asked(seen) == OWN
    assert (seen["scripts"], seen["title"]) == (0, "Parity of demo")
    assert len(seen["charts"]) == 6
    assert seen["wanted"] <= 1200
