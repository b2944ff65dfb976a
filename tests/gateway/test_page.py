"""The live page in a real Chromium, against the real gateway and the demonstration models."""

import asyncio
import base64
import io
import os
import re
from typing import Any

import httpx2
import pytest
from PIL import Image, ImageDraw
from playwright.async_api import FilePayload, Request, Route, expect

from consumer.devstack import GatewayServer
from tests.gateway.images import red_circle
from tests.gateway.page_visits import (
    LONG,
    WITHIN,
    Visits,
    browser,
    bytes_of,
    card,
    draw,
    job,
    tenants,
    visit,
)
from tests.support.relay import Relay

__all__ = ["browser", "tenants", "visit"]  # fixtures

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_drawing_shows_its_progress_and_its_result(visit: Visits) -> None:
    page = await visit()
    await expect(page.locator("#gallery-empty")).to_have_text(re.compile("No results yet"))
    await expect(page.locator("#connection")).to_have_text("Connected")
    title = "a small red star at the top"
    await draw(page, title, steps="60", seed="7")

    row = job(page, title)
    await expect(row.locator(".job-status")).to_have_text(re.compile(r"Step \d+ of 60"))
    await expect(row.locator("progress")).to_have_attribute("max", "60")
    await expect(row.get_by_alt_text(f"Preview of {title}")).to_be_visible()
    await expect(row).to_have_count(0)
    await expect(page.locator("#announcer")).to_have_text(re.compile(f"Done: {title}"))

    result = card(page, title)
    await expect(result).to_contain_text(re.compile("64 . 64"))
    await expect(result).to_contain_text("seed 7")
    await expect(result.locator(".frame")).to_have_attribute("data-state", "done")

    await result.get_by_role("button", name=f"Details: {title}").click()
    detail = page.get_by_role("dialog")
    for fact in ("Steps60", "Seed7", "Modeldemonstration", "Time to generate", "Time in the queue"):
        await expect(detail.locator("dl")).to_contain_text(fact)
    name, content = await bytes_of(page, detail.get_by_role("link", name="Download").click)
    assert name == "a-small-red-star-at-the-top-7.png"
    assert Image.open(io.BytesIO(content)).size == (64, 64)


async def test_the_form_reuses_the_parameters_of_a_result(visit: Visits) -> None:
    key = visit.tenants.new_key()
    page = await visit(key=key)
    options = {"steps": "5", "seed": "11", "count": "3", "width": "32", "guidance": "1.5"}
    await page.locator("#options summary").click()
    await page.locator("#format").select_option("webp")
    await page.locator("#negative").fill("green")
    await draw(page, "three blue squares", **options)
    await expect(card(page, "three blue squares")).to_contain_text("3 images")

    # Another browser of the same tenant has no stored values: all data is from the server.
    page = await visit(key=key)
    await (
        card(page, "three blue squares").get_by_role("button", name="Use these parameters").click()
    )
    for name, value in {**options, "prompt": "three blue squares", "negative": "green"}.items():
        await expect(page.locator(f"#{name}")).to_have_value(value)
    await expect(page.locator("#format")).to_have_value("webp")
    await expect(page.locator("#prompt")).to_be_focused()


async def test_waiting_jobs_show_their_position_and_can_be_cancelled(visit: Visits) -> None:
    page = await visit()
    await draw(page, "the first", **LONG)
    await expect(job(page, "the first")).to_have_attribute("data-state", "running")
    await draw(page, "the second", steps="2", count="1")
    await draw(page, "the third", steps="2", count="1")
    await expect(job(page, "the second").locator(".job-status")).to_have_text(re.compile("^Next"))
    await expect(job(page, "the third").locator(".job-status")).to_have_text(
        re.compile("^1 request ahead")
    )
    await expect(page.locator("#queue")).to_contain_text("1 running, 2 waiting")

    await page.get_by_role("button", name="Cancel the second").click()
    await expect(card(page, "the second")).to_contain_text("Cancelled")
    await page.get_by_role("button", name="Cancel the first").click()
    await expect(card(page, "the first")).to_contain_text("Cancelled")
    await expect(card(page, "the third")).to_have_attribute("data-state", "succeeded")
    await expect(page.locator("#active-empty")).to_be_visible()


