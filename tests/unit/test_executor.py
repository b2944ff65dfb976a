"""The behaviour of a worker on in-memory ports."""

from tests.support.behaviour import Behaviour


class TestExecution(Behaviour):
    """Runs the common tests with the `make_world` fixture of this folder."""
