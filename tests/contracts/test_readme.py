"""The examples in the README of the contracts run unchanged."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nats
from nats.js.api import StreamConfig

from consumer.devstack import NatsServer
from generation_contracts import Subjects, Task, TextToImageRequest, decode_request

README = Path(__file__).parents[2] / "contracts" / "README.md"
PUBLISH, READ, CHECK = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


def run(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


async def test_readme_example_publishes_a_request_once(tmp_path: Path) -> None:
    subjects = Subjects()
    with NatsServer(tmp_path) as server:
        client = await nats.connect(server.url)
        stream = client.jetstream()
        name = subjects.requests_stream(Task.TEXT_TO_IMAGE)
        stored_there = list(subjects.request_subjects(Task.TEXT_TO_IMAGE))
        await stream.add_stream(StreamConfig(name=name, subjects=stored_there))
        output = run(PUBLISH, NATS_URL=server.url).splitlines()
        assert output == [f"GENERATION_REQUESTS_TEXT_TO_IMAGE 1 {twice}" for twice in (False, True)]
        assert (await stream.stream_info(name)).state.messages == 1
        stored = await stream.get_msg(name, 1)
        await client.close()
    assert stored.subject == "generation.request.text_to_image.poster-0001"
    assert stored.data is not None
    request = decode_request(Task.TEXT_TO_IMAGE, stored.data)
    assert isinstance(request, TextToImageRequest)
    assert (request.request_id, request.width) == ("poster-0001", 64)


def test_readme_example_reads_a_result() -> None:
    assert run(READ) == "out_of_memory True\n"


def test_readme_example_validates_with_the_schema() -> None:
    assert run(CHECK) == "$.images[0]\n"
