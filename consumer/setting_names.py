"""Environment variables with a prefix of the settings that are not settings.

A misspelt variable would otherwise have no effect and no message. Other programs use the same
prefixes, so only a name that is close to a setting counts as misspelt.
"""

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches

_PREFIXES = ("CONSUMER_", "GATEWAY_", "MODEL_", "NATS_", "S3_")
_SIMILARITY = 0.75  # of difflib, for the part after the prefix: `PROT` for `PORT`

# Variables of other programs: the nats command line, S3 clients, and GATEWAY_KEY, with which
# docs/reference/http.md calls the gateway.
_FOREIGN = frozenset(
    {"NATS_COLOR", "NATS_CONTEXT", "NATS_JWT", "NATS_NKEY", "NATS_SEED", "NATS_SOCKS_PROXY"}
    | {"NATS_TABLE_FORMAT", "NATS_TIMEOUT", "NATS_TOKEN"}
    | {"S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY", "GATEWAY_KEY"}
)
# Kubernetes sets such variables in each container for each Service of the namespace.
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)$|_PORT_[0-9]+_(TCP|UDP|SCTP)(_|$)")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


def is_service_address(name: str, value: str) -> bool:
    """Return whether a variable has the form that Kubernetes gives it for a Service: `X_PORT`."""
    return name.upper().endswith("_PORT") and _SERVICE_ADDRESS.match(value) is not None


def suggestion(name: str, known: Collection[str]) -> str | None:
    """Return the known name that `name` was probably meant to be, or None.

    Args:
        name: A name in upper case.
        known: The names of all settings, in upper case.
    """
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    rests = [other.removeprefix(prefix) for other in known if other.startswith(prefix)]
    close = get_close_matches(name.removeprefix(prefix), rests, n=1, cutoff=_SIMILARITY)
    return prefix + close[0] if close else None


def unknown_variables(environment: Mapping[str, str], known: Collection[str]) -> list[str]:
    """Return the variables with a prefix of the settings that nothing is known to read.

    Args:
        environment: Variables by name; settings are read in any case.
        known: The names of all settings, in upper case.
    """
    return sorted(
        name
        for name, value in environment.items()
        if name.upper().startswith(_PREFIXES)
        and name.upper() not in known
        and name.upper() not in _FOREIGN
        and not _SERVICE_LINK.search(name.upper())
        and not is_service_address(name, value)
    )
