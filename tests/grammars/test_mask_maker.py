"""The engine's side of masks, over a real process."""

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import msgspec
import psutil
import pytest
from llguidance import LLTokenizer

from server.engine.masks import Broken
from server.grammars import mask_maker as module
from server.grammars import mask_process
from server.grammars.mask_maker import MaskMaker
from server.grammars.mask_messages import Accept, Begin, Broke, Close, Frames, Masked, Open, framed
from server.grammars.mask_rows import MaskRows, row_bytes_of
from server.grammars.prototypes import Prototypes
from tests.support.grammar_checks import SPEC, STOP, VOCAB, allowed, load, matcher
from tests.support.live_server import write_tokenizer
from tests.support.waiting import eventually

WORD = '%llguidance {"no_forcing": true}\nstart: /[a-z]{1,40}/'
# becomes more than is served behind some tokens
TOO_MUCH = '{"grammars": [{"lark_grammar": "start: /((((a{0,1000}){0,1000}){0,1000}){0,1000}){0,1000}/"}]}'


@pytest.fixture(scope="module")
def tokens() -> LLTokenizer:
    return load()


@pytest.fixture
def masks() -> Iterator[MaskMaker]:
    maker = MaskMaker(Path(SPEC.model_dir), VOCAB, (STOP,), max_requests=4)
    yield maker
    maker.stop()
    assert not processes()


def processes() -> list[psutil.Process]:
    return [it for it in psutil.Process().children() if "server.grammars.mask_process" in it.cmdline()]


def awaited(masks: MaskMaker, request_id: int) -> list[int]:
    """The tokens that its mask allows, when it is there."""

    def is_there() -> bool:
        assert masks.poll() == []
        return masks.is_ready(request_id)

    eventually(is_there)
    return allowed(masks.collect([request_id], lambda: False, may_wait=False)[request_id])


def broken(masks: MaskMaker) -> list[Broken]:
    found: list[Broken] = []
    eventually(lambda: found.extend(masks.poll()) or found)
    return found


def test_masks_are_the_librarys(masks: MaskMaker, tokens: LLTokenizer) -> None:
    assert not processes()  # nobody has asked yet
    rng = Random(0)
    beside = {number: matcher(tokens, "regex", "[a-z]{1,40}") for number in range(3)}
    for number in beside:
        masks.open(number, WORD, ())
    for _ in range(8):
        for number, made in beside.items():
            choices = awaited(masks, number)
            assert choices == allowed(made.compute_bitmask())
            token = rng.choice([it for it in choices if it != STOP])
            masks.accept(number, token)
            made.consume_token(token)
    assert masks.made.num == 27 - sum(not masks.is_ready(it) for it in beside)
    assert 0 < masks.made.seconds < 20


def test_a_request_goes_on_from_tokens_that_it_has(masks: MaskMaker, tokens: LLTokenizer) -> None:
    begun = tokens.tokenize_str("abc")
    made = matcher(tokens, "regex", "[a-z]{1,40}")
    made.consume_tokens(begun)
    masks.open(7, WORD, begun)
    assert awaited(masks, 7) == allowed(made.compute_bitmask())
    masks.close(7)
    masks.open(7, WORD, begun[:1])
    made.rollback(len(begun) - 1)
    assert awaited(masks, 7) == allowed(made.compute_bitmask())


def test_behind_its_end_there_are_only_stop_tokens(masks: MaskMaker) -> None:
    masks.open(1, 'start: "a"', ())
    (token,) = awaited(masks, 1)
    for _ in range(3):
        masks.accept(1, token)
        (token,) = awaited(masks, 1)
        assert token == STOP


def test_a_dead_end_is_not_called_too_much(masks: MaskMaker) -> None:
    masks.open(1, 'start: "a" x\nx: x', ())
    (token,) = awaited(masks, 1)
    masks.accept(1, token)
    (it,) = broken(masks)
    assert it.is_its_own and it.reason.startswith("nothing can follow at this point of the answer")


def test_rows_are_not_given_to_another_before_the_process_lets_go(masks: MaskMaker) -> None:
    """Eight rows: what is opened beyond them waits until one is free, and gets its own masks."""
    for number in range(40):
        masks.open(number, WORD if number % 2 else 'start: "a"', ())
        if number >= 4:
            masks.close(number - 4)
    for number in range(36, 40):
        assert (len(awaited(masks, number)) > 1) == bool(number % 2)
    for number in range(36, 40):
        masks.close(number)
    assert masks.num_open == 0 and masks.poll() == []
    masks.open(99, WORD, ())
    assert len(awaited(masks, 99)) > 1


def test_a_grammar_that_becomes_too_much_breaks_its_own_request(masks: MaskMaker, tokens: LLTokenizer) -> None:
    masks.open(1, TOO_MUCH, ())
    masks.open(2, WORD, ())
    awaited(masks, 2)
    for _ in range(60):
        eventually(lambda: masks.poll() or masks.is_ready(1) or masks.num_open == 1)
        if masks.num_open == 1:
            break
        choices = allowed(masks.collect([1], lambda: False, may_wait=False)[1])
        masks.accept(1, max(it for it in choices if it != STOP))
        found: list[Broken] = []
        eventually(lambda found=found: found.extend(masks.poll()) or found or masks.is_ready(1))  # type: ignore[misc]
        if found:
            assert found[0].request_id == 1 and found[0].is_its_own
            assert "too much at this point of the answer: lexer error" in found[0].reason
            break
    else:
        raise AssertionError("it came to no end")
    assert not masks.is_ready(1) and masks.collect([1], lambda: False, may_wait=True) == {}
    masks.accept(1, 5)  # nobody has told the engine yet
    masks.close(1)
    masks.accept(2, tokens.tokenize_str("a")[0])
    assert len(awaited(masks, 2)) > 1


