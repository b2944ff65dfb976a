"""Artifacts: outputs into an S3 store, inputs out of it.

The only folder that imports the MinIO SDK and urllib3.
"""

from consumer.artifacts.config import StoreConfig, StoreMisconfigured, store_config
from consumer.artifacts.object_store import ObjectStoreArtifacts

__all__ = ["ObjectStoreArtifacts", "StoreConfig", "StoreMisconfigured", "store_config"]
