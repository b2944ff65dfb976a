"""What shows that a file has changed: keys and certificates are read again then."""

from pathlib import Path


def file_state(path: Path) -> tuple[int, ...] | None:
    """Return numbers that differ once a file is replaced, written to, or readable by others.

    Returns:
        None where there is no file.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    # The change time also shows a new owner or mode.
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
