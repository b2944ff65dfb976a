"""The parts of a gateway without HTTP, on real servers."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from consumer.bus.connection import Bus, connect
from consumer.bus.queue_view import QueueView
from consumer.gateway.event_log import EventLog
from consumer.gateway.job_list import JobList
from consumer.gateway.jobs import Job, Jobs
from consumer.gateway.tenants import Caller, Tenant
from consumer.settings import Settings
from generation_client import GenerationClient
from generation_contracts import Request, TextToImageRequest
from generation_contracts.base import DEFAULT_QUEUES
from tests.support.scene import WITHIN, Scene

ALICE = Caller(Tenant("alice", "alice000", b"a" * 32), "key-a")
BOB = Caller(Tenant("bob", "bob00000", b"b" * 32), "key-b")


class NoLimits:
    """Admits and records every request, unless the test sets a refusal."""

    def __init__(self) -> None:
        self.admitted: list[str] = []
        self.over: list[str] = []
        self.refusal: Exception | None = None

    async def admit(self, caller: Caller, request: Request) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.admitted.append(request.request_id or "")

    def ended(self, request_id: str) -> None:
        self.over.append(request_id)


@dataclass
class OpenJobs:
    """The parts of one gateway."""

    bus: Bus
    jobs: Jobs
    log: EventLog
    view: QueueView
    ids: JobList
    limits: NoLimits

    async def submit(self, caller: Caller = ALICE, *, key: str | None = None, **fields: Any) -> Job:
        """Submit a request for images."""
        wait = fields.pop("wait", False)
        request = TextToImageRequest(prompt=fields.pop("prompt", "a"), **fields)
        return await self.jobs.submit(caller, request, idempotency_key=key, wait=wait)


def settings_of(scene: Scene, **more: Any) -> Settings:
    """Return the settings of a gateway for a scene."""
    values: dict[str, Any] = {**scene.settings(), **more}
    return Settings(**{name.lower(): value for name, value in values.items()})


@asynccontextmanager
async def open_jobs(
    scene: Scene, *, seconds: float = 60.0, quiet: float = 60.0, **more: Any
) -> AsyncIterator[OpenJobs]:
    """Open the parts of a gateway."""
    settings = settings_of(scene, **more)
    bus = await connect(settings, name="gateway", within=WITHIN)
    client = GenerationClient(bus.client, root=scene.subjects.root)
    log = EventLog(seconds=seconds, most_bytes=2**24, quiet=quiet)
    view = QueueView(bus, scene.subjects, {task: str(task) for task in DEFAULT_QUEUES})
    limits = NoLimits()
    ids = JobList(view)
    jobs = Jobs(bus, client, settings, events=log, view=view, ids=ids, limits=limits)
    try:
        await jobs.open()
        yield OpenJobs(bus, jobs, log, view, ids, limits)
        await jobs.close()
    finally:
        await bus.close()


@pytest.fixture
async def opened(scene: Scene) -> AsyncIterator[OpenJobs]:
    """The parts of one gateway."""
    async with open_jobs(scene) as gateway:
        yield gateway
