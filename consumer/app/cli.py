"""The `consumer` command. Each command imports what it needs: --help must not wait for torch."""

import asyncio
import gc
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

    from consumer.gateway.keys import KeyFile
    from consumer.settings import Settings
    from generation_client import GenerationClient
    from generation_contracts import Request

EXIT_FAILED = 1  # the job failed
EXIT_USAGE = 2  # usage or settings
EXIT_UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h: a service cannot be reached or used
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it; for SIGTERM too

DEADLINE_MARGIN = 5.0  # seconds in which the worker's own word on the deadline may come

T = TypeVar("T")


class _Range(click.FloatRange):
    """Numbers between two others; click takes `nan` for one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
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
    """Message-driven generation: requests from NATS JetStream, outputs to S3, events back."""


@cli.command()
@config_option
def run(config: Path | None) -> None:
    """The daemon: load one model, serve one task until SIGTERM."""
    settings = _settings(config)
    _require_task(settings)
    from consumer.app.daemon import run as run_daemon
    from consumer.settings import SettingsError
    from consumer.telemetry import configure_logging

    configure_logging(settings.log_format, settings.log_level)
    gc.enable()
    try:
        code = run_daemon(settings)
    except SettingsError as error:
        _fail(str(error), EXIT_USAGE)
    sys.exit(code)


@cli.group(invoke_without_command=True)
@config_option
@click.pass_context
def gateway(context: click.Context, config: Path | None) -> None:
    """The HTTP gateway: OpenAI's API, jobs, events and a page, until SIGTERM."""
    context.obj = config
    if context.invoked_subcommand is not None:
        return
    settings = _settings(config)
    serve = _gateway_part("serve").serve
    from consumer.settings import SettingsError
    from consumer.telemetry import configure_logging

    configure_logging(settings.log_format, settings.log_level)
    gc.enable()
    try:
        code = serve(settings)
    except SettingsError as error:
        _fail(str(error), EXIT_USAGE)
    except KeyboardInterrupt:  # while it still starts
        code = 0
    sys.exit(code)


@gateway.group("keys")
def gateway_keys() -> None:
    """The API keys of the gateway, in the file GATEWAY_KEYS."""


def _bound(name: str, text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(name, type=click.IntRange(min=1), metavar="N", help=text)


@gateway_keys.command("add")
@click.argument("tenant")
@_bound("--waiting", "Requests of the tenant that wait or run at the same time.")
@_bound("--per-minute", "Requests in a minute, at each gateway.")
@_bound("--pixels", "Width times height of one image.")
@_bound("--steps", "Denoising steps of one request.")
@_bound("--images", "Images of one request.")
@config_option
@click.pass_obj
def gateway_keys_add(
    of_group: Path | None, /, config: Path | None, tenant: str, **bounds: int | None
) -> None:
    """Make a key for TENANT and print it: this once, it is not kept.

    Keys of one tenant see the same jobs. To replace a key, add the new one, hand it out, then
    revoke the old one. A running gateway takes changes over at once.
    """
    file = _key_file(config or of_group)
    from consumer.gateway.tenants import Bounds

    new = _guarded(lambda: file.add(tenant, Bounds(**bounds)))
    click.echo(new.text)
    click.echo(f"key {new.id} of tenant {tenant}: keep it now, it is not shown again", err=True)


@gateway_keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@config_option
@click.pass_obj
def gateway_keys_list(of_group: Path | None, /, config: Path | None, *, as_json: bool) -> None:
    """All keys: id, tenant, creation, bounds. The keys themselves are not known."""
    file = _key_file(config or of_group)
    document = _guarded(file.read)
    for key_id, entry in document.keys.items():
        bounds = entry.bounds.model_dump(exclude_none=True)
        created = entry.created.isoformat().replace("+00:00", "Z")
        if as_json:
            fields = {"id": key_id, "tenant": entry.tenant, "created": created, "bounds": bounds}
            click.echo(json.dumps(fields))
        else:
            said = " ".join(f"{name}={value}" for name, value in bounds.items())
            click.echo(f"{key_id}  {created}  {entry.tenant}  {said}".rstrip())


@gateway_keys.command("revoke")
@click.argument("key", metavar="KEY_ID")
@config_option
@click.pass_obj
def gateway_keys_revoke(of_group: Path | None, /, config: Path | None, key: str) -> None:
    """Remove a key. The tenant's jobs stay, for its other keys and for later ones."""
    file = _key_file(config or of_group)
    key_id = _guarded(lambda: file.revoke(key))
    click.echo(f"{key_id}: revoked")


@cli.command()
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".consumer"),
    show_default=True,
    help="Where data, ports and credentials are kept.",
)
def up(directory: Path) -> None:
    """NATS, an S3 server, one daemon of each task and a gateway, for development."""
    from consumer.app.development import up as run_up

    sys.exit(_guarded(lambda: run_up(directory, _console()), interrupted=0))


