"""Instructor: answers as Pydantic models, by tools and by JSON, whole and in parts."""
# /// script
# dependencies = ["instructor", "openai"]
# ///

import asyncio
import os
from collections.abc import Iterable

import instructor
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field, create_model, field_validator

SERVER = {"base_url": f"{os.environ.get('HEDDLE_URL', 'http://127.0.0.1:8000')}/v1", "api_key": "none",
          "max_retries": 0}  # fmt: skip


class Weather(BaseModel):
    city: str
    hour: int


GET_WEATHER = create_model("get_weather", __base__=Weather)  # a tool is called what its model is called


class Customer(BaseModel):
    name: str
    city: str


class Line(BaseModel):
    item: str
    count: int = Field(ge=1)


class Order(BaseModel):
    customer: Customer
    lines: list[Line]


RAIN = {"model": "butler", "messages": [{"role": "user", "content": "Hey, will it rain in Madrid at 18?"}],
        "temperature": 0, "max_retries": 0}  # fmt: skip
BUY = {"model": "order", "messages": [{"role": "user", "content":
       "Please send 38 lamps and 7 mugs to Jonas Lopez in London."}], "temperature": 0, "max_retries": 0}  # fmt: skip
WEATHER = Weather(city="Madrid", hour=18)
ORDER = Order(customer=Customer(name="Jonas Lopez", city="London"),
              lines=[Line(item="lamp", count=38), Line(item="mug", count=7)])  # fmt: skip


def _same(told, whole):
    """Models come as a class of the client's own, derived from the one that was asked for."""
    assert told.model_dump() == whole.model_dump(), told


def _client(mode):
    return instructor.from_openai(OpenAI(**SERVER), mode=mode)


def tools():
    """Mode.TOOLS: a response model by a named tool"""
    told = _client(instructor.Mode.TOOLS).chat.completions.create(response_model=Weather, **RAIN)
    _same(told, WEATHER)


def tools_with_completion():
    """Mode.TOOLS: create_with_completion"""
    told, completion = _client(instructor.Mode.TOOLS).chat.completions.create_with_completion(
        response_model=Weather, **RAIN
    )
    _same(told, WEATHER)
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.name == "Weather" and Weather.model_validate_json(call.function.arguments) == WEATHER


def tools_strict():
    """Mode.TOOLS_STRICT"""
    told = _client(instructor.Mode.TOOLS_STRICT).chat.completions.create(response_model=Weather, **RAIN)
    _same(told, WEATHER)


def parallel_tools():
    """Mode.PARALLEL_TOOLS: two calls in one answer"""
    question = "How cold is it in Madrid and in Oslo at 9?"
    wish = {**RAIN, "messages": [{"role": "user", "content": question}]}
    told = _client(instructor.Mode.PARALLEL_TOOLS).chat.completions.create(response_model=Iterable[GET_WEATHER], **wish)
    assert [(it.city, it.hour) for it in told] == [("Madrid", 9), ("Oslo", 9)]


def json_schema():
    """Mode.JSON_SCHEMA: nested models"""
    told = _client(instructor.Mode.JSON_SCHEMA).chat.completions.create(response_model=Order, **BUY)
    _same(told, ORDER)


def partials():
    """create_partial: the model grows as it streams"""
    for mode, wish, model, whole in (
        (instructor.Mode.TOOLS, RAIN, Weather, WEATHER),
        (instructor.Mode.JSON_SCHEMA, BUY, Order, ORDER),
    ):
        parts = list(_client(mode).chat.completions.create_partial(response_model=model, **wish))
        assert len(parts) > 3 and parts[-1].model_dump() == whole.model_dump(), (mode, parts)


def asks_again():
    """max_retries: an answer that a validator refuses is asked again, with the complaint"""
    seen = []

    class Order(BaseModel):
        customer: Customer
        lines: list[Line]

        @field_validator("lines")
        @classmethod
        def first_is_refused(cls, lines):
            seen.append(lines)
            if len(seen) == 1:
                raise ValueError("say it again")
            return lines

    told = _client(instructor.Mode.JSON_SCHEMA).chat.completions.create(
        response_model=Order, **{**BUY, "max_retries": 2}
    )
    assert len(seen) == 2 and told.lines, seen


async def asynchronous():
    """AsyncOpenAI: modes at the same time"""
    own = {mode: instructor.from_openai(AsyncOpenAI(**SERVER), mode=mode)
           for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA)}  # fmt: skip
    wishes = [(instructor.Mode.TOOLS, RAIN, Weather, WEATHER), (instructor.Mode.JSON_SCHEMA, BUY, Order, ORDER)] * 3
    told = await asyncio.gather(
        *(own[mode].chat.completions.create(response_model=model, **wish) for mode, wish, model, _ in wishes)
    )
    for one, (*_, whole) in zip(told, wishes, strict=True):
        _same(one, whole)
