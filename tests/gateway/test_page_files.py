"""The static files of the pages: HTTP headers, content and packaging."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx2

from consumer.devstack import GatewayServer
from consumer.gateway.page import FILES

ROOT = Path(__file__).parents[2]


async def test_files_have_entity_tags_and_a_strict_content_security_policy(
    gateway: GatewayServer,
) -> None:
    async with httpx2.AsyncClient(base_url=gateway.url) as client:
        for path in ("/", "/docs", *(f"/page/{name}" for name in FILES)):
            answer = await client.get(path)
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["content-encoding"] == "gzip"
            etag = answer.headers["etag"]
            again = await client.get(path, headers={"if-none-match": f'"other", {etag}'})
            assert (again.status_code, again.content) == (304, b"")
            head = await client.head(path, headers={"accept-encoding": "identity"})
            assert (head.status_code, head.content) == (200, b"")
            assert int(head.headers["content-length"]) == len(answer.content)
        missing = await client.get("/page/nothing.js")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "not_found"


async def test_files_contain_no_address_of_another_server() -> None:
    for name, file in FILES.items():
        text = file.content.decode()
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        if name.endswith(".html"):
            assert not re.search(
                r"<script(?![^>]*\ssrc=)|\sstyle=|<style|\son[a-z]+=|javascript:", text
            )
        if name.endswith(".js"):
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text
            )


def test_the_wheel_contains_the_files(tmp_path: Path) -> None:
    uv = shutil.which("uv")
    command = [uv] if uv else [sys.executable, "-m", "uv"]
    build = [*command, "build", "--package", "generation-consumer", "--wheel", "-o", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    assert {f"consumer/gateway/page/{name}" for name in FILES} <= set(inside)
