"""A job's pictures: fetched and decoded before the run, encoded and stored after it.

While the store does not answer, the job waits with its finished outputs, and its lease is renewed.
After `STORE_PATIENCE` it is handed over, if another worker is free. An input that the store does
not give although it answers ends the request.
"""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import structlog

from consumer.admission import Job
from consumer.job import State
from consumer.ports.media import EncodedImage, Images, InputUnavailable
from consumer.ports.model import GeneratedImage, RunnerOutput
from consumer.ports.store import Artifacts, StoreUnavailable
from consumer.provenance import provenance_of
from consumer.verdict import StoreIsAway
from generation_contracts import ImageArtifact, ModelInfo, Task, TextToImageRequest
from generation_contracts.artifacts import ImageSource

if TYPE_CHECKING:
    from PIL.Image import Image

log = structlog.get_logger()

T = TypeVar("T")

MAX_PIXELS_IN_ALL = 64_000_000  # of one request's pictures; 192 MB as RGB
STORE_PAUSE_FIRST = 0.5  # seconds
STORE_PAUSE_MOST = 15.0  # seconds; how long an output waits at most once the store is back
STORE_PATIENCE = 60.0  # seconds; longer than a pull stands, see `Workers.others_idle`


@dataclass(frozen=True)
class Pictures:
    """The stages in which pictures come in and go out.

    Attributes:
        artifacts: The object store.
        images: The codec.
        task: Part of the outputs' keys.
        model: What the files say of where they come from.
        prompt_in_files: Whether they say their prompts.
        others_idle: Whether another worker is free to do a request of this one.
    """

    artifacts: Artifacts
    images: Images
    task: Task
    model: ModelInfo
    prompt_in_files: bool
    others_idle: Callable[[], Awaitable[bool]]
    waiting: set[Job] = field(default_factory=set)  # for the store
    # Encoders compute: more of them than cores would only hold more pictures.
    _encoders: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(os.cpu_count() or 1)
    )

    async def fetch(self, job: Job, sources: Sequence[ImageSource]) -> "list[Image]":
        """The request's input pictures, decoded.

        Raises:
            InputUnavailable: One cannot be had or read, or they are too large together.
            Stopped: The job was asked to stop while the store was away.
            StoreIsAway: The request is to be handed over.
        """
        started = time.monotonic()
        pictures: list[Image] = []
        for index, source in enumerate(sources):
            pictures.append(await self._input(job, index, source))
            if sum(picture.width * picture.height for picture in pictures) > MAX_PIXELS_IN_ALL:
                raise InputUnavailable("images: too many pixels together")
        if sources:
            job.spent("inputs", time.monotonic() - started)
        return pictures

    async def keep(
        self, job: Job, request: TextToImageRequest, output: RunnerOutput
    ) -> tuple[ImageArtifact, ...]:
        """Encode and store what a run has made.

        Raises:
            Stopped: The job was asked to stop before everything was stored.
            StoreIsAway: The request is to be handed over.
        """
        encoded = await self._encode(job, request, output)
        stored = await self._store(job, encoded)
        return tuple(
            artifact.model_copy(update={"flagged": made.flagged})
            for artifact, made in zip(stored, output.images, strict=True)
        )

    async def _input(self, job: Job, index: int, source: ImageSource) -> "Image":
        try:
            data = await self._retry_while_store_away(job, partial(self._fetch, source))
            return await asyncio.to_thread(self.images.decode, data)
        except InputUnavailable as error:
            raise InputUnavailable(f"images.{index}: {error}") from None

    async def _fetch(self, source: ImageSource) -> bytes:
        for _ in range(2):  # the first failure may have been the end of an outage
            try:
                return await self.artifacts.fetch(source, max_bytes=self.images.max_bytes)
            except StoreUnavailable:
                if not await self.artifacts.reachable():
                    raise
        # The store answers and does not give this object: to wait would be to wait for ever.
        raise InputUnavailable("the store does not give the object")

    async def _encode(
        self, job: Job, request: TextToImageRequest, output: RunnerOutput
    ) -> list[EncodedImage]:
        job.advance(State.ENCODING)
        started = time.monotonic()

        async def encode(made: GeneratedImage) -> EncodedImage:
            said = provenance_of(
                made,
                request_id=job.request_id,
                request=request,
                model=self.model,
                parameters=output.parameters,
                with_prompt=self.prompt_in_files,
            )
            write = partial(self.images.encode, made.image, request.output_format)
            async with self._encoders:
                return await asyncio.to_thread(write, seed=made.seed, provenance=said)

        encoded = await asyncio.gather(*map(encode, output.images))
        job.encode = time.monotonic() - started
        job.spent("encode", job.encode)
        return encoded

    async def _store(self, job: Job, encoded: list[EncodedImage]) -> tuple[ImageArtifact, ...]:
        job.advance(State.STORING)
        started = time.monotonic()
        putting = [
            asyncio.ensure_future(
                self._retry_while_store_away(
                    job, partial(self.artifacts.store, self.task, job.request_id, index, image)
                )
            )
            for index, image in enumerate(encoded)
        ]
        try:
            await asyncio.gather(*putting)
        finally:
            # When one is broken off so are the others, and what is in the store by then is known:
            # no event will tell of it.
            for put in putting:
                put.cancel()
            await asyncio.wait(putting)
            job.stored = [
                put.result() for put in putting if not put.cancelled() and not put.exception()
            ]
            del putting, put  # what they raised has this frame in its traceback
        job.upload = time.monotonic() - started
        job.spent("upload", job.upload)
        return tuple(job.stored)

    async def _retry_while_store_away(self, job: Job, action: Callable[[], Awaitable[T]]) -> T:
        pause = STORE_PAUSE_FIRST
        since = asyncio.get_running_loop().time()
        try:
            while True:
                try:
                    return await job.interrupt.during(action())
                except StoreUnavailable as error:
                    log.warning("store_unavailable", reason=str(error), pause=round(pause, 1))
                self.waiting.add(job)
                waited = asyncio.get_running_loop().time() - since
                if waited > STORE_PATIENCE and await self.others_idle():
                    raise StoreIsAway
                await job.interrupt.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - jitter
                pause = min(pause * 2, STORE_PAUSE_MOST)
        finally:
            self.waiting.discard(job)
