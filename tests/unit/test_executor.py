"""What every worker does, on in-memory ports."""

from tests.support.behaviour import Behaviour


class TestExecution(Behaviour):
    """`make_world` comes from the fixtures of this folder."""
