"""Keys for the users of infra/nats/users.conf, and what each of them connects with."""

import os
import re
from pathlib import Path

import nkeys

USERS = Path(__file__).parents[2] / "infra" / "nats" / "users.conf"
ENDPOINTS = "endpoints"  # user of a worker's second connection, where the file has it
_OTHER_INBOXES = {"publisher": "_INBOX_sender"}


class Users:
    """Seeds of all users that the file names.

    Args:
        folder: Where the seeds are written.

    Attributes:
        roles: Names of the users, in small letters.
        config: The file, with the public keys of these users; for `DevStack(nats_config=…)`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        text = USERS.read_text()
        self.roles = sorted(set(re.findall(r"nkey: \$GENERATION_([A-Z]+)_NKEY", text)))
        self.roles = [role.lower() for role in self.roles]
        keys = {role: self._make(role) for role in self.roles}
        lines = [f"GENERATION_{role.upper()}_NKEY: {key}\n" for role, key in keys.items()]
        self.config = "".join(lines) + text

    def seed(self, role: str) -> Path:
        """The file with a user's seed."""
        return self._folder / f"{role}.nk"

    def inbox(self, role: str) -> str:
        """What the inboxes of a user begin with."""
        return _OTHER_INBOXES.get(role, f"_INBOX_{role}")

    def settings(self, role: str) -> dict[str, str]:
        """The settings with which a process connects as a user."""
        return {"NATS_NKEY_SEED": str(self.seed(role)), "NATS_INBOX_PREFIX": self.inbox(role)}

    def worker_settings(self) -> dict[str, str]:
        """The settings of a worker, which may have two connections."""
        settings = self.settings("worker")
        if ENDPOINTS in self.roles:
            settings["NATS_ENDPOINTS_NKEY_SEED"] = str(self.seed(ENDPOINTS))
            settings["NATS_ENDPOINTS_INBOX_PREFIX"] = self.inbox(ENDPOINTS)
        prefixes = f"{self.inbox('publisher')}.,generation.reply."
        return {**settings, "CONSUMER_REPLY_PREFIXES": prefixes}

    def _make(self, role: str) -> str:
        seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
        self.seed(role).write_bytes(seed)
        public_key: str = nkeys.from_seed(bytearray(seed)).public_key.decode()
        return public_key
