"""A client of an S3 server that shares no code with the product."""

from typing import Protocol

from minio import Minio


class Store(Protocol):
    """The address and the keys of an S3 server; see `consumer.devstack.ObjectStore`."""

    @property
    def endpoint(self) -> str: ...
    @property
    def access_key(self) -> str: ...
    @property
    def secret_key(self) -> str: ...


def plain_s3_client(store: Store, **keys: str) -> Minio:
    """Return a client of a store, with the store's keys unless others are given."""
    return Minio(
        store.endpoint.removeprefix("http://"),
        **{"access_key": store.access_key, "secret_key": store.secret_key, **keys},
        secure=False,
        region="us-east-1",  # without it, the SDK asks the store for the region
    )
