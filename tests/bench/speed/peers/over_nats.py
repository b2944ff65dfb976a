"""The job behind FastStream on JetStream: `python -m tests.bench.speed.peers.over_nats`.

As durable as the daemon: a work queue, one delivery in flight, the result stored before the ack.
"""

import asyncio
import os

from faststream import AckPolicy, FastStream
from faststream.nats import JStream, NatsBroker, PullSub
from nats.js.api import ConsumerConfig

from tests.bench.speed.peers.job import JobRequest, JobResult, PeerJob, say_ready
from tests.bench.speed.peers.subjects import REQUEST, REQUESTS_STREAM, RESULTS_STREAM, result


def make_app(job: PeerJob) -> FastStream:
    """Return an app with one subscriber that runs the whole job in a thread."""
    broker = NatsBroker(os.environ["NATS_URL"])

    @broker.subscriber(
        REQUEST,
        durable="speed",
        stream=JStream(REQUESTS_STREAM, declare=False),
        pull_sub=PullSub(batch_size=1),
        config=ConsumerConfig(max_ack_pending=1, ack_wait=60),
        ack_policy=AckPolicy.NACK_ON_ERROR,
    )
    async def handle(request: JobRequest) -> None:
        done: JobResult = await asyncio.to_thread(job, request.request_id)
        await broker.publish(done, result(request.request_id), stream=RESULTS_STREAM)

    app = FastStream(broker)
    app.after_startup(say_ready)
    return app


if __name__ == "__main__":
    asyncio.run(make_app(PeerJob()).run())
