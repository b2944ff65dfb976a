"""The job as the peers do it: the device, Pillow, the SDK; one after the other, and blocking."""

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

FAIR = "SPEED_FAIR"  # environment: set where the peers use the daemon's encoder
READY = "SPEED_READY"  # environment: the file that a peer makes when it is ready

# PNG is as Pillow writes it by itself. The other two have the daemon's quality: Pillow's own would
# make other pictures, and less work.
_OPTIONS: dict[str, dict[str, int]] = {
    "png": {},
    "webp": {"quality": 90, "method": 2},
    "jpeg": {"quality": 95, "subsampling": 0},
}


class Asked(BaseModel):
    """What a peer is sent."""

    request_id: str
    prompt: str


class Done(BaseModel):
    """What it answers."""

    request_id: str
    key: str
    size: int  # bytes


class PeerJob:
    """Everything that a peer does for one request, in one call."""

    def __init__(self) -> None:
        row = Row.from_environment(os.environ)
        self._format = row.file_format
        self._device = StandIn(row, Path(os.environ[NOTES]))
        self._encode = quick_encoder() if FAIR in os.environ else encode
        self._store = Store(os.environ)

    def __call__(self, request_id: str) -> Done:
        data = self._encode(self._device.run(), self._format)
        key = f"{request_id}.{self._format}"
        self._store.put(key, data, f"image/{self._format}")
        return Done(request_id=request_id, key=key, size=len(data))


def encode(picture: Image.Image, file_format: OutputFormat) -> bytes:
    """A file, by Pillow."""
    file = BytesIO()
    picture.save(file, file_format.upper(), **_OPTIONS[file_format])
    return file.getvalue()


def quick_encoder() -> Callable[[Image.Image, OutputFormat], bytes]:
    """The daemon's encoder, so that what is left of the difference is not the encoder's."""
    codec = ImageCodec()
    return lambda picture, file_format: codec.encode(picture, file_format, seed=0).data


def say_ready() -> None:
    """Tell the bench that requests can come."""
    Path(os.environ[READY]).touch()