async def test_waiting_jobs_show_their_estimated_start(visit: Visits) -> None:
    page = await visit()
    await draw(page, "the measured job", steps="60", count="1")
    await expect(card(page, "the measured job")).to_have_attribute("data-state", "succeeded")
    await draw(page, "the first", **LONG)
    await expect(job(page, "the first")).to_have_attribute("data-state", "running")
    await draw(page, "the second", steps="2", count="1")
    await draw(page, "the third", steps="2", count="1")
    positions = {"the second": "Next in the queue", "the third": "1 request ahead"}
    for title, position in positions.items():
        status = job(page, title).locator(".job-status")
        await expect(status).to_have_text(re.compile(rf"^{position}, starts in about \d+ (s|min)$"))


async def test_results_of_custom_runners_are_text_and_links(visit: Visits) -> None:
    page = await visit()
    file = {"kind": "file", "key": "tone/x-1/0-a.wav", "media_type": "audio/wav", "size": 2048}
    job: dict[str, Any] = {"id": "x-1", "task": "custom", "queue": "tone", "state": "succeeded"}
    job["created"] = "2026-01-02T03:04:05Z"
    job["result"] = {
        "outputs": [{"kind": "json", "value": {"label": "cat"}}, file],
        "timings": {"inference": 1.0},
        "model": {"id": "tone"},
        "parameters": {"seed": 1},
        "time": "2026-01-02T03:04:06Z",
    }

    async def list_job(route: Route) -> None:
        await route.fulfill(json={"object": "list", "data": [job], "has_more": False, "next": None})

    await page.route("**/v1/jobs?*", list_job)
    await page.reload()
    result = page.locator("#gallery > li[data-task=custom]")
    await expect(result).to_contain_text("Job (request …")
    await expect(result.locator(".answer")).to_contain_text('"label": "cat"')
    link = result.get_by_role("link", name="Download audio/wav")
    assert await link.get_attribute("download") == "job-request-x-1-1.wav"
    await expect(result.get_by_role("button", name="Use these parameters again")).to_have_count(0)
    await result.get_by_role("button", name="Details").click()
    await expect(page.locator("dialog[open]")).to_contain_text("tone")


async def test_a_running_job_survives_a_reload(visit: Visits) -> None:
    page = await visit()
    title = "a yellow cross"
    await draw(page, title, **LONG)
    status = job(page, title).locator(".job-status")
    await expect(status).to_have_text(re.compile(r"Step ([4-9]|\d\d+) of"))
    await page.reload()
    await expect(status).to_have_text(re.compile(r"Step ([4-9]|\d\d+) of"))
    await expect(job(page, title).get_by_alt_text("Preview of")).to_be_visible()
    await expect(page.locator("#prompt")).to_have_value(title)
    await page.get_by_role("button", name=f"Cancel {title}").click()
    await expect(card(page, title)).to_contain_text("Cancelled")


async def test_a_broken_stream_is_resumed(visit: Visits) -> None:
    async with Relay(visit.tenants.server.ports["http"]) as relay:
        page = await visit(url=f"http://{relay.address}")
        last_ids: list[str | None] = []

        def on_request(request: Request) -> None:
            if request.url.endswith("/events"):
                last_ids.append(request.headers.get("last-event-id"))

        page.on("request", on_request)
        title = "a purple heart"
        await draw(page, title, **LONG)
        status = job(page, title).locator(".job-status")
        await expect(status).to_have_text(re.compile(r"Step \d+"))
        relay.break_all()
        await expect(status).to_have_text(re.compile(r"Step \d+"))
        relay.cut()
        await expect(page.locator("#connection")).to_have_text("Reconnecting")
        await expect(page.locator("#notices")).to_contain_text("cannot be reached")
        relay.mend()
        await expect(page.locator("#connection")).to_have_text("Connected")
        await expect(page.locator("#notices")).to_be_empty()
        await page.get_by_role("button", name=f"Cancel {title}").click()
        await expect(card(page, title)).to_contain_text("Cancelled")
    assert last_ids[0] is None
    assert len(last_ids) > 1
    assert all(re.fullmatch(r"\d+-\d+", last or "") for last in last_ids[1:])


