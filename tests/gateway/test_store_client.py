"""Outputs whose presigned URLs name an address that the gateway cannot reach."""

import asyncio
import base64
from pathlib import Path
from typing import Any

import httpx2

from consumer.apply import apply
from consumer.devstack import DevStack, free_ports
from consumer.settings import Settings
from generation_contracts import Task
from tests.support.forked import ForkedGateway, ForkedWorker
from tests.support.quick_runner import FOLDER
from tests.support.scene import WITHIN


def test_outputs_are_read_at_the_inner_address(stack: DevStack, tmp_path: Path) -> None:
    """As in containers: clients reach the store at another address than the gateway."""
    (port,) = free_ports(1)  # nothing listens there
    public = f"http://127.0.0.1:{port}"
    environment: dict[str, Any] = {
        **stack.environment(),
        "S3_PUBLIC_ENDPOINT": public,
        "CONSUMER_SUBJECT_ROOT": "inner",
    }
    settings = Settings(**{name.lower(): value for name, value in environment.items()})
    asyncio.run(apply(settings))
    of_worker = {"MODEL_TYPE": str(Task.TEXT_TO_IMAGE), FOLDER: str(tmp_path)}
    worker = ForkedWorker(
        "worker", {**environment, **of_worker}, log=tmp_path / "worker.log", cause="none"
    )
    gateway = ForkedGateway("gateway", environment, log=tmp_path / "gateway.log")
    with worker, gateway:
        address = f"{gateway.url}/v1/images/generations"
        asked = {"prompt": "a red circle", "num_inference_steps": 1}
        made = httpx2.post(address, json=asked, timeout=WITHIN)
        assert made.status_code == 200, made.text
        assert base64.b64decode(made.json()["data"][0]["b64_json"]).startswith(b"\x89PNG")
        url = {**asked, "response_format": "url"}
        named = httpx2.post(address, json=url, timeout=WITHIN)
        assert named.json()["data"][0]["url"].startswith(f"{public}/")
