"""Make the worker's user in MinIO, with the policy of infra/s3/policy.json.

SeaweedFS reads its identities from a file; MinIO needs API calls. The program may run again.
"""

# ruff: noqa: INP001 - a program to run, no package

import os
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

from minio import MinioAdmin
from minio.credentials import StaticProvider

SECRETS = Path(os.environ.get("SECRETS", "/run/secrets"))
POLICY_FILE = Path(os.environ.get("POLICY_FILE", "/etc/generation/policy.json"))
POLICY = "generation-worker"


def keys(role: str) -> tuple[str, str]:
    """Return the access key and the secret key in the settings of a role."""
    settings = tomllib.loads((SECRETS / f"{role}_settings").read_text())
    return settings["s3_access_key"], settings["s3_secret_key"]


def main() -> None:
    """Create the user and the policy, and attach the policy to the user."""
    endpoint = urlsplit(os.environ["S3_ENDPOINT"])
    admin = MinioAdmin(
        endpoint=endpoint.netloc,
        credentials=StaticProvider(*keys("admin")),
        secure=endpoint.scheme == "https",
    )
    access_key, secret_key = keys("worker")
    admin.user_add(access_key, secret_key)
    admin.policy_add(POLICY, POLICY_FILE)
    # Not attach_policy, which fails where the policy is attached already.
    admin.policy_set(POLICY, user=access_key)


if __name__ == "__main__":
    main()
