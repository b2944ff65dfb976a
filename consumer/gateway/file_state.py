"""Detection of changed files, for keys and certificates."""

from pathlib import Path


def file_state(path: Path) -> tuple[int, ...] | None:
    """Return numbers that change when a file is replaced, written, or gets another owner or mode.

    Returns:
        None if the file does not exist.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    # The change time also covers the owner and the mode.
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
