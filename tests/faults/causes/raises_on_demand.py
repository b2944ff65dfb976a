"""The model raises if the prompt requests it, and the runner raises for the prompt `breaks`."""

from consumer.ports.model import ModelError
from consumer.settings import Settings
from generation_contracts import Request
from tests.support.quick_runner import QuickRunner, first_time


class RaisesOnDemand(QuickRunner):
    def step(self, request: Request, number: int) -> None:
        super().step(request, number)
        match request.prompt:
            case "raises":
                raise ModelError("ValueError")
            case "raises once" if first_time("raised"):
                raise ModelError("ValueError")
            case "breaks":
                raise KeyError("secret words")


def make_runner(_: Settings) -> RaisesOnDemand:
    return RaisesOnDemand()
