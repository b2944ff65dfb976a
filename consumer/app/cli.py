"""The `consumer` command line.

Each command imports its own modules, so that `--help` and the light commands never import torch.
"""

import asyncio
import gc
import json
import keyword
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

    from consumer.bus.connection import Bus
    from consumer.gateway.keys import KeyFile
    from consumer.settings import Settings
    from generation_client import GenerationClient
    from generation_contracts import Request, TaskSpec

EXIT_FAILED = 1  # the job failed
EXIT_USAGE = 2  # usage or settings
EXIT_UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h: a service cannot be reached or used
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in shells; also used for SIGTERM

DEADLINE_MARGIN = 5.0  # seconds after the deadline in which the worker's failed event may arrive

T = TypeVar("T")


class _Range(click.FloatRange):
    """A range of numbers that refuses `nan`, which click accepts."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


config_option = click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file with settings; the environment has precedence.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="generation-consumer")
def cli() -> None:
    """Message-driven generation: requests from NATS JetStream, outputs in S3, events on NATS."""


@cli.command()
@config_option
def run(config: Path | None) -> None:
    """Run a worker: load one model, serve one task until SIGTERM."""
    settings = _settings(config)
    _require_task(settings)
    from consumer.app.daemon import run as run_daemon
    from consumer.settings import SettingsError

    _start_logging(settings)
    try:
        _imported()
        code = run_daemon(settings)
    except SettingsError as error:
        _fail(str(error), EXIT_USAGE)
    sys.exit(code)


@cli.group(invoke_without_command=True)
@config_option
@click.pass_context
def gateway(context: click.Context, config: Path | None) -> None:
    """Run the HTTP gateway until SIGTERM, or manage its keys.

    The gateway serves OpenAI's API, jobs, events and a web page.
    """
    context.obj = config
    if context.invoked_subcommand is not None:
        return
    settings = _settings(config)
    serve = _gateway_part("serve").serve
    from consumer.settings import SettingsError

    _start_logging(settings)
    try:
        _imported()
        code = serve(settings)
    except SettingsError as error:
        _fail(str(error), EXIT_USAGE)
    except KeyboardInterrupt:  # during startup
        code = 0
    sys.exit(code)


@gateway.group("keys")
def gateway_keys() -> None:
    """Manage the API keys of the gateway, in the file GATEWAY_KEYS."""


def _bound(name: str, text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(name, type=click.IntRange(min=1), metavar="N", help=text)


@gateway_keys.command("add")
@click.argument("tenant")
@_bound("--waiting", "Most requests of the tenant that are queued or running.")
@_bound("--per-minute", "Most requests per minute, at each gateway.")
@_bound("--pixels", "Largest width times height of one image.")
@_bound("--steps", "Most denoising steps of one request.")
@_bound("--images", "Most images of one request.")
@config_option
@click.pass_obj
def gateway_keys_add(
    of_group: Path | None, /, config: Path | None, tenant: str, **bounds: int | None
) -> None:
    """Create a key for TENANT and print it.

    The key itself is not stored. All keys of a tenant see the same jobs. To replace a key, add a
    new one, distribute it, then revoke the old one. A running gateway applies changes at once.
    """
    file = _key_file(config or of_group)
    from consumer.gateway.tenants import Bounds

    new = _guarded(lambda: file.add(tenant, Bounds(**bounds)))
    click.echo(new.text)
    click.echo(f"key {new.id} of tenant {tenant}: save it now, it is not shown again", err=True)


@gateway_keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@config_option
@click.pass_obj
def gateway_keys_list(of_group: Path | None, /, config: Path | None, *, as_json: bool) -> None:
    """List all keys: id, tenant, creation time and bounds.

    The file has only the hashes of the keys.
    """
    file = _key_file(config or of_group)
    document = _guarded(file.read)
    for key_id, entry in document.keys.items():
        bounds = entry.bounds.model_dump(exclude_none=True)
        created = entry.created.isoformat().replace("+00:00", "Z")
        if as_json:
            fields = {"id": key_id, "tenant": entry.tenant, "created": created, "bounds": bounds}
            click.echo(json.dumps(fields))
        else:
            text = " ".join(f"{name}={value}" for name, value in bounds.items())
            click.echo(f"{key_id}  {created}  {entry.tenant}  {text}".rstrip())


@gateway_keys.command("revoke")
@click.argument("key", metavar="KEY_ID")
@config_option
@click.pass_obj
def gateway_keys_revoke(of_group: Path | None, /, config: Path | None, key: str) -> None:
    """Remove a key.

    The tenant's jobs remain available to its other keys.
    """
    file = _key_file(config or of_group)
    key_id = _guarded(lambda: file.revoke(key))
    click.echo(f"{key_id}: revoked")


@cli.command()
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".consumer"),
    show_default=True,
    help="Directory for data, ports and credentials.",
)
def up(directory: Path) -> None:
    """Run the whole system for development, until Ctrl-C.

    The system is NATS, an S3 server, one worker of each task and a gateway, all on loopback.
    """
    from consumer.app.development import up as run_up

    sys.exit(_guarded(lambda: run_up(directory, _console()), interrupted=0))


@cli.command()
@click.argument("prompt", default="a small red star on a white background at the top")
@click.option(
    "--question",
    default="Describe this picture.",
    show_default=True,
    help="Prompt about the generated image.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the result events; default if standard output is no terminal.",
)
@click.option("--open", "opens", is_flag=True, help="Open the image with the system's viewer.")
def demo(prompt: str, question: str, *, as_json: bool, opens: bool) -> None:
    """Try it: start everything, draw PROMPT, describe it, stop.

    The image is saved in the working directory. Terminals that can display images show it.
    """
    from consumer.app.sender_commands import new_request
    from generation_contracts import ArtifactReference, ImageToTextRequest, TextToImageRequest

    make_request = partial(new_request, TextToImageRequest)
    request = _build_request(make_request, {"prompt": prompt, "deadline": None})
    image = ArtifactReference(bucket="generation", key="the image, whose key is not known yet")
    about = {"prompt": question, "images": (image,), "deadline": None}
    _build_request(partial(new_request, ImageToTextRequest), about, names={"prompt": "--question"})
    from consumer.app.development import demo as run_demo

    as_json = as_json or not sys.stdout.isatty()
    console = _console()
    sys.exit(
        _guarded(
            lambda: run_demo(request, question, Path.cwd(), console, as_json=as_json, opens=opens)
        )
    )


@cli.command()
@config_option
@click.option(
    "--replicas",
    type=click.IntRange(1, 1_000),
    help="Number of workers of each task; multiplies max_ack_pending. "
    "(Stream replicas are set by NATS_REPLICAS.)",
)
def apply(config: Path | None, replicas: int | None) -> None:
    """Create or update the streams, the durables and the bucket."""
    settings = _settings(config)
    from consumer.app.apply import apply as run_apply
    from consumer.app.apply import for_workers

    if replicas is not None:
        settings = for_workers(settings, replicas)

    def report(line: str) -> None:
        click.echo(line, err=True)

    for name, change in _guarded(lambda: asyncio.run(run_apply(settings, report))).items():
        click.echo(f"{name}: {change}")


@cli.command()
@config_option
@click.option("--model", is_flag=True, help="Also load the model.")
@click.option("--verbose", "-v", is_flag=True, help="Also print the settings that are not set.")
def check(config: Path | None, *, model: bool, verbose: bool) -> None:
    """Test what a worker needs: settings, NATS, streams and S3."""
    settings = _settings(config)
    _require_task(settings)
    from consumer.app.check import Finding
    from consumer.app.check import check as run_check

    for name, value in settings.shown(only_set=not verbose).items():
        click.echo(f"{name}={value}")
    for name in settings.unknown_variables():
        click.echo(f"{name}: not a setting, not read")

    def report(finding: Finding) -> None:
        click.echo(f"{'FAIL' if finding.exit_code else 'ok  '} {finding.name}: {finding.text}")

    sys.exit(_guarded(lambda: asyncio.run(run_check(settings, report, model=model))))


@cli.command()
@click.option("--json-schema", is_flag=True, help="Print JSON Schemas of the messages instead.")
@click.option("--markdown", is_flag=True, help="Print a Markdown page instead.")
@config_option
def schema(config: Path | None, *, json_schema: bool, markdown: bool) -> None:
    """Print the AsyncAPI 3 document of all messages, as JSON."""
    from generation_contracts.reference import markdown as page_of
    from generation_contracts.schema import asyncapi, json_schemas

    if markdown:
        text = page_of(asyncapi(_settings(config).subjects)).rstrip("\n")
        _guarded(lambda: click.echo(text))
        return
    document = json_schemas() if json_schema else asyncapi(_settings(config).subjects)
    text = json.dumps(document, indent=2, ensure_ascii=False)
    _guarded(lambda: click.echo(text))


class _TaskCommands(click.Group):
    """One command for each task, made when it is needed: the contracts import pydantic."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        self._add_commands()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return a command; None if there is no such task."""
        self._add_commands()
        return super().get_command(ctx, name)

    def _add_commands(self) -> None:
        from generation_contracts import TASKS

        if not self.commands:
            for task, spec in TASKS.items():
                self.add_command(_task_command(str(task).replace("_", "-"), spec))


