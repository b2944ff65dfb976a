"""`consumer up` and `consumer demo`: the whole system on one machine, without Docker."""

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
    ask,
    image_to_text,
    save_pictures,
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

LOOK_EVERY = 0.5  # seconds between two looks at the children of `up`


def demo(prompt: str, question: str, folder: Path, console: Console) -> int:
    """Draw, describe, show both results, stop everything.

    Args:
        prompt: What to draw.
        question: What to ask about the picture.
        folder: Where the picture is saved.
        console: Standard error; the result events go to standard output.

    Returns:
        0, or 1 when a job failed.
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
    """Keep the stack running until Ctrl-C or SIGTERM.

    Returns:
        0, or 70 when a daemon or the gateway ended by itself.
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
                    console.print(f"{child.name} ended by itself with code {child.returncode}")
                    return 70
            time.sleep(LOOK_EVERY)


def _start_processes(
    stack: DevStack, console: Console
) -> tuple[list[Daemon], GatewayServer | None]:
    """Start a daemon of each task and a gateway, and wait until all of them are ready.

    The gateway's libraries are an extra: without it there is none.
    """
    with _environment(stack):
        asyncio.run(apply(Settings.load()))
    settings = {
        # Nothing of the environment that could only be meant for one of the two.
        "MODEL_ID": "",
        "MODEL_DEFAULTS": "",
        "MODEL_ADAPTERS": "",
        "MODEL_SAFETY_CHECKER": "",
        "CONSUMER_NAME": "",
        # torch makes the folder for its compiler when it is imported, else in the temporary folder.
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
    """The stack's settings in this process's environment, where `Settings` reads them.

    Without what names other servers, their credentials or one of the two daemons.
    """
    before = dict(os.environ)
    for name in before:
        elsewhere = name.upper().startswith(("NATS_", "S3_", "MODEL_", "GATEWAY_"))
        if elsewhere or name.upper() == "CONSUMER_NAME":
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
        console.print(f"drawing: {prompt}", markup=False)
        drawn = await _show(client, text_to_image(prompt), console)
        if not isinstance(drawn, SucceededEvent):
            return 1
        files = await save_pictures(client, drawn, folder, f"demo-{drawn.request_id[:8]}")
        seconds = time.monotonic() - started
        console.print(f"{summary(drawn, files)} ({seconds:.1f} s after the start)", soft_wrap=True)
        picture = next(o for o in drawn.outputs if isinstance(o, ImageArtifact))
        console.print(f"asking about it: {question}", markup=False)
        reference = ArtifactReference(bucket=picture.bucket, key=picture.key)
        described = await _show(client, image_to_text(question, (reference,)), console)
        console.print(summary(described, []), markup=False, soft_wrap=True)
        return 0 if isinstance(described, SucceededEvent) else 1
    finally:
        await bus.close()


async def _show(client: GenerationClient, request: Request, console: Console) -> ResultEvent:
    with ProgressBar(console) as bar:
        event = await ask(client, request, bar)
    print(encode(event).decode(), flush=True)  # noqa: T201 - the result is this command's output
    return event


def _addresses(stack: DevStack) -> str:
    return f"nats-server on {stack.nats.url}, S3 on {stack.store.endpoint}"


def _instructions(stack: DevStack, daemons: list[Daemon], gateway: GatewayServer | None) -> str:
    nats = f"nats --server {stack.nats.url}"
    probes = "\n".join(f"  {daemon.name:<14} {daemon.probes_url}/readyz" for daemon in daemons)
    return f"""
Running until Ctrl-C. Data, ports and credentials stay in {stack.directory}.

  NATS           {stack.nats.url}
  S3             {stack.store.endpoint} (bucket {stack.store.bucket})
{probes}
  HTTP           {_gateway_line(gateway)}
{"" if gateway is None else _http_example(gateway)}
Ask for a picture and wait for it:

  NATS_URL={stack.nats.url} uv run consumer request text-to-image "a red circle"

With the nats command line, the results in one terminal and a request in another:

  {nats} subscribe 'generation.result.>'
  {nats} publish --jetstream generation.request.text_to_image '{{"prompt":"a red circle"}}'
"""


def _gateway_line(gateway: GatewayServer | None) -> str:
    if gateway is None:
        return "none: install the extra 'gateway'"
    return f"{gateway.url} (the page), {gateway.url}/v1 (OpenAI's API), {gateway.url}/docs"


def _http_example(gateway: GatewayServer) -> str:
    return f"""
Over HTTP, as OpenAI's clients ask:

  curl {gateway.url}/v1/images/generations --json '{{"prompt":"a red circle"}}'
"""