@cli.command()
@click.argument("prompt", default="a small red star on a white background at the top")
@click.option(
    "--question",
    default="Describe this picture.",
    show_default=True,
    help="Asked about the result.",
)
def demo(prompt: str, question: str) -> None:
    """Everything in one command: draw PROMPT, save it, describe it, stop."""
    from consumer.app.development import demo as run_demo

    sys.exit(_guarded(lambda: run_demo(prompt, question, Path.cwd(), _console())))


@cli.command()
@config_option
@click.option(
    "--replicas",
    type=click.IntRange(1, 1_000),
    help="Workers of each task: makes room for as many times the deliveries of one. "
    "(Copies of the streams are NATS_REPLICAS.)",
)
def apply(config: Path | None, replicas: int | None) -> None:
    """Create or update the streams, the durables and the bucket."""
    settings = _settings(config)
    from consumer.app.apply import apply as run_apply
    from consumer.app.apply import for_workers

    if replicas is not None:
        settings = for_workers(settings, replicas)
    for name, change in _guarded(lambda: asyncio.run(run_apply(settings))).items():
        click.echo(f"{name}: {change}")


@cli.command()
@config_option
@click.option("--model", is_flag=True, help="Also load the model.")
def check(config: Path | None, model: bool) -> None:
    """Settings, NATS, streams and S3: try what a daemon needs, say what is wrong."""
    settings = _settings(config)
    _require_task(settings)
    from consumer.app.check import Finding
    from consumer.app.check import check as run_check

    for name, value in settings.shown().items():
        click.echo(f"{name}={value}")

    def report(finding: Finding) -> None:
        click.echo(f"{'FAIL' if finding.exit_code else 'ok  '} {finding.what}: {finding.said}")

    sys.exit(_guarded(lambda: asyncio.run(run_check(settings, report, model=model))))


@cli.command()
@click.option("--json-schema", is_flag=True, help="JSON Schemas of the messages instead.")
@click.option("--markdown", is_flag=True, help="A page to read instead.")
@config_option
def schema(config: Path | None, *, json_schema: bool, markdown: bool) -> None:
    """AsyncAPI 3 of all subjects and messages, as JSON."""
    from generation_contracts.reference import markdown as page_of
    from generation_contracts.schema import asyncapi, json_schemas

    if markdown:
        text = page_of(asyncapi(_settings(config).subjects)).rstrip("\n")
        _guarded(lambda: click.echo(text))
        return
    document = json_schemas() if json_schema else asyncapi(_settings(config).subjects)
    text = json.dumps(document, indent=2, ensure_ascii=False)
    _guarded(lambda: click.echo(text))


@cli.group()
def request() -> None:
    """Publish a request on a running bus and wait for its result."""


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """What both kinds of request take."""
    for option in (
        config_option,
        click.option(
            "--json", "as_json", is_flag=True, help="Print the result event; save nothing."
        ),
        click.option("--seed", type=int),
        click.option(
            "--deadline",
            type=_Range(0, 1e7, min_open=True),
            metavar="SECONDS",
            help="Give up after so long; else the request waits for a worker.",
        ),
        click.option("--id", "request_id", help="The request's id; default: a new one."),
    ):
        command = option(command)
    return command


@request.command("text-to-image")
@click.argument("prompt")
@click.option("--negative-prompt")
@click.option("--width", type=int)
@click.option("--height", type=int)
@click.option("--steps", "num_inference_steps", type=int)
@click.option("--guidance-scale", type=float)
@click.option("--images", "num_images", type=int, help="How many pictures.")
@click.option("--format", "output_format", type=click.Choice(["png", "webp", "jpeg"]))
@click.option(
    "--output",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    default=Path(),
    help="Folder for the pictures; default: the working folder.",
)
@common_options
def request_text_to_image(
    config: Path | None, as_json: bool, output: Path, **parameters: Any
) -> None:
    """Make a picture of PROMPT and save it."""
    settings = _settings(config)
    from consumer.app.sender_commands import text_to_image

    made = _request(text_to_image, parameters)
    _ask(settings, made, as_json=as_json, folder=output)


