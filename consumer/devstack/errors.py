"""What can go wrong with the development stack, each with one message for the person at the desk.

The messages name ports and files of this machine, so they are for the terminal, never for a
sender of requests.
"""

from consumer.ports.unavailable import Unavailable


class DevStackError(Unavailable):
    """The development stack cannot do what was asked; the message says why and what helps."""


class ServerMissingError(DevStackError):
    """The program of a server is not installed."""


class DirectoryInUseError(DevStackError):
    """Another development stack runs on the same directory."""


class StartFailedError(DevStackError):
    """A child ended before it was ready, or was not ready in time; the message shows its log."""


class PortTakenError(StartFailedError):
    """A port that a child was to listen on belongs to another program."""
