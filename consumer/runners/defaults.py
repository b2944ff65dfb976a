"""Validation of MODEL_DEFAULTS: defaults for omitted request fields, which override the model's."""

from collections.abc import Mapping

from pydantic import ValidationError

from consumer.ports.model import ModelMisconfigured
from generation_contracts.base import RequestPart

SETTING = "MODEL_DEFAULTS"

Default = int | float | str


def checked_defaults(
    parameters: type[RequestPart],
    defaults: Mapping[str, Default],
) -> dict[str, Default]:
    """Validate defaults against the contract, and return them by request field.

    A field can have a default if its absence means "the model's default". The seed is excluded: a
    fixed seed would give every sender the same image.

    Args:
        parameters: The contract's model of the task's parameters.
        defaults: The value of the setting.

    Raises:
        ModelUnavailable: There is no such field, it cannot have a default, or the value is invalid.
    """
    try:
        validated = parameters.model_validate(dict(defaults), strict=True)
    except ValidationError as error:
        detail = error.errors(include_input=False, include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in detail["loc"])
        unknown = detail["type"] == "extra_forbidden"
        problem = "a request has no such parameter" if unknown else detail["msg"]
        raise ModelMisconfigured(f"{SETTING}: {field}: {problem}") from None
    fields = parameters.model_fields
    for name in sorted(validated.model_fields_set):
        if fields[name].default is not None or name == "seed":
            raise ModelMisconfigured(f"{SETTING}: {name}: cannot have a default")
    return validated.model_dump(include=validated.model_fields_set, exclude_none=True)
