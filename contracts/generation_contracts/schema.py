"""The contract as documents: AsyncAPI 3 for all subjects and messages, JSON Schema for each body.

Both are made from the models, the header names and the examples of this package, so they say what
the code does. What pydantic leaves out is added: a second name that a field is accepted
under, the constant field that tells events apart as required, the end of a map whose keys have a
pattern, and examples.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic import AliasChoices, BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema
from pydantic_core import core_schema

from generation_contracts import events, headers
from generation_contracts.base import Task
from generation_contracts.cancellation import CancelReply
from generation_contracts.events import VERSION, EventBase
from generation_contracts.examples import EVENTS, REPLIES, REQUESTS, TRACE_PARENT
from generation_contracts.failures import FailureCode
from generation_contracts.requests import REQUEST_TYPES, encode
from generation_contracts.subjects import MAX_SUBJECT, SUBJECT_PATTERN, Subjects

Document = dict[str, Any]

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_JSON: Final = "application/json"

_NEWS: Final[Mapping[str, type[EventBase]]] = {
    "started": events.StartedEvent,
    "progress": events.ProgressEvent,
}
_ENDS: Final[Mapping[str, type[EventBase]]] = {
    "succeeded": events.SucceededEvent,
    "failed": events.FailedEvent,
    "cancelled": events.CancelledEvent,
}
_MODELS: Final[tuple[tuple[type[BaseModel], JsonSchemaMode], ...]] = (
    *((model, "validation") for model in REQUEST_TYPES.values()),
    *((model, "serialization") for model in (*_NEWS.values(), *_ENDS.values())),
    (CancelReply, "serialization"),
)

# The queue group that NATS micro services are in unless told otherwise.
_QUEUE_GROUP: Final = {"nats": {"queue": "q", "bindingVersion": "0.1.0"}}

# Stands for any request id while an address is built; it has to be a valid id itself.
_ANY_ID: Final = "request_id"


class _Generator(GenerateJsonSchema):
    """pydantic's generator, made complete."""

    def model_schema(self, schema: core_schema.ModelSchema) -> Document:
        """Add the other names that a field is accepted under, one of them at a time."""
        document = super().model_schema(schema)
        for name, field in schema["cls"].model_fields.items():
            if isinstance(field.validation_alias, AliasChoices):
                for other in sorted({*map(str, field.validation_alias.choices)} - {name}):
                    document["properties"][other] = document["properties"][name] | {
                        "deprecated": True,
                        "description": f"another name of {name}",
                        "title": other.replace("_", " ").title(),
                    }
                    not_both = {"not": {"required": [name, other]}}
                    document.setdefault("allOf", []).append(not_both)
        return document

    def field_is_required(
        self,
        field: core_schema.ModelField | core_schema.DataclassField | core_schema.TypedDictField,
        total: bool,
    ) -> bool:
        """Require a constant field of an event: readers tell events and outputs apart by it."""
        inner: Any = field["schema"]
        if self.mode == "serialization" and inner["type"] == "default":
            return bool(inner["schema"]["type"] == "literal")
        return super().field_is_required(field, total)

    def dict_schema(self, schema: core_schema.DictSchema) -> Document:
        """Close a map whose keys have a pattern: pydantic leaves it open to every other key."""
        document = super().dict_schema(schema)
        if "patternProperties" in document:
            document["additionalProperties"] = False
        return document

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> Document:
        """Leave out `discriminator`: it is OpenAPI's, and the constant fields say the same."""
        document = super().tagged_union_schema(schema)
        document.pop("discriminator", None)
        return document


def json_schemas() -> dict[str, Document]:
    """A JSON Schema 2020-12 for the body of every request and event, each usable on its own.

    A schema is not the last word on a request. Beyond it `decode_request` refuses a prompt of
    white space, a deadline without time zone, a whole number written as `512.0`, and JSON that is
    broken or nested too deeply.

    Returns:
        Class name -> schema. Requests forbid unknown fields, events allow them.
    """
    return {
        model.__name__: {
            "$schema": _DIALECT,
            "$id": f"urn:{VERSION.replace('.', ':')}:{model.__name__}",
            **model.model_json_schema(mode=mode, schema_generator=_Generator),
            "examples": [json.loads(encode(example)) for example in _examples_of(model).values()],
        }
        for model, mode in _MODELS
    }


