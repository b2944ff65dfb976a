"""C code holds the interpreter lock for longer than a lease: the lease guard renews the lease."""

import os
import signal
from pathlib import Path

from nats.aio.subscription import Subscription

from consumer.devstack import Daemon
from tests.support.holding import RESUME
from tests.support.observations import until_pulls_wait
from tests.support.scene import ACK_WAIT, WITHIN, Scene


def guard_of(worker: Daemon) -> int:
    """Return the process id of a worker's lease guard."""
    (child,) = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    return int(child)


def exists(pid: int) -> bool:
    """Return whether a process that is not a child of this process is running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_lease_survives_a_lock_held_for_twice_as_long(scene: Scene) -> None:
    worker = await scene.start("holding_the_lock", FAULTS_SECONDS=str(2 * ACK_WAIT + 0.5))
    await scene.until_logged(worker, "lease_guard_connected")
    request_id = await scene.submit()
    await scene.until_noted("holding")
    await scene.start()  # this worker would get the request after the end of the lease
    event = await scene.event(request_id)
    assert (event["type"], event["attempt"]) == ("generation.v1.succeeded", 1)
    assert scene.runs() == [request_id]
    await scene.until_empty()


async def test_lock_held_too_long_ends_the_lease_and_the_process(scene: Scene) -> None:
    hanging = await scene.start(
        "holding_the_lock", FAULTS_SECONDS="600", CONSUMER_STALL_TIMEOUT="1"
    )
    request_id = await scene.submit()
    await scene.until_noted("holding")
    await scene.start()
    assert await scene.exit_code(hanging) == -signal.SIGKILL
    log = hanging.log_since_start()
    assert "worker_stalled" in log
    assert "holding_the_lock.py" in log, "the log has the position of the thread"
    event = await scene.event(request_id, within=ACK_WAIT + 1 + 5)
    assert (event["type"], event["attempt"]) == ("generation.v1.succeeded", 2)
    assert scene.runs() == [request_id] * 2


async def test_lease_guard_ends_with_its_worker(scene: Scene) -> None:
    worker = await scene.start()
    lease_guard = guard_of(worker)
    os.kill(worker.pid, signal.SIGKILL)

    async def gone() -> bool:
        return not exists(lease_guard)

    await scene.until(gone, "end of the lease_guard")


async def test_new_lease_guard_gets_the_leases_of_a_killed_one(scene: Scene) -> None:
    worker = await scene.start(
        "holding_the_lock", FAULTS_SECONDS=str(2 * ACK_WAIT), FAULTS_WAIT="1"
    )
    request_id = await scene.submit()
    await scene.until_noted("runs")
    await scene.until_logged(worker, "lease_guard_connected")
    os.kill(guard_of(worker), signal.SIGKILL)

    async def replaced() -> bool:
        return worker.log_since_start().count("lease_guard_connected") == 2

    await scene.until(replaced, "new lease_guard")
    (scene.folder / "hold").touch()
    await scene.until_noted("holding")
    await scene.start()
    event = await scene.event(request_id)
    assert (event["type"], event["attempt"]) == ("generation.v1.succeeded", 1)
    assert scene.runs() == [request_id]
    assert worker.alive


async def test_worker_without_a_lease_is_not_killed(scene: Scene) -> None:
    worker = await scene.start(CONSUMER_STALL_TIMEOUT="1")
    await scene.until_logged(worker, "lease_guard_connected")
    # Each run takes longer than the timeout of the guard for a lease without messages.
    for request_id in [await scene.submit(steps=200) for _ in range(2)]:
        assert (await scene.event(request_id))["attempt"] == 1
    assert worker.alive


async def pulled(scene: Scene) -> Subscription:
    """Pull the request. The durable delivers it when its current lease expires."""
    inbox = scene.sender.new_inbox()
    subscription = await scene.sender.subscribe(inbox)
    durable = f"{scene.subjects.requests_stream(scene.task)}.{scene.task}"
    pull = b'{"batch":1,"expires":30000000000}'
    await scene.sender.publish(f"$JS.API.CONSUMER.MSG.NEXT.{durable}", pull, reply=inbox)
    await scene.sender.flush()
    return subscription


async def test_frozen_worker_does_not_count_as_stalled(scene: Scene) -> None:
    worker = await scene.start(
        "holding_the_lock", CONSUMER_STALL_TIMEOUT="1", FAULTS_SECONDS="0", FAULTS_WAIT="1"
    )
    await scene.until_logged(worker, "lease_guard_connected")
    request_id = await scene.submit()
    await scene.until_noted("runs")
    lease_guard = guard_of(worker)
    deliveries_of_lease = await pulled(scene)
    for pid in (worker.pid, lease_guard):
        os.kill(pid, signal.SIGSTOP)
    await deliveries_of_lease.next_msg(timeout=WITHIN)  # the lease has expired
    beats = await scene.sender.subscribe(f"$JS.ACK.{scene.subjects.requests_stream(scene.task)}.>")
    await scene.sender.flush()
    os.kill(lease_guard, signal.SIGCONT)
    assert (await beats.next_msg(timeout=WITHIN)).data == b"+WPI", (
        "the lease guard renews the lease and kills no process"
    )
    os.kill(worker.pid, signal.SIGCONT)
    (scene.folder / "hold").touch()
    event = await scene.event(request_id)
    assert event["type"] == "generation.v1.succeeded"
    assert worker.alive
    assert guard_of(worker) == lease_guard
    await scene.until_empty()


async def test_lease_guard_ends_if_a_fork_keeps_its_input_open(scene: Scene) -> None:
    # A pull stands for half of it, and a beat that is late on a busy machine is a fifth.
    await scene.apply(CONSUMER_ACK_WAIT=str(3 * ACK_WAIT))
    dying = await scene.start("survived_by_a_fork")
    await scene.until_logged(dying, "lease_guard_connected")
    lease_guard = guard_of(dying)
    request_id = await scene.submit()
    await scene.until_noted("run")
    # The fork keeps the connection of the dead worker open for the server.
    await until_pulls_wait(scene, 1, in_flight=1)
    (scene.folder / f"run{RESUME}").touch()
    assert await scene.exit_code(dying) == -signal.SIGKILL
    await scene.start()
    event = await scene.event(request_id)
    assert (event["type"], event["attempt"]) == ("generation.v1.succeeded", 2)

    async def gone() -> bool:
        return not exists(lease_guard)

    await scene.until(gone, "end of the lease_guard")
    (fork,) = scene.notes("forks")
    assert exists(int(fork)), "the test needs a running fork"
    (scene.folder / "end").touch()
