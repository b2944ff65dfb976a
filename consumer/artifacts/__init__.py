"""Artifacts: stores outputs in an S3 object store, and fetches input images.

Only this package imports the MinIO SDK and urllib3.
"""

from consumer.artifacts.config import StoreConfig, StoreMisconfigured, store_config
from consumer.artifacts.faults import with_address
from consumer.artifacts.object_store import ObjectStoreArtifacts

__all__ = [
    "ObjectStoreArtifacts",
    "StoreConfig",
    "StoreMisconfigured",
    "store_config",
    "with_address",
]
