"""Fuzz the parsers of untrusted bytes: `uv run --group fuzz python -m tests.fuzz TARGET`.

TARGET is `requests`, `results`, `images` or `protocol`, followed by options of libFuzzer, for
example `-max_total_time=60`. A target may raise only the exceptions that the daemon handles. Any
other exception and any hang is a finding. Coverage includes this project's modules, nats-py and the
Python part of Pillow.
"""

import asyncio
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import atheris

with atheris.instrument_imports(include=["consumer", "generation_contracts", "PIL", "nats"]):
    from nats.aio.msg import Msg
    from nats.errors import ProtocolError
    from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
    from pydantic import ValidationError

    from consumer.bus.nats_internals import RobustClient
    from consumer.jobs.admission import Admission
    from consumer.media.codec import ImageCodec
    from consumer.ports.media import InputUnavailable
    from generation_contracts import InvalidRequest, Subjects, Task, decode_result
    from generation_contracts.headers import REPLY_TO

SUBJECTS = Subjects()
ADMISSION = Admission(Task.IMAGE_TO_TEXT, SUBJECTS, ("_INBOX.",))
CODEC = ImageCodec(max_bytes=2**20, max_pixels=1_000_000)
SEEDS = (
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)  # imported here so that atheris instruments them


class Delivery:
    """The part of a delivery that admission reads."""

    stream = "GENERATION_REQUESTS_IMAGE_TO_TEXT"
    stream_sequence = 1
    attempt = 1

    def __init__(self, body: bytes, subject: str, reply_to: str) -> None:
        self.body = body
        self.subject = subject
        self.headers = {REPLY_TO: reply_to}
        self.stored_at = datetime.now(UTC)


def requests(data: bytes) -> None:
    """Fuzz a message of the request stream: body, last token of the subject, reply header."""
    data_provider = atheris.FuzzedDataProvider(data)
    subject = SUBJECTS.request(Task.IMAGE_TO_TEXT) + data_provider.ConsumeUnicodeNoSurrogates(8)
    reply_to = data_provider.ConsumeUnicodeNoSurrogates(24)
    delivery = Delivery(
        data_provider.ConsumeBytes(data_provider.remaining_bytes()), subject, reply_to
    )
    job = ADMISSION.open(delivery)  # type: ignore[arg-type] # never raises
    assert 1 <= len(job.request_id) <= 64
    try:
        ADMISSION.request(delivery)  # type: ignore[arg-type]
    except InvalidRequest:
        return


def results(data: bytes) -> None:
    """Fuzz a message of the results stream."""
    try:
        decode_result(data)
    except ValidationError:
        return


def images(data: bytes) -> None:
    """Fuzz an input image."""
    try:
        image = CODEC.decode(data)
    except InputUnavailable:
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= 1_000_000


class OfflineClient(RobustClient):
    """A client without a server. It parses and ignores everything except messages."""

    async def _nothing(self, *_: Any) -> None:
        pass

    _process_ping = _process_pong = _process_info = _process_err = _nothing


def protocol(data: bytes) -> None:
    """Fuzz the input from a server: a message with any subject and headers, then any bytes."""
    asyncio.run(_receive(atheris.FuzzedDataProvider(data)))


async def _receive(data_provider: Any) -> None:
    client = OfflineClient()
    received: list[Msg] = []

    async def on_message(message: Msg) -> None:
        received.append(message)

    client._process_disconnect()
    client._flush_queue = asyncio.Queue()
    await client.subscribe("a", cb=on_message)
    subject, reply = (_without_separators(data_provider.ConsumeBytes(16)) or b"a" for _ in range(2))
    headers = b"NATS/1.0" + data_provider.ConsumeBytes(24)
    body = data_provider.ConsumeBytes(8)
    sizes = len(headers), len(headers) + len(body)
    stream = b"HMSG %s 1 %s %d %d\r\n" % (subject, reply, *sizes) + headers + body + b"\r\n"
    stream += b"MSG b 1 2\r\nhi\r\n"
    cut = data_provider.ConsumeIntInRange(0, len(stream))
    for part in (stream[:cut], stream[cut:]):
        await client._ps.parse(part)
    for _ in range(4):
        await asyncio.sleep(0)
    assert [message.data for message in received] == [body, b"hi"]
    try:
        await client._ps.parse(data_provider.ConsumeBytes(data_provider.remaining_bytes()))
    except ProtocolError:
        return  # the client reconnects


def _without_separators(text: bytes) -> bytes:
    return text.translate(None, delete=b" \t\n")


TARGETS: dict[str, Callable[[bytes], None]] = {
    "requests": requests,
    "results": results,
    "images": images,
    "protocol": protocol,
}


def seed_inputs(target: str) -> list[bytes]:
    """Return seed inputs: random bytes would not get past the first byte of an image file."""
    if target == "protocol":
        return [b"generation.\x0b.\xff", b"a" * 40 + b" 100\r\n\r\nMSG a 1 b 1\r\na\r\n"]
    if target != "images":
        return [b'{"prompt":"a","images":[{"base64":"aGFsbG8="}],"then":[]}']
    files = []
    for mode, kind in (("RGB", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("L", "JPEG"), ("RGB", "WEBP")):
        file = BytesIO()
        Image.new(mode, (9, 7)).save(file, kind)
        files.append(file.getvalue())
    return files


def main() -> None:
    target = sys.argv.pop(1)
    for seed in seed_inputs(target):
        TARGETS[target](seed)
    # Start with the length of a small file.
    options = [*sys.argv, "-len_control=0", *([] if _has("-max_len") else ["-max_len=4096"])]
    atheris.Setup(options, TARGETS[target], custom_mutator=_mutator(seed_inputs(target)))
    atheris.Fuzz()


def _has(option: str) -> bool:
    return any(argument.startswith(option) for argument in sys.argv)


def _mutator(seeds: list[bytes]) -> Callable[[bytes, int, int], bytes]:
    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        base = data if len(data) > 1 else seeds[seed % len(seeds)]
        return bytes(atheris.Mutate(base[:max_size], max_size))

    return mutate


if __name__ == "__main__":
    main()
