"""The job behind LitServe: `python -m tests.bench.speed.peers.over_litserve PORT`.

As in its documentation: a class with `setup` and `predict`, and one worker process.
"""

import sys

import litserve  # type: ignore[import-not-found] # of the group `bench`

from tests.bench.speed.peers.job import JobRequest, PeerJob


class Peer(litserve.LitAPI):  # type: ignore[misc] # as above
    """The whole job in one call."""

    def setup(self, device: str) -> None:
        """Load the model."""
        self._job = PeerJob()

    def decode_request(self, request: JobRequest) -> str:
        """Return the request id from the body."""
        return request.request_id

    def predict(self, request_id: str) -> dict[str, object]:
        """Do the job."""
        return self._job(request_id).model_dump()


if __name__ == "__main__":
    server = litserve.LitServer(
        Peer(api_path="/infer"), accelerator="cpu", healthcheck_path="/ready", timeout=False
    )
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning"
    )
