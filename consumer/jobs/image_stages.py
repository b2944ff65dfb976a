"""The images of a job: fetched and decoded before the run, encoded and stored after the run.

While the store does not answer, the job keeps its finished outputs and its lease. After
`HANDOVER_DELAY` the worker requeues the request, if another worker is idle. If the store answers
but does not return an input, the request fails.
"""

import asyncio
import hashlib
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import structlog

from consumer.jobs.admission import Job
from consumer.jobs.outcomes import HandedOver, NotSigned
from consumer.jobs.states import State
from consumer.media.provenance import provenance_of
from consumer.ports.media import (
    Credentials,
    EncodedFile,
    EncodedImage,
    Images,
    InputUnavailable,
    OutputFormat,
    SigningFailed,
)
from consumer.ports.model import GeneratedFile, GeneratedImage, RunnerOutput
from consumer.ports.store import Artifacts, StoreUnavailable
from generation_contracts import FileArtifact, ImageArtifact, ModelInfo, Request
from generation_contracts.artifacts import ImageSource

if TYPE_CHECKING:
    from PIL.Image import Image

log = structlog.get_logger()

T = TypeVar("T")

MAX_INPUT_PIXELS = 64_000_000  # of all input images of one request; 192 MB as RGB
STORE_PAUSE_FIRST = 0.5  # seconds
STORE_PAUSE_MOST = 15.0  # seconds; the longest delay of an output after an outage
SIGN_TIMEOUT = 60.0  # seconds; c2pa waits 30 s for a time stamp, a callback may take any time
HANDOVER_DELAY = 60.0  # seconds; longer than a pull request, see `Workers.others_idle`


