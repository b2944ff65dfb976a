"""The AsyncAPI document is complete and matches the subjects and headers of the code."""

import copy
import json
import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from generation_contracts import Subjects, Task, TerminalEvent, headers
from generation_contracts.events import VERSION
from generation_contracts.examples import EVENTS
from generation_contracts.headers import event_headers
from generation_contracts.schema import asyncapi

DOCUMENT = asyncapi()
CHANNELS, OPERATIONS = DOCUMENT["channels"], DOCUMENT["operations"]
MESSAGES, SCHEMAS = DOCUMENT["components"]["messages"], DOCUMENT["components"]["schemas"]

ADDRESSES = {
    "cancel": "generation.cancel.{request_id}",
    "cancel_reply": None,
    "upload": "generation.upload",
    "upload_reply": None,
    "dead_letter": "generation.dead.{task}",
    "custom_call": "generation.call.custom",
    "custom_request": "generation.request.custom",
    "custom_request_by_id": "generation.request.custom.{request_id}",
    "image_to_text_call": "generation.call.image_to_text",
    "image_to_text_request": "generation.request.image_to_text",
    "image_to_text_request_by_id": "generation.request.image_to_text.{request_id}",
    "progress": "generation.progress.{task}.{request_id}",
    "reply": None,
    "result": "generation.result.{task}.{request_id}",
    "text_to_image_call": "generation.call.text_to_image",
    "text_to_image_request": "generation.request.text_to_image",
    "text_to_image_request_by_id": "generation.request.text_to_image.{request_id}",
}
RECEIVES = {
    "cancel": "cancel",
    "upload": "upload",
    "custom_call": "custom_call",
    "image_to_text_call": "image_to_text_call",
    "receive_custom_request": "custom_request",
    "receive_custom_request_by_id": "custom_request_by_id",
    "receive_image_to_text_request": "image_to_text_request",
    "receive_image_to_text_request_by_id": "image_to_text_request_by_id",
    "receive_text_to_image_request": "text_to_image_request",
    "receive_text_to_image_request_by_id": "text_to_image_request_by_id",
    "text_to_image_call": "text_to_image_call",
}
SENDS = {
    "send_dead_letter": "dead_letter",
    "send_custom_request": "custom_request_by_id",
    "send_image_to_text_request": "image_to_text_request_by_id",
    "send_progress": "progress",
    "send_result": "result",
    "send_text_to_image_request": "text_to_image_request_by_id",
}


def at(pointer: str) -> Any:
    node: Any = DOCUMENT
    for token in pointer.removeprefix("#/").split("/"):
        node = node[token]
    return node


def references(node: Any) -> list[str]:
    if isinstance(node, list):
        return [found for item in node for found in references(item)]
    if not isinstance(node, dict):
        return []
    here = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
    return here + [found for item in node.values() for found in references(item)]


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    whole = {**schema, "components": DOCUMENT["components"]}
    Draft202012Validator.check_schema(whole)
    return Draft202012Validator(whole)


def test_document_has_its_title_and_version() -> None:
    assert DOCUMENT["asyncapi"] == "3.0.0"
    assert DOCUMENT["info"]["version"] == VERSION.removeprefix("generation.")
    server = DOCUMENT["servers"]["nats"]
    assert server["protocol"] == "nats"
    assert server["host"].format(host=server["variables"]["host"]["default"]) == "localhost:4222"
    assert json.loads(json.dumps(DOCUMENT)) == DOCUMENT


def test_every_subject_has_a_channel() -> None:
    assert {name: channel["address"] for name, channel in CHANNELS.items()} == ADDRESSES


@pytest.mark.parametrize("root", ["team-a.images", "request", "task.result", "x"])
def test_root_changes_only_the_addresses(root: str) -> None:
    moved = {name: c["address"] for name, c in asyncapi(Subjects(root))["channels"].items()}
    tails = {n: a and a.removeprefix("generation.") for n, a in ADDRESSES.items()}
    assert moved == {name: tail and f"{root}.{tail}" for name, tail in tails.items()}


def test_stored_channels_have_their_streams() -> None:
    streams = {n: c["x-stream"] for n, c in CHANNELS.items() if "x-stream" in c}
    assert streams == {
        "text_to_image_request": "GENERATION_REQUESTS_TEXT_TO_IMAGE",
        "text_to_image_request_by_id": "GENERATION_REQUESTS_TEXT_TO_IMAGE",
        "custom_request": "GENERATION_REQUESTS_CUSTOM",
        "custom_request_by_id": "GENERATION_REQUESTS_CUSTOM",
        "image_to_text_request": "GENERATION_REQUESTS_IMAGE_TO_TEXT",
        "image_to_text_request_by_id": "GENERATION_REQUESTS_IMAGE_TO_TEXT",
        "result": "GENERATION_RESULTS",
        "dead_letter": "GENERATION_DEAD_LETTERS",
    }


@pytest.mark.parametrize("name", CHANNELS)
def test_parameters_of_an_address_are_described(name: str) -> None:
    channel = CHANNELS[name]
    used = set(re.findall(r"{(\w+)}", channel["address"] or ""))
    assert set(channel.get("parameters", {})) == used
    if "task" in used:
        assert channel["parameters"]["task"]["examples"] == [str(task) for task in Task]


