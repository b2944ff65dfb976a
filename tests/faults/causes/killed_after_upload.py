"""The process is killed when the store has its output, and nobody else knows."""

from consumer.artifacts import ObjectStoreArtifacts
from tests.faults.causes.none import make_runner
from tests.support.holding import after, die_once_marked

__all__ = ["make_runner"]

after(ObjectStoreArtifacts, "store", die_once_marked)
