"""Only control tokens are removed from a text, including nested control tokens."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.runners.image_to_text.control_tokens import ControlTokens

TOKENS = ["<|im_end|>", "<|im_start|>", "<|im_end|><|im_start|>", "<|image_pad|>", "(x)*"]

CONTROL = ControlTokens(
    SimpleNamespace(
        tokenizer=SimpleNamespace(
            all_special_tokens=TOKENS[:2],
            added_tokens_decoder={
                5: SimpleNamespace(content=TOKENS[2], special=True),
                6: SimpleNamespace(content=TOKENS[4], special=True),
                7: SimpleNamespace(content="<tool_call>", special=False),
            },
        ),
        image_token=TOKENS[3],
        video_token=None,
    )
)


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("a <|im_end|> b", "a  b"),
        ("<|im_<|im_end|>end|>", ""),
        ("<|im_<|image_pad|>end|>x", "x"),
        ("(x)*", ""),
        ("<|im_end|", "<|im_end|"),
        ("call it <tool_call>", "call it <tool_call>"),
        ("", ""),
    ],
)
def test_control_tokens_are_removed(text: str, stripped: str) -> None:
    assert CONTROL.strip(text) == stripped


pieces = st.sampled_from([*TOKENS, *(t[:4] for t in TOKENS), *(t[4:] for t in TOKENS), "a", " "])


@given(st.lists(pieces, max_size=12).map("".join))
def test_nested_control_tokens_are_removed(text: str) -> None:
    stripped = CONTROL.strip(text)
    assert not any(token in stripped for token in TOKENS)
    assert CONTROL.strip(stripped) == stripped


@given(st.text())
def test_text_without_control_tokens_is_unchanged(text: str) -> None:
    if not any(token in text for token in TOKENS):
        assert CONTROL.strip(text) == text


def test_tokenizer_without_control_tokens_removes_nothing() -> None:
    tokenizer = SimpleNamespace(all_special_tokens=[], added_tokens_decoder={})
    assert ControlTokens(SimpleNamespace(tokenizer=tokenizer)).strip("a b") == "a b"