def asyncapi(subjects: Subjects | None = None) -> Document:
    """The AsyncAPI 3.0.0 document of one installation, from the daemon's point of view.

    Args:
        subjects: The installation's subjects; None means the default root.
    """
    subjects = subjects or Subjects()
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Generation consumer",
            "version": VERSION.rpartition(".")[2],
            "description": (
                "Requests come from NATS JetStream, outputs go to an S3 store, events tell what "
                "happened. `receive` and `send` are what the daemon does: a sender does the "
                "opposite. Each stored channel names its JetStream stream as `x-stream`."
            ),
        },
        "defaultContentType": _JSON,
        "servers": {"nats": _server()},
        "channels": _channels(subjects),
        "operations": _operations(),
        "components": {"messages": _messages(), "schemas": _schemas()},
    }


def _examples_of(model: type[BaseModel]) -> dict[str, BaseModel]:
    every: dict[str, BaseModel] = {**REQUESTS, **EVENTS, **REPLIES}
    return {name: example for name, example in every.items() if type(example) is model}


def _server() -> Document:
    return {
        "host": "{host}",
        "protocol": "nats",
        "description": "NATS 2.12 or later with JetStream",
        "variables": {
            "host": {"default": "localhost:4222", "description": "host and port of the server"}
        },
    }


def _channels(subjects: Subjects) -> Document:
    first = Task.TEXT_TO_IMAGE  # stands for any task in the addresses that have `{task}`
    channels = {
        "result": _channel(
            _address(subjects, subjects.result(first, _ANY_ID), any_task=True),
            "The one terminal event of a request, kept for those who ask later.",
            _ENDS,
            subjects.results_stream,
        ),
        "progress": _channel(
            _address(subjects, subjects.progress(first, _ANY_ID), any_task=True),
            "What happens meanwhile, at most five times a second; core NATS, not stored.",
            _NEWS,
        ),
        "dead_letter": _channel(
            _address(subjects, subjects.dead_letter(first), any_task=True),
            "The original bytes of a request that no worker can handle.",
            ["dead_letter"],
            subjects.dead_letters_stream,
        ),
        "cancel": _channel(
            _address(subjects, subjects.cancel(_ANY_ID)),
            "Ask for the end of a request, queued or running.",
            ["cancel"],
        ),
        "reply": _channel(
            None,
            f"The sender's own subject. A worker replies only under the prefixes that it is set to "
            f"reply to, never under `{subjects.root}.` except `{subjects.root}.reply.`.",
            _ENDS,
        ),
        "cancel_reply": _channel(
            None, "The caller's inbox: what there was to cancel.", ["cancel_reply"]
        ),
    }
    for task in Task:
        channels |= _task_channels(subjects, task)
    return dict(sorted(channels.items()))


def _task_channels(subjects: Subjects, task: Task) -> Document:
    request = f"{task}_request"
    return {
        request: _channel(
            _address(subjects, subjects.request(task)),
            "Requests; the id is in the body, in Nats-Msg-Id, or made by the worker.",
            [request],
            subjects.requests_stream(task),
        ),
        f"{request}_by_id": _channel(
            _address(subjects, subjects.request(task, _ANY_ID)),
            "Requests that can be found and cancelled by their id while they are queued. A last "
            "token that is no request id fails with `invalid_request`. That event is sent to the "
            "reply subject, and stored under the id in the body, else under Nats-Msg-Id, else "
            "under an id that the worker makes.",
            [request],
            subjects.requests_stream(task),
        ),
        f"{task}_call": _channel(
            _address(subjects, subjects.call(task)),
            "The front door for request-reply: the caller's inbox gets the terminal event.",
            [request],
        ),
    }