async def test_a_submission_without_a_response_creates_one_job(visit: Visits) -> None:
    page = await visit()
    lost = True

    async def lose_response(route: Route) -> None:
        nonlocal lost
        if route.request.method == "POST" and lost:
            lost = False
            await route.fetch()
            await route.abort()
        else:
            await route.continue_()

    await page.route("**/v1/jobs", lose_response)
    await draw(page, "a green disc", steps="2")
    await expect(page.locator("#form-error")).to_have_text("The gateway cannot be reached.")
    await page.get_by_role("button", name="Draw").click()
    await expect(card(page, "a green disc")).to_have_count(1)
    await page.reload()
    await expect(card(page, "a green disc")).to_have_count(1)


async def test_a_model_without_previews_still_draws(visit: Visits) -> None:
    page = await visit()
    sent: list[dict[str, Any]] = []
    listed = asyncio.Event()

    async def list_failed_job(route: Route) -> None:
        answer = await route.fetch()
        body = await answer.json()
        if sent:
            failure = {"code": "unsupported_parameter", "details": {"parameter": "preview"}}
            failed = {"state": "failed", "result": {"failure": failure, "time": None}}
            body["data"].append({"id": "x-1", "task": "text_to_image", **failed})
            listed.set()
        await route.fulfill(response=answer, json=body)

    async def refuse_previews(route: Route) -> None:
        body: Any = route.request.post_data_json
        if body is None:
            return await route.continue_()
        sent.append(body)
        if "preview" not in body:
            return await route.continue_()
        document = {"id": "x-1", "task": body["task"], "state": "queued", "created": None}
        await route.fulfill(status=202, json=document)
        return None

    async def failed_event(route: Route) -> None:
        failed = (
            'event: failed\ndata: {"failure": {"code": "unsupported_parameter", "message": '
            '"preview: Flux does not have it", "details": {"parameter": "preview"}}}\n\n'
        )
        await route.fulfill(content_type="text/event-stream", body=failed)

    await page.route("**/v1/jobs?*", list_failed_job)
    await page.route("**/v1/jobs", refuse_previews)
    await page.route("**/v1/jobs/x-1/events", failed_event)
    await draw(page, "a red disc", steps="2")
    await expect(page.locator("#gallery > li[data-state=succeeded]")).to_contain_text("a red disc")
    await draw(page, "a blue disc", steps="2")
    await expect(card(page, "a blue disc")).to_be_visible()
    listed.clear()
    await asyncio.wait_for(listed.wait(), 30)
    assert ["preview" in body for body in sent] == [True, False, False]


def photograph() -> bytes:
    """Return an image file that is too large for a message of the queue."""
    noise = Image.frombytes("RGB", (1_200, 1_200), os.urandom(1_200 * 1_200 * 3))
    ImageDraw.Draw(noise).ellipse((200, 200, 1_000, 1_000), fill=(220, 40, 40))
    file = io.BytesIO()
    noise.save(file, "PNG")
    return file.getvalue()


async def test_a_question_about_uploads_gets_an_answer(visit: Visits) -> None:
    page = await visit()
    await page.get_by_role("radio", name="Ask about images").check()
    await page.locator("#files").set_input_files(
        [
            FilePayload(name="circle.png", mimeType="image/png", buffer=red_circle()),
            FilePayload(name="photo.png", mimeType="image/png", buffer=photograph()),
            FilePayload(name="letter.txt", mimeType="text/plain", buffer=b"no image"),
        ]
    )
    attached = page.locator("#attachments > li")
    await expect(attached).to_have_count(2)
    await expect(page.locator("#images-error")).to_contain_text("letter.txt is not an image")
    await page.get_by_role("button", name="Remove circle.png").click()
    await expect(attached).to_have_count(1)

    # The text grows too fast for polling, so an observer records it.
    await page.evaluate(
        """() => {
          window.texts = new Set();
          const record = () => {
            for (const node of document.querySelectorAll(".job-text")) texts.add(node.textContent);
          };
          new MutationObserver(record).observe(document.querySelector("#active"),
            { subtree: true, childList: true, characterData: true });
        }"""
    )
    await page.get_by_label("Question").fill("Describe this picture.")
    async with page.expect_request(lambda request: request.method == "POST") as sent:
        await page.get_by_role("button", name="Ask", exact=True).click()
    body: Any = (await sent.value).post_data_json
    (image,) = body["images"]
    reduced = Image.open(io.BytesIO(base64.b64decode(image["base64"])))
    assert reduced.format == "JPEG"
    assert len(image["base64"]) < 1_000_000

    answer = card(page, "Describe this picture.").locator(".answer")
    await expect(answer).to_have_text(re.compile(r"\w+ \w+"))
    text = await answer.inner_text()
    # A quick answer may arrive whole: test_page_parts.py tests that a text grows.
    assert all(text.startswith(each.strip()) for each in await page.evaluate("[...texts]"))
    await expect(page.locator("#announcer")).to_contain_text("Answer:")
    await expect(card(page, "Describe this picture.").locator(".sources img")).to_be_visible()


