"""The only module that uses private names of the MinIO SDK: a client that hashes uploads only once.

The SDK hashes every body that it sends (SHA-256 over plain HTTP, MD5 over TLS), even if a header
has the SHA-256 already. It builds the headers of a request in a private method and has no option
for this.

tests/unit/test_library_internals.py fails when a new version of the SDK changes what this module
replaces or uses.
"""

import base64
import hashlib
from datetime import datetime
from urllib.parse import urlsplit

from minio import Minio
from minio.credentials.credentials import Credentials
from minio.helpers import DictType
from urllib3 import PoolManager

from consumer.artifacts.config import StoreConfig

CHECKSUM = "x-amz-checksum-sha256"  # its value is base64


class SingleHashClient(Minio):
    """The SDK's client, except that it does not hash a body that has a checksum header."""

    def _build_headers(
        self,
        host: str,
        headers: DictType | None = None,
        body: bytes | None = None,
        creds: Credentials | None = None,
    ) -> tuple[DictType, datetime]:
        checksum = (headers or {}).get(CHECKSUM)
        if not isinstance(checksum, str):
            if body:  # the SDK sends it over TLS only
                md5 = hashlib.md5(body, usedforsecurity=False).digest()
                headers = {**(headers or {}), "Content-MD5": base64.b64encode(md5).decode()}
            return super()._build_headers(host, headers, body, creds)
        built, date = super()._build_headers(host, headers, None, creds)
        if not self._base_url.is_https:  # over TLS the signature does not cover the body
            built["x-amz-content-sha256"] = base64.b64decode(checksum).hex()
        return built, date


def store_client(config: StoreConfig, endpoint: str, pools: PoolManager) -> Minio:
    """Create a client of the store.

    Args:
        config: Credentials and region.
        endpoint: `http(s)://host[:port]`, which may differ from the configuration's.
        pools: Connections of the client.
    """
    url = urlsplit(endpoint)
    return SingleHashClient(
        url.netloc,
        access_key=config.access_key,
        secret_key=config.secret_key,
        secure=url.scheme == "https",
        region=config.region,  # without it the SDK queries the store before the first call
        http_client=pools,
    )
