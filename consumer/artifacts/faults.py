"""Classifies failed store operations as transient or permanent, with texts that are safe to show.

The texts contain S3 codes and the configured bucket, but no credentials and no signed query. They
contain no address either, because senders may receive them; `with_address` adds it for operators.
"""

import re
import ssl
from http import HTTPStatus
from xml.etree.ElementTree import ParseError

from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)

from consumer.artifacts.config import StoreConfig, StoreMisconfigured
from consumer.ports.store import StoreUnavailable

_S3_CODE = re.compile(r"[A-Za-z0-9.]{1,64}\Z")
_HTTP_STATUS = re.compile(r"Response code: (\d{3})")

# Transient codes with a status below 500; all others there are configuration faults.
_TRANSIENT_CODES = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "OperationAborted",
        "RequestTimeout",
        "SlowDown",
        "TooManyRequests",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
    }
)
_TRANSIENT_STATUSES = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})

# Codes with which stores refuse a checksum header that they do not support. Some stores drop the
# header before they compare the signatures. The ambiguous codes can have other causes, such as a
# proxy that changed one request.
AMBIGUOUS_REFUSALS = frozenset({"InvalidRequest", "InvalidArgument", "SignatureDoesNotMatch"})
_CHECKSUM_REFUSALS = AMBIGUOUS_REFUSALS | {"NotImplemented"}

# The first matching class is used.
_CONNECTION_FAULTS: tuple[tuple[type[Exception], str], ...] = (
    (NameResolutionError, "the name of its host is not known"),
    (NewConnectionError, "no connection"),
    (ConnectTimeoutError, "no connection in time"),
    (ReadTimeoutError, "no answer in time"),
    (TimeoutError, "no complete answer in time"),
    (ProtocolError, "the connection broke"),
    (HTTPError, "the connection failed"),
    (OSError, "the connection broke"),
    (ParseError, "the answer is not that of an S3 store"),
    (
        ValueError,
        "the answer is not that of an S3 store",
    ),  # the SDK's, for some malformed responses
)


class UnexpectedResponse(Exception):  # noqa: N818 - it names the response, not a bug
    """The store reported success, but its response shows that the operation did not succeed."""


# Exceptions that an attempt may raise; any other exception is a bug and propagates.
FAILURES = (UnexpectedResponse, MinioException, HTTPError, OSError, ParseError, ValueError)


def checksum_refusal(error: MinioException) -> str | None:
    """Return the code of a response that may refuse the checksum header of an upload, else None.

    Responses about damaged bytes, such as BadDigest, are excluded: the checksum detects these.
    """
    if isinstance(error, S3Error) and error.code in _CHECKSUM_REFUSALS:
        return error.code
    if isinstance(error, ServerError) and error.status_code == HTTPStatus.NOT_IMPLEMENTED:
        return f"HTTP {error.status_code}"
    if isinstance(error, InvalidResponseError):  # a response without XML
        status = _status(error)
        if status == HTTPStatus.NOT_IMPLEMENTED:
            return f"HTTP {status}"
    return None


def classify_error(error: Exception, config: StoreConfig) -> StoreUnavailable:
    """Convert one of `FAILURES`: `StoreUnavailable` if transient, else `StoreMisconfigured`."""
    if isinstance(error, UnexpectedResponse):
        return StoreUnavailable(f"S3: {error}")
    if isinstance(error, S3Error):
        code = error.code if error.code and _S3_CODE.match(error.code) else "an unknown code"
        return _refusal(code, error.response.status, config)
    if isinstance(error, ServerError):
        return _refusal(f"HTTP {error.status_code}", error.status_code, config)
    if isinstance(error, InvalidResponseError):
        status = _status(error) or "unknown"
        return StoreUnavailable(f"S3: the answer is not that of an S3 store (HTTP {status})")
    inner = error.args[0] if error.args else None
    if isinstance(error, SSLError) and not isinstance(inner, ssl.SSLEOFError):
        reason = getattr(inner, "reason", None) or "unknown reason"
        return StoreMisconfigured(f"S3: TLS fails ({reason.lower().replace('_', ' ')})")
    text = next(text for kind, text in _CONNECTION_FAULTS if isinstance(error, kind))
    return StoreUnavailable(f"S3: {text}")


def with_address(error: StoreUnavailable, endpoint: str) -> str:
    """Return the text of an error with the address of the store, for the operator.

    Args:
        error: Of `classify_error`, or raised by the store.
        endpoint: `http(s)://host[:port]`.
    """
    return str(error).replace("S3: ", f"S3 at {endpoint}: ", 1)


def _status(error: InvalidResponseError) -> int | None:
    # The SDK has the status only in the text of this exception and in a private attribute.
    found = _HTTP_STATUS.search(str(error))
    return int(found.group(1)) if found else None


def _refusal(code: str, status: int, config: StoreConfig) -> StoreUnavailable:
    if status == HTTPStatus.NOT_IMPLEMENTED:
        return StoreMisconfigured(f"S3: the store lacks what is needed ({code})")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _TRANSIENT_STATUSES:
        return StoreUnavailable(f"S3: the store cannot do it now ({code})")
    if code in _TRANSIENT_CODES:
        return StoreUnavailable(f"S3: the store did not take it ({code})")
    place = f"{config.bucket}/{config.key('*')}"
    known = {
        "AccessDenied": f'access is denied; reading and writing "{place}" is needed',
        "AuthorizationHeaderMalformed": f'the region "{config.region}" is wrong',
        "PermanentRedirect": f'the bucket "{config.bucket}" is at another endpoint or in another '
        f'region than "{config.region}"',
        "InvalidAccessKeyId": "the access key is not known",
        "NoSuchBucket": f'the bucket "{config.bucket}" does not exist; '
        "create it with consumer apply",
        "RequestTimeTooSkewed": "the clocks of this machine and of the store differ",
        "SignatureDoesNotMatch": "the secret key is wrong",
    }
    return StoreMisconfigured(f"S3: {known.get(code, f'the store refuses ({code})')}")
