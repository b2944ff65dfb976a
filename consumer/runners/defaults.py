"""MODEL_DEFAULTS: what a request gets that says nothing, before what the model itself would do."""

from collections.abc import Mapping

from pydantic import ValidationError

from consumer.ports.model import ModelUnavailable
from generation_contracts.requests import ImageToTextParameters, TextToImageParameters

SETTING = "MODEL_DEFAULTS"

Default = int | float | str


def checked_defaults(
    parameters: type[TextToImageParameters | ImageToTextParameters],
    defaults: Mapping[str, Default],
) -> dict[str, Default]:
    """The defaults by the names of the request's fields, seen by the contract.

    Args:
        parameters: The fields of a request that are the model's. One of them can have a default if
            its absence means "the model's own", but for the seed: a fixed one would make one
            image for every sender.
        defaults: As the setting has them.

    Raises:
        ModelUnavailable: There is no such field, or the contract refuses the value.
    """
    try:
        seen = parameters.model_validate(dict(defaults), strict=True)
    except ValidationError as error:
        detail = error.errors(include_input=False, include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in detail["loc"])
        unknown = detail["type"] == "extra_forbidden"
        problem = "a request has no such parameter" if unknown else detail["msg"]
        raise ModelUnavailable(f"{SETTING}: {field}: {problem}") from None
    fields = parameters.model_fields
    for name in sorted(seen.model_fields_set):
        if fields[name].default is not None or name == "seed":
            raise ModelUnavailable(f"{SETTING}: {name}: cannot have a default")
    return seen.model_dump(include=seen.model_fields_set, exclude_none=True)
