"""Streamed text equals a search in the whole text, for any division into tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.text import ReasoningSplit, TextStream


class Pieces:
    """A decoder whose tokens are indices of strings."""

    def __init__(self, pieces: list[str], last: str = "") -> None:
        self.pieces, self.last = pieces, last

    def __call__(self, token: int) -> str:
        return self.pieces[token]

    def finish(self) -> str:
        return self.last


def streamed(pieces: list[str], stops: tuple[str, ...], last: str = "") -> tuple[list[str], bool]:
    """The texts of one stream, up to the stop, and whether a token stopped it."""
    stream, texts = TextStream(Pieces(pieces, last), stops), []
    for token in range(len(pieces)):
        text, stopped = stream.push(token)
        texts.append(text)
        if stopped:
            assert stream.finish() == "" and stream.push(0) == ("", True)
            return texts, True
    return [*texts, stream.finish()], False


def searched(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the stop string that is completed first, character by character."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


words = st.text("ab", min_size=0, max_size=6)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(words, max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3).map(tuple),
)
def test_stream_equals_search(pieces, stops):
    texts, stopped = streamed(pieces, stops)
    assert ("".join(texts), stopped) == searched("".join(pieces), stops)


@settings(max_examples=200, deadline=None)
@given(st.lists(words, max_size=12), st.lists(words.filter(bool), max_size=3).map(tuple))
def test_only_the_start_of_a_stop_string_is_withheld(pieces, stops):
    """After each token all text is returned except an end that starts a stop string."""
    stream, returned, pushed = TextStream(Pieces(pieces), stops), "", ""
    for token, piece in enumerate(pieces):
        text, stopped = stream.push(token)
        returned, pushed = returned + text, pushed + piece
        if stopped:
            break
        withheld = pushed[len(returned) :]
        assert pushed.startswith(returned)
        assert not withheld or any(s.startswith(withheld) and s != withheld for s in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "texts", "stopped"),
    [
        (["a", "b", "c"], (), ["a", "b", "c", ""], False),
        (["a", "b", "c"], ("bc",), ["a", "", ""], True),
        (["xab", "abc"], ("abc",), ["x", "ab"], True),
        (["a", "b", "x"], ("abc",), ["", "", "abx", ""], False),
        (["ab"], ("abc",), ["", "ab"], False),
        (["abcd"], ("abcd", "bc"), ["a"], True),
        (["xabc"], ("c", "abc", "bc"), ["x"], True),
    ],
    ids=["no_stop", "two_tokens", "overlap", "false_start", "end", "first_end", "longest"],
)
def test_examples(pieces, stops, texts, stopped):
    assert streamed(pieces, stops) == (texts, stopped)


def test_last_incomplete_character():
    assert streamed(["a"], (), "\ufffd") == (["a", "\ufffd"], False)
    assert streamed(["a"], ("a\ufffd",), "\ufffd") == (["", ""], False)


def split(text: str, cuts: list[int], inside: bool) -> tuple[str, str]:
    """Reasoning and answer of a text that arrives in pieces."""
    stream, reasoning, answer = ReasoningSplit(inside), "", ""
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
    for part in [*map(stream.push, pieces), stream.finish()]:
        reasoning, answer = reasoning + part[0], answer + part[1]
    return reasoning, answer


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("answer", False, ("", "answer")),
        ("\n\nanswer <think>x</think>", False, ("", "\n\nanswer <think>x</think>")),
        ("<think>\nhm\n</think>\n\nyes\n", False, ("hm\n", "yes\n")),
        ("\n <think>hm</think>yes</think>", False, ("hm", "yes</think>")),
        ("\nhm</think>\nyes", True, ("hm", "yes")),
        ("hm </thin", True, ("hm </thin", "")),
        ("<thin", False, ("", "<thin")),
        ("<think></think>\n", False, ("", "")),
        ("", True, ("", "")),
    ],
    ids=["plain", "later", "both", "spaces", "inside", "end", "start", "empty", "nothing"],
)
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=12))
def test_reasoning_is_split_from_the_answer(text, inside, expected, cuts):
    assert split(text, cuts, inside) == expected
