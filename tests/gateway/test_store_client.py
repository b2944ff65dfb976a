"""Outputs with presigned URLs at an address that the gateway cannot reach."""

import asyncio
import base64
from pathlib import Path
from typing import Any

import httpx2

from consumer.app.apply import apply
from consumer.devstack import DevStack, free_ports
from consumer.settings import Settings
from generation_contracts import Task
from tests.support.forked import ForkedGateway, ForkedWorker
from tests.support.quick_runner import FOLDER
from tests.support.scene import WITHIN


def test_outputs_are_read_at_the_internal_address(stack: DevStack, tmp_path: Path) -> None:
    """In containers, clients and the gateway use different addresses of the store."""
    (port,) = free_ports(1)  # nothing listens there
    public = f"http://127.0.0.1:{port}"
    environment: dict[str, Any] = {
        **stack.environment(),
        "S3_PUBLIC_ENDPOINT": public,
        "CONSUMER_SUBJECT_ROOT": "inner",
    }
    settings = Settings(**{name.lower(): value for name, value in environment.items()})
    asyncio.run(apply(settings))
    worker_settings = {"MODEL_TYPE": str(Task.TEXT_TO_IMAGE), FOLDER: str(tmp_path)}
    worker = ForkedWorker(
        "worker", {**environment, **worker_settings}, log=tmp_path / "worker.log", cause="none"
    )
    gateway = ForkedGateway("gateway", environment, log=tmp_path / "gateway.log")
    with worker, gateway:
        address = f"{gateway.url}/v1/images/generations"
        body = {"prompt": "a red circle", "num_inference_steps": 1}
        answer = httpx2.post(address, json=body, timeout=WITHIN)
        assert answer.status_code == 200, answer.text
        assert base64.b64decode(answer.json()["data"][0]["b64_json"]).startswith(b"\x89PNG")
        url = {**body, "response_format": "url"}
        with_url = httpx2.post(address, json=url, timeout=WITHIN)
        assert with_url.json()["data"][0]["url"].startswith(f"{public}/")
