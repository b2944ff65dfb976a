"""`consumer queues`: list the queues, create one, and remove one."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import click

from consumer.app.composition import make_topology
from consumer.bus.connection import Bus, connect, require_server_version, wait_until_available
from consumer.bus.queue_directory import QueueDirectory
from consumer.bus.queue_removal import QueueInUse, count_requests, remove_queue
from consumer.settings import Settings, SettingsError
from generation_contracts.base import DEFAULT_QUEUES
from generation_contracts.queues import QueueInfo
from generation_contracts.subjects import require_queue_name

CONNECT_WITHIN = 5.0  # seconds; a person waits
API_WITHIN = 10.0  # seconds
EXIT_REFUSED = 1  # the queue has requests or workers, or does not exist
CREATED_BY = "consumer queues create"
COLUMNS = ("QUEUE", "TASK", "MODEL", "REQUESTS")


async def print_queues(settings: Settings, *, as_json: bool) -> None:
    """Print every queue: a table, or one JSON object per line."""
    async with _connected(settings) as bus:
        queues = (await QueueDirectory(bus, settings.subjects).queues()).values()
        requests = [await count_requests(bus, settings.subjects, each.name) for each in queues]
    if as_json:
        for queue, count in zip(queues, requests, strict=True):
            fields = {"queue": queue.name, "task": queue.task, "model": queue.model}
            more = {"created_by": queue.created_by, "requests": count}
            click.echo(json.dumps(fields | more))
        return
    rows = [
        COLUMNS,
        *(
            (queue.name, str(queue.task), _printable(queue.model or "-"), str(count))
            for queue, count in zip(queues, requests, strict=True)
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


async def create_queue(settings: Settings, queue: QueueInfo) -> dict[str, str]:
    """Create the streams and durables of a queue, or update them to the settings.

    Returns:
        The change of each resource of the queue, by name.

    Raises:
        SettingsError: The name cannot be used for a queue of this task.
        BusUnavailable, TopologyError: The text is one line.
    """
    try:
        require_queue_name(queue.name, queue.task)
    except ValueError as error:
        raise SettingsError(f"NAME: {error}") from None
    if queue.is_default:
        raise SettingsError(f"NAME: {queue.name} is a default queue; run `consumer apply`")
    async with _connected(settings) as bus:
        topology = make_topology(settings, bus, queue=replace(queue, created_by=CREATED_BY))
        applying = partial(topology.apply, (queue.name,))
        return dict(await wait_until_available(applying, deadline=time.monotonic() + API_WITHIN))


async def remove(settings: Settings, name: str, *, force: bool) -> int:
    """Remove a queue and print the outcome.

    Returns:
        The exit code.
    """
    if name in DEFAULT_QUEUES:
        click.echo(f"consumer: {name}: a default queue cannot be removed", err=True)
        return EXIT_REFUSED
    async with _connected(settings) as bus:
        if name not in await QueueDirectory(bus, settings.subjects).queues():
            click.echo(f"consumer: {_printable(name)}: there is no such queue", err=True)
            return EXIT_REFUSED
        try:
            await remove_queue(bus, settings.subjects, name, force=force)
        except QueueInUse as error:
            click.echo(f"consumer: {error}", err=True)
            return EXIT_REFUSED
    click.echo(f"{name}: removed")
    return 0


@asynccontextmanager
async def _connected(settings: Settings) -> AsyncIterator[Bus]:
    bus = await connect(settings, name="generation queues", within=CONNECT_WITHIN)
    try:
        require_server_version(bus)
        yield bus
    finally:
        await bus.close()


def _printable(text: str) -> str:
    """Replace control characters, which could control the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