def test_every_reference_has_a_target() -> None:
    for reference in references(DOCUMENT):
        assert at(reference) is not None, reference  # the schema of any JSON value is {}


def test_every_message_and_schema_is_used() -> None:
    used = set(references(DOCUMENT))
    assert {f"#/components/messages/{name}" for name in MESSAGES} <= used
    assert {f"#/components/schemas/{name}" for name in SCHEMAS} <= used


def test_operations_are_those_of_the_daemon() -> None:
    for action, expected in (("receive", RECEIVES), ("send", SENDS)):
        channels = {
            name: operation["channel"]["$ref"].removeprefix("#/channels/")
            for name, operation in OPERATIONS.items()
            if operation["action"] == action
        }
        assert channels == expected


@pytest.mark.parametrize("name", OPERATIONS)
def test_messages_of_an_operation_belong_to_its_channels(name: str) -> None:
    for part in (OPERATIONS[name], OPERATIONS[name].get("reply", {})):
        for message in part.get("messages", []):
            assert message["$ref"].startswith(f"{part['channel']['$ref']}/messages/")


def test_replies_are_terminal_events() -> None:
    ends = [f"#/channels/reply/messages/{name}" for name in ("succeeded", "failed", "cancelled")]
    for name in RECEIVES:
        reply = OPERATIONS[name]["reply"]
        if name in {"cancel", "upload"}:
            assert reply["channel"]["$ref"] == f"#/channels/{name}_reply"
        else:
            assert [message["$ref"] for message in reply["messages"]] == ends
    assert not [name for name in SENDS if "reply" in OPERATIONS[name]]


def test_services_share_a_queue_group() -> None:
    """One worker handles each call and cancellation. Requests are pulled."""
    bound = {n: o["bindings"]["nats"]["queue"] for n, o in OPERATIONS.items() if "bindings" in o}
    names = ("cancel", "custom_call", "image_to_text_call", "text_to_image_call", "upload")
    assert bound == dict.fromkeys(names, "q")


@pytest.mark.parametrize("name", [n for n in MESSAGES if "examples" in MESSAGES[n]])
def test_message_examples_match_their_schemas(name: str) -> None:
    message = MESSAGES[name]
    assert message["contentType"] == "application/json"
    assert message["examples"]
    for example in message["examples"]:
        validator(message["payload"]).validate(example["payload"])
        if "headers" in message:  # a reply to a cancellation is no event
            validator(message["headers"]).validate(example["headers"])


def test_only_messages_without_a_body_have_no_examples() -> None:
    assert {name for name in MESSAGES if not MESSAGES[name].get("examples")} == {
        "cancel",
        "dead_letter",
    }


@pytest.mark.parametrize("name", EVENTS)
def test_headers_of_an_event_are_described_and_required(name: str) -> None:
    kind = "ResultHeaders" if isinstance(EVENTS[name], TerminalEvent) else "EventHeaders"
    schema = SCHEMAS[kind]
    # A reply has no Nats-Msg-Id: under a stream of the sender it would take the stored event's.
    of_results = {headers.AI_GENERATED} if kind == "ResultHeaders" else set()
    always = set(event_headers(EVENTS[name])) - {headers.MESSAGE_ID, headers.AI_GENERATED}
    assert set(schema["required"]) == always
    assert set(schema["properties"]) == always | of_results | {headers.TRACE_PARENT}


def test_headers_of_a_dead_letter_are_described() -> None:
    names = {v for n, v in vars(headers).items() if n.startswith("DEAD_LETTER_")}
    names.add(headers.MESSAGE_ID)
    schema = SCHEMAS["DeadLetterHeaders"]
    assert set(schema["properties"]) == names
    assert set(schema["required"]) == names - {headers.DEAD_LETTER_TRUNCATED}
    letter = dict.fromkeys(schema["required"], "x") | {headers.DEAD_LETTER_CODE: "worker_lost"}
    check = validator(schema)
    check.validate({**letter, f"{headers.ORIGINAL_PREFIX}Nats-Msg-Id": "a"})
    assert not check.is_valid(letter | {headers.DEAD_LETTER_CODE: "other"})
    assert not check.is_valid({n: v for n, v in letter.items() if n != headers.DEAD_LETTER_REASON})


def test_headers_of_a_request_are_described() -> None:
    schema = SCHEMAS["RequestHeaders"]
    attempt_headers = {headers.EARLIER_ATTEMPTS, headers.EARLIER_DELIVERIES}
    names = {headers.MESSAGE_ID, headers.REPLY_TO, headers.TRACE_PARENT, *attempt_headers}
    assert set(schema["properties"]) == names
    assert "required" not in schema
    check = validator(schema)
    assert check.is_valid({headers.REPLY_TO: "_INBOX.a", "other": "x"})
    assert not check.is_valid({headers.REPLY_TO: "$JS.API.STREAM.DELETE.X"})


def test_returned_document_is_a_copy() -> None:
    before = copy.deepcopy(DOCUMENT)
    mine = asyncapi()
    mine["channels"]["result"]["parameters"]["task"]["examples"].clear()
    mine["components"]["schemas"].clear()
    assert asyncapi() == before
