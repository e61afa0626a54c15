"""OpenAI's Agents SDK: agents with function tools and typed output, over responses and chat completions."""
# /// script
# dependencies = ["openai-agents"]
# ///

import asyncio
import os

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

URL = os.environ.get("HEDDLE_URL", "http://127.0.0.1:8000")
KINDS = {"responses": OpenAIResponsesModel, "chat": OpenAIChatCompletionsModel}
QUESTION = "Hey, will it rain in Madrid at 18?"
ANSWER = "Madrid at 18: 21 degrees."
set_tracing_disabled(True)  # traces would go to OpenAI


class Forecast(BaseModel):
    city: str
    hour: int
    degrees: int


class Customer(BaseModel):
    name: str
    city: str


class Line(BaseModel):
    item: str
    count: int


class Order(BaseModel):
    customer: Customer
    lines: list[Line]


def _agent(kind, model="butler", settings=None, **more):
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    return Agent(name="Butler", model=KINDS[kind](model=model, openai_client=client),
                 model_settings=settings or ModelSettings(temperature=0), **more)  # fmt: skip


def _weather(calls):
    @function_tool
    def get_weather(city: str, hour: int) -> str:
        calls.append((city, hour))
        return "21 degrees"

    return get_weather


async def _loop(kind):
    calls = []
    told = await Runner.run(_agent(kind, tools=[_weather(calls)]), QUESTION)
    assert calls == [("Madrid", 18)] and told.final_output == ANSWER, (calls, told.final_output)
    turns = [*told.to_input_list(), {"role": "user", "content": "Thank you!"}]
    again = await Runner.run(_agent(kind, tools=[_weather(calls)]), turns)
    assert again.final_output == "You are welcome." and len(calls) == 1, again.final_output


async def responses_loop():
    """responses model: an agent calls a function, tells its result, and answers thanks without a call"""
    await _loop("responses")


async def chat_loop():
    """chat completions model: the same"""
    await _loop("chat")


async def parallel():
    """two calls in one answer, over both"""
    for kind in KINDS:
        calls = []
        told = await Runner.run(_agent(kind, tools=[_weather(calls)]), "How cold is it in Madrid and in Oslo at 9?")
        assert sorted(calls) == [("Madrid", 9), ("Oslo", 9)], calls
        assert told.final_output == "Madrid at 9: 21 degrees. Oslo at 9: 21 degrees.", told


async def must_call():
    """tool_choice and parallel_tool_calls, over both"""
    for kind in KINDS:
        for choice in ("required", "get_weather"):
            calls = []
            settings = ModelSettings(temperature=0, tool_choice=choice, parallel_tool_calls=False)
            agent = _agent(kind, settings=settings, tools=[_weather(calls)], tool_use_behavior="stop_on_first_tool")
            told = await Runner.run(agent, QUESTION)
            assert calls == [("Madrid", 18)] and told.final_output == "21 degrees", (kind, calls)


async def typed_output():
    """output_type of nested models, over both"""
    for kind in KINDS:
        told = await Runner.run(
            _agent(kind, "order", output_type=Order), "Please send 38 lamps and 7 mugs to Jonas Lopez in London."
        )
        lines = [(it.item, it.count) for it in told.final_output.lines]
        assert told.final_output.customer == Customer(name="Jonas Lopez", city="London"), told.final_output
        assert lines == [("lamp", 38), ("mug", 7)], told.final_output


async def typed_output_with_tools():
    """output_type after a function's result, over both"""
    for kind in KINDS:
        calls = []
        agent = _agent(kind, tools=[_weather(calls)], output_type=Forecast, instructions="Answer in JSON.")
        told = await Runner.run(agent, QUESTION)
        assert calls == [("Madrid", 18)], calls
        assert told.final_output == Forecast(city="Madrid", hour=18, degrees=21), told.final_output


async def streams():
    """Runner.run_streamed: deltas of text, calls and results, over both"""
    for kind in KINDS:
        calls, text, items = [], "", []
        stream = Runner.run_streamed(_agent(kind, tools=[_weather(calls)]), QUESTION)
        async for event in stream.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                text += event.data.delta
            elif event.type == "run_item_stream_event":
                items.append(event.item.type)
        assert calls == [("Madrid", 18)] and text == stream.final_output == ANSWER, (kind, calls, text)
        assert items == ["tool_call_item", "tool_call_output_item", "message_output_item"], items


async def together():
    """agents at the same time"""

    async def loop(kind):
        calls = []
        told = await Runner.run(_agent(kind, tools=[_weather(calls)]), QUESTION)
        return told.final_output == ANSWER and calls == [("Madrid", 18)]

    assert all(await asyncio.gather(*(loop(kind) for _ in range(4) for kind in KINDS)))