@cli.group(cls=_TaskCommands)
def request() -> None:
    """Publish a request to NATS and wait for its result."""


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all requests have."""
    for option in (
        config_option,
        click.option(
            "--json", "as_json", is_flag=True, help="Print the result event; save nothing."
        ),
        click.option("--seed", type=int),
        click.option("--model", help="Name of the model; default: the model of the queue."),
        click.option(
            "--queue", help="Name of the queue; default: the queue of the model or of the task."
        ),
        click.option(
            "--deadline",
            type=_Range(0, 1e7, min_open=True),
            metavar="SECONDS",
            help="Fail the request after this time; without it the request waits for a worker.",
        ),
        click.option("--id", "request_id", help="Request id; default: a new one."),
    ):
        command = option(command)
    return command


def _task_command(name: str, spec: "TaskSpec") -> click.Command:
    """Return the command that sends a request of a task and waits for its result."""
    from consumer.app.task_options import decorators

    def send(config: Path | None, **parameters: Any) -> None:
        _send_task(spec, _settings(config), parameters)

    command: Callable[..., None] = common_options(send)
    added = list(decorators(spec))
    if spec.stores_files:
        folder = click.Path(file_okay=False, exists=True, path_type=Path)
        text = "Folder for the files; default: the working directory."
        added.append(click.option("--output", type=folder, default=Path(), help=text))
    if spec.image_fields:
        text = "Upload the files unchanged, also those that fit into the request."
        added.append(click.option("--upload", is_flag=True, help=text))
    for decorator in reversed(added):
        command = decorator(command)
    text = f"{spec.request.__doc__}\n\nThe result is "
    text += "saved as files." if spec.stores_files else "printed."
    if spec.image_fields:
        text += (
            "\n\nAn IMAGE is a file of any size, or s3://bucket/key. Files that do not fit into "
            "the request are scaled to the pixels that the worker uses, or uploaded."
        )
    return click.command(name, help=text)(command)


@cli.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@config_option
def upload(config: Path | None, file: Path) -> None:
    """Upload the image FILE and print its s3:// address.

    S3 credentials are not needed, but a worker must be running. The store deletes the file after a
    day.
    """
    settings = _settings(config)

    async def upload_file(client: "GenerationClient", _: "Bus") -> int:
        reference = await client.upload(file)
        click.echo(f"s3://{reference.bucket}/{reference.key}")
        return 0

    sys.exit(_with_client(settings, upload_file))


@cli.command()
@click.argument("request_id", metavar="ID")
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print the reply as JSON; do not wait.")
def cancel(config: Path | None, request_id: str, *, as_json: bool) -> None:
    """Cancel the request ID and wait until it has stopped.

    The request may be queued or running. Exit codes: 0 the request is cancelled, 1 it has already
    ended or does not exist, 69 no worker is available to cancel it.
    """
    settings = _settings(config)
    from consumer.app.sender_commands import cancelled_line
    from generation_contracts import encode
    from generation_contracts.subjects import is_request_id

    if not is_request_id(request_id):
        _fail("ID: 1-64 characters of A-Z a-z 0-9 _ -", EXIT_USAGE)

    async def cancel_and_wait(client: "GenerationClient", _: "Bus") -> int:
        reply = await client.cancel(request_id)
        if as_json:
            click.echo(encode(reply).decode())
            return 0 if reply.status in {"cancelled", "stopping"} else EXIT_FAILED
        ended = reply.result
        if reply.status == "stopping":
            click.echo("stopping …", err=True)
            ended = await client.ended(request_id)
        line = cancelled_line(request_id, ended)
        click.echo(line, err=line != "cancelled")
        return 0 if line == "cancelled" else EXIT_FAILED

    sys.exit(_with_client(settings, cancel_and_wait))


@cli.group()
def new() -> None:
    """Write files to begin with."""


@new.command("runner")
@click.argument("name")
def new_runner(name: str) -> None:
    """Write a custom runner NAME.py and its test."""
    from consumer.app.new_runner import NameTaken, write_runner

    if re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) is None or keyword.iskeyword(name):
        _fail("NAME: lower-case letters, digits and single _, such as my_model", EXIT_USAGE)
    try:
        runner, test = _guarded(lambda: write_runner(name, Path.cwd()))
    except NameTaken as error:
        _fail(str(error), EXIT_USAGE)
    click.echo(f"wrote {runner.name} and {test.name}; try: pytest {test.name}")


@cli.group()
def queues() -> None:
    """List, create and remove the queues of models."""


@queues.command("list")
@config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def queues_list(config: Path | None, *, as_json: bool) -> None:
    """List all queues with their tasks and models. No worker is needed."""
    settings = _settings(config)
    from consumer.app.queue_commands import print_queues

    _guarded(lambda: asyncio.run(print_queues(settings, as_json=as_json)))


@queues.command("create")
@click.argument("name")
@click.option("--task", required=True, help="Task of the requests, for example text_to_image.")
@click.option("--model", help="Name of the model, for requests that name it: a hub id or any text.")
@config_option
def queues_create(config: Path | None, name: str, task: str, model: str | None) -> None:
    """Create the queue NAME, or update it to the settings.

    Its workers run with CONSUMER_QUEUE=NAME. NAME has at most 32 characters of a-z, 0-9 and -.
    """
    settings = _settings(config)
    from consumer.app.queue_commands import create_queue
    from generation_contracts import Task
    from generation_contracts.queues import QueueInfo

    task = task.lower().replace("-", "_")
    if task not in set(Task):
        _fail(f"--task: must be one of {', '.join(Task)}", EXIT_USAGE)
    queue = QueueInfo(name, Task(task), model)
    for resource, change in _guarded(lambda: asyncio.run(create_queue(settings, queue))).items():
        click.echo(f"{resource}: {change}")


@queues.command("remove")
@click.argument("name")
@click.option("--force", is_flag=True, help="Delete its requests too; do not look for workers.")
@config_option
def queues_remove(config: Path | None, name: str, *, force: bool) -> None:
    """Remove the queue NAME. Stop its senders and its workers first.

    Results and dead letters of the queue remain stored. Exit codes: 0 removed, 1 the queue has
    requests or workers, or does not exist.
    """
    settings = _settings(config)
    from consumer.app.queue_commands import remove

    sys.exit(_guarded(lambda: asyncio.run(remove(settings, name, force=force))))


@cli.group("dead-letters")
def dead_letters() -> None:
    """List, show and replay requests that no worker could handle."""


only_code_option = click.option(
    "--code", metavar="CODE", help="Only dead letters with this failure code, e.g. model_error."
)


@dead_letters.command("list")
@config_option
@only_code_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def dead_letters_list(config: Path | None, code: str | None, *, as_json: bool) -> None:
    """List all dead letters, oldest first."""
    settings = _settings(config)
    _require_known(code)
    from consumer.app.dead_letter_commands import print_list

    _guarded(lambda: asyncio.run(print_list(settings, code=code, as_json=as_json)))


@dead_letters.command("show")
@click.argument("letter", metavar="SEQUENCE|ID")
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def dead_letters_show(config: Path | None, letter: str, *, as_json: bool) -> None:
    """Show one dead letter.

    The headers are written to standard error, the request body to standard output.

    A number is the sequence of a dead letter. Anything else is a request id; its newest dead
    letter is shown. Write a request id of digits only as id:123.
    """
    settings = _settings(config)
    from consumer.app.dead_letter_commands import print_letter

    sys.exit(_guarded(lambda: asyncio.run(print_letter(settings, letter, as_json=as_json))))


@dead_letters.command("replay")
@click.argument("letters", metavar="[SEQUENCE|ID]...", nargs=-1)
@config_option
@click.option("--all", "every", is_flag=True, help="Replay all present dead letters.")
@only_code_option
def dead_letters_replay(
    config: Path | None, letters: tuple[str, ...], code: str | None, *, every: bool
) -> None:
    """Publish the requests of dead letters again.

    A replay is a new attempt of the same request under the same id; the dead letter is deleted.
    The failed event of the request is removed from the results stream. The next terminal event
    replaces it when a worker has finished the request. A deadline in the request stays in force:
    if it has passed, the new attempt fails with deadline_exceeded.

    Some dead letters are not replayed and remain stored: those with a truncated request body, and
    those whose id was cancelled, is queued, or was used for another request since. If the request
    has succeeded since, its dead letter is deleted.

    After an interruption, run the command again to finish the replay. Exit codes: 0; 1 if a dead
    letter was not replayed; 69 if a service is unreachable or the queue is full, and the other
    dead letters remain stored.

    A number is the sequence of a dead letter. Anything else is a request id; its newest dead
    letter is replayed. Write a request id of digits only as id:123.
    """
    if every == bool(letters) or (code is not None and not every):
        _fail("name dead letters, or use --all; --code requires --all", EXIT_USAGE)
    settings = _settings(config)
    _require_known(code)
    from consumer.app.dead_letter_commands import replay, replay_all

    def run_replay() -> int:
        work = replay_all(settings, code=code) if every else replay(settings, letters)
        return asyncio.run(work)

    sys.exit(_guarded(run_replay))


def main() -> None:
    """Run the `consumer` command."""
    # Imports allocate many objects and no garbage: collection would cost a tenth of a command.
    gc.disable()
    with _sigint_ends():
        try:
            cli()
        except OSError as error:  # standard output cannot be written, for example --help
            _fail(_os_reason(error), EXIT_FAILED)


# -- shared by the commands -----------------------------------------------------------------------


def _settings(config: Path | None) -> "Settings":
    from consumer.settings import Settings, SettingsError

    try:
        return Settings.load(config)
    except SettingsError as error:
        _fail(str(error), EXIT_USAGE)


def _start_logging(settings: "Settings") -> None:
    """Set up the log of a process, and log a warning about variables that nothing reads."""
    import structlog

    from consumer.telemetry import configure_logging

    configure_logging(settings.log_format, settings.log_level)
    if unknown := settings.unknown_variables():
        log = structlog.get_logger()
        log.warning("unknown_variables", names=unknown)


def _gateway_part(name: str) -> Any:
    """Import a module of the gateway, whose libraries are an extra."""
    try:
        return import_module(f"consumer.gateway.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("consumer"):
            raise
        _fail(f"{error.name} is not installed: install the extra 'gateway'", EXIT_USAGE)


def _key_file(config: Path | None) -> "KeyFile":
    path = _settings(config).gateway_keys
    if path is None:
        _fail("GATEWAY_KEYS: set it to the path of the key file", EXIT_USAGE)
    file: KeyFile = _gateway_part("keys").KeyFile(path)
    return file


def _require_task(settings: "Settings") -> None:
    from consumer.settings import SettingsError

    try:
        _ = settings.task
    except SettingsError as error:
        _fail(str(error), EXIT_USAGE)


def _require_known(code: str | None) -> None:
    from generation_contracts import FailureCode

    if code is not None and code not in set(FailureCode):
        _fail(f"--code: must be one of {', '.join(FailureCode)}", EXIT_USAGE)


def _build_request(
    make: Callable[..., T], parameters: dict[str, Any], *, names: Mapping[str, str] | None = None
) -> T:
    from datetime import UTC, datetime, timedelta

    from pydantic import ValidationError

    seconds = parameters.pop("deadline")
    if seconds is not None:
        parameters["deadline"] = datetime.now(UTC) + timedelta(seconds=seconds)
    try:
        return make(**parameters)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        field = (names or {}).get(field, field)
        _fail(f"{field}: {first['msg']}", EXIT_USAGE)


def _send_task(spec: "TaskSpec", settings: "Settings", parameters: dict[str, Any]) -> None:
    """Send the request of a command's arguments, wait for it and show the result."""
    from consumer.app.sender_commands import PLACEHOLDER, image_source, new_request

    as_json, folder = parameters.pop("as_json"), parameters.pop("output", Path())
    upload, images = parameters.pop("upload", False), parameters.pop("images", ())
    try:
        sources = tuple(image_source(image) for image in images)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}", EXIT_USAGE)
    queue = parameters.pop("queue")
    if sources:
        parameters["images"] = (PLACEHOLDER,)  # while the other fields are checked
    built = _build_request(partial(new_request, spec.request), parameters)

    async def with_images(client: "GenerationClient") -> "Request":
        return await client.with_images(built, sources, upload=upload)

    prepare = with_images if sources else None
    _send_and_wait(settings, built, queue=queue, as_json=as_json, folder=folder, prepare=prepare)


