"""The page in a browser without a window: `pip install playwright`, and a Chromium that PATH or DS4JAX_CHROMIUM names."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")
pytest.importorskip("httpx2", reason="needs the extra test")
pytest.importorskip("playwright", reason="needs playwright")

from held_calls import held
from playwright.sync_api import Page, expect, sync_playwright
from serving import Served, served

pytestmark = pytest.mark.slow
CHROMIUM = os.environ.get("DS4JAX_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
# A busy machine may need longer than the five seconds that Playwright gives a page.
WAIT = 60_000
expect.set_options(timeout=WAIT)
# A seed of a long reply.
SEED = 1


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as one:
        yield one.ready()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("needs a Chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def trouble(message: Any) -> bool:
    """Whether the console says that something is wrong with the page itself."""
    return message.type == "error" and not message.text.startswith("Failed to load resource: the server responded with a status")


@pytest.fixture(params=[("light", 1280), ("dark", 390)], ids=["light desktop", "dark phone"])
def page(request: pytest.FixtureRequest, browser: Any, server: Served) -> Iterator[Page]:
    scheme, width = request.param
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    found = context.new_page()
    troubles: list[str] = []
    found.on("pageerror", lambda error: troubles.append(str(error)))
    found.on("console", lambda message: troubles.append(message.text) if trouble(message) else None)
    found.on("request", lambda one: troubles.append(one.url) if not one.url.startswith(server.url) else None)
    found.goto(server.url)
    expect(found.locator("#model")).to_have_text("small")
    background = found.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", background))) > 3 * 128
    assert light == (scheme == "light")
    yield found
    assert found.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), "it is wider than the window"
    assert troubles == []
    context.close()
    assert server.idle()


def send(page: Page, text: str, effort: str) -> None:
    page.select_option("#effort", effort)
    page.fill("#text", text)
    page.press("#text", "Enter")
    expect(page.locator("#text")).to_have_value("")


def shown(page: Page) -> list[str]:
    return page.locator(".turn").all_text_contents()


def test_a_reply_comes_is_stopped_and_survives_a_reload(page: Page, server: Served) -> None:
    # A reply of another seed may end by itself after a few tokens.
    page.route("**/v1/chat/completions", lambda route: route.continue_(post_data={**route.request.post_data_json, "seed": SEED}))
    turn = page.locator(".turn").nth(1)
    with held(server.runner.engine) as calls:
        send(page, "Hello\n<b>you</b>", "none")
        expect(turn).to_be_attached()
        calls.until(lambda: len(turn.text_content() or "") >= 20)
        before = turn.text_content() or ""
        calls.until(lambda: len(turn.text_content() or "") > len(before))
        page.click("#stop")
        expect(turn).to_contain_text("stopped")
    expect(page.locator("#send")).to_be_visible()
    assert (turn.text_content() or "").startswith(before)
    assert server.idle()
    assert server.log[-1]["status"] == 499
    said = shown(page)
    assert said[0] == "Hello\n<b>you</b>"
    page.reload()
    assert shown(page) == said
    send(page, "And?", "none")
    expect(page.locator(".turn").nth(3)).to_contain_text("tokens/s")
    assert server.log[-1]["prompt"] > server.log[-2]["prompt"] + 20, "what was said before is sent, too"
    page.click("#new")
    page.reload()
    assert shown(page) == []


def test_a_reply_folds_its_reasoning_and_can_be_asked_for_again(page: Page, server: Served) -> None:
    send(page, "Hello", "high")
    figures = page.locator(".turn .figures", has_text="seed")
    expect(figures).to_be_visible()
    found = re.fullmatch(
        r"(\d+) tokens · [\d.]+ tokens/s · first after [\d.]+ s · [\d.]+ tokens a step · seed (-?\d+)( · cut by the context)?",
        figures.text_content() or "",
    )
    assert found
    reasoning = page.locator("details div")
    expect(reasoning).to_be_hidden()
    page.click("summary")
    expect(reasoning).to_be_visible()
    asked = {"messages": [{"role": "user", "content": "Hello"}], "reasoning_effort": "high", "temperature": 1}
    again = server.post("/v1/chat/completions", **asked, seed=int(found[2]))
    assert reasoning.text_content() == again["choices"][0]["message"]["reasoning_content"]
    assert int(found[1]) == again["usage"]["completion_tokens"]


def test_an_error_is_shown(page: Page) -> None:
    answer = {"error": {"message": "the queue is full"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json=answer))
    send(page, "Hello", "none")
    expect(page.locator(".turn .error")).to_have_text("the queue is full")
    expect(page.locator("#send")).to_be_visible()
    page.unroute("**/v1/chat/completions")
