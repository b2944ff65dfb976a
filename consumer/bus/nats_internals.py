r"""The only module that uses private names of nats-py: its client with corrections, and accessors.

Each correction is needed because one message, one file or one cancellation could stop the whole
process, and nats-py has no public name that a correction could use:

- The parser splits protocol lines at every character that `\s` matches. The server splits at space
  and tab only, so a vertical tab in a subject breaks the connection at each delivery.
- An exception while one message is processed ends the read loop, and the client still reports
  itself as connected.
- A forced flush swallows cancellations, so that its task cannot be stopped.
- An unexpected exception during a reconnect ends all reconnects, without a report.
- A credentials file without a JWT is read in an endless loop that blocks the event loop. The seed
  in a credentials file with CRLF line ends, or without a final line end, is read wrongly.
- `flush` does not wait for everything that was sent before it, and a cancelled `flush` breaks the
  read loop.

The rest is what nats-py has no public name for: whether the server belongs to a cluster, the reply
subject of a service request, and the draining of a service.

tests/unit/test_library_internals.py fails when a new version of nats-py changes a function that
this module replaces or uses.
"""

import asyncio
import json
from codecs import BOM_UTF8
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nkeys
import structlog
from nats.aio.client import DEFAULT_FLUSH_TIMEOUT, Client
from nats.aio.msg import Msg
from nats.errors import Error, NoServersError, ProtocolError
from nats.protocol.parser import (
    AWAITING_CONTROL_LINE,
    AWAITING_MSG_PAYLOAD,
    CRLF_SIZE,
    ERR_OP,
    HMSG_OP,
    INFO_OP,
    MSG_OP,
    OK_OP,
    PING_OP,
    PONG_OP,
    Parser,
)

if TYPE_CHECKING:  # most processes that import this module have no service
    from nats.micro.request import Request
    from nats.micro.service import Service

log = structlog.get_logger()

RECONNECT_WAIT = 0.25  # seconds between two attempts
_JWT_HEADERS = (b"BEGIN NATS USER JWT",)
_SEED_HEADERS = (b"BEGIN USER NKEY SEED", b"BEGIN USER PRIVATE KEY")


class CredentialsError(Error):
    """A credentials file or a seed cannot be used; the text names no secret."""


class LineParser(Parser):
    """Parser with the rules of the server: lines end with CRLF, and spaces separate fields.

    The server accepts every byte in a subject except space, tab and line feed.
    """

    async def parse(self, data: bytes = b"") -> None:
        """Process all complete protocol messages in the buffer.

        Raises:
            ProtocolError: A line does not follow the protocol; the client must reconnect.
        """
        self.buf.extend(data)
        while self.buf:
            if self.state == AWAITING_CONTROL_LINE:
                end = self.buf.find(b"\n")
                if end < 0:
                    return
                line = bytes(self.buf[:end]).removesuffix(b"\r")
                del self.buf[: end + 1]
                await self._process_line(line)
            elif len(self.buf) >= self.needed + CRLF_SIZE:
                await self._process_payload()
            else:
                return

    async def _process_line(self, line: bytes) -> None:
        operation, _, arguments = line.partition(b" ")
        try:
            await self._process_operation(operation, arguments)
        except (OSError, ProtocolError):
            raise
        except Exception as error:
            # Any other exception would end nats-py's read loop without a reconnect.
            raise ProtocolError(f"nats: {_kind(error)} in {operation[:16]!r}") from error

    async def _process_operation(self, operation: bytes, arguments: bytes) -> None:
        if operation in (MSG_OP, HMSG_OP):
            self._begin_message(operation, arguments)
        elif operation == PING_OP:
            await self.nc._process_ping()
        elif operation == PONG_OP:
            await self.nc._process_pong()
        elif operation == INFO_OP:
            await self.nc._process_info(json.loads(arguments))
        elif operation == ERR_OP:
            await self.nc._process_err(arguments.decode(errors="replace").strip().lower())
        elif operation != OK_OP:
            raise ProtocolError(f"nats: unknown operation {operation[:16]!r}")

    def _begin_message(self, operation: bytes, arguments: bytes) -> None:
        # split() without an argument would also split at vertical tabs and form feeds.
        fields = [field for field in arguments.split(b" ") if field]
        sizes = 1 if operation == MSG_OP else 2
        subject, sid, *reply = fields[:-sizes]
        self.msg_arg = {"subject": subject, "sid": int(sid), "reply": b"".join(reply)}
        self.needed = int(fields[-1])
        self.header_needed = int(fields[-2]) if operation == HMSG_OP else 0
        self.state = AWAITING_MSG_PAYLOAD

    async def _process_payload(self) -> None:
        content = bytes(self.buf[: self.needed])
        del self.buf[: self.needed + CRLF_SIZE]
        headers, payload = content[: self.header_needed], content[self.header_needed :]
        message = self.msg_arg
        # Set before the message is processed, because the processing may reset the parser.
        self.state, self.header_needed = AWAITING_CONTROL_LINE, 0
        try:
            await self.nc._process_msg(
                message["sid"], message["subject"], message["reply"], payload, headers or None
            )
        except Exception as error:  # noqa: BLE001 - one message must not affect other messages
            log.warning("message_not_processed", error=type(error).__name__)