async def test_images_can_be_dropped_and_pasted(visit: Visits) -> None:
    page = await visit()
    transfer = await page.evaluate_handle(
        """(base64) => {
          const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
          const transfer = new DataTransfer();
          transfer.items.add(new File([bytes], "circle.png", { type: "image/png" }));
          return transfer;
        }""",
        base64.b64encode(red_circle()).decode(),
    )
    await page.dispatch_event("main", "dragenter", {"dataTransfer": transfer})
    await expect(page.locator("body")).to_have_class("dragging")
    await page.dispatch_event("main", "drop", {"dataTransfer": transfer})
    await expect(page.locator("body")).not_to_have_class("dragging")
    await expect(page.get_by_role("radio", name="Ask about images")).to_be_checked()
    await expect(page.locator("#attachments > li")).to_have_count(1)
    await page.evaluate(
        """(clipboardData) => document.querySelector("#prompt").dispatchEvent(
          new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }))""",
        transfer,
    )
    await expect(page.locator("#attachments > li")).to_have_count(2)


async def test_one_click_prepares_a_question_about_an_image_of_the_gallery(visit: Visits) -> None:
    key = visit.tenants.new_key()
    page = await visit(key=key)
    await draw(page, "a blue triangle")
    await card(page, "a blue triangle").get_by_role("button", name="Ask about this image").click()
    await expect(page.get_by_alt_text("Attached: a blue triangle")).to_be_visible()
    await expect(page.get_by_label("Question")).to_be_focused()
    await page.keyboard.press("Control+Enter")
    await expect(card(page, "Describe this picture.")).to_contain_text("blue triangle")

    page = await visit(key=key)
    source = card(page, "Describe this picture.").locator(".sources .frame")
    await expect(source).to_have_attribute("data-state", "done")


async def test_the_form_shows_errors_as_sentences_at_their_fields(visit: Visits) -> None:
    page = await visit()
    await page.get_by_role("button", name="Draw").click()
    await expect(page.locator("#prompt-error")).to_have_text("This field is required.")
    await expect(page.locator("#prompt")).to_be_focused()

    await draw(page, "a star", steps="201")
    await expect(page.locator("#steps-error")).to_have_text("This must be between 1 and 200.")
    await expect(page.locator("#steps")).to_have_attribute("aria-invalid", "true")

    await draw(page, "a star", steps="4", width="33")
    await expect(card(page, "a star")).to_contain_text(
        re.compile(r"Width must be a multiple of \d+\.")
    )

    await page.get_by_role("radio", name="Ask about images").check()
    await page.get_by_label("Question").fill("What is it?")
    await page.get_by_role("button", name="Ask", exact=True).click()
    await expect(page.locator("#images-error")).to_contain_text("Choose at least one image")


async def test_the_form_shows_the_bounds_of_a_key(visit: Visits) -> None:
    page = await visit(key=visit.tenants.new_key(steps=10, per_minute=1))
    await draw(page, "a star", steps="11")
    await expect(page.locator("#steps-error")).to_have_text(re.compile(r"[A-Z].*10.*\."))
    await draw(page, "a star", steps="2")
    await expect(card(page, "a star")).to_be_visible()
    await draw(page, "a star", steps="3")
    await expect(page.locator("#form-error")).to_have_text(
        re.compile(r"try again in \d+ seconds?\.$")
    )


