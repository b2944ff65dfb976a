"""A client whose downloads take the inner way to the object store.

Presigned URLs name `S3_PUBLIC_ENDPOINT`, where senders reach the store. The gateway may have no way
there: in a cluster, or in containers. It connects to `S3_ENDPOINT` instead and says the public
name in the header `Host`, which is what the signature covers.
"""

import hashlib
from urllib.parse import urlsplit

import aiohttp

from consumer.bus.connection import Bus
from consumer.settings import Settings
from generation_client import DownloadFailed, GenerationClient
from generation_client.client import DOWNLOAD_WITHIN
from generation_contracts import ImageArtifact


class StoreClient(GenerationClient):
    """A client on an existing connection.

    Args:
        bus: The gateway's connection.
        settings: S3_ENDPOINT, S3_PUBLIC_ENDPOINT and the subject root.
    """

    def __init__(self, bus: Bus, settings: Settings) -> None:
        super().__init__(bus.client, root=settings.subjects.root)
        self._endpoint = settings.s3_endpoint
        self._public = settings.s3_public_endpoint

    async def download(self, picture: ImageArtifact) -> bytes:
        """Read the file of an output and compare it with its event.

        Raises:
            DownloadFailed: It cannot be read, or its bytes are not the ones that were stored.
        """
        if self._public is None or not picture.url.startswith(f"{self._public}/"):
            return await super().download(picture)
        url = self._endpoint + picture.url.removeprefix(self._public)
        headers = {"Host": urlsplit(self._public).netloc}
        timeout = aiohttp.ClientTimeout(total=DOWNLOAD_WITHIN)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(url, headers=headers) as response,
            ):
                response.raise_for_status()
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            # The error's own text has the presigned URL in it.
            raise DownloadFailed(f"{picture.key}: {type(error).__name__}") from None
        if hashlib.sha256(content).hexdigest() != picture.sha256:
            raise DownloadFailed(f"{picture.key}: the bytes are not the ones that were stored")
        return content
