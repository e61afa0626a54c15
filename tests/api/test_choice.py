"""From tokens to pieces of text: what is held back, what is cut, and which tokens a piece is made of."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from server.api.generating.choice import Choice, Piece
from server.api.texts.decoding import StopMatcher, StopStrings, TokenTexts
from server.api.texts.speech import CallPiece, Said
from server.api.texts.text import Text
from server.engine.messages import TokenEvent
from server.engine.request import FinishReason, Logprobs, Token, ToldOfPrompt
from tests.support.live_server import write_tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    directory = tmp_path_factory.mktemp("bytes")
    write_tokenizer(directory)
    return Text.load(directory)


def ids(text: Text, words: str) -> list[int]:
    return text.encode([words], 100, "prompt")[0]


def pieces(
    text: Text, tokens: Sequence[int], stops: Sequence[str] = (), finish: FinishReason = FinishReason.LENGTH,
    own_stops: frozenset[int] = frozenset(), keeps_stop: bool = False,
) -> list[Piece]:  # fmt: skip
    choice, made = Choice(0, text.decoder(), StopStrings(stops, keeps_stop), own_stops), []
    for place, token in enumerate(tokens):
        event = TokenEvent(0, Token(token, Logprobs(-float(place), 1)), finish if place == len(tokens) - 1 else None)
        made.append(choice.push(event))
        if made[-1].finish:
            break
    return made


def told(made: Sequence[Piece]) -> list[tuple[int, int]]:
    return [(it.id, it.offset) for piece in made for it in piece.tokens]


def test_a_character_comes_when_it_is_whole_and_its_tokens_with_it(text: Text) -> None:
    tokens = ids(text, "a€b")
    made = pieces(text, tokens)
    assert [it.text for it in made] == ["a", "", "", "€", "b"]
    assert [len(it.tokens) for it in made] == [1, 0, 0, 3, 1]
    assert [offset for _, offset in told(made)] == [0, 1, 1, 1, 2]
    assert [it.id for piece in made for it in piece.tokens] == tokens


def test_the_first_token_says_something_even_if_it_has_no_text_and_later_ones_only_if_they_have(text: Text) -> None:
    made = pieces(text, ids(text, "€€b"))
    assert [it.text for it in made] == ["", "", "€", "", "", "€", "b"]
    assert [it.begins for it in made] == [True] + [False] * 6
    assert [it.says_something for it in made] == [True, False, True, False, False, True, True]


def test_what_may_be_a_stop_is_held_with_its_tokens(text: Text) -> None:
    made = pieces(text, ids(text, "xENx"), ["END"])
    assert [it.text for it in made] == ["x", "", "", "ENx"]
    assert [len(it.tokens) for it in made] == [1, 0, 0, 3]


@pytest.mark.parametrize(("keeps_stop", "kept"), [(False, "ab"), (True, "abEND")])
def test_behind_a_stop_string_there_is_neither_text_nor_tokens(text: Text, keeps_stop: bool, kept: str) -> None:
    made = pieces(text, ids(text, "abENDcd"), ["END"], keeps_stop=keeps_stop)
    assert "".join(it.text for it in made) == kept
    assert [it for it, _ in told(made)] == ids(text, kept)
    assert (made[-1].finish, made[-1].stop) == ("stop", "END")


def test_of_two_stops_the_one_that_is_complete_first_is_named(text: Text) -> None:
    made = pieces(text, ids(text, "abcd"), ["bcd", "bc"])
    assert (made[-1].stop, "".join(it.text for it in made)) == ("bc", "a")


def test_no_stop_string_is_looked_for_in_the_least_tokens(text: Text) -> None:
    choice = Choice(0, text.decoder(), StopStrings(["a"]), min_tokens=3)
    made = [choice.push(TokenEvent(0, Token(token))) for token in ids(text, "aaab")]
    assert "".join(it.text for it in made) == "aaab"
    assert choice.push(TokenEvent(0, Token(ids(text, "a")[0]))).stop == "a"


def test_a_long_stop_that_repeats_costs_no_more_than_a_short_one() -> None:
    matcher, start = StopMatcher(StopStrings(["a" * 1023 + "b"] * 16)), time.process_time()
    assert "".join(matcher.push("a" * 4) for _ in range(2000)) == "a" * (8000 - 1023)
    assert time.process_time() - start < 1


def test_a_stop_token_has_no_text_and_is_told_as_what_ended_the_answer(text: Text) -> None:
    a, b = ids(text, "ab")
    made = pieces(text, [a, b], finish=FinishReason.STOP)
    assert [it.text for it in made] == ["a", ""] and made[-1].stop is None
    assert [it.ends for piece in made for it in piece.tokens] == [False, True]
    assert pieces(text, [a, b], finish=FinishReason.STOP, own_stops=frozenset([b]))[-1].stop == b


def test_at_the_end_what_was_held_back_comes_out(text: Text) -> None:
    made = pieces(text, ids(text, "aEN"), ["END"])
    assert made[-1].text == "EN" and len(made[-1].tokens) == 2 and made[-1].stop is None


def test_what_is_told_of_the_prompt_comes_without_text_too(text: Text) -> None:
    of_prompt = ToldOfPrompt([Logprobs(-1.0, 1)])
    piece = Choice(0, text.decoder(), StopStrings(())).push(
        TokenEvent(0, None, FinishReason.LENGTH, None, 0, of_prompt)
    )
    assert (piece.text, piece.tokens, piece.finish, piece.of_prompt) == ("", (), "length", of_prompt)


def test_what_is_no_utf8_comes_out_as_such_and_hides_nothing_behind_it(text: Text) -> None:
    euro, latin = ids(text, "€"), ids(text, "é")
    broken = [latin[0]] * 20  # the first byte of a character, again and again
    made = "".join(it.text for it in pieces(text, [*ids(text, "a"), *broken, *euro, *ids(text, "b")]))
    assert made == "a" + "\ufffd" * 20 + "€b"
    for count in range(1, 30):
        tokens = [*([latin[0]] * count), *euro]
        raw = b"".join(text.token_texts.of(token).bytes for token in tokens)
        assert "".join(it.text for it in pieces(text, tokens)) == raw.decode(errors="replace")


def test_a_character_that_never_becomes_whole_is_told_at_the_end(text: Text) -> None:
    made = pieces(text, [*ids(text, "a"), *ids(text, "€")[:2]])
    assert [it.text for it in made] == ["a", "", "\ufffd"] and len(made[-1].tokens) == 2
    assert pieces(text, ids(text, "€")[:1], ["\ufffd"])[-1].stop == "\ufffd"


def test_thousands_of_tokens_without_text_cost_what_others_do(text: Text) -> None:
    for token in (ids(text, "é")[0], 256):  # broken bytes, and a control token that is skipped
        decoder, start = text.decoder(), time.process_time()
        for _ in range(20_000):
            decoder.push(token)
        assert time.process_time() - start < 2


# -- what text turns out to be ---


class Bracketed:
    """Reasoning up to a `|`, and behind a `(` one call, whose arguments are told when it is whole."""

    def __init__(self) -> None:
        self.is_reasoning, self.num_calls = True, 0
        self._arguments = ""

    def push(self, text: str) -> Said:
        content = reasoning = ""
        for char in text:
            if self.num_calls:
                self._arguments += char
            elif char == "(":
                self.num_calls = 1
            elif char == "|":
                self.is_reasoning = False
            elif self.is_reasoning:
                reasoning += char
            else:
                content += char
        return Said(content, reasoning, [CallPiece(0, "f", "")] if text.endswith("(") else [])

    def flush(self) -> Said:
        return Said(calls=[CallPiece(0, None, self._arguments)] if self.num_calls else [])


def split(text: Text, words: str, *, stops: Sequence[str] = ()) -> list[Piece]:
    choice = Choice(0, text.decoder(), StopStrings(stops), splitter=Bracketed())
    made: list[Piece] = []
    for token in ids(text, words):
        made.append(choice.push(TokenEvent(0, Token(token, Logprobs(-1.0, 1)))))
        if made[-1].finish is not None:
            return made
    return [*made, choice.push(TokenEvent(0, Token(0, Logprobs(-1.0, 1)), FinishReason.STOP))]


def test_what_is_said_is_told_apart_and_reasoning_is_counted_by_token(text: Text) -> None:
    made = split(text, "a€|b")
    assert [it.said.reasoning for it in made] == ["a", "", "", "€", "", "", ""]
    assert [it.said.content for it in made] == ["", "", "", "", "", "b", ""]
    assert [it.num_reasoning for it in made] == [1, 1, 1, 1, 1, 0, 0]
    assert [it.says_something for it in made] == [True, False, False, True, False, True, True]


def test_an_answer_with_calls_ends_for_them_unless_it_is_cut(text: Text) -> None:
    made = split(text, "|x(12")
    assert (made[-1].finish, made[-1].said.calls) == ("tool_calls", [CallPiece(0, None, "12")])
    assert split(text, "|x")[-1].finish == "stop"
    choice = Choice(0, text.decoder(), StopStrings(()), splitter=Bracketed())
    *_, last = ids(text, "|(")
    assert choice.push(TokenEvent(0, Token(last), FinishReason.LENGTH)).finish == "length"


def test_an_answer_whose_call_is_cut_by_a_stop_string_ends_for_that(text: Text) -> None:
    choice = Choice(0, text.decoder(), StopStrings(("2",)), splitter=Bracketed())
    *_, last = [choice.push(TokenEvent(0, Token(it))) for it in ids(text, "|x(12")]
    assert (last.finish, last.stop) == ("stop", "2")


def test_calls_that_begin_with_the_last_token_are_whole_pieces(text: Text) -> None:
    choice = Choice(0, text.decoder(), StopStrings(()), splitter=Bracketed())
    piece = choice.push(TokenEvent(0, Token(ids(text, "(")[0]), FinishReason.LENGTH))
    assert piece.said.calls == [CallPiece(0, "f", "")]


def test_tokens_are_told_with_what_is_said_behind_them(text: Text) -> None:
    made = split(text, "a||b(12")
    assert [len(it.tokens) for it in made] == [1, 0, 0, 3, 1, 0, 0, 3]
    assert [it for it, _ in told(made)][:-1] == ids(text, "a||b(12")
    assert [it.says_something for it in made if not it.tokens] == [False] * 4


def test_a_stop_string_cuts_what_is_split_too(text: Text) -> None:
    made = split(text, "|abENDc", stops=["END"])
    assert "".join(it.said.content for it in made) == "ab" and made[-1].finish == "stop"
    assert [it for it, _ in told(made)] == ids(text, "|ab")


# -- single tokens ---


def test_tokens_of_a_byte_level_vocabulary_are_bytes(text: Text) -> None:
    texts, euro = text.token_texts, ids(text, "€")
    assert b"".join(texts.of(token).bytes for token in euro) == "€".encode()
    assert texts.of(euro[0]).text == "bytes:\\xe2" and texts.of(ids(text, " ")[0]).text == " "
    assert b"".join(texts.of(token).bytes for token in range(256)) == bytes(
        byte for byte in (texts.of(token).bytes[0] for token in range(256))
    )
    assert {texts.of(token).bytes[0] for token in range(256)} == set(range(256))
    assert texts.of(256).text == "<|beyond|>" and texts.of(99_999).bytes == b""


def test_a_word_keeps_the_space_before_it_and_byte_tokens_are_bytes(tmp_path: Path) -> None:
    vocab = [
        ("<unk>", 0.0),
        ("a", -1.0),
        ("▁a", -1.0),
        ("▁", -2.0),
        *((f"<0x{byte:02X}>", -9.0) for byte in range(256)),
    ]
    tokenizer = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    texts = TokenTexts(tokenizer)
    assert [texts.of(token).text for token in (1, 2, 3)] == ["a", " a", " "]
    assert texts.of(4 + 0xE2).text == "bytes:\\xe2" and texts.of(4 + 0x41).text == "A"
