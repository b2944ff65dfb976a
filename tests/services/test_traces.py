"""Traces of real jobs from a daemon process, at an OTLP endpoint over HTTP."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.services.conftest import Caller
from tests.support.scene import WITHIN, Scene

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SENDER = "00f067aa0ba902b7"


class Collector:
    """Collects the spans at an OTLP endpoint."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self._more = asyncio.Event()

    async def receive(self, request: web.Request) -> web.Response:
        sent = ExportTraceServiceRequest.FromString(await request.read())
        for resource in sent.resource_spans:
            self.services |= {
                one.value.string_value
                for one in resource.resource.attributes
                if one.key == "service.name"
            }
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        self._more.set()
        return web.Response()

    async def until(self, number: int) -> None:
        async with asyncio.timeout(WITHIN):
            while len(self.spans) < number:
                await self._more.wait()
                self._more.clear()

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


@asynccontextmanager
async def collector() -> AsyncIterator[tuple[Collector, dict[str, str]]]:
    """Run an endpoint; yield its collector and the settings of a worker that exports to it."""
    received, application = Collector(), web.Application()
    application.router.add_post("/v1/traces", received.receive)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield (
            received,
            {
                "CONSUMER_TRACES": "true",
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
                "OTEL_BSP_SCHEDULE_DELAY": "100",
            },
        )
    finally:
        await runner.cleanup()


async def test_a_job_is_a_span_in_the_trace_of_its_sender(scene: Scene, caller: Caller) -> None:
    async with collector() as (received, settings):
        await scene.start(**settings)
        events = await caller.client.subscribe(f"{scene.subjects.root}.result.>")
        await caller.call(headers={"traceparent": f"00-{TRACE}-{SENDER}-01"})
        result = await events.next_msg(timeout=WITHIN)
        await received.until(6)
    (job,) = received.named("generation text_to_image")
    assert (job.trace_id.hex(), job.parent_span_id.hex()) == (TRACE, SENDER)
    assert job.kind == Span.SPAN_KIND_CONSUMER
    stages = [span for span in received.spans if span is not job]
    assert [one.name for one in sorted(stages, key=lambda one: one.start_time_unix_nano)] == [
        "queue",
        "inference",
        "encode",
        "upload",
        "publish",
    ]
    assert {stage.parent_span_id for stage in stages} == {job.span_id}
    for stage in stages:
        assert job.start_time_unix_nano <= stage.start_time_unix_nano
        assert stage.start_time_unix_nano <= stage.end_time_unix_nano <= job.end_time_unix_nano
    assert (result.headers or {})["traceparent"] == f"00-{TRACE}-{job.span_id.hex()}-01"
    assert received.services == {"generation-consumer"}


async def test_a_failed_job_is_an_error_span_without_a_prompt(scene: Scene, caller: Caller) -> None:
    async with collector() as (received, settings):
        await scene.apply(CONSUMER_MAX_ATTEMPTS="1")
        await scene.start("raising", CONSUMER_MAX_ATTEMPTS="1", **settings)
        await caller.call(prompt="a secret wish")
        await received.until(4)
    (job,) = received.named("generation text_to_image")
    assert job.status.code == Status.STATUS_CODE_ERROR
    assert job.status.message == "model_error"
    assert not any("secret" in str(span) for span in received.spans)


async def test_an_unreachable_endpoint_does_not_delay_jobs(scene: Scene, caller: Caller) -> None:
    async with collector() as (_, settings):
        pass  # the endpoint is closed, and its port is unused
    worker = await scene.start(**settings)
    for _ in range(3):
        assert (await caller.call(within=10))["type"] == "generation.v1.succeeded"
    assert worker.alive


def test_traces_without_the_extra_stop_the_start() -> None:
    without = "import sys; sys.modules['opentelemetry.sdk.trace'] = None"
    run = "from consumer.app.cli import main; sys.argv[1:] = ['run']; main()"
    settings = {"MODEL_TYPE": "text_to_image", "CONSUMER_TRACES": "true"}
    keys = {"S3_ACCESS_KEY": "worker", "S3_SECRET_KEY": "a secret key"}
    done = subprocess.run(
        [sys.executable, "-c", f"{without}; {run}"],
        env={**os.environ, **settings, **keys},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "consumer: CONSUMER_TRACES: needs the extra `traces`\n"


async def test_without_the_setting_the_context_of_the_sender_is_forwarded(
    scene: Scene, caller: Caller
) -> None:
    async with collector() as (received, settings):
        await scene.start(**{**settings, "CONSUMER_TRACES": "false"})
        events = await caller.client.subscribe(f"{scene.subjects.root}.result.>")
        await caller.call(headers={"traceparent": f"00-{TRACE}-{SENDER}-01"})
        result = await events.next_msg(timeout=WITHIN)
    assert (result.headers or {})["traceparent"] == f"00-{TRACE}-{SENDER}-01"
    assert received.spans == []