def _send_and_wait(
    settings: "Settings",
    request: "Request",
    *,
    queue: str | None,
    as_json: bool,
    folder: Path,
    prepare: Callable[["GenerationClient"], Coroutine[Any, Any, "Request"]] | None = None,
) -> None:
    from contextlib import nullcontext

    from consumer.app.sender_commands import (
        NoDisplay,
        ProgressBar,
        save_files,
        send_request,
        summary,
    )
    from consumer.bus.queue_length import QueueLength
    from generation_contracts import SucceededEvent, encode

    async def send_and_save(client: "GenerationClient", bus: "Bus") -> int:
        prepared = request if prepare is None else await prepare(client)
        name = queue or await client.queue_for(request)
        stream, durable = settings.subjects.requests_stream(name), settings.durable(name)
        length = None if as_json else QueueLength(bus, stream, durable)
        with nullcontext(NoDisplay()) if as_json else ProgressBar(_console()) as display:
            async with asyncio.timeout(_result_timeout(request)):
                event = await send_request(client, prepared, display, name=name, queue=length)
        succeeded = isinstance(event, SucceededEvent)
        if as_json:
            click.echo(encode(event).decode())
            return 0 if succeeded else EXIT_FAILED
        saved = (
            await save_files(client, event, folder, event.request_id)
            if isinstance(event, SucceededEvent)
            else []
        )
        # A streamed text is on the terminal already, unless the result goes elsewhere.
        shown = display.text if sys.stdout.isatty() else ""
        if text := summary(event, saved, shown=shown):
            click.echo(text, err=not succeeded)
        return 0 if succeeded else EXIT_FAILED

    def on_interrupt() -> None:
        click.echo(
            f"consumer: interrupted; if request {request.request_id} is stored, it goes on. "
            f"Cancel it: consumer cancel {request.request_id}. "
            f"Get its result: the same command with --id {request.request_id}",
            err=True,
        )

    sys.exit(_with_client(settings, send_and_save, on_interrupt=on_interrupt))


