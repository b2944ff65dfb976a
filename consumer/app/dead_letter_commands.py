"""The operator's side of dead letters: a list, one letter in full, and what a replay has done."""

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
EXIT_REFUSED = 1  # a letter is not there, or cannot be replayed
ID_PREFIX = "id:"  # no request id has a colon
WIDE = 10_000  # columns: rich would cut ids on a narrow terminal, which wraps lines by itself
COLUMNS = ("SEQUENCE", "STORED", "TASK", "REQUEST ID", "CODE", "ATTEMPTS", "WORKER", "REASON")


async def print_list(settings: Settings, *, code: str | None, as_json: bool) -> None:
    """Print every letter, oldest first: a table, or one JSON object per line.

    Args:
        settings: NATS_* and the root.
        code: Only letters with this code of failure.
        as_json: Lines are printed as the letters come; a table is made when all are there.
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
    """Print one letter: its headers on standard error, the bytes of its body on standard output.

    Returns:
        The exit code.
    """
    async with _connected(settings) as bus:
        letters = DeadLetters(bus, settings.subjects)
        try:
            letter = await letters.read((await _sequences(letters, [name]))[name])
        except (DeadLetterNotFound, KeyError):
            click.echo(f"consumer: {_plain(name)}: no such letter", err=True)
            return EXIT_REFUSED
    if as_json:
        click.echo(json.dumps({**_fields(letter), "headers": letter.originals, **_body(letter)}))
        return 0
    click.echo(f"Sequence: {letter.sequence}\nStored: {_time(letter)}", err=True)
    for header, text in letter.headers.items():
        click.echo(f"{_plain(header)}: {_plain(text)}", err=True)
    click.echo(err=True)
    click.echo(letter.body or b"", nl=False)
    if sys.stdout.isatty():
        click.echo()
    return 0


async def replay(settings: Settings, names: Sequence[str]) -> int:
    """Replay letters by their names, and print what has become of each.

    Returns:
        The exit code.

    Raises:
        QueueFull: The rest is left as it is.
    """
    async with _connected(settings) as bus:
        letters = DeadLetters(bus, settings.subjects)
        sequences = await _sequences(letters, names)
        refused = False
        for name in dict.fromkeys(names):
            if name in sequences:
                refused |= not await _replayed(bus, settings, sequences[name])
            else:
                click.echo(f"{_plain(name)}: no such letter")
                refused = True
    return EXIT_REFUSED if refused else 0


async def replay_all(settings: Settings, *, code: str | None) -> int:
    """Replay every letter that is there when it begins, oldest first, and print the same.

    Returns:
        The exit code.

    Raises:
        QueueFull: The rest is left as it is.
    """
    async with _connected(settings) as bus:
        letters = _with_code(DeadLetters(bus, settings.subjects), code)
        # First all sequences: what fails again in the meantime is not for this call.
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
    """The sequences that names stand for: digits are one, an id is the newest letter of it."""
    numbers = {name: int(name) for name in names if name.isascii() and name.isdecimal()}
    ids = {name: name.removeprefix(ID_PREFIX) for name in names if name not in numbers}
    found: dict[str, int] = {}
    if ids:
        wanted = set(ids.values())
        async for letter in letters.list_all():
            if letter.request_id in wanted:
                found[letter.request_id] = letter.sequence
    return numbers | {name: found[name_] for name, name_ in ids.items() if name_ in found}


async def _replayed(bus: Bus, settings: Settings, sequence: int) -> bool:
    try:
        letter = await DeadLetters(bus, settings.subjects).read(sequence)
    except DeadLetterNotFound:
        click.echo(f"{sequence}: no such letter")
        return False
    which = f"{sequence} {_plain(letter.request_id)}"
    try:
        outcome = await Replayer(bus, settings.subjects).replay(letter)
    except NotReplayed as error:
        click.echo(f"{which}: not replayed: {error}")
        return False
    click.echo(f"{which}: {outcome.value}")
    return True


def _table(rows: list[list[Text]]) -> str:
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console(file=StringIO(), width=WIDE, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _row(letter: StoredDeadLetter) -> list[Text]:
    task = "" if letter.task is None else str(letter.task)
    cells = (str(letter.sequence), _time(letter), task, letter.request_id, letter.code)
    # As Text: brackets in it are no markup.
    return [Text(_plain(cell)) for cell in (*cells, letter.attempts, letter.worker, letter.reason)]


def _fields(letter: StoredDeadLetter) -> dict[str, Any]:
    return {
        "sequence": letter.sequence,
        "stored_at": _time(letter),
        "task": letter.task,
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


def _plain(text: str) -> str:
    """A text that cannot steer the terminal: headers come from whoever may publish."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
