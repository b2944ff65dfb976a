"""Unit tests of the live page's modules, in a real Chromium."""

import pytest

from tests.gateway.page_visits import Visits, browser, tenants, visit

__all__ = ["browser", "tenants", "visit"]  # fixtures

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_the_event_parser_accepts_chunks_of_any_size(visit: Visits) -> None:
    page = await visit()
    stream = (
        ": a comment\r\n\r\nid: 1-0\nevent: started\ndata: {\n\rdata:}\n\n"
        "data: one\rdata:  two\r\nid:1-1\r\n\r\nevent: empty\n\n\nretry: 5\ndata\n\ndata: cut"
    )
    expected = [
        {"event": "started", "data": "{", "id": "1-0"},
        {"event": "message", "data": "}", "id": "1-0"},
        {"event": "message", "data": "one\n two", "id": "1-1"},
        {"event": "message", "data": "", "id": "1-1"},
    ]
    found = await page.evaluate(
        """async (stream) => {
          const { EventParser } = await import(new URL("page/sse.js", document.baseURI));
          return Array.from(stream, (_, length) => length + 1).map((length) => {
            const parser = new EventParser();
            const events = [];
            for (let i = 0; i < stream.length; i += length) {
              events.push(...parser.push(stream.slice(i, i + length)));
            }
            return events;
          });
        }""",
        stream,
    )
    for length, events in enumerate(found, start=1):
        assert events == expected, length


async def test_long_prompts_fit_the_metadata(visit: Visits) -> None:
    page = await visit()
    prompt, negative = "ß😀" * 4_000, "n" * 2_000
    metadata, back = await page.evaluate(
        """async ([prompt, negativePrompt]) => {
          const path = new URL("page/metadata.js", document.baseURI);
          const { writeMetadata, readMetadata } = await import(path);
          const id = "x".repeat(64);
          const images = Array.from({ length: 9 }, (_, number) => ({ id, number }));
          const metadata = writeMetadata({ prompt, negativePrompt, images });
          return [metadata, readMetadata(metadata)];
        }""",
        [prompt, negative],
    )
    assert len(metadata) <= 16
    assert all(0 < len(name) <= 64 and 0 < len(value) <= 512 for name, value in metadata.items())
    assert back["prompt"] == prompt[: 12 * 512]
    assert back["negativePrompt"] == negative[: 3 * 512]
    assert len(back["images"]) == 6


async def test_many_progress_events_lead_to_one_draw_per_frame(visit: Visits) -> None:
    page = await visit()
    seconds = await page.evaluate(
        """async () => {
          const { ActiveJobs } = await import(new URL("page/jobs.js", document.baseURI));
          const { ActiveView } = await import(new URL("page/active_view.js", document.baseURI));
          const jobs = new ActiveJobs();
          new ActiveView(jobs);
          const job = jobs.update({ id: "x", task: "image_to_text", state: "running" });
          const began = performance.now();
          for (let i = 0; i < 5000; i += 1) {
            job.apply("progress", { attempt: 1, sequence: i, step: i, of: 8192, text: "word " });
            jobs.changed(job, job.state);
          }
          await new Promise(requestAnimationFrame);
          return (performance.now() - began) / 1000;
        }"""
    )
    assert seconds < 2


async def test_a_text_grows_and_restarts_with_a_new_attempt(visit: Visits) -> None:
    page = await visit()
    texts = await page.evaluate(
        """async () => {
          const { ActiveJobs } = await import(new URL("page/jobs.js", document.baseURI));
          const { ActiveView } = await import(new URL("page/active_view.js", document.baseURI));
          const jobs = new ActiveJobs();
          new ActiveView(jobs);
          const job = jobs.update({ id: "x", task: "image_to_text", state: "running" });
          const texts = [];
          const events = [
            [1, 1, "A "], [1, 2, "red "], [1, 2, "red "], [1, 4, "star"],
            [2, 1, "One "], [1, 5, "late"], [2, 2, "star"],
          ];
          for (const [attempt, sequence, text] of events) {
            job.apply("progress", { attempt, sequence, step: sequence, of: 9, text });
            jobs.changed(job, job.state);
            await new Promise(requestAnimationFrame);
            await new Promise(requestAnimationFrame);
            texts.push(document.querySelector(".job-text").textContent);
          }
          return texts;
        }"""
    )
    # The events 0 and 3 of the first attempt and the event 0 of the second are missing.
    assert texts == [
        "… A ",
        "… A red ",
        "… A red ",
        "… A red star",
        "… One ",
        "… One ",
        "… One star",
    ]