def _with_client(
    settings: "Settings",
    work: Callable[["GenerationClient", "Bus"], Coroutine[Any, Any, int]],
    *,
    on_interrupt: Callable[[], None] | None = None,
) -> int:
    """Connect a client to the configured NATS server, run `work` with it, report errors."""
    from consumer.bus.connection import connect
    from generation_client import GenerationClient

    async def connected() -> int:
        bus = await connect(settings, name="generation request", within=5.0)
        try:
            async with GenerationClient(bus.client, root=settings.subjects.root) as client:
                return await work(client, bus)
        finally:
            await bus.close()

    return _guarded(lambda: asyncio.run(connected()), on_interrupt=on_interrupt)


def _result_timeout(request: "Request") -> float | None:
    """Return the seconds to wait for a result: until the deadline and a margin; None: no limit."""
    from datetime import UTC, datetime

    if request.deadline is None:
        return None
    return (request.deadline - datetime.now(UTC)).total_seconds() + DEADLINE_MARGIN


def _console() -> "Console":
    from rich.console import Console

    # Soft wrap: only a terminal wraps long lines. Plain text: a prompt can look like markup.
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


@contextmanager
def _sigint_ends() -> Iterator[None]:
    """End the process on Ctrl-C without a message, until `_imported` is called.

    Python would raise KeyboardInterrupt in the middle of an import. The shell reports 130, as for
    every program that SIGINT ends. A parent that ignores SIGINT is obeyed.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _imported() -> None:
    """Restore what `main` has turned off for the time of the imports: collection and Ctrl-C."""
    gc.enable()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Terminated(KeyboardInterrupt):
    """SIGTERM as an exception: `finally` blocks stop what the command has started.

    It is a KeyboardInterrupt because asyncio propagates such exceptions out of a task at once.
    """


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Raise an exception on SIGTERM, as Python does on Ctrl-C, within the block."""

    def unwind(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _guarded(
    command: Callable[[], T],
    *,
    interrupted: int = EXIT_INTERRUPTED,
    on_interrupt: Callable[[], None] | None = None,
) -> T:
    """Call a command and turn its errors into one line and an exit code, without a traceback.

    Args:
        command: Must stop what it has started when an exception is raised.
        interrupted: The exit code after Ctrl-C or SIGTERM.
        on_interrupt: Called before the exit after Ctrl-C or SIGTERM.
    """
    from consumer.ports.unavailable import Unavailable
    from consumer.settings import SettingsError
    from consumer.telemetry import configure_logging
    from generation_client import (
        GenerationError,
        RequestInvalid,
        RequestTooLarge,
        ServiceUnavailable,
    )

    configure_logging("console", "ERROR")
    try:
        _imported()  # most modules
        with _sigterm_unwinds():
            return command()
    except (Unavailable, ServiceUnavailable) as error:
        _fail(str(error), EXIT_UNAVAILABLE)
    except (RequestInvalid, RequestTooLarge) as error:
        _fail(str(error), EXIT_USAGE)
    except GenerationError as error:  # for example: the id is in use, a download failed
        _fail(str(error), EXIT_FAILED)
    except SettingsError as error:
        _fail(str(error), EXIT_USAGE)
    except TimeoutError:
        _fail("no result by the deadline", EXIT_UNAVAILABLE)
    except BrokenPipeError:  # click exits without a message when the pipe is closed
        raise
    except OSError as error:  # for example: the folder is not writable, the disk is full
        _fail(_os_reason(error), EXIT_FAILED)
    except KeyboardInterrupt:
        if on_interrupt is not None:
            on_interrupt()
        sys.exit(interrupted)


def _os_reason(error: OSError) -> str:
    return f"{error.filename or 'system'}: {error.strerror}"


def _fail(message: str, code: int) -> NoReturn:
    for line in message.splitlines():
        click.echo(f"consumer: {line}", err=True)
    try:
        sys.stdout.flush()
    except OSError:  # the disk is full; the interpreter would flush again at exit and fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
