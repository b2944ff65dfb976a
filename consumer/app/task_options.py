"""The options of `consumer request TASK`, derived from the fields of the task's request."""

import json
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from generation_contracts import TaskSpec

Decorator = Callable[[Callable[..., None]], Callable[..., None]]

_TYPES = (int, float, str)
_SHARED = {"seed"}  # an option of every task


class _JsonObject(click.ParamType[Any]):
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the object as a dictionary."""
        try:
            found = value if isinstance(value, dict) else json.loads(value)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            self.fail('must be a JSON object, for example {"name": 1}', param, ctx)
        return found


def decorators(spec: TaskSpec) -> Iterator[Decorator]:
    """Yield the click decorators of a task's arguments and options, in the order of the help.

    A list of images that a request needs is an argument, one that it may have is `--image`. The
    field for previews has no option.
    """
    fields = spec.request.model_fields
    for name in spec.image_fields:
        if fields[name].is_required():
            yield click.argument(name, nargs=-1, required=True, metavar="IMAGE...")
    if "prompt" in fields:
        yield click.argument("prompt")
    for name in spec.image_fields:
        if not fields[name].is_required():
            several = name == "images"
            option = "--image" if several else f"--{name}"
            text = "A file, or s3://bucket/key." + (" Repeatable." if several else "")
            yield click.option(option, name, multiple=several, help=text)
    for name, field in spec.parameters.model_fields.items():
        if name not in {*_SHARED, *spec.image_fields, spec.preview_field}:
            yield from _option(spec.options.get(name, name), name, field)


def _option(shown: str, name: str, field: FieldInfo) -> Iterator[Decorator]:
    option = "--" + shown.replace("_", "-")
    kind = _type(field.annotation)
    described = (field.description or "").replace("`", "")
    text = f"{described[0].upper()}{described[1:]}." if described else None
    if kind is bool:
        yield click.option(option, name, is_flag=True, default=None, help=text)
    elif kind is dict:
        yield click.option(option, name, type=_JsonObject(), metavar="JSON", help=text)
    elif get_origin(kind) is Literal:
        yield click.option(option, name, type=click.Choice(get_args(kind)), help=text)
    elif kind in _TYPES:
        yield click.option(option, name, type=kind, help=text)


def _type(annotation: Any) -> Any:
    """Return the type of a field without its constraints and without None."""
    members = [each for each in get_args(annotation) if each is not type(None)]
    if get_origin(annotation) is Literal or not members:
        return annotation
    return dict if get_origin(annotation) is dict else _type(members[0])