@request.command("image-to-text")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.argument("prompt")
@click.option("--system")
@click.option("--max-new-tokens", type=int)
@click.option("--temperature", type=float)
@click.option("--top-p", type=float)
@click.option("--top-k", type=int)
@click.option("--repetition-penalty", type=float)
@click.option("--stream", is_flag=True, help="Show the text as it appears.")
@common_options
def request_image_to_text(
    config: Path | None, as_json: bool, images: tuple[str, ...], **parameters: Any
) -> None:
    """Ask PROMPT about each IMAGE: a file, or s3://bucket/key."""
    settings = _settings(config)
    from consumer.app.sender_commands import image_source, image_to_text

    try:
        sources = tuple(image_source(image) for image in images)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}", EXIT_USAGE)
    made = _request(image_to_text, {**parameters, "images": sources})
    _ask(settings, made, as_json=as_json, folder=Path())


@cli.command()
@click.argument("request_id", metavar="ID")
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print the reply as JSON; do not wait.")
def cancel(config: Path | None, request_id: str, *, as_json: bool) -> None:
    """Cancel the request ID, queued or running, and wait until it has stopped.

    Exit codes: 0 it is cancelled, 1 it has ended otherwise or there is none, 69 no worker is there
    to see to it.
    """
    settings = _settings(config)
    from generation_contracts import encode
    from generation_contracts.subjects import is_request_id

    if not is_request_id(request_id):
        _fail("ID: 1-64 characters of A-Z a-z 0-9 _ -", EXIT_USAGE)

    async def cancel_and_wait(client: "GenerationClient") -> int:
        reply = await client.cancel(request_id)
        if as_json:
            click.echo(encode(reply).decode())
            return 0 if reply.status in {"cancelled", "stopping"} else EXIT_FAILED
        ended = reply.result
        if reply.status == "stopping":
            click.echo("stopping …", err=True)
            ended = await client.ended(request_id)
        kind = "there is no such request" if ended is None else ended.rpartition(".")[2]
        click.echo(kind)
        return 0 if kind == "cancelled" else EXIT_FAILED

    sys.exit(_as_client(settings, cancel_and_wait))


@cli.group("dead-letters")
def dead_letters() -> None:
    """What no worker could handle: list it, look at it, ask for it again."""


only_code_option = click.option(
    "--code", metavar="CODE", help="Only letters with this code of failure, as model_error."
)


@dead_letters.command("list")
@config_option
@only_code_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def dead_letters_list(config: Path | None, code: str | None, *, as_json: bool) -> None:
    """All dead letters, oldest first."""
    settings = _settings(config)
    _require_known(code)
    from consumer.app.dead_letter_commands import print_list

    _guarded(lambda: asyncio.run(print_list(settings, code=code, as_json=as_json)))


@dead_letters.command("show")
@click.argument("letter", metavar="SEQUENCE|ID")
@config_option
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def dead_letters_show(config: Path | None, letter: str, *, as_json: bool) -> None:
    """One letter: headers on standard error, the request's bytes on standard output.

    A number is the sequence of a letter, anything else a request id, whose newest letter is
    shown. A request id of digits alone is written id:123.
    """
    settings = _settings(config)
    from consumer.app.dead_letter_commands import print_letter

    sys.exit(_guarded(lambda: asyncio.run(print_letter(settings, letter, as_json=as_json))))


@dead_letters.command("replay")
@click.argument("letters", metavar="[SEQUENCE|ID]...", nargs=-1)
@config_option
@click.option("--all", "every", is_flag=True, help="All that there are now.")
@only_code_option
def dead_letters_replay(
    config: Path | None, letters: tuple[str, ...], code: str | None, *, every: bool
) -> None:
    """Ask again for the requests of letters.

    A replay is a new attempt of the same request under the same id; the letter is deleted. The
    failed event of the request is taken out of the stream of results, and the next one is in its
    place when a worker has done the request. A deadline in the request stays in force: when it has
    passed, the new attempt fails with deadline_exceeded.

    Not replayed, and kept: a letter with only a part of its request; one whose id has been
    cancelled, is waiting in the queue, or has been used for another request since. When the request
    itself has succeeded since, its letter is deleted.

    Run it again after an interruption: it finishes what was begun. Exit codes: 0, 1 when one was
    not replayed, 69 when a service is unreachable or the queue is full; the rest is kept then.

    A number is the sequence of a letter, anything else a request id, whose newest letter is
    replayed. A request id of digits alone is written id:123.
    """
    if every == bool(letters) or (code is not None and not every):
        _fail("name letters or say --all; --code goes with --all", EXIT_USAGE)
    settings = _settings(config)
    _require_known(code)
    from consumer.app.dead_letter_commands import replay, replay_all

    def run_replay() -> int:
        work = replay_all(settings, code=code) if every else replay(settings, letters)
        return asyncio.run(work)

    sys.exit(_guarded(run_replay))


def main() -> None:
    """Entry point of the `consumer` command."""
    # Imports make many objects and no garbage: looking for it is a tenth of what a command costs.
    gc.disable()
    cli()


