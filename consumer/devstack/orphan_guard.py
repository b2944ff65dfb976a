"""A launcher that makes a server end with its parent process.

`python -I -S orphan_guard.py PARENT PROGRAM ARGUMENT…` asks Linux to send SIGKILL when the thread
that forked it ends, and then replaces itself by PROGRAM, which keeps the process id and the
request. A `preexec_fn` could do the same, but runs Python between fork and exec, which can
deadlock in a process with threads. Only the standard library is imported: it is run by its path.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_FIRST_PROGRAM_ARGUMENT = 2
_CANNOT_EXECUTE = 127  # the exit code a shell gives


def main(arguments: list[str]) -> None:
    """Become the program in `arguments[2:]`; exit instead where `arguments[1]` is not the parent.

    Raises:
        OSError: the kernel refused the request.
        SystemExit: the parent is gone, or the program cannot be executed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
    # Checked after prctl: the kernel sends no signal for a parent that ended before it.
    if os.getppid() != int(arguments[1]):
        sys.exit("the parent ended before the program could start")
    program = arguments[_FIRST_PROGRAM_ARGUMENT:]
    try:
        os.execv(program[0], program)  # noqa: S606 - replacing this process is the purpose
    except OSError as error:
        sys.stderr.write(f"cannot start {program[0]}: {error.strerror}\n")
        sys.exit(_CANNOT_EXECUTE)


if __name__ == "__main__":
    main(sys.argv)
