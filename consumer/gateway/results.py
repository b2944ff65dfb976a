"""Reading of stored results by job id."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http import HTTPStatus

import structlog

from consumer.bus.connection import API_TIMEOUT, Bus, BusUnavailable
from consumer.gateway.errors import ApiError, of_error
from generation_client import GenerationClient, GenerationError, ServiceUnavailable
from generation_client.lookup import ResultEvent
from generation_contracts import StoredArtifact

log = structlog.get_logger()

RECONNECT_WITHIN = 2.0  # seconds; a restarting broker is available in less
LOOKUPS = 32  # concurrent reads: after an outage all waiting calls read at once


class Results:
    """Reads terminal events from the results stream.

    Args:
        bus: The gateway's connection.
        client: A client on the same connection.
    """

    def __init__(self, bus: Bus, client: GenerationClient) -> None:
        self._bus = bus
        self._client = client
        self._lookups = asyncio.Semaphore(LOOKUPS)

    async def read(self, queue: str, request_id: str) -> ResultEvent | None:
        """Read the terminal event of a request; return None if there is none yet.

        Raises:
            ServiceUnavailable: The stream cannot be read now.
            UnsupportedMessage: The result has a later version of the contract.
        """
        await self._reconnected()
        async with self._lookups:
            try:
                async with self._bus.api_call(API_TIMEOUT):
                    return await self._stored(queue, request_id)
            except TimeoutError:
                raise ServiceUnavailable("NATS: no reply from the results stream") from None

    async def find(self, request_id: str, *queues: str) -> ResultEvent | None:
        """Read the terminal event of a request of one of these queues.

        Raises:
            ServiceUnavailable, UnsupportedMessage: See `read`.
        """
        found = await asyncio.gather(*(self.read(queue, request_id) for queue in queues))
        return next((event for event in found if event is not None), None)

    async def _reconnected(self) -> None:
        if self._bus.connected:
            return
        try:
            async with asyncio.timeout(RECONNECT_WITHIN):
                await self._bus.wait_connected()
        except (TimeoutError, BusUnavailable):
            raise ServiceUnavailable("NATS: not connected") from None

    async def _stored(self, queue: str, request_id: str) -> ResultEvent | None:
        try:
            return await self._client.result(queue, request_id, within=0)
        except TimeoutError:
            return None


def require_address(output: StoredArtifact) -> str:
    """Return the presigned URL of an image.

    Raises:
        ApiError: 404: the URL has expired; it is valid for a shorter time than its result.
    """
    if output.url_expires_at <= datetime.now(UTC):
        raise ApiError(
            HTTPStatus.NOT_FOUND, "the address of the output has expired", "output_expired"
        )
    return output.url


@contextmanager
def as_api_errors() -> Iterator[None]:
    """Convert exceptions of the queue and of the client library to `ApiError`."""
    try:
        yield
    except BusUnavailable as error:
        log.warning("queue_not_available", reason=str(error))
        raise of_error(ServiceUnavailable()) from None
    except GenerationError as error:
        if isinstance(error, ServiceUnavailable):
            log.warning("queue_not_available", reason=str(error))
        raise of_error(error) from None