async def test_the_page_requests_a_key_and_stores_it_in_the_tab_only(visit: Visits) -> None:
    page = await visit(key="")
    await expect(page.locator("#notices")).to_contain_text("This gateway needs an API key.")
    await expect(page.locator("#connection")).to_have_text("API key needed")
    await page.get_by_label("Prompt", exact=True).fill("written before")
    await page.get_by_role("button", name="Enter a key").click()
    await page.get_by_label("Key", exact=True).fill("wrong")
    await page.get_by_role("button", name="Use this key").click()
    await expect(page.locator("#notices")).to_contain_text("does not accept this API key")

    first, second = visit.tenants.new_key(), visit.tenants.new_key()
    await page.get_by_role("button", name="Enter a key").click()
    await page.get_by_label("Key", exact=True).fill(first)
    await page.keyboard.press("Enter")
    await expect(page.locator("#connection")).to_have_text("Connected")
    await expect(page.locator("#notices")).to_be_empty()
    await draw(page, "of the first key", steps="2")
    await expect(card(page, "of the first key")).to_be_visible()
    await page.reload()
    await expect(card(page, "of the first key")).to_be_visible()
    assert await page.evaluate("JSON.stringify(localStorage) + document.cookie") == "{}"
    assert first not in page.url

    await page.get_by_role("button", name="API key").click()
    await page.get_by_label("Key", exact=True).fill(second)
    await page.keyboard.press("Enter")
    await expect(page.locator("#gallery-empty")).to_be_visible()
    await expect(page.locator("#prompt")).to_have_value("")
    assert "first key" not in await page.evaluate("JSON.stringify(sessionStorage)")


async def test_a_gateway_without_keys_needs_no_key(visit: Visits, gateway: GatewayServer) -> None:
    page = await visit(key="", url=gateway.url)
    await expect(page.locator("#connection")).to_have_text("Connected")
    await draw(page, "for everybody", steps="2")
    await expect(card(page, "for everybody")).to_be_visible()


async def test_the_history_has_pages_and_filters(visit: Visits) -> None:
    key = visit.tenants.new_key()
    headers = {"authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(base_url=visit.tenants.server.url, headers=headers) as client:
        for number in range(30):
            body = {"task": "text_to_image", "prompt": "a dot", "num_inference_steps": 1}
            metadata = {"prompt": f"number {number:02}"}
            # The model refuses one of the requests.
            width = {"width": 17} if number == 15 else {}
            answer = await client.post("/v1/jobs", json={**body, **width, "metadata": metadata})
            assert answer.status_code == 202, answer.text
        last = answer.json()["id"]
        async with client.stream("GET", f"/v1/jobs/{last}/events", timeout=WITHIN) as events:
            await events.aread()
    page = await visit(key=key)
    await expect(page.locator("#gallery > .card:not(.skeleton)")).to_have_count(24)
    await page.get_by_role("button", name="Show older results").focus()
    await page.keyboard.press("Enter")
    await expect(page.locator("#gallery > .card")).to_have_count(30)
    titles = await page.locator("#gallery .card-title").all_text_contents()
    assert titles == [f"number {number:02}" for number in reversed(range(30))]
    assert await page.evaluate("document.activeElement.closest('.card') !== null")

    await page.get_by_label("Show").select_option("Failed")
    await expect(page.locator("#gallery .card-title")).to_have_text(["number 15"])
    await page.get_by_label("Show").select_option("Answers")
    await expect(page.locator("#gallery-empty")).to_have_text("No answers yet.")


async def test_texts_are_not_rendered_as_markup(visit: Visits) -> None:
    page = await visit()
    title = "<img src=x onerror=alert(1)> <b>bold</b> &amp;"
    await draw(page, title, steps="2")
    await expect(card(page, "bold").locator(".card-title")).to_have_text(title)
    await card(page, "bold").get_by_role("button", name="Details").click()
    await expect(page.locator("#detail-title")).to_have_text(title)
    assert await page.locator("#detail b, .card b").count() == 0
