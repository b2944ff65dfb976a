"""AsyncAPI 3 for all subjects and messages, and a JSON Schema for the body of each message.

Both are generated from the models, the header names and the examples of this package. This module
adds what pydantic leaves out: alias names of fields, the constant `type` of an event as a required
field, `additionalProperties: false` for maps with a key pattern, and examples.
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
from generation_contracts.examples import EVENTS, REPLIES, REQUESTS, TRACE_PARENT, UPLOADS
from generation_contracts.failures import FailureCode
from generation_contracts.requests import encode
from generation_contracts.subjects import MAX_SUBJECT, SUBJECT_PATTERN, Subjects
from generation_contracts.tasks import TASKS
from generation_contracts.uploads import UploadReply, UploadRequest

Document = dict[str, Any]

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_JSON: Final = "application/json"

_TRANSIENT: Final[Mapping[str, type[EventBase]]] = {
    "started": events.StartedEvent,
    "progress": events.ProgressEvent,
}
_TERMINAL: Final[Mapping[str, type[EventBase]]] = {
    "succeeded": events.SucceededEvent,
    "failed": events.FailedEvent,
    "cancelled": events.CancelledEvent,
}
_MODELS: Final[tuple[tuple[type[BaseModel], JsonSchemaMode], ...]] = (
    *((spec.request, "validation") for spec in TASKS.values()),
    *((model, "serialization") for model in (*_TRANSIENT.values(), *_TERMINAL.values())),
    (CancelReply, "serialization"),
    (UploadRequest, "validation"),
    (UploadReply, "serialization"),
)

# The default queue group of NATS micro services.
_QUEUE_GROUP: Final = {"nats": {"queue": "q", "bindingVersion": "0.1.0"}}

# Placeholder for a request id in an address. It must be a valid id.
_ANY_ID: Final = "request_id"


class _Generator(GenerateJsonSchema):
    """The generator of pydantic, with the additions of this module."""

    def model_schema(self, schema: core_schema.ModelSchema) -> Document:
        """Add the alias names of fields, and forbid a name together with its alias."""
        document = super().model_schema(schema)
        for name, field in schema["cls"].model_fields.items():
            if isinstance(field.validation_alias, AliasChoices):
                for other in sorted({*map(str, field.validation_alias.choices)} - {name}):
                    document["properties"][other] = document["properties"][name] | {
                        "deprecated": True,
                        "description": f"alias of {name}",
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
        """Require the constant fields of events: readers distinguish events and outputs by them."""
        inner: Any = field["schema"]
        if self.mode == "serialization" and inner["type"] == "default":
            return bool(inner["schema"]["type"] == "literal")
        return super().field_is_required(field, total)

    def dict_schema(self, schema: core_schema.DictSchema) -> Document:
        """Forbid keys that do not match the key pattern of a map; pydantic allows them."""
        document = super().dict_schema(schema)
        if "patternProperties" in document:
            document["additionalProperties"] = False
        return document

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> Document:
        """Remove `discriminator`, which belongs to OpenAPI. The constant fields are sufficient."""
        document = super().tagged_union_schema(schema)
        document.pop("discriminator", None)
        return document


def json_schemas() -> dict[str, Document]:
    """Return a self-contained JSON Schema 2020-12 for the body of every request and event.

    A schema cannot express all rules. `decode_request` also refuses a prompt of white space, a
    deadline without time zone, an integer written as `512.0`, and JSON that is nested too deeply.

    Returns:
        Class name to schema. Requests forbid unknown fields, events allow them.
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
    """Return the AsyncAPI 3.0.0 document of an installation, from the daemon's point of view.

    Args:
        subjects: Subjects of the installation; None means the default root.
    """
    subjects = subjects or Subjects()
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Generation consumer",
            "version": VERSION.rpartition(".")[2],
            "description": (
                "The daemon receives requests from NATS JetStream, stores outputs in S3 and "
                "publishes events. `receive` and `send` are operations of the daemon; a sender "
                "does the opposite. `x-stream` names the JetStream stream of a stored channel."
            ),
        },
        "defaultContentType": _JSON,
        "servers": {"nats": _server()},
        "channels": _channels(subjects),
        "operations": _operations(),
        "components": {"messages": _messages(), "schemas": _schemas()},
    }