def _channel(
    address: str | None, description: str, messages: Iterable[str], stream: str | None = None
) -> Document:
    channel: Document = {
        "address": address,
        "description": description,
        "messages": {name: _ref("components/messages", name) for name in messages},
    }
    described: Document = {
        "request_id": {
            "description": "1-64 characters of A-Z a-z 0-9 _ -",
            "examples": ["poster-0001"],
        },
        "task": {"description": "what the model does", "enum": [str(task) for task in Task]},
    }
    parameters = {name: text for name, text in described.items() if f"{{{name}}}" in str(address)}
    if parameters:
        channel["parameters"] = parameters
    if stream is not None:
        channel["x-stream"] = stream
    return channel


def _address(subjects: Subjects, subject: str, *, any_task: bool = False) -> str:
    """A subject of `Subjects` with its variable tokens as parameters."""
    tokens = subject.removeprefix(f"{subjects.root}.").split(".")
    if any_task:
        tokens = ["{task}" if token in set(Task) else token for token in tokens]
    return ".".join([subjects.root, *(t.replace(_ANY_ID, f"{{{_ANY_ID}}}") for t in tokens)])


def _operations() -> Document:
    operations = {
        "cancel": _operation("receive", "cancel", ["cancel"], "Any worker sees to it.")
        | {
            "reply": {
                "channel": _ref("channels", "cancel_reply"),
                "messages": _messages_of("cancel_reply", ["cancel_reply"]),
            },
            "bindings": _QUEUE_GROUP,
        },
        "send_dead_letter": _operation("send", "dead_letter", ["dead_letter"], "Put it aside."),
        "send_progress": _operation("send", "progress", _NEWS, "Tell what happens."),
        "send_result": _operation("send", "result", _ENDS, "Store how the request ended."),
    }
    for task in Task:
        request = f"{task}_request"
        for channel in (request, f"{request}_by_id"):
            operations[f"receive_{channel}"] = _operation(
                "receive", channel, [request], "Pulled from the work queue by a durable consumer."
            ) | {"reply": _reply("$message.payload#/reply_to")}
        operations[f"{task}_call"] = _operation(
            "receive", f"{task}_call", [request], "Queued; the worker answers the caller's inbox."
        ) | {
            "reply": _reply(None),
            "bindings": _QUEUE_GROUP,
        }
        operations[f"send_{request}"] = _operation(
            "send", f"{request}_by_id", [request], "The next step of a routing slip."
        )
    return dict(sorted(operations.items()))


def _operation(action: str, channel: str, messages: Iterable[str], summary: str) -> Document:
    return {
        "action": action,
        "channel": _ref("channels", channel),
        "messages": _messages_of(channel, messages),
        "summary": summary,
    }


def _reply(location: str | None) -> Document:
    reply: Document = {
        "channel": _ref("channels", "reply"),
        "messages": _messages_of("reply", _ENDS),
    }
    if location is not None:
        reply["address"] = {
            "location": location,
            "description": f"else the header {headers.REPLY_TO}; without both there is no reply",
        }
    return reply


def _messages_of(channel: str, messages: Iterable[str]) -> list[Document]:
    return [_ref(f"channels/{channel}/messages", name) for name in messages]


def _messages() -> Document:
    messages = {
        "cancel": {
            "name": "cancel",
            "title": "Cancellation",
            "summary": "The subject says all: send an empty body.",
        },
        "cancel_reply": {
            "name": "cancel_reply",
            "title": CancelReply.__name__,
            "summary": (CancelReply.__doc__ or "").partition("\n")[0],
            "contentType": _JSON,
            "payload": _ref("components/schemas", CancelReply.__name__),
            "examples": [
                {"name": name, "payload": json.loads(encode(example))}
                for name, example in REPLIES.items()
            ],
        },
        "dead_letter": {
            "name": "dead_letter",
            "title": "Dead letter",
            "summary": "The body is the request's, byte for byte, whatever it was.",
            "contentType": "application/octet-stream",
            "headers": _ref("components/schemas", "DeadLetterHeaders"),
        },
    }
    for task, model in REQUEST_TYPES.items():
        messages[f"{task}_request"] = _message(
            f"{task}_request", model, "RequestHeaders", "$message.payload#/request_id"
        )
    for name, event in {**_NEWS, **_ENDS}.items():
        kind = "ResultHeaders" if name in _ENDS else "EventHeaders"
        messages[name] = _message(f"{VERSION}.{name}", event, kind, "$message.header#/ce-subject")
    return dict(sorted(messages.items()))


