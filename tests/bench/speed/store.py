"""The object store of the peers and the bench: the SDK with its defaults."""

from collections.abc import Mapping
from io import BytesIO
from typing import NamedTuple

from minio import Minio
from PIL import Image


class Stored(NamedTuple):
    """The content of the bucket after a measurement."""

    objects: int
    file_format: str
    size: tuple[int, int]  # pixels


class Store:
    """One bucket.

    Args:
        environment: The settings of `DevStack.environment`.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._bucket = environment["S3_BUCKET"]
        self._client = Minio(
            environment["S3_ENDPOINT"].removeprefix("http://"),
            access_key=environment["S3_ACCESS_KEY"],
            secret_key=environment["S3_SECRET_KEY"],
            secure=False,
            region="us-east-1",  # without it the SDK asks the store for the region
        )

    def make_bucket(self) -> None:
        """Create the bucket; `consumer apply` creates it only for the daemon."""
        self._client.make_bucket(self._bucket)

    def put(self, key: str, data: bytes, media_type: str) -> None:
        """Store one object."""
        self._client.put_object(
            self._bucket, key, BytesIO(data), len(data), content_type=media_type
        )

    def inspect(self) -> Stored:
        """Count the objects, and open one of them."""
        keys = [
            one.object_name or "" for one in self._client.list_objects(self._bucket, recursive=True)
        ]
        response = self._client.get_object(self._bucket, keys[-1])
        try:
            image = Image.open(BytesIO(response.read()))
        finally:
            response.close()
            response.release_conn()
        image.load()
        return Stored(len(keys), (image.format or "").lower(), image.size)
