"""The memory of a worker does not grow with the number of jobs, for any outcome."""

import pytest

from tests.bench.memory import measure, slope
from tests.support.scene import Scene

JOBS = 1_200  # enough that a single arena of 1 MB does not count as growth
WARM_UP = 150  # jobs until every pool and cache has its final size

# KB a job. Measured: 0.0 to 0.3, a part of it the JSON parser's cache of short strings, which is
# bounded. A kept exception of this model is 8 MB and a request 65 KB: if those of one of the ten
# kinds of jobs were kept, that would be 6.5 KB a job, less what fits into holes of the heap.
BOUND = 2.0
# Pools of connections and threads may grow by a few when calls coincide.
MORE = 8


@pytest.mark.timeout(400)  # seconds; 20 on idle cores
async def test_memory_and_open_files_do_not_grow_with_jobs(scene: Scene) -> None:
    looks = await measure(scene, JOBS)
    counted = [look for look in looks if look.jobs > WARM_UP]
    print(f"{slope(counted):.3f} KB a job")  # noqa: T201 - for people
    assert slope(counted) < BOUND
    first, last = counted[0], counted[-1]
    assert last.open_files <= first.open_files + MORE
    assert last.threads <= first.threads + MORE
    assert len(await scene.dead_letters()) == 2 * len(looks)  # the faults have been there
