"""The job behind FastStream on JetStream: `python -m tests.bench.speed.peers.over_nats`.

As durable as the daemon: a work queue, one delivery at a time, the result stored before the ack.
"""

import asyncio
import os

from faststream import AckPolicy, FastStream
from faststream.nats import JStream, NatsBroker, PullSub
from nats.js.api import ConsumerConfig

from tests.bench.speed.peers.job import Asked, Done, PeerJob, say_ready
from tests.bench.speed.peers.subjects import REQUEST, REQUESTS_STREAM, RESULTS_STREAM, result


def make_app(job: PeerJob) -> FastStream:
    """One subscriber that gives the whole job to a thread."""
    broker = NatsBroker(os.environ["NATS_URL"])

    @broker.subscriber(
        REQUEST,
        durable="speed",
        stream=JStream(REQUESTS_STREAM, declare=False),
        pull_sub=PullSub(batch_size=1),
        config=ConsumerConfig(max_ack_pending=1, ack_wait=60),
        ack_policy=AckPolicy.NACK_ON_ERROR,
    )
    async def handle(asked: Asked) -> None:
        done: Done = await asyncio.to_thread(job, asked.request_id)
        await broker.publish(done, result(asked.request_id), stream=RESULTS_STREAM)

    app = FastStream(broker)
    app.after_startup(say_ready)
    return app


if __name__ == "__main__":
    asyncio.run(make_app(PeerJob()).run())
