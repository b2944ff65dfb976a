"""Fixtures with a real Chromium on the live page, and the actions of a user."""

import asyncio
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Locator,
    Page,
    Request,
    async_playwright,
    expect,
)

from consumer.devstack import DevStack, GatewayServer
from consumer.gateway.keys import KeyFile
from consumer.gateway.tenants import Bounds
from tests.gateway.conftest import start_gateway

REQUIRED = "CHROMIUM_REQUIRED"  # environment variable: without Chromium, fail instead of skip
CHECKS = Path(__file__).with_name("page_checks.js").read_text()
WITHIN = 60_000.0  # milliseconds; the models run on a busy CPU
LONG = {"steps": "200", "count": "8"}  # a run of many seconds on the demonstration model
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
NARROW = {"width": 320, "height": 568}  # 1280 pixels at a zoom of 400%, as in WCAG

expect.set_options(timeout=WITHIN)


def _chromium() -> str | None:
    """Return the browser of the system; None if the system has none."""
    names = ["chromium", "chromium-browser", "google-chrome"]
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        try:
            # Chromium's sandbox does not work for root, the user in many containers.
            running = await playwright.chromium.launch(
                executable_path=_chromium(), args=["--no-sandbox"]
            )
        except Error:
            if os.environ.get(REQUIRED):
                raise
            pytest.skip("there is no Chromium")
        yield running
        await running.close()


@dataclass(frozen=True)
class Tenants:
    """A gateway with keys. Each test uses a new tenant with an empty history."""

    server: GatewayServer
    file: KeyFile

    def new_key(self, **bounds: int) -> str:
        return self.file.add(secrets.token_hex(4), Bounds(**bounds)).text


@pytest.fixture(scope="module")
def tenants(system: DevStack) -> Iterator[Tenants]:
    file = KeyFile(system.directory / "keys-of-the-page.json")
    file.add("unused", Bounds())
    server = start_gateway(system, "page-gateway", GATEWAY_KEYS=str(file.path))
    yield Tenants(server, file)
    assert server.alive, server.log_since_start()
    server.stop()


@dataclass
class Visits:
    """Opens pages, and records errors and requests to other servers."""

    browser: Browser
    tenants: Tenants
    contexts: list[BrowserContext] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    async def __call__(
        self, path: str = "/", *, key: str | None = None, url: str | None = None, **options: Any
    ) -> Page:
        """Open a page.

        Args:
            path: Path on the gateway.
            key: API key; None creates a new tenant, "" enters no key.
            url: URL of another gateway.
            options: Options of the browser's context.
        """
        origin = url or self.tenants.server.url
        options = {"viewport": DESKTOP, "color_scheme": "light", **options}
        context = await self.browser.new_context(**options)
        self.contexts.append(context)
        key = self.tenants.new_key() if key is None else key
        if key:
            await context.add_init_script(f"sessionStorage.setItem('api-key', '{key}')")
        page = await context.new_page()
        self._watch(page, origin)
        await page.goto(origin + path)
        return page

    def _watch(self, page: Page, origin: str) -> None:
        def on_console(message: ConsoleMessage) -> None:
            # The browser logs each response with an error status, even an expected one.
            if message.type == "error" and "Failed to load resource" not in message.text:
                self.violations.append(message.text)

        def on_request(request: Request) -> None:
            if not request.url.startswith((origin, "blob:", "data:")):
                self.violations.append(f"request to {request.url}")

        page.on("console", on_console)
        page.on("pageerror", lambda error: self.violations.append(str(error)))
        page.on("request", on_request)


@pytest_asyncio.fixture(loop_scope="module")
async def visit(browser: Browser, tenants: Tenants) -> AsyncIterator[Visits]:
    visits = Visits(browser, tenants)
    yield visits
    for context in visits.contexts:
        for page in context.pages:
            await cancel_all(page)
        await context.close()
    assert visits.violations == []


async def cancel_all(page: Page) -> None:
    """Cancel the unfinished jobs of a test, so that the models are idle for the next test."""
    if page.url.endswith("/docs"):
        return
    with suppress(Exception):
        await page.evaluate(
            """async () => {
              const api = await import(new URL("page/api.js", document.baseURI));
              const { data } = await api.listJobs({ states: ["queued", "running"], limit: 100 });
              await Promise.all(data.map(({ id }) => api.cancelJob(id).catch(() => {})));
            }"""
        )


async def draw(page: Page, prompt: str, **options: str) -> None:
    """Fill in the form and submit it with the keyboard."""
    await page.get_by_label("Prompt", exact=True).fill(prompt)
    if options and await page.locator("#options").get_attribute("open") is None:
        await page.locator("#options summary").click()
    for name, value in options.items():
        await page.locator(f"#{name}").fill(value)
    await page.keyboard.press("Control+Enter")


def job(page: Page, title: str) -> Locator:
    """Return the row of a waiting or running job."""
    return page.locator("#active > li").filter(has_text=title)


def card(page: Page, title: str) -> Locator:
    """Return the card of a result."""
    return page.locator("#gallery > li.card").filter(has_text=title)


async def bytes_of(page: Page, click: Callable[[], Awaitable[None]]) -> tuple[str, bytes]:
    """Return the name and the content of the file that a click downloads."""
    async with page.expect_download() as download:
        await click()
    value = await download.value
    content = await asyncio.to_thread((await value.path()).read_bytes)
    return value.suggested_filename, content


async def problems(page: Page) -> list[str]:
    """Return the accessibility problems of a page."""
    # Wait for the end of all animations that do not repeat forever.
    await page.evaluate(
        """() => Promise.allSettled(document.getAnimations()
          .filter((each) => each.effect.getTiming().iterations !== Infinity)
          .map((each) => each.finished))"""
    )
    found = await page.evaluate(CHECKS)
    return [str(problem) for problem in found["problems"]]


async def scrolls_sideways(page: Page) -> bool:
    size = page.viewport_size
    assert size
    return bool(await page.evaluate("document.documentElement.scrollWidth") > size["width"])
