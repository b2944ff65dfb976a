"""The README's screenshot of the page: `python -m tests.bench.gateway.screenshot docs/gateway.png`.

Chromium shows the page of a gateway with both demonstration models. The desktop has a running job,
two queued jobs and a gallery. The phone shows the details of one result.
"""

import asyncio
import base64
import re
import shutil
import tempfile
from pathlib import Path

import click
from playwright.async_api import Browser, Page, async_playwright, expect

from consumer.app.apply import apply
from consumer.devstack import DevStack
from consumer.settings import Settings
from generation_contracts.base import DEFAULT_QUEUES
from tests.gateway.page_visits import LONG, PHONE, card, draw, job

DESKTOP = {"width": 1280, "height": 940}
WHOLE = {"width": 1560, "height": 990}
FEW = {"steps": "28", "count": "1", "guidance": "3", "seed": "3"}
HEART = "a small yellow heart at the top right, on blue"
CROSSES = "a purple cross on yellow"
RUNNING = "a large red star on a yellow background at the top"
WAITING = (
    "a yellow cross in the bottom left corner, on purple",
    "a gray heart below a green triangle",
)
WITHIN = 120_000.0  # milliseconds; only bounds a wait for something that must happen
LAYOUT = """\
<style>
  body {{ margin: 0; background: #e4e4df; }}
  img {{ position: absolute; box-shadow: 0 12px 40px rgb(0 0 0 / 35%); }}
  .desktop {{ left: 24px; top: 24px; border-radius: 12px; }}
  .phone {{ right: 24px; bottom: 24px; width: 300px; border: 13px solid #050505;
            border-radius: 24px; }}
</style>
<img class="desktop" src="data:image/png;base64,{desktop}">
<img class="phone" src="data:image/png;base64,{phone}">
"""


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def main(file: Path) -> None:
    """Start the system, fill the page, and save the screenshot as a PNG."""
    with (
        tempfile.TemporaryDirectory(prefix="generation-page-") as folder,
        DevStack(Path(folder), persist=False) as stack,
    ):
        settings = {name.lower(): value for name, value in stack.environment().items()}
        known = {name: settings[name] for name in settings.keys() & Settings.model_fields.keys()}
        asyncio.run(apply(Settings(**known)))
        processes = [
            *(stack.start_daemon(str(task), {"MODEL_TYPE": str(task)}) for task in DEFAULT_QUEUES),
            stack.start_gateway("gateway", {}),
        ]
        for process in processes:
            process.wait_ready()
        file.write_bytes(asyncio.run(_screenshot(processes[-1].url)))


async def _screenshot(url: str) -> bytes:
    expect.set_options(timeout=WITHIN)
    async with async_playwright() as playwright:
        # Chromium's sandbox does not work for root, as in many containers.
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = await _open(browser, url, viewport=DESKTOP, color_scheme="light")
        await _fill_gallery(page)
        phone = await _details(browser, url)
        desktop = await _busy(page)
        whole = await browser.new_page(viewport=WHOLE)
        await whole.set_content(
            LAYOUT.format(
                desktop=base64.b64encode(desktop).decode(), phone=base64.b64encode(phone).decode()
            )
        )
        combined = await whole.screenshot()
        await browser.close()
        return combined


async def _open(browser: Browser, url: str, **options: object) -> Page:
    page = await browser.new_page(**options)
    await page.goto(url)
    return page


async def _fill_gallery(page: Page) -> None:
    """Generate an image, ask a question about it, and generate four more."""
    await draw(page, HEART, **FEW)
    heart = card(page, HEART)
    await expect(heart).to_have_attribute("data-state", "succeeded")
    await heart.get_by_role("button", name="Ask about this image").click()
    await page.keyboard.press("Control+Enter")
    await expect(card(page, "Describe this picture.")).to_contain_text("heart")
    await page.get_by_role("radio", name="Draw").check()
    await draw(page, CROSSES, **{**FEW, "count": "4"})
    await expect(card(page, CROSSES).locator(".frame").first).to_have_attribute(
        "data-state", "done"
    )


async def _details(browser: Browser, url: str) -> bytes:
    """Return a screenshot of a result on a phone with the dark theme."""
    page = await _open(
        browser, url, viewport=PHONE, color_scheme="dark", is_mobile=True, device_scale_factor=1.5
    )
    await card(page, CROSSES).get_by_role("button", name=f"Details: {CROSSES}").click()
    await expect(page.get_by_role("dialog").locator("dl")).to_contain_text("Seed")
    await page.evaluate("document.activeElement.blur()")
    return await page.screenshot(animations="disabled")


async def _busy(page: Page) -> bytes:
    """Return a screenshot with a running job and two queued jobs."""
    await draw(page, RUNNING, **{**FEW, **LONG})
    await expect(job(page, RUNNING)).to_have_attribute("data-state", "running")
    for title in WAITING:
        await draw(page, title, **FEW)
        await expect(job(page, title).locator(".job-status")).to_have_text(re.compile("starts in"))
    status = job(page, RUNNING).locator(".job-status")
    await expect(status).to_have_text(re.compile(r"^Step ([2-9]\d|1\d\d) of 200"))
    await expect(job(page, RUNNING).get_by_alt_text("Preview of")).to_be_visible()
    return await page.screenshot(animations="disabled")


if __name__ == "__main__":
    main()
