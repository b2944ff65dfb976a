"""Converts the package version to the SemVer form that NATS micro services require."""

import re

# The normal form of PEP 440, as in package metadata: 1!2.0rc1.post2.dev3+local.4
_PEP_440 = re.compile(
    r"(?:(?P<epoch>\d+)!)?(?P<release>\d+(?:\.\d+)*)(?P<pre>(?:a|b|rc)\d+)?"
    r"(?P<post>\.post\d+)?(?P<dev>\.dev\d+)?(?:\+(?P<local>[a-z0-9.]+))?"
)


def semantic_version(version: str) -> str:
    """Convert a PEP 440 version to a SemVer 2.0.0 version.

    A pre-release or development release stays one. Parts that SemVer does not have (an epoch, a
    fourth number, a post-release, a local version) become build metadata.

    Raises:
        ValueError: The version is not in the normal form of PEP 440.
    """
    found = _PEP_440.fullmatch(version)
    if found is None:
        raise ValueError(f"{version}: not in the normal form of PEP 440")
    numbers = [str(int(number)) for number in found["release"].split(".")]
    core = ".".join([*numbers, "0", "0"][:3])
    before = _joined(found["pre"], found["dev"])
    epoch = f"epoch{found['epoch']}" if found["epoch"] else None
    build = _joined(epoch, *numbers[3:], found["post"], found["local"])
    return core + (f"-{before}" if before else "") + (f"+{build}" if build else "")


def _joined(*parts: str | None) -> str:
    """Join the parts that are not None with dots: `rc1` and `.dev3` become `rc.1.dev.3`."""
    split = (re.sub(r"^\.?(a|b|rc|post|dev|epoch)(\d+)$", r"\1.\2", part) for part in parts if part)
    return ".".join(split)