@dataclass(frozen=True)
class ImageStages:
    """The stages that fetch input images, and encode and store output images.

    Attributes:
        artifacts: The object store.
        images: The codec.
        queue: Part of the output keys.
        model: Written into the provenance of the output files.
        prompt_in_files: Whether the output files contain their prompts.
        others_idle: Returns whether another worker is idle.
        credentials: Signs the output files; None: they are not signed.
        credentials_required: Whether a file that cannot be signed fails the job.
        waiting: The jobs that wait for the store.
    """

    artifacts: Artifacts
    images: Images
    queue: str
    model: ModelInfo
    prompt_in_files: bool
    others_idle: Callable[[], Awaitable[bool]]
    credentials: Credentials | None = None
    credentials_required: bool = False
    waiting: set[Job] = field(default_factory=set)
    # Encoding is CPU work: more threads than cores would only keep more images in memory.
    _encoders: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(os.cpu_count() or 1)
    )

    async def fetch_inputs(
        self, job: Job, sources: Sequence[tuple[str, ImageSource]]
    ) -> "list[Image]":
        """Fetch the input images of a request and decode them to RGB.

        Args:
            job: The job of the request.
            sources: The images, each with its place in the request, such as `images.0`.

        Raises:
            InputUnavailable: An image cannot be fetched or read, or there are too many pixels.
            Stopped: The job was asked to stop while the store did not answer.
            HandedOver: The store does not answer, and another worker is idle.
        """
        started = time.monotonic()
        inputs: list[Image] = []
        for place, source in sources:
            inputs.append(await self._fetch_input(job, place, source))
            if sum(image.width * image.height for image in inputs) > MAX_INPUT_PIXELS:
                raise InputUnavailable("images: too many pixels in total")
        if sources:
            job.spent("inputs", time.monotonic() - started)
        return inputs

    async def encode_and_store(
        self, job: Job, request: Request, output: RunnerOutput
    ) -> tuple[ImageArtifact | FileArtifact, ...]:
        """Encode and sign the images of a run, and store all its files.

        Raises:
            NotSigned: A file cannot be signed, and signatures are required.
            Stopped: The job was asked to stop before every image was stored.
            HandedOver: The store does not answer, and another worker is idle.
        """
        images = iter(await self._encode(job, request, output))
        encoded = [
            next(images)
            if isinstance(file, GeneratedImage)
            else await asyncio.to_thread(_hash, file)
            for file in output.files
        ]
        stored = await self._store(job, encoded)
        return tuple(
            artifact.model_copy(update={"flagged": file.flagged})
            if isinstance(file, GeneratedImage)
            else artifact
            for artifact, file in zip(stored, output.files, strict=True)
        )

    async def _fetch_input(self, job: Job, place: str, source: ImageSource) -> "Image":
        try:
            data = await self._retry_while_store_unavailable(
                job, partial(self._fetch_bytes, source)
            )
            return await asyncio.to_thread(self.images.decode, data)
        except InputUnavailable as error:
            raise InputUnavailable(f"{place}: {error}") from None

    async def _fetch_bytes(self, source: ImageSource) -> bytes:
        for _ in range(2):  # the first failure may have been the end of an outage
            try:
                return await self.artifacts.fetch(source, max_bytes=self.images.max_bytes)
            except StoreUnavailable:
                if not await self.artifacts.reachable():
                    raise
        # The store answers, but does not return this object: another attempt would fail too.
        raise InputUnavailable("the store does not return the object")

    async def _encode(self, job: Job, request: Request, output: RunnerOutput) -> list[EncodedImage]:
        job.advance(State.ENCODING)
        started = time.monotonic()
        file_format: OutputFormat = getattr(request, "output_format", "png")
        provenances = [
            provenance_of(
                image,
                request_id=job.request_id,
                request=request,
                model=self.model,
                parameters=output.parameters,
                with_prompt=self.prompt_in_files,
            )
            for image in output.images
        ]

        async def encode(image: GeneratedImage, provenance: Mapping[str, str]) -> EncodedImage:
            write = partial(self.images.encode, image.image, image.output_format or file_format)
            async with self._encoders:
                return await asyncio.to_thread(write, seed=image.seed, provenance=provenance)

        encoded = await asyncio.gather(*map(encode, output.images, provenances))
        job.spent("encode", time.monotonic() - started)
        if self.credentials is not None and encoded:
            encoded = await self._sign(job, self.credentials, encoded, provenances)
        job.encode = time.monotonic() - started
        return encoded

    async def _sign(
        self,
        job: Job,
        credentials: Credentials,
        files: list[EncodedImage],
        provenances: list[dict[str, str]],
    ) -> list[EncodedImage]:
        started = time.monotonic()
        signing = [
            asyncio.wrap_future(credentials.submit(*each))
            for each in zip(files, provenances, strict=True)
        ]
        unsigned: list[int] = []
        try:
            for index, future in enumerate(signing):
                left = SIGN_TIMEOUT - (time.monotonic() - started)
                try:
                    files[index] = await job.cancel_token.race(asyncio.wait_for(future, left))
                except (SigningFailed, TimeoutError) as error:
                    reason = str(error) or f"no signature after {SIGN_TIMEOUT:g} s"
                    log.warning("image_not_signed", index=index, reason=reason)
                    job.unsigned += 1
                    if self.credentials_required:
                        raise NotSigned from None
                    unsigned.append(index)
        finally:
            for future in signing:
                future.cancel()
            await asyncio.gather(*signing, return_exceptions=True)
            del signing, future  # tracebacks of their exceptions refer to this frame
        job.warnings += tuple(
            f"image {index} has no Content Credentials: it could not be signed"
            for index in unsigned
        )
        job.spent("sign", time.monotonic() - started)
        return files

    async def _store(
        self, job: Job, encoded: Sequence[EncodedFile]
    ) -> tuple[ImageArtifact | FileArtifact, ...]:
        job.advance(State.STORING)
        started = time.monotonic()
        uploads = [
            asyncio.ensure_future(
                self._retry_while_store_unavailable(
                    job, partial(self.artifacts.store, self.queue, job.request_id, index, image)
                )
            )
            for index, image in enumerate(encoded)
        ]
        try:
            await asyncio.gather(*uploads)
        finally:
            # If one upload fails, the others end too. The finalizer deletes the files that were
            # stored by then, because no event will mention them.
            for upload in uploads:
                upload.cancel()
            await asyncio.wait(uploads)
            job.stored = [
                upload.result()
                for upload in uploads
                if not upload.cancelled() and not upload.exception()
            ]
            del uploads, upload  # tracebacks of their exceptions refer to this frame
        job.upload = time.monotonic() - started
        job.spent("upload", job.upload)
        return tuple(job.stored)

    async def _retry_while_store_unavailable(
        self, job: Job, action: Callable[[], Awaitable[T]]
    ) -> T:
        pause = STORE_PAUSE_FIRST
        since = asyncio.get_running_loop().time()
        try:
            while True:
                try:
                    return await job.cancel_token.race(action())
                except StoreUnavailable as error:
                    log.warning("store_unavailable", reason=str(error), pause=round(pause, 1))
                self.waiting.add(job)
                waited = asyncio.get_running_loop().time() - since
                if waited > HANDOVER_DELAY and await self.others_idle():
                    raise HandedOver
                await job.cancel_token.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - jitter
                pause = min(pause * 2, STORE_PAUSE_MOST)
        finally:
            self.waiting.discard(job)


def _hash(file: GeneratedFile) -> EncodedFile:
    """Return a file with its hash: CPU work, for a thread."""
    digest = hashlib.sha256(file.data).hexdigest()
    return EncodedFile(file.data, file.media_type, file.extension, digest)