class RobustClient(Client):
    """A nats-py client that continues after any single bad message, file or cancellation."""

    def __init__(self) -> None:
        super().__init__()
        self._ps = LineParser(self)
        self._closed_permanently = False

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (IndexError, ValueError):  # a UnicodeDecodeError is a ValueError
            log.warning("headers_not_readable")
            return None

    def _build_message(
        self,
        sid: int,
        subject: bytes,
        reply: bytes,
        data: bytes,
        headers: dict[str, str] | None,
    ) -> Msg:
        # A subject that is not UTF-8 has no valid request id, so its request is refused. nats-py
        # cannot publish to a reply subject that is not UTF-8, so such a reply subject is dropped.
        readable = subject.decode(errors="replace").encode()
        try:
            reply.decode()
        except UnicodeDecodeError:
            reply = b""
        message: Msg = super()._build_message(sid, readable, reply, data, headers)
        return message

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            # The flush was cancelled; nats-py would raise InvalidStateError.
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def flush(self, timeout: int = DEFAULT_FLUSH_TIMEOUT) -> None:  # noqa: ASYNC109 - nats-py
        """Make two round trips, because nats-py writes the first PING ahead of buffered data.

        Without the second round trip, an UNSUB could still be buffered. Messages that the server
        sends before it receives the UNSUB would be dropped here, and a dropped delivery is only
        redelivered after `ack_wait`.
        """
        await super().flush(timeout)
        await super().flush(timeout)

    async def _flush_pending(self, force_flush: bool = False) -> Any:  # noqa: FBT002 - nats-py
        # nats-py swallows a cancellation here. A forced flush (more than 2 MiB of buffered data for
        # a server that reads nothing) lasts until the reconnect, so its task could not be stopped.
        task = asyncio.current_task()
        requests = 0 if task is None else task.cancelling()
        result = await super()._flush_pending(force_flush)
        if task is not None and task.cancelling() > requests:
            raise asyncio.CancelledError
        return result

    @property
    def is_clustered(self) -> bool:
        """Whether the server belongs to a cluster."""
        # nats-py has no public name for this field of the server's INFO.
        return bool(self._server_info.get("cluster"))

    @property
    def server_version(self) -> str:
        """The version of the server of the last connection, such as `2.12.1`; empty: unknown."""
        return str(self._server_info.get("version", ""))

    @property
    def is_connected(self) -> bool:
        """Whether the client is connected to the server."""
        return not self._closed_permanently and super().is_connected

    async def _close(self, status: int, do_cbs: bool = True) -> None:  # noqa: FBT002 - nats-py
        # If the server refuses the connection permanently during a reconnect, nats-py continues
        # the reconnect and then reports itself as connected.
        self._closed_permanently = self._closed_permanently or status == Client.CLOSED
        await super()._close(status, do_cbs)

    async def _select_next_server(self) -> None:
        if self._closed_permanently:
            raise NoServersError
        await super()._select_next_server()

    async def _attempt_reconnect(self) -> None:
        while not self.is_closed:
            try:
                await super()._attempt_reconnect()
            except Exception as error:  # noqa: BLE001 - the server may become available again
                log.warning("reconnect_failed", error=type(error).__name__)
                if self._closed_permanently:
                    return
                self._status = Client.RECONNECTING
                await asyncio.sleep(RECONNECT_WAIT)
            else:
                return

    def _connect_command(self) -> bytes:
        # nats-py retries only after its own errors and after an OSError.
        try:
            command: bytes = super()._connect_command()
        except (Error, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - nkeys raises many kinds
            raise CredentialsError(f"the credentials cannot be used: {_kind(error)}") from None
        return command

    def _read_creds_user_jwt(self, creds: str) -> bytearray:  # type: ignore[override] # a path here
        return bytearray(_line_after(_JWT_HEADERS, Path(creds)))

    def _read_creds_user_nkey(self, creds: str) -> bytearray:  # type: ignore[override] # a path here
        return bytearray(_line_after(_SEED_HEADERS, Path(creds)))


def reply_subject(request: "Request") -> str:
    """Return the reply subject of a service request; empty if the request has none.

    nats-py has no public name for it. Callers validate the subject before they reply.
    """
    return request._msg.reply


async def drain_endpoints(service: "Service", *, within: float) -> bool:
    """Drain the endpoints of a service: handle all received requests, then unsubscribe.

    `Service.stop` alone drops requests that were received and not handled yet. nats-py can drain
    subscriptions, but it has no public name for those of a service.

    Args:
        service: The service, which the caller may stop afterwards.
        within: Seconds.

    Returns:
        Whether all requests were handled in time.
    """
    subscriptions = [endpoint._subscription for endpoint in service._endpoints]
    draining = {asyncio.ensure_future(each.drain()) for each in subscriptions if each is not None}
    if draining:
        _, late = await asyncio.wait(draining, timeout=within)
        for task in late:
            task.cancel()
    ends = await asyncio.gather(*draining, return_exceptions=True)
    service._endpoints.clear()  # a second unsubscribe in `stop` would raise
    return not any(isinstance(end, BaseException) for end in ends)


def require_usable_seed(path: Path) -> str:
    """Return the nkey seed in a file.

    Raises:
        CredentialsError: The content is not a seed.
        OSError: The file cannot be read.
    """
    seed = path.read_bytes().removeprefix(BOM_UTF8).strip()
    _require_seed(seed)
    return seed.decode()


def require_usable_credentials(path: Path) -> None:
    """Validate that a credentials file has a JWT and a seed.

    Raises:
        CredentialsError: One of them is missing or invalid.
        OSError: The file cannot be read.
    """
    _line_after(_JWT_HEADERS, path)
    _require_seed(_line_after(_SEED_HEADERS, path))


def _require_seed(seed: bytes) -> None:
    try:
        nkeys.from_seed(bytearray(seed)).wipe()
    except Exception as error:  # noqa: BLE001 - nkeys raises many kinds
        raise CredentialsError(f"not an nkey seed: {_kind(error)}") from None


def _line_after(headers: tuple[bytes, ...], path: Path) -> bytes:
    """Return the first non-empty line after one of the headers."""
    lines = iter(path.read_bytes().splitlines())
    for line in lines:
        if any(header in line for header in headers):
            return next(filter(None, map(bytes.strip, lines)), b"")
    raise CredentialsError(f"{path}: no line with {headers[0].decode()}")


def _kind(error: Exception) -> str:
    # Not the text of an unexpected exception, which may contain a part of the seed.
    return type(error).__name__
