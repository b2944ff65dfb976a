"""The first upload waits until the test resumes it. The end of the job aborts the upload."""

from consumer.artifacts import ObjectStoreArtifacts
from tests.faults.causes.none import make_runner
from tests.support.holding import before, hold_once_without_blocking

__all__ = ["make_runner"]


async def _held() -> None:
    await hold_once_without_blocking("upload")


before(ObjectStoreArtifacts, "store", _held)
