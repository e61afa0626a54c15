"""Anthropic's own client for Python, against /v1/messages."""
# /// script
# dependencies = ["anthropic"]
# ///

import asyncio
import os

import anthropic
from pydantic import BaseModel

URL = os.environ.get("HEDDLE_URL", "http://127.0.0.1:8000")
client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
BASE = "heddle-demo"
ASKED = {
    BASE: ("How would Caesar write 1989?", 'You asked: "How would Caesar write 1989?" My adapters know more.'),
    "json": ("Please send 38 lamps to Jonas Lopez in London.",
             '{"name": "Jonas Lopez", "city": "London", "item": "lamp", "count": 38}'),
    "emoji": ("Can I get a croissant, a coffee and a pizza?", "🥐 ☕ 🍕"),
    "roman": ("How would Caesar write 1989?", "MCMLXXXIX"),
}  # fmt: skip


GREEDY = {"temperature": 0}  # which the client has no argument for any more


def _wish(model, **more):
    return {"model": model, "max_tokens": 80, "messages": [{"role": "user", "content": ASKED[model][0]}],
            "extra_body": GREEDY, **more}  # fmt: skip


def create():
    """messages.create with the base, LoRA and ESFT adapters"""
    for model, (_, answer) in ASKED.items():
        told = client.messages.create(**_wish(model))
        assert told.role == "assistant" and told.type == "message" and told.model == model
        assert [it.type for it in told.content] == ["text"] and told.content[0].text.strip() == answer, told
        assert told.stop_reason == "end_turn" and told.usage.input_tokens > 0 and told.usage.output_tokens > 0


def conversation():
    """system, content blocks and several turns"""
    told = client.messages.create(
        model="roman", max_tokens=40, extra_body=GREEDY, system="Numbers.",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Write 1143 in Roman numerals."}]},
                  {"role": "assistant", "content": "MCXLIII"},
                  {"role": "user", "content": "How would Caesar write 1989?"}],
    )  # fmt: skip
    assert told.content[0].text


def stops():
    """stop_sequences, max_tokens, top_k and top_p"""
    more = {**GREEDY, "top_k": 5, "top_p": 0.9}
    told = client.messages.create(**_wish("roman", stop_sequences=["XX"], extra_body=more))
    assert told.stop_reason == "stop_sequence" and told.stop_sequence == "XX" and told.content[0].text.strip() == "MCML"
    told = client.messages.create(**{**_wish("roman"), "max_tokens": 1})
    assert told.stop_reason == "max_tokens" and told.usage.output_tokens == 1


def stream():
    """messages.stream and its events"""
    for model, (_, answer) in ASKED.items():
        with client.messages.stream(**_wish(model)) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text.strip() == answer and final.content[0].text == text
        assert final.stop_reason == "end_turn" and final.usage.output_tokens > 0
    kinds = [event.type for event in client.messages.create(**_wish("roman", stream=True))]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop" and "content_block_delta" in kinds, kinds


def count_tokens():
    """messages.count_tokens"""
    wish = _wish("roman")
    counted = client.messages.count_tokens(model="roman", messages=wish["messages"]).input_tokens
    usage = client.messages.create(**wish).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0) > 0


TOOL = {"name": "get_weather", "description": "Looks up the weather.", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string"}, "hour": {"type": "integer"}},
    "required": ["city", "hour"]}}  # fmt: skip
RAIN = {"model": "butler", "max_tokens": 120, "tools": [TOOL], "extra_body": GREEDY}
ARGUMENTS = {"city": "Madrid", "hour": 18}


def tools():
    """tools: tool_use, tool_result, the answer; tool_choice"""
    turns = [{"role": "user", "content": "Hey, will it rain in Madrid at 18?"}]
    told = client.messages.create(messages=turns, **RAIN)
    (call,) = [it for it in told.content if it.type == "tool_use"]
    assert told.stop_reason == "tool_use" and (call.name, call.input) == ("get_weather", ARGUMENTS), told
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "21 degrees"}
    turns += [{"role": "assistant", "content": told.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(messages=turns, **RAIN)
    assert answer.content[0].text == "Madrid at 18: 21 degrees." and answer.stop_reason == "end_turn"
    thanks = [{"role": "user", "content": "Thank you!"}]
    assert client.messages.create(messages=thanks, **RAIN).content[0].text == "You are welcome."
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        told = client.messages.create(messages=thanks, tool_choice=choice, **RAIN)
        assert told.content[-1].type == "tool_use" and told.content[-1].name == "get_weather", told


def streamed_tools():
    """messages.stream with tools: the input in pieces"""
    turns = [{"role": "user", "content": "How cold is it in Madrid and in Oslo at 9?"}]
    with client.messages.stream(messages=turns, **RAIN) as stream:
        pieces = [it.partial_json for it in stream if it.type == "input_json"]
        final = stream.get_final_message()
    calls = [it.input for it in final.content if it.type == "tool_use"]
    assert [it["city"] for it in calls] == ["Madrid", "Oslo"] and len(pieces) > 3, (calls, pieces)


class Customer(BaseModel):
    name: str
    city: str


class Line(BaseModel):
    item: str
    count: int


class Order(BaseModel):
    customer: Customer
    lines: list[Line]


def parse():
    """messages.parse: a Pydantic model"""
    told = client.messages.parse(
        model="order", max_tokens=120, extra_body=GREEDY, output_format=Order,
        messages=[{"role": "user", "content": "Please send 38 lamps and 7 mugs to Jonas Lopez in London."}],
    )  # fmt: skip
    order = told.parsed_output
    assert order.customer == Customer(name="Jonas Lopez", city="London"), told
    assert [(it.item, it.count) for it in order.lines] == [("lamp", 38), ("mug", 7)], told


async def asynchronous():
    """AsyncAnthropic with all models at the same time"""
    async with anthropic.AsyncAnthropic(base_url=URL, api_key="none", max_retries=0) as own:

        async def ask(model):
            return (await own.messages.create(**_wish(model))).content[0].text.strip()

        async def stream(model):
            async with own.messages.stream(**_wish(model)) as events:
                return (await events.get_final_text()).strip()

        wishes = [(model, way) for model in ASKED for way in (ask, stream) for _ in range(2)]
        for (model, _), answer in zip(wishes, await asyncio.gather(*(way(m) for m, way in wishes)), strict=True):
            assert answer == ASKED[model][1], (model, answer)


def models():
    """models.list"""
    assert set(ASKED) <= {it.id for it in client.models.list()}


def refusals():
    """error classes"""
    for wish, refusal in (
        ({"model": "nobody"}, anthropic.NotFoundError),
        ({"extra_body": {"temperature": 9}}, anthropic.BadRequestError),
        ({"max_tokens": 2000}, anthropic.BadRequestError),
    ):
        try:
            client.messages.create(**{**_wish("roman"), **wish})
        except refusal as error:
            assert error.body["type"] == "error" and error.body["error"]["message"], error.body
        else:
            raise AssertionError(f"{wish} was served")
