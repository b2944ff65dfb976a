"""The process is killed after the upload of its output, and before the result."""

from consumer.artifacts import ObjectStoreArtifacts
from tests.faults.causes.none import make_runner
from tests.support.holding import after, die_once_marked

__all__ = ["make_runner"]

after(ObjectStoreArtifacts, "store", die_once_marked)