def _examples_of(model: type[BaseModel]) -> dict[str, BaseModel]:
    every: dict[str, BaseModel] = {**REQUESTS, **EVENTS, **REPLIES, **UPLOADS}
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
    first = next(iter(Task))  # becomes `{task}` in the addresses
    channels = {
        "result": _channel(
            _address(subjects, subjects.result(first, _ANY_ID), any_task=True),
            "The one terminal event of a request, stored for later reads.",
            _TERMINAL,
            subjects.results_stream,
        ),
        "progress": _channel(
            _address(subjects, subjects.progress(first, _ANY_ID), any_task=True),
            "Progress of a run, at most five events a second; core NATS, not stored.",
            _TRANSIENT,
        ),
        "dead_letter": _channel(
            _address(subjects, subjects.dead_letter(first), any_task=True),
            "The original bytes of a request that the workers cannot process.",
            ["dead_letter"],
            subjects.dead_letters_stream,
        ),
        "cancel": _channel(
            _address(subjects, subjects.cancel(_ANY_ID)),
            "Cancels a request that is queued or in progress.",
            ["cancel"],
        ),
        "reply": _channel(
            None,
            f"The sender's reply subject. A worker replies only under the prefixes of its "
            f"settings, and never under `{subjects.root}.` except `{subjects.root}.reply.`.",
            _TERMINAL,
        ),
        "cancel_reply": _channel(
            None, "The inbox of the caller of a cancellation.", ["cancel_reply"]
        ),
        "upload": _channel(
            subjects.upload, "Asks for an address to upload an input image.", ["upload"]
        ),
        "upload_reply": _channel(
            None, "The inbox of the caller of an upload request.", ["upload_reply"]
        ),
    }
    for task in Task:
        channels |= _task_channels(subjects, task)
    return dict(sorted(channels.items()))


_OTHER_QUEUE = "The subject of another queue of the task has its name in place of the task."


def _task_channels(subjects: Subjects, task: Task) -> Document:
    request = f"{task}_request"
    return {
        request: _channel(
            _address(subjects, subjects.request(task)),
            "Requests with the id in the body or in Nats-Msg-Id, else the worker derives an id. "
            f"{_OTHER_QUEUE}",
            [request],
            subjects.requests_stream(task),
        ),
        f"{request}_by_id": _channel(
            _address(subjects, subjects.request(task, _ANY_ID)),
            "Requests that can be found and cancelled by id while they are queued. If the last "
            "token is not a request id, the request fails with `invalid_request`. That event is "
            "sent to the reply subject, and stored under the id in the body, else under "
            "Nats-Msg-Id, else under a derived id.",
            [request],
            subjects.requests_stream(task),
        ),
        f"{task}_call": _channel(
            _address(subjects, subjects.call(task)),
            "Request-reply endpoint: the caller's inbox receives the terminal event. The request "
            f"goes to the queue of its `model`. {_OTHER_QUEUE}",
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
        "task": {
            "description": "the task of the model, or the name of another queue of the task",
            "examples": [str(task) for task in Task],
        },
    }
    parameters = {name: text for name, text in described.items() if f"{{{name}}}" in str(address)}
    if parameters:
        channel["parameters"] = parameters
    if stream is not None:
        channel["x-stream"] = stream
    return channel


def _address(subjects: Subjects, subject: str, *, any_task: bool = False) -> str:
    """Return a subject with its variable tokens as parameters."""
    tokens = subject.removeprefix(f"{subjects.root}.").split(".")
    if any_task:
        tokens = ["{task}" if token in set(Task) else token for token in tokens]
    return ".".join([subjects.root, *(t.replace(_ANY_ID, f"{{{_ANY_ID}}}") for t in tokens)])


def _operations() -> Document:
    operations = {
        "cancel": _operation(
            "receive", "cancel", ["cancel"], "One worker of the queue group processes it."
        )
        | {
            "reply": {
                "channel": _ref("channels", "cancel_reply"),
                "messages": _messages_of("cancel_reply", ["cancel_reply"]),
            },
            "bindings": _QUEUE_GROUP,
        },
        "upload": _operation(
            "receive", "upload", ["upload"], "One worker of the queue group signs the form."
        )
        | {
            "reply": {
                "channel": _ref("channels", "upload_reply"),
                "messages": _messages_of("upload_reply", ["upload_reply"]),
            },
            "bindings": _QUEUE_GROUP,
        },
        "send_dead_letter": _operation(
            "send", "dead_letter", ["dead_letter"], "Dead-letter a request."
        ),
        "send_progress": _operation("send", "progress", _TRANSIENT, "Publish progress."),
        "send_result": _operation("send", "result", _TERMINAL, "Store the terminal event."),
    }
    for task in Task:
        request = f"{task}_request"
        for channel in (request, f"{request}_by_id"):
            operations[f"receive_{channel}"] = _operation(
                "receive", channel, [request], "Pulled from the work queue by a durable consumer."
            ) | {"reply": _reply("$message.payload#/reply_to")}
        operations[f"{task}_call"] = _operation(
            "receive",
            f"{task}_call",
            [request],
            "The worker queues the request and replies to the caller's inbox.",
        ) | {
            "reply": _reply(None),
            "bindings": _QUEUE_GROUP,
        }
        operations[f"send_{request}"] = _operation(
            "send", f"{request}_by_id", [request], "Queue the next step of a routing slip."
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
        "messages": _messages_of("reply", _TERMINAL),
    }
    if location is not None:
        reply["address"] = {
            "location": location,
            "description": f"or the header {headers.REPLY_TO}; without both there is no reply",
        }
    return reply


def _messages_of(channel: str, messages: Iterable[str]) -> list[Document]:
    return [_ref(f"channels/{channel}/messages", name) for name in messages]


def _messages() -> Document:
    messages = {
        "cancel": {
            "name": "cancel",
            "title": "Cancellation",
            "summary": "The subject contains the request id; the body is empty.",
        },
        "cancel_reply": _exchanged("cancel_reply", CancelReply),
        "upload": _exchanged("upload", UploadRequest),
        "upload_reply": _exchanged("upload_reply", UploadReply),
        "dead_letter": {
            "name": "dead_letter",
            "title": "Dead letter",
            "summary": "The body of the original message, byte for byte.",
            "contentType": "application/octet-stream",
            "headers": _ref("components/schemas", "DeadLetterHeaders"),
        },
    }
    for task, spec in TASKS.items():
        messages[f"{task}_request"] = _message(
            f"{task}_request", spec.request, "RequestHeaders", "$message.payload#/request_id"
        )
    for name, event in {**_TRANSIENT, **_TERMINAL}.items():
        kind = "ResultHeaders" if name in _TERMINAL else "EventHeaders"
        messages[name] = _message(f"{VERSION}.{name}", event, kind, "$message.header#/ce-subject")
    return dict(sorted(messages.items()))


def _exchanged(name: str, model: type[BaseModel]) -> Document:
    """Return a message of request-reply, which has no headers."""
    return {
        "name": name,
        "title": model.__name__,
        "summary": (model.__doc__ or "").partition("\n")[0],
        "contentType": _JSON,
        "payload": _ref("components/schemas", model.__name__),
        "examples": [
            {"name": example_name, "payload": json.loads(encode(example))}
            for example_name, example in _examples_of(model).items()
        ],
    }


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
        "ce-id": "unique id of the event",
        "ce-source": "URN of the worker",
        "ce-specversion": "version of CloudEvents",
        "ce-subject": "the request id",
        "ce-time": "time of the event, RFC 3339",
        "ce-type": "versioned type, as in the body",
        "ce-datacontenttype": f"`{_JSON}`",
    }
    trace = {headers.TRACE_PARENT: "W3C trace context, from the request"}
    marks = {headers.AI_GENERATED: "`true` on a succeeded event: a model generated the outputs"}
    schemas = {
        **bodies["$defs"],
        "DeadLetterHeaders": _dead_letter_headers(),
        "EventHeaders": _headers({**event, **trace}, required=event),
        "RequestHeaders": _request_headers(trace),
        "ResultHeaders": _headers({**event, **marks, **trace}, required=event),
    }
    return dict(sorted(schemas.items()))