def _message(name: str, model: type[BaseModel], header_schema: str, correlation: str) -> Document:
    return {
        "name": name,
        "title": model.__name__,
        "summary": (model.__doc__ or "").partition("\n")[0],
        "contentType": _JSON,
        "headers": _ref("components/schemas", header_schema),
        "payload": _ref("components/schemas", model.__name__),
        "correlationId": {"location": correlation, "description": "the request id"},
        "examples": [
            {
                "name": name,
                "headers": _example_headers(example),
                "payload": json.loads(encode(example)),
            }
            for name, example in _examples_of(model).items()
        ],
    }


def _example_headers(message: Any) -> dict[str, str]:
    if isinstance(message, EventBase):
        return headers.event_headers(message, trace_parent=TRACE_PARENT)
    if message.request_id is None:
        return {}
    return {headers.MESSAGE_ID: message.request_id, headers.TRACE_PARENT: TRACE_PARENT}


def _schemas() -> Document:
    _, bodies = models_json_schema(
        _MODELS, ref_template="#/components/schemas/{model}", schema_generator=_Generator
    )
    event = {
        "ce-id": "unique among the events",
        "ce-source": "the worker",
        "ce-specversion": "of CloudEvents",
        "ce-subject": "the request id",
        "ce-time": "RFC 3339",
        "ce-type": "the versioned type, as in the body",
        "ce-datacontenttype": _JSON,
    }
    trace = {headers.TRACE_PARENT: "W3C trace context, from the request"}
    schemas = {
        **bodies["$defs"],
        "DeadLetterHeaders": _dead_letter_headers(),
        "EventHeaders": _headers({**event, **trace}, required=event),
        "RequestHeaders": _request_headers(trace),
        "ResultHeaders": _headers({**event, **trace}, required=event),
    }
    return dict(sorted(schemas.items()))


def _request_headers(trace: Mapping[str, str]) -> Document:
    schema = _headers(
        {
            headers.MESSAGE_ID: (
                "JetStream drops a second message with the same within the stream's window; the "
                "request id where neither subject nor body has one"
            ),
            headers.EARLIER_ATTEMPTS: "attempts that were made already; workers write it",
            headers.EARLIER_DELIVERIES: "deliveries so far, attempts or not; workers write it",
            headers.REPLY_TO: "subject for the result event where the body has no `reply_to`",
            **trace,
        }
    )
    schema["properties"][headers.REPLY_TO] |= {"maxLength": MAX_SUBJECT, "pattern": SUBJECT_PATTERN}
    return schema


def _dead_letter_headers() -> Document:
    always = {
        headers.DEAD_LETTER_ATTEMPTS: "how often it was delivered",
        headers.DEAD_LETTER_CODE: "a failure code",
        headers.DEAD_LETTER_REASON: "in one sentence, safe to show",
        headers.DEAD_LETTER_REQUEST_ID: "its own, or the one derived for it",
        headers.DEAD_LETTER_SUBJECT: "where it was published",
        headers.DEAD_LETTER_TIME: "when its stream took it, RFC 3339",
        headers.DEAD_LETTER_WORKER: "who put it aside",
        headers.MESSAGE_ID: "the request's place in its stream, with `.dead`",
    }
    truncated = {headers.DEAD_LETTER_TRUNCATED: "bytes of the original, where it was cut to fit"}
    schema = _headers({**always, **truncated}, required=always)
    schema["properties"][headers.DEAD_LETTER_CODE]["enum"] = [str(code) for code in FailureCode]
    schema["patternProperties"] = {
        f"^{headers.ORIGINAL_PREFIX}": {"type": "string", "description": "a header of the request"}
    }
    return schema


def _headers(descriptions: Mapping[str, str], *, required: Iterable[str] = ()) -> Document:
    schema: Document = {
        "type": "object",
        "properties": {
            name: {"type": "string", "description": text} for name, text in descriptions.items()
        },
    }
    if names := sorted(required):
        schema["required"] = names
    return schema


def _ref(place: str, name: str) -> Document:
    return {"$ref": f"#/{place}/{name}"}
