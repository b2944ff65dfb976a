"""`consumer up` and `consumer demo`: run the whole system on one machine, without Docker."""

import asyncio
import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from consumer.app.apply import CONNECT_WITHIN, apply
from consumer.app.sender_commands import (
    ProgressBar,
    image_to_text,
    save_images,
    send_request,
    summary,
    text_to_image,
)
from consumer.bus.connection import connect
from consumer.devstack import Daemon, DevStack, GatewayServer
from consumer.ports.bus import ResultEvent
from consumer.settings import Settings
from generation_client import GenerationClient
from generation_contracts import (
    ArtifactReference,
    ImageArtifact,
    Request,
    SucceededEvent,
    Task,
    encode,
)

CHECK_INTERVAL = 0.5  # seconds between two checks of the child processes of `up`


def demo(prompt: str, question: str, folder: Path, console: Console) -> int:
    """Start everything, generate an image, describe it, print both results, and stop.

    Args:
        prompt: The prompt of the image.
        question: The prompt about the generated image.
        folder: The folder in which the image is saved.
        console: Writes to standard error; the result events are printed on standard output.

    Returns:
        0, or 1 if a job failed.
    """
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="generation-demo-") as directory,
        DevStack(Path(directory), persist=False) as stack,
    ):
        console.print(_addresses(stack))
        _, gateway = _start_processes(stack, console)
        if gateway is not None:
            console.print(f"HTTP on {gateway.url}", highlight=False)
        with _environment(stack):
            settings = Settings.load()
        return asyncio.run(
            _demo(settings, prompt, question, folder=folder, console=console, started=started)
        )


def up(directory: Path, console: Console) -> int:
    """Run the development stack until Ctrl-C or SIGTERM.

    Returns:
        0, or 70 if a worker or the gateway exited unexpectedly.
    """
    with DevStack(directory, persist=True) as stack:
        console.print(_addresses(stack))
        daemons, gateway = _start_processes(stack, console)
        instructions = _instructions(stack, daemons, gateway)
        console.print(instructions, highlight=False, soft_wrap=True, markup=False)
        children = [*daemons, *([] if gateway is None else [gateway])]
        while True:
            for child in children:
                if not child.alive:
                    console.print(f"{child.name} exited unexpectedly with code {child.returncode}")
                    return 70
            time.sleep(CHECK_INTERVAL)


def _start_processes(
    stack: DevStack, console: Console
) -> tuple[list[Daemon], GatewayServer | None]:
    """Start a worker of each task and a gateway, and wait until all of them are ready.

    The libraries of the gateway are an extra. Without them no gateway is started.
    """
    with _environment(stack):
        asyncio.run(apply(Settings.load()))
    settings = {
        # Override variables that could be meant for only one of the two workers.
        "MODEL_ID": "",
        "MODEL_DEFAULTS": "",
        "MODEL_ADAPTERS": "",
        "MODEL_SAFETY_CHECKER": "",
        "CONSUMER_NAME": "",
        # torch creates this folder on import, by default in the temporary folder of the system.
        "TORCHINDUCTOR_CACHE_DIR": str(stack.directory / "torchinductor"),
    }
    daemons = [
        stack.start_daemon(str(task), {**settings, "MODEL_TYPE": str(task)}) for task in Task
    ]
    gateway = None
    if all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn")):
        gateway = stack.start_gateway("gateway", {})
    console.print("loading the models …")
    for daemon in daemons:
        daemon.wait_ready()
    if gateway is not None:
        gateway.wait_ready()
    return daemons, gateway


@contextmanager
def _environment(stack: DevStack) -> Iterator[None]:
    """Put the stack's settings into this process's environment, where `Settings` reads them.

    Variables that name other servers, their credentials or one worker are removed in the block.
    """
    before = dict(os.environ)
    for name in before:
        foreign = name.upper().startswith(("NATS_", "S3_", "MODEL_", "GATEWAY_"))
        if foreign or name.upper() == "CONSUMER_NAME":
            del os.environ[name]
    os.environ.update(stack.environment())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


async def _demo(
    settings: Settings,
    prompt: str,
    question: str,
    *,
    folder: Path,
    console: Console,
    started: float,
) -> int:
    bus = await connect(settings, name="generation demo", within=CONNECT_WITHIN)
    client = GenerationClient(bus.client, root=settings.subjects.root)
    try:
        console.print(f"text to image: {prompt}", markup=False)
        image_event = await _run(client, text_to_image(prompt), console)
        if not isinstance(image_event, SucceededEvent):
            return 1
        name = f"demo-{image_event.request_id[:8]}"
        files = await save_images(client, image_event, folder, name)
        seconds = time.monotonic() - started
        text = f"{summary(image_event, files)} ({seconds:.1f} s after the start)"
        console.print(text, soft_wrap=True)
        image = next(o for o in image_event.outputs if isinstance(o, ImageArtifact))
        console.print(f"image to text: {question}", markup=False)
        reference = ArtifactReference(bucket=image.bucket, key=image.key)
        text_event = await _run(client, image_to_text(question, (reference,)), console)
        console.print(summary(text_event, []), markup=False, soft_wrap=True)
        return 0 if isinstance(text_event, SucceededEvent) else 1
    finally:
        await bus.close()


async def _run(client: GenerationClient, request: Request, console: Console) -> ResultEvent:
    with ProgressBar(console) as bar:
        event = await send_request(client, request, bar)
    print(encode(event).decode(), flush=True)  # noqa: T201 - the result is this command's output
    return event


def _addresses(stack: DevStack) -> str:
    return f"nats-server on {stack.nats.url}, S3 on {stack.store.endpoint}"


def _instructions(stack: DevStack, daemons: list[Daemon], gateway: GatewayServer | None) -> str:
    nats = f"nats --server {stack.nats.url}"
    probes = "\n".join(f"  {daemon.name:<14} {daemon.probes_url}/readyz" for daemon in daemons)
    return f"""
Running until Ctrl-C. Data, ports and credentials are stored in {stack.directory}.

  NATS           {stack.nats.url}
  S3             {stack.store.endpoint} (bucket {stack.store.bucket})
{probes}
  HTTP           {_gateway_line(gateway)}
{"" if gateway is None else _http_example(gateway)}
Generate an image:

  NATS_URL={stack.nats.url} uv run consumer request text-to-image "a red circle"

With the nats command line tool, results in one terminal and requests in another:

  {nats} subscribe 'generation.result.>'
  {nats} publish --jetstream generation.request.text_to_image '{{"prompt":"a red circle"}}'
"""


def _gateway_line(gateway: GatewayServer | None) -> str:
    if gateway is None:
        return "none: install the extra 'gateway'"
    return f"{gateway.url} (web page), {gateway.url}/v1 (OpenAI's API), {gateway.url}/docs"


def _http_example(gateway: GatewayServer) -> str:
    return f"""
Over HTTP, with OpenAI's API:

  curl {gateway.url}/v1/images/generations --json '{{"prompt":"a red circle"}}'
"""