def _request_headers(trace: Mapping[str, str]) -> Document:
    schema = _headers(
        {
            headers.MESSAGE_ID: (
                "JetStream drops a second message with the same value within 10 minutes; the "
                "request id if neither the subject nor the body has one"
            ),
            headers.EARLIER_ATTEMPTS: "number of earlier attempts; written by workers",
            headers.EARLIER_DELIVERIES: "number of earlier deliveries; written by workers",
            headers.REPLY_TO: "subject for the terminal event if the body has no `reply_to`",
            **trace,
        }
    )
    schema["properties"][headers.REPLY_TO] |= {"maxLength": MAX_SUBJECT, "pattern": SUBJECT_PATTERN}
    return schema


def _dead_letter_headers() -> Document:
    always = {
        headers.DEAD_LETTER_ATTEMPTS: "number of deliveries",
        headers.DEAD_LETTER_CODE: "a failure code",
        headers.DEAD_LETTER_REASON: "one sentence, safe to show",
        headers.DEAD_LETTER_REQUEST_ID: "request id, or the derived id",
        headers.DEAD_LETTER_SUBJECT: "original subject",
        headers.DEAD_LETTER_TIME: "when the request was stored, RFC 3339",
        headers.DEAD_LETTER_WORKER: "name of the worker process",
        headers.MESSAGE_ID: "stream and sequence of the request, with `.dead`",
    }
    truncated = {
        headers.DEAD_LETTER_TRUNCATED: "size of the original in bytes, if the body was truncated"
    }
    schema = _headers({**always, **truncated}, required=always)
    schema["properties"][headers.DEAD_LETTER_CODE]["enum"] = [str(code) for code in FailureCode]
    schema["patternProperties"] = {
        f"^{headers.ORIGINAL_PREFIX}": {"type": "string", "description": "original header"}
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
