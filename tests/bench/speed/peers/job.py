"""The job of the peers: the device, Pillow and the SDK, one after another and blocking."""

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from PIL import Image
from pydantic import BaseModel

from consumer.media.codec import ImageCodec
from consumer.ports.media import OutputFormat
from tests.bench.speed.rows import Row
from tests.bench.speed.stand_in import NOTES, StandIn
from tests.bench.speed.store import Store

FAIR = "SPEED_FAIR"  # environment variable: set if the peers use the daemon's encoder
READY = "SPEED_READY"  # environment variable: the file that a ready peer creates

# PNG has Pillow's defaults. The other two have the daemon's quality, because Pillow's defaults
# would be less work for a lower quality.
_OPTIONS: dict[str, dict[str, int]] = {
    "png": {},
    "webp": {"quality": 90, "method": 2},
    "jpeg": {"quality": 95, "subsampling": 0},
}


class JobRequest(BaseModel):
    """The request of a peer."""

    request_id: str
    prompt: str


class JobResult(BaseModel):
    """The response of a peer."""

    request_id: str
    key: str
    size: int  # bytes


class PeerJob:
    """The work of a peer for one request, in one call."""

    def __init__(self) -> None:
        row = Row.from_environment(os.environ)
        self._format = row.file_format
        self._device = StandIn(row, Path(os.environ[NOTES]))
        self._encode = quick_encoder() if FAIR in os.environ else encode
        self._store = Store(os.environ)

    def __call__(self, request_id: str) -> JobResult:
        data = self._encode(self._device.run(), self._format)
        key = f"{request_id}.{self._format}"
        self._store.put(key, data, f"image/{self._format}")
        return JobResult(request_id=request_id, key=key, size=len(data))


def encode(image: Image.Image, file_format: OutputFormat) -> bytes:
    """Encode an image with Pillow."""
    file = BytesIO()
    image.save(file, file_format.upper(), **_OPTIONS[file_format])
    return file.getvalue()


def quick_encoder() -> Callable[[Image.Image, OutputFormat], bytes]:
    """Return the daemon's encoder, to exclude the encoder from the comparison."""
    codec = ImageCodec()
    return lambda image, file_format: codec.encode(image, file_format, seed=0).data


def say_ready() -> None:
    """Notify the bench that the peer is ready."""
    Path(os.environ[READY]).touch()
