"""Make the secrets of infra/compose.yaml: keys and passwords, each in a file.

    uv run python infra/compose/make_secrets.py

For gated models, set `HF_TOKEN` to the hub's token.

Existing files are not changed, and deleted files are created again. Only the owner
can read the folder (0700). Files that are mounted into containers are readable for all (0444): an
engine mounts them unchanged, and no container runs as their owner. The others are 0600.
"""

# ruff: noqa: INP001 - a program to run, no package

import json
import os
import secrets
import sys
import tomllib
from pathlib import Path

import nkeys

from consumer.gateway.keys import KeyFile
from consumer.gateway.tenants import Bounds

HERE = Path(__file__).parent
FOLDER = HERE / "secrets"
IDENTITIES = HERE.parent / "s3" / "identities.json"
MOUNTED, OWN = 0o444, 0o600


def write(name: str, text: str, mode: int = MOUNTED) -> str:
    """Write a file if its text differs."""
    path = FOLDER / name
    if not path.exists() or path.read_text() != text:
        draft = FOLDER / f".{name}"
        draft.unlink(missing_ok=True)
        draft.touch(OWN)  # before the secret is in it
        draft.write_text(text)
        draft.replace(path)
        sys.stdout.write(f"{path}\n")
    path.chmod(mode)
    return text


def write_once(name: str, text: str, mode: int = MOUNTED) -> str:
    """Write a file if it does not exist; return its text."""
    path = FOLDER / name
    return write(name, path.read_text() if path.exists() else text, mode)


def public_key(role: str, mode: int) -> str:
    """Return the public key of a NATS user, and store the seed in a file."""
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode()
    pair = nkeys.from_seed(bytearray(write_once(f"{role}.nk", seed, mode).encode()))
    return pair.public_key.decode()


def s3_keys(role: str) -> dict[str, str]:
    """Return the S3 credentials in the settings of a role."""
    made = (
        f's3_access_key = "{role}-{secrets.token_hex(6)}"\n'
        f's3_secret_key = "{secrets.token_urlsafe(30)}"\n'
    )
    settings = tomllib.loads(write_once(f"{role}.toml", made))
    return {"accessKey": settings["s3_access_key"], "secretKey": settings["s3_secret_key"]}


def gateway_key() -> None:
    """Create the folder with the file of API keys of the gateway, and the first key."""
    path = FOLDER / "gateway" / "keys.json"
    path.parent.mkdir(exist_ok=True)
    path.parent.chmod(0o755)
    if not path.exists():
        write("gateway_key", KeyFile(path).add("default", Bounds()).text, OWN)
    path.chmod(MOUNTED)


def main() -> None:
    """Create the missing secrets, and the files that are derived from them."""
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    FOLDER.chmod(0o700)
    mounted, own = ("admin", "worker", "endpoints", "gateway"), ("publisher", "observer")
    roles = {**dict.fromkeys(mounted, MOUNTED), **dict.fromkeys(own, OWN)}
    users = {role: public_key(role, mode) for role, mode in roles.items()}
    write("nkeys.env", "".join(f"GENERATION_{r.upper()}_NKEY={key}\n" for r, key in users.items()))
    stores = {role: s3_keys(role) for role in ("admin", "worker")}
    identities = json.loads(IDENTITIES.read_text())
    for identity in identities["identities"]:
        identity["credentials"] = [stores[identity["name"]]]
    write("s3.json", json.dumps(identities, indent=2) + "\n")
    write("minio_root_user", stores["admin"]["accessKey"])
    write("minio_root_password", stores["admin"]["secretKey"])
    write_once("grafana_admin_password", secrets.token_urlsafe(18))
    gateway_key()
    if token := os.environ.get("HF_TOKEN"):
        write("hub_token", token)
    else:
        write_once("hub_token", "")  # which is none to the hub's client


if __name__ == "__main__":
    main()
