"""The exceptions of the development stack, each with one message for the terminal.

The messages contain ports and files of this machine, so they must not be sent to senders of
requests.
"""

from consumer.ports.unavailable import Unavailable


class DevStackError(Unavailable):
    """The development stack failed; the message has the reason and a remedy."""


class ServerMissingError(DevStackError):
    """The program of a server is not installed."""


class DirectoryInUseError(DevStackError):
    """Another development stack runs on the same directory."""


class StartFailedError(DevStackError):
    """A child ended before it was ready, or was not ready in time; the message shows its log."""


class ChildEndedError(DevStackError):
    """A child that was ready ended by itself; the message shows its log."""


class NoSpaceError(DevStackError):
    """The disk has too little free space; the message names the need."""


class PortTakenError(StartFailedError):
    """The port of a child is in use by another program."""
