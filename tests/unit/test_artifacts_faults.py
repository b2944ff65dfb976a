"""The classification of store errors: retryable or not, and the message."""

import socket
import ssl
from xml.etree.ElementTree import ParseError

import pytest
from minio.error import InvalidResponseError, S3Error, ServerError
from urllib3 import HTTPResponse
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)

from consumer.artifacts import StoreConfig, StoreMisconfigured
from consumer.artifacts.faults import FAILURES, UnexpectedResponse, classify_error
from consumer.ports.store import StoreUnavailable

CONFIG = StoreConfig(
    endpoint="http://store.example:9000",
    access_key="the-access-key",
    secret_key="the-secret-key",
    bucket="generation",
    prefix="outputs",
    region="eu-west-9",
)
CONNECTION = HTTPConnection("store.example", 9000)
POOL = HTTPConnectionPool("store.example", 9000)


def s3_error(code: str | None, status: int) -> S3Error:
    return S3Error(
        HTTPResponse(status=status), code, "the-message", "/generation/outputs/x", None, None
    )


def tls_error(kind: type[ssl.SSLError], reason: str) -> SSLError:
    inner = kind(1, f"[SSL: {reason}] something at the-address")
    inner.reason = reason
    return SSLError(inner)


PASSING = [
    (s3_error("SlowDown", 503), "S3: the store cannot do it now (SlowDown)"),
    (s3_error("InternalError", 500), "S3: the store cannot do it now (InternalError)"),
    (s3_error("AccessDenied", 503), "S3: the store cannot do it now (AccessDenied)"),
    (s3_error("Whatever", 429), "S3: the store cannot do it now (Whatever)"),
    (s3_error("Whatever", 408), "S3: the store cannot do it now (Whatever)"),
    (s3_error("RequestTimeout", 400), "S3: the store did not take it (RequestTimeout)"),
    (s3_error("BadDigest", 400), "S3: the store did not take it (BadDigest)"),
    (
        s3_error("XAmzContentSHA256Mismatch", 400),
        "S3: the store did not take it (XAmzContentSHA256Mismatch)",
    ),
    (ServerError("the-message", 503), "S3: the store cannot do it now (HTTP 503)"),
    (
        InvalidResponseError(502, "text/html", "<p>Response code: 999</p>"),
        "S3: the answer is not that of an S3 store (HTTP 502)",
    ),
    (UnexpectedResponse("the answer has no ETag"), "S3: the answer has no ETag"),
    (ConnectTimeoutError(CONNECTION, "the-message"), "S3: no connection in time"),
    (
        NameResolutionError("store.example", CONNECTION, socket.gaierror("the-message")),
        "S3: the name of its host is not known",
    ),
    (NewConnectionError(CONNECTION, "the-message"), "S3: no connection"),
    (ReadTimeoutError(POOL, "/the-address", "the-message"), "S3: no answer in time"),
    (TimeoutError(), "S3: no complete answer in time"),
    (ProtocolError("the-message"), "S3: the connection broke"),
    (HTTPError("the-message"), "S3: the connection failed"),
    (ConnectionResetError("the-message"), "S3: the connection broke"),
    (tls_error(ssl.SSLEOFError, "UNEXPECTED_EOF"), "S3: the connection failed"),
    (ParseError("the-message"), "S3: the answer is not that of an S3 store"),
    (ValueError("the-message"), "S3: the answer is not that of an S3 store"),
]

LASTING = [
    (
        s3_error("AccessDenied", 403),
        'S3: access is denied; reading and writing "generation/outputs/*" is needed',
    ),
    (
        s3_error("NoSuchBucket", 404),
        'S3: the bucket "generation" does not exist; create it with consumer apply',
    ),
    (s3_error("SignatureDoesNotMatch", 403), "S3: the secret key is wrong"),
    (s3_error("InvalidAccessKeyId", 403), "S3: the access key is not known"),
    (s3_error("AuthorizationHeaderMalformed", 400), 'S3: the region "eu-west-9" is wrong'),
    (
        s3_error("PermanentRedirect", 301),
        'S3: the bucket "generation" is at another endpoint or in another region than "eu-west-9"',
    ),
    (
        s3_error("RequestTimeTooSkewed", 403),
        "S3: the clocks of this machine and of the store differ",
    ),
    (s3_error("InvalidRequest", 400), "S3: the store refuses (InvalidRequest)"),
    (s3_error("Oh\nno <the-code>", 400), "S3: the store refuses (an unknown code)"),
    (s3_error(None, 400), "S3: the store refuses (an unknown code)"),
    (ServerError("the-message", 411), "S3: the store refuses (HTTP 411)"),
    (
        tls_error(ssl.SSLCertVerificationError, "CERTIFICATE_VERIFY_FAILED"),
        "S3: TLS fails (certificate verify failed)",
    ),
]


@pytest.mark.parametrize(("error", "words"), PASSING, ids=[words for _, words in PASSING])
def test_temporary_error_is_retryable(error: Exception, words: str) -> None:
    fault = classify_error(error, CONFIG)
    assert type(fault) is StoreUnavailable
    assert str(fault) == words


@pytest.mark.parametrize(("error", "words"), LASTING, ids=[words for _, words in LASTING])
def test_permanent_error_is_not_retryable(error: Exception, words: str) -> None:
    fault = classify_error(error, CONFIG)
    assert type(fault) is StoreMisconfigured
    assert str(fault) == words


@pytest.mark.parametrize("error", [error for error, _ in PASSING + LASTING])
def test_error_message_has_no_secret(error: Exception) -> None:
    assert isinstance(error, FAILURES)
    shown = str(classify_error(error, CONFIG))
    for hidden in ("the-", "store.example", "9000", "outputs/x", "\n"):
        assert hidden not in shown


def test_programming_error_is_not_a_store_error() -> None:
    for error in (TypeError(), KeyError(), AttributeError(), AssertionError()):
        assert not isinstance(error, FAILURES)
