"""Accessibility of the pages: keyboard, screen readers, contrast and small screens."""

import pytest
from playwright.async_api import Route, expect

from tests.gateway.images import red_circle
from tests.gateway.page_visits import (
    DESKTOP,
    LONG,
    NARROW,
    PHONE,
    Visits,
    browser,
    card,
    draw,
    job,
    problems,
    scrolls_sideways,
    tenants,
    visit,
)

__all__ = ["browser", "tenants", "visit"]  # fixtures

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_the_page_works_with_the_keyboard_alone(visit: Visits) -> None:
    page = await visit()
    focused = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"

    async def tab_to(name: str) -> None:
        for _ in range(40):
            await page.keyboard.press("Tab")
            if (await page.evaluate(focused)) == name:
                return
        raise AssertionError(name)

    await page.keyboard.press("Tab")
    await expect(page.get_by_text("Skip to jobs")).to_be_in_viewport()
    await tab_to("API reference")
    await tab_to("API key")
    await page.keyboard.press("Enter")
    await expect(page.locator("#key")).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(page.locator("#key-button")).to_be_focused()
    await tab_to("prompt")
    await page.keyboard.type("a gray cross")
    await page.keyboard.press("Tab")  # the options
    await page.keyboard.press("Enter")
    await tab_to("steps")
    await page.keyboard.type("2")
    await page.keyboard.press("Control+Enter")
    await expect(card(page, "a gray cross")).to_be_visible()
    await tab_to("Details: a gray cross")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("dialog")).to_be_visible()
    for _ in range(12):  # the focus stays in the dialog or moves to the browser's controls
        await page.keyboard.press("Tab")
        assert await page.evaluate(
            "document.activeElement === document.body || !!document.activeElement.closest('dialog')"
        )
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("dialog")).to_have_count(0)
    assert await page.evaluate(focused) == "Details: a gray cross"


async def test_the_arrow_keys_switch_between_results(visit: Visits) -> None:
    page = await visit()
    for title in ("the older", "the newer"):
        await draw(page, title, steps="2")
        await expect(card(page, title)).to_be_visible()
    await card(page, "the newer").get_by_role("button", name="Details").click()
    heading = page.locator("#detail-title")
    await expect(heading).to_have_text("the newer")
    await page.keyboard.press("ArrowRight")
    await expect(heading).to_have_text("the older")
    await page.keyboard.press("ArrowRight")
    await expect(heading).to_have_text("the older")
    await page.keyboard.press("ArrowLeft")
    await expect(heading).to_have_text("the newer")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
async def test_names_structure_and_contrast_are_accessible(
    visit: Visits, theme: str, size: dict[str, int]
) -> None:
    page = await visit(color_scheme=theme, viewport=size)
    await expect(page.locator("#gallery-empty")).to_be_visible()
    assert await problems(page) == []
    await draw(page, "a small green star", steps="2", count="2")
    await expect(card(page, "a small green star").locator(".frame").first).to_have_attribute(
        "data-state", "done"
    )
    await draw(page, "refused", width="17", count="")
    await expect(card(page, "refused")).to_contain_text("Failed")
    await draw(page, "a long run", width="", **LONG)
    await draw(page, "a waiting run", **LONG)
    await expect(job(page, "a long run").locator("progress[value]")).to_be_visible()
    await expect(job(page, "a waiting run")).to_be_visible()
    assert await problems(page) == []
    await card(page, "a small green star").get_by_role("button", name="Ask about").click()
    await page.locator("#temperature").fill("99")
    await page.get_by_role("button", name="Ask", exact=True).click()
    await expect(page.locator("#temperature-error")).to_be_visible()
    assert await problems(page) == []
    await card(page, "a small green star").get_by_role("button", name="Details").click()
    assert await problems(page) == []
    await page.keyboard.press("Escape")
    await page.get_by_role("button", name="API key").click()
    assert await problems(page) == []


@pytest.mark.parametrize("size", [PHONE, NARROW], ids=["phone", "zoomed"])
async def test_small_screens_need_no_horizontal_scrolling(
    visit: Visits, size: dict[str, int]
) -> None:
    page = await visit(viewport=size, has_touch=True, is_mobile=True)
    assert not await scrolls_sideways(page)
    await draw(page, "w" * 300, steps="2", count="5")
    await expect(card(page, "www")).to_be_visible()
    await draw(page, "a red star " * 20, **LONG)
    await expect(job(page, "a red star").locator("progress")).to_be_visible()
    assert not await scrolls_sideways(page)
    await card(page, "www").get_by_role("button", name="Details").click()
    assert not await scrolls_sideways(page)
    assert await page.evaluate("document.querySelector('#detail').scrollWidth") < size["width"]
    await page.keyboard.press("Escape")
    await page.get_by_role("radio", name="Ask about images").check()
    assert not await scrolls_sideways(page)


async def test_the_theme_follows_the_system_until_the_user_chooses_one(visit: Visits) -> None:
    page = await visit(color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = await page.evaluate(background)
    await page.emulate_media(color_scheme="light")
    light = await page.evaluate(background)
    assert dark != light
    await page.get_by_role("button", name="Switch to the dark theme").click()
    assert await page.evaluate(background) == dark
    await page.reload()
    assert await page.evaluate(background) == dark
    await page.get_by_role("button", name="Switch to the light theme").click()
    assert await page.evaluate(background) == light


async def test_reduced_motion_disables_all_animations(visit: Visits) -> None:
    page = await visit(reduced_motion="reduce")
    await page.get_by_role("radio", name="Ask about images").check()
    await page.locator("#files").set_input_files(
        {"name": "circle.png", "mimeType": "image/png", "buffer": red_circle()}
    )
    await page.get_by_label("Question").fill("What is it?")
    await page.keyboard.press("Control+Enter")
    await expect(job(page, "What is it?").or_(card(page, "What is it?"))).to_be_visible()
    assert await page.evaluate("document.getAnimations().length") == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_the_reference_shows_every_endpoint(visit: Visits, theme: str) -> None:
    page = await visit("/docs", color_scheme=theme)
    answer = await page.request.get(visit.tenants.server.url + "/openapi.json")
    paths = (await answer.json())["paths"]
    count = sum(len({"get", "post", "delete"} & item.keys()) for item in paths.values())
    await expect(page.locator("section.operation[id]")).to_have_count(count)
    submit = page.locator("#post-v1-jobs")
    await expect(submit).to_contain_text("num_inference_steps")
    await expect(submit.locator("pre")).to_contain_text('"task":"text_to_image"')
    assert await problems(page) == []
    await page.set_viewport_size({"width": 320, "height": 568})
    assert not await scrolls_sideways(page)


async def test_the_reference_reports_a_failed_load(visit: Visits) -> None:
    page = await visit("/docs")

    async def fail(route: Route) -> None:
        await route.fulfill(status=500)

    await page.route("**/openapi.json", fail)
    await page.reload()
    await expect(page.get_by_role("status")).to_contain_text("cannot be loaded")
