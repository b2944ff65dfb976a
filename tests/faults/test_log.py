"""A daemon whose log has no reader."""

import asyncio
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

from consumer.devstack import free_ports
from tests.support.quick_runner import FOLDER
from tests.support.scene import ROOT, WITHIN, Scene


async def test_requests_succeed_and_lost_log_lines_are_counted_without_a_reader(
    scene: Scene, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    environment = {
        **os.environ,
        **scene.settings(),
        FOLDER: str(tmp_path),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'contracts'}",
        "CONSUMER_PROBES_PORT": str(port),
    }
    read, write = os.pipe()
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "tests.faults.worker", "none"),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=write,
        stderr=write,
    )
    os.close(write)
    try:
        os.read(read, 100)  # its first line
        os.close(read)  # as `head` does
        for _ in range(3):
            event = await scene.event(await scene.submit(), within=2 * WITHIN)
            assert event["type"] == "generation.v1.succeeded"
        metrics = await asyncio.to_thread(_get, f"http://127.0.0.1:{port}/metrics")
        lost = metrics.split(
            'generation_lost_log_lines_total{queue="text_to_image",task="text_to_image"} '
        )[1]
        assert float(lost.splitlines()[0]) >= 3
        await scene.until_empty()
        worker.terminate()
        async with asyncio.timeout(WITHIN):
            assert await worker.wait() == 0
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - loopback
        text: str = answer.read().decode()
    return text
