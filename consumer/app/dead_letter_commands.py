"""`consumer dead-letters`: list dead letters, show one in full, and replay them."""

import base64
import json
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from io import StringIO
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from consumer.bus.connection import Bus, connect
from consumer.bus.dead_letters.listing import DeadLetterNotFound, DeadLetters, StoredDeadLetter
from consumer.bus.dead_letters.replay import NotReplayed, Replayer
from consumer.settings import Settings

CONNECT_WITHIN = 5.0  # seconds
EXIT_REFUSED = 1  # a dead letter does not exist, or cannot be replayed
ID_PREFIX = "id:"  # request ids contain no colon
TABLE_WIDTH = 10_000  # columns; at the terminal's width, rich would cut ids
COLUMNS = ("SEQUENCE", "STORED", "QUEUE", "REQUEST ID", "CODE", "ATTEMPTS", "WORKER", "REASON")


async def print_list(settings: Settings, *, code: str | None, as_json: bool) -> None:
    """Print every dead letter, oldest first: a table, or one JSON object per line.

    Args:
        settings: NATS_* and the subject root.
        code: Only dead letters with this failure code.
        as_json: Print each line as its dead letter is read. A table is printed after the last one.
    """
    async with _connected(settings) as bus:
        letters = _with_code(DeadLetters(bus, settings.subjects), code)
        if as_json:
            async for letter in letters:
                click.echo(json.dumps(_fields(letter)))
            return
        rows = [_row(letter) async for letter in letters]
    if not rows:
        click.echo("no dead letters", err=True)
        return
    click.echo(_table(rows))


async def print_letter(settings: Settings, name: str, *, as_json: bool) -> int:
    """Print one dead letter: headers on standard error, the bytes of the body on standard output.

    Returns:
        The exit code.
    """
    async with _connected(settings) as bus:
        letters = DeadLetters(bus, settings.subjects)
        try:
            letter = await letters.read((await _sequences(letters, [name]))[name])
        except (DeadLetterNotFound, KeyError):
            click.echo(f"consumer: {_printable(name)}: no such dead letter", err=True)
            return EXIT_REFUSED
    if as_json:
        click.echo(json.dumps({**_fields(letter), "headers": letter.originals, **_body(letter)}))
        return 0
    click.echo(f"Sequence: {letter.sequence}\nStored: {_time(letter)}", err=True)
    for header, text in letter.headers.items():
        click.echo(f"{_printable(header)}: {_printable(text)}", err=True)
    click.echo(err=True)
    click.echo(letter.body or b"", nl=False)
    if sys.stdout.isatty():
        click.echo()
    return 0


async def replay(settings: Settings, names: Sequence[str]) -> int:
    """Replay dead letters by sequence or request id, and print the outcome of each.

    Returns:
        The exit code.

    Raises:
        QueueFull: The remaining dead letters are unchanged.
    """
    async with _connected(settings) as bus:
        letters = DeadLetters(bus, settings.subjects)
        sequences = await _sequences(letters, names)
        refused = False
        for name in dict.fromkeys(names):
            if name in sequences:
                refused |= not await _replayed(bus, settings, sequences[name])
            else:
                click.echo(f"{_printable(name)}: no such dead letter")
                refused = True
    return EXIT_REFUSED if refused else 0


async def replay_all(settings: Settings, *, code: str | None) -> int:
    """Replay every present dead letter, oldest first, and print the outcome of each.

    Returns:
        The exit code.

    Raises:
        QueueFull: The remaining dead letters are unchanged.
    """
    async with _connected(settings) as bus:
        letters = _with_code(DeadLetters(bus, settings.subjects), code)
        # All sequences are read first: a request that fails again is not replayed twice.
        sequences = [letter.sequence async for letter in letters]
        replayed = [await _replayed(bus, settings, sequence) for sequence in sequences]
    if not replayed:
        click.echo("no dead letters", err=True)
    return 0 if all(replayed) else EXIT_REFUSED


@asynccontextmanager
async def _connected(settings: Settings) -> AsyncIterator[Bus]:
    bus = await connect(settings, name="generation dead letters", within=CONNECT_WITHIN)
    try:
        yield bus
    finally:
        await bus.close()


async def _with_code(letters: DeadLetters, code: str | None) -> AsyncIterator[StoredDeadLetter]:
    async for letter in letters.list_all():
        if code in {None, letter.code}:
            yield letter


async def _sequences(letters: DeadLetters, names: Iterable[str]) -> dict[str, int]:
    """Return the sequence of each name: digits are a sequence, an id is its newest dead letter."""
    numbers = {name: int(name) for name in names if name.isascii() and name.isdecimal()}
    ids = {name: name.removeprefix(ID_PREFIX) for name in names if name not in numbers}
    found: dict[str, int] = {}
    if ids:
        request_ids = set(ids.values())
        async for letter in letters.list_all():
            if letter.request_id in request_ids:
                found[letter.request_id] = letter.sequence
    return numbers | {name: found[id_] for name, id_ in ids.items() if id_ in found}


async def _replayed(bus: Bus, settings: Settings, sequence: int) -> bool:
    try:
        letter = await DeadLetters(bus, settings.subjects).read(sequence)
    except DeadLetterNotFound:
        click.echo(f"{sequence}: no such dead letter")
        return False
    label = f"{sequence} {_printable(letter.request_id)}"
    try:
        outcome = await Replayer(bus, settings.subjects).replay(letter)
    except NotReplayed as error:
        click.echo(f"{label}: not replayed: {error}")
        return False
    click.echo(f"{label}: {outcome.value}")
    return True


def _table(rows: list[list[Text]]) -> str:
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console(file=StringIO(), width=TABLE_WIDTH, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _row(letter: StoredDeadLetter) -> list[Text]:
    request = (str(letter.sequence), _time(letter), letter.queue, letter.request_id, letter.code)
    cells = (*request, letter.attempts, letter.worker, letter.reason)
    return [Text(_printable(cell)) for cell in cells]  # rich reads brackets in a str as markup


def _fields(letter: StoredDeadLetter) -> dict[str, Any]:
    return {
        "sequence": letter.sequence,
        "stored_at": _time(letter),
        "task": letter.task,
        "queue": letter.queue,
        "request_id": letter.request_id,
        "code": letter.code,
        "reason": letter.reason,
        "attempts": int(letter.attempts) if letter.attempts.isdecimal() else None,
        "worker": letter.worker,
        "subject": letter.subject,
        "requested_at": letter.requested_at,
        "size": letter.size,
        "truncated": letter.truncated,
    }


def _body(letter: StoredDeadLetter) -> dict[str, str]:
    body = letter.body or b""
    try:
        return {"body": body.decode()}
    except UnicodeDecodeError:
        return {"body_base64": base64.b64encode(body).decode()}


def _time(letter: StoredDeadLetter) -> str:
    return letter.stored_at.isoformat(timespec="seconds").replace("+00:00", "Z")


def _printable(text: str) -> str:
    """Replace control characters, which a publisher could use to control the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