def test_a_token_that_was_not_allowed_is_our_bug(masks: MaskMaker, tokens: LLTokenizer) -> None:
    masks.open(1, WORD, ())
    awaited(masks, 1)
    masks.accept(1, tokens.tokenize_str("7")[0])
    ((number, reason, is_its_own),) = broken(masks)
    assert (number, is_its_own) == (1, False) and "does not allow" in reason


def test_a_process_that_is_killed_breaks_its_requests_and_is_replaced(masks: MaskMaker) -> None:
    masks.open(1, WORD, ())
    masks.open(2, WORD, ())
    awaited(masks, 1)
    (process,) = processes()
    process.kill()
    found = broken(masks)
    assert {(it.request_id, it.is_its_own) for it in found} == {(1, False), (2, False)}
    assert masks.num_open == 0
    masks.open(1, WORD, ())
    assert len(awaited(masks, 1)) > 1 and processes() != [process]


def test_a_process_that_says_nothing_is_given_up(masks: MaskMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    masks.open(1, WORD, ())
    awaited(masks, 1)
    (process,) = processes()
    process.suspend()
    masks.open(2, WORD, ())
    assert masks.collect([1, 2], lambda: False, may_wait=True).keys() == {1}
    monkeypatch.setattr(module, "SILENCE_S", 0.1)
    found = broken(masks)
    assert {it.request_id for it in found} == {1, 2} and "said nothing for 0.1 s" in found[0].reason
    assert not process.is_running()


def test_signals_to_the_server_do_not_end_it(masks: MaskMaker, tokens: LLTokenizer) -> None:
    masks.open(1, WORD, ())
    awaited(masks, 1)
    (process,) = processes()
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    masks.accept(1, tokens.tokenize_str("a")[0])
    assert len(awaited(masks, 1)) > 1


def test_collecting_waits_while_the_device_computes_and_a_moment_longer(masks: MaskMaker) -> None:
    masks.open(1, WORD, ())
    awaited(masks, 1)
    (process,) = processes()
    process.suspend()
    masks.open(2, WORD, ())
    looks = iter([True] * 5)
    begin = time.perf_counter()
    assert masks.collect([2], lambda: next(looks, False), may_wait=False) == {}
    assert next(looks, None) is None and time.perf_counter() - begin >= 0.004
    process.resume()
    until = time.monotonic() + 30
    got = masks.collect([1, 2], lambda: time.monotonic() < until, may_wait=False)
    assert got.keys() == {1, 2}


def test_a_vocabulary_that_cannot_be_loaded(tmp_path: Path) -> None:
    maker = MaskMaker(tmp_path, VOCAB, (STOP,), max_requests=2)
    maker.open(1, WORD, ())
    ((_, reason, is_its_own),) = broken(maker)
    assert not is_its_own and "tokenizer.json cannot be read" in reason
    maker.stop()


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)  # of 257 tokens
    maker = MaskMaker(tmp_path, 256, (0,), max_requests=2)
    maker.open(1, 'start: "a"', ())
    eventually(lambda: maker.poll() == [] and maker.is_ready(1))
    mask = maker.collect([1], lambda: False, may_wait=False)[1]
    assert len(mask) == 32 and len(allowed(mask, 256)) == 1
    maker.stop()


def test_who_leaves_when_it_has_just_broken_is_not_spoken_of(masks: MaskMaker) -> None:
    for number in (1, 2):
        masks.open(number, WORD, ())
        awaited(masks, number)
    (process,) = processes()
    process.kill()
    eventually(lambda: not masks.collect([1, 2], lambda: False, may_wait=False))
    masks.close(1)
    assert [it.request_id for it in masks.poll()] == [2]
    masks.close(2)
    assert masks.poll() == []


def test_a_token_that_takes_too_long_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_process.limits, "MOST_SECONDS_A_TOKEN", -1.0)
    ours, theirs = socket.socketpair()
    memory = MaskRows.new_file(1, row_bytes_of(VOCAB))
    with ours, theirs:
        process = mask_process.MaskProcess(theirs, memory)
        process._begin(Begin(SPEC, 1, row_bytes_of(VOCAB)))
        opened = Open(1, 0, WORD, [])
        answer = process._answer(mask_process.Ticket(opened), opened)
    assert isinstance(answer, Broke) and answer.is_its_own and "many ways to read it" in answer.reason


def test_frames_arrive_in_any_pieces() -> None:
    messages = [Begin(SPEC, 3, 4), Open(1, 2, "g" * 300, [1, 2]), Accept(1, 5), Close(1)]
    data = framed(messages[:3]) + framed(messages[3:])
    for size in (1, 3, 7, len(data)):
        frames = Frames(msgspec.msgpack.Decoder(list[Begin | Open | Accept | Close]))
        pieces = [data[place : place + size] for place in range(0, len(data), size)]
        assert [it for piece in pieces for it in frames.push(piece)] == messages
    assert framed([Masked(1, 0.5)])


def test_prototypes_are_bounded_in_number_and_bytes(tokens: LLTokenizer) -> None:
    made, kept = matcher(tokens, "regex", "a"), Prototypes(most=3, most_bytes=10)
    for grammar in ("a", "b", "c", "dddddd", "x" * 11):
        kept.put(grammar, made)
        kept.check()
    assert kept.get("a") is None and kept.get("dddddd") is made and kept.get("x" * 11) is None
    kept.put("ff", made)
    assert kept.get("b") is None
    kept.drop("ff")
    assert kept.get("ff") is None
    kept.check()