# -- between the commands and the parts -----------------------------------------------------------


def _settings(config: Path | None) -> "Settings":
    from consumer.settings import Settings, SettingsError

    try:
        return Settings.load(config)
    except SettingsError as error:
        _fail(str(error), EXIT_USAGE)


def _gateway_part(name: str) -> Any:
    """Import a module of the gateway, whose libraries are an extra."""
    try:
        return import_module(f"consumer.gateway.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("consumer"):
            raise
        _fail(f"{error.name} is not installed: use the extra 'gateway'", EXIT_USAGE)


def _key_file(config: Path | None) -> "KeyFile":
    path = _settings(config).gateway_keys
    if path is None:
        _fail("GATEWAY_KEYS: set it to the file of keys", EXIT_USAGE)
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


def _request(make: Callable[..., "Request"], parameters: dict[str, Any]) -> "Request":
    from datetime import UTC, datetime, timedelta

    from pydantic import ValidationError

    seconds = parameters.pop("deadline")
    if seconds is not None:
        parameters["deadline"] = datetime.now(UTC) + timedelta(seconds=seconds)
    try:
        return make(**parameters)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        _fail(f"{place}: {first['msg']}", EXIT_USAGE)


def _ask(settings: "Settings", request: "Request", *, as_json: bool, folder: Path) -> None:
    from contextlib import nullcontext

    from consumer.app.sender_commands import ProgressBar, Quiet, ask, save_pictures, summary
    from generation_contracts import SucceededEvent, encode

    async def ask_and_save(client: "GenerationClient") -> int:
        display = nullcontext(Quiet()) if as_json else ProgressBar(_console())
        with display as shown:
            async with asyncio.timeout(_patience(request)):
                event = await ask(client, request, shown)
        saved = []
        if isinstance(event, SucceededEvent) and not as_json:
            saved = await save_pictures(client, event, folder, event.request_id)
        click.echo(encode(event).decode() if as_json else summary(event, saved))
        return 0 if isinstance(event, SucceededEvent) else EXIT_FAILED

    sys.exit(_as_client(settings, ask_and_save))


def _as_client(
    settings: "Settings", work: Callable[["GenerationClient"], Coroutine[Any, Any, int]]
) -> int:
    """Do something with a client of the configured bus; what stops it is one line."""
    from consumer.bus.connection import connect
    from generation_client import GenerationClient

    async def connected() -> int:
        bus = await connect(settings, name="generation request", within=5.0)
        try:
            async with GenerationClient(bus.client, root=settings.subjects.root) as client:
                return await work(client)
        finally:
            await bus.close()

    return _guarded(lambda: asyncio.run(connected()))


def _patience(request: "Request") -> float | None:
    """Seconds to wait for a result: for ever without a deadline, else a little longer than it."""
    from datetime import UTC, datetime

    if request.deadline is None:
        return None
    return (request.deadline - datetime.now(UTC)).total_seconds() + DEADLINE_MARGIN


def _console() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program is, so that everything is stopped on the way out.

    A KeyboardInterrupt, because asyncio lets no other exception out of a task.
    """


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Turn SIGTERM into an exception, as Ctrl-C is, for as long as the block lasts."""

    def unwind(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _guarded(command: Callable[[], T], *, interrupted: int = EXIT_INTERRUPTED) -> T:
    """Call a command; what stops it is one line and an exit code, never a traceback.

    Args:
        command: Stops what it has started on its way out.
        interrupted: The exit code after Ctrl-C or SIGTERM.
    """
    from consumer.ports.unavailable import Unavailable
    from consumer.settings import SettingsError
    from consumer.telemetry import configure_logging
    from generation_client import GenerationError, RequestTooLarge, ServiceUnavailable

    configure_logging("console", "ERROR")
    gc.enable()  # what is left to import is little
    try:
        with _sigterm_unwinds():
            return command()
    except (Unavailable, ServiceUnavailable) as error:
        _fail(str(error), EXIT_UNAVAILABLE)
    except RequestTooLarge:
        _fail("the request is too large for the bus: name its images by s3://", EXIT_USAGE)
    except GenerationError as error:  # the id is taken, a download has failed
        _fail(str(error), EXIT_FAILED)
    except SettingsError as error:
        _fail(str(error), EXIT_USAGE)
    except TimeoutError:
        _fail("no result by the deadline", EXIT_UNAVAILABLE)
    except BrokenPipeError:  # click ends quietly where nobody reads on
        raise
    except OSError as error:  # a folder that cannot be written to, a full disk
        _fail(f"{error.filename or 'system'}: {error.strerror}", EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(interrupted)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"consumer: {message}", err=True)
    try:
        sys.stdout.flush()
    except OSError:  # it is full; the interpreter would try once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
