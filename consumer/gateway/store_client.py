"""A client that downloads from the internal endpoint of the object store.

Presigned URLs contain `S3_PUBLIC_ENDPOINT`, through which senders reach the store. In a cluster or
in containers, the gateway may not reach this host. It connects to `S3_ENDPOINT` instead and sends
the public host in the header `Host`, which the signature covers.
"""

from urllib.parse import urlsplit

from consumer.bus.connection import Bus
from consumer.settings import Settings
from generation_client import GenerationClient
from generation_contracts import StoredArtifact


class StoreClient(GenerationClient):
    """A client on an existing connection, for downloads by the internal endpoint.

    Args:
        bus: The gateway's connection.
        settings: S3_ENDPOINT, S3_PUBLIC_ENDPOINT and the subject root.
    """

    def __init__(self, bus: Bus, settings: Settings) -> None:
        super().__init__(bus.client, root=settings.subjects.root)
        self._endpoint = settings.s3_endpoint
        self._public = settings.s3_public_endpoint

    def _address(self, artifact: StoredArtifact) -> tuple[str, dict[str, str]]:
        if self._public is None or not artifact.url.startswith(f"{self._public}/"):
            return super()._address(artifact)
        url = self._endpoint + artifact.url.removeprefix(self._public)
        return url, {"Host": urlsplit(self._public).netloc}
