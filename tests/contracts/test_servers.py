"""URLs of NATS servers."""

from typing import Any

import pytest

from generation_contracts.servers import Servers, parse_servers

READ: list[tuple[str, Servers]] = [
    ("nats://bus:4222", Servers(("nats://bus:4222",))),
    ("bus", Servers(("nats://bus",))),
    ("bus:4333", Servers(("nats://bus:4333",))),
    ("NATS://Bus:4222/", Servers(("nats://Bus:4222/",))),
    (" nats://a , tls://b:1 ,", Servers(("nats://a", "tls://b:1"))),
    ("nats://[::1]:4222", Servers(("nats://[::1]:4222",))),
    ("wss://bus/path", Servers(("wss://bus/path",))),
    ("nats://app:p%40ss@bus", Servers(("nats://bus",), user="app", password="p@ss")),
    ("nats://a%3Ab:%2F%23%3F%2C%25@bus", Servers(("nats://bus",), user="a:b", password="/#?,%")),
    ("nats://app:p@ss:w+rd@bus", Servers(("nats://bus",), user="app", password="p@ss:w+rd")),
    ("nats://app:gr%C3%BC%C3%9Fe@bus", Servers(("nats://bus",), user="app", password="grüße")),
    ("nats://app:100%@bus", Servers(("nats://bus",), user="app", password="100%")),
    ("nats://app:@bus", Servers(("nats://bus",), user="app", password="")),
    ("nats://t%40ken@bus", Servers(("nats://bus",), token="t@ken")),
    ("nats://@bus", Servers(("nats://bus",))),
    ("WSS://bus,ws://b", Servers(("wss://bus", "ws://b"))),
    ("u:p@a,u:p@b", Servers(("nats://a", "nats://b"), user="u", password="p")),
    ("nats://u:p@a,nats://b", Servers(("nats://a", "nats://b"), user="u", password="p")),
    ("nats://u:p@a,nats://u:p@b", Servers(("nats://a", "nats://b"), user="u", password="p")),
]
REFUSED = {
    "": "must be nats://",
    " , ": "must be nats://",
    "nats://": "percent-encode",
    "nats://app:pa/s3cret@bus": "percent-encode",
    "nats://app:s3cret@bus:none": "percent-encode",
    "nats://app:s3cret@bus:0": "percent-encode",
    "http://bus:4222": "percent-encode",
    "nats+tls://bus:4222": "must be nats://",
    "nats://app:s3c[ret@bus": "must be nats://.*percent-encode",
    "nats://app:1#s3cret@bus:4222": "percent-encode",
    "nats://app:1/s3cret@bus:4222": "percent-encode",
    "nats://app:1?s3cret@bus:4222": "percent-encode",
    "nats://app:1,s3cret@bus:4222": "percent-encode",
    "nats://app,s3cret@bus:4222": "percent-encode",
    "nats://a:4222,WS://s3cret@b": "ws://",
    "nats://u:s3cret@a,nats://u:other@b": "the same user and password",
    "nats://u:%FFs3cret@a": "UTF-8",
}


@pytest.mark.parametrize(("text", "servers"), READ, ids=[text for text, _ in READ])
def test_user_information_is_decoded_and_separated(text: str, servers: Servers) -> None:
    assert parse_servers(text) == servers
    assert servers.password is None or servers.password not in repr(servers) or not servers.password


@pytest.mark.parametrize(("text", "words"), REFUSED.items())
def test_invalid_server_list_is_refused_without_its_secret(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        parse_servers(text)
    assert "s3cret" not in str(refused.value)


def test_only_named_values_are_options() -> None:
    options: dict[str, Any] = parse_servers("nats://app:p%40ss@bus").credentials
    assert options == {"user": "app", "password": "p@ss"}
    assert parse_servers("nats://bus").credentials == {}
