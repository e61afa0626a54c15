"""Pydantic AI: agents with tools and typed output, over chat completions, responses and Anthropic's messages."""
# /// script
# dependencies = ["pydantic-ai-slim[openai,anthropic]"]
# ///

import asyncio
import os

from anthropic import AsyncAnthropic
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.messages import ToolCallPart, ToolReturnPart
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

URL = os.environ.get("HEDDLE_URL", "http://127.0.0.1:8000")
QUESTION = "Hey, will it rain in Madrid at 18?"
ANSWER = "Madrid at 18: 21 degrees."
BUY = "Please send 38 lamps and 7 mugs to Jonas Lopez in London."
GREEDY = {"temperature": 0, "max_tokens": 200}


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


FORECAST = Forecast(city="Madrid", hour=18, degrees=21)
ORDER = Order(customer=Customer(name="Jonas Lopez", city="London"),
              lines=[Line(item="lamp", count=38), Line(item="mug", count=7)])  # fmt: skip


def _chat(name):
    return OpenAIChatModel(name, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key="none"))


def _responses(name):
    return OpenAIResponsesModel(name, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key="none"))


def _messages(name):
    client = AsyncAnthropic(base_url=URL, api_key="none", max_retries=0)
    return AnthropicModel(name, provider=AnthropicProvider(anthropic_client=client))


def _agent(model, **more):
    """An agent that has the tool, and the calls that were made of it."""
    agent, calls = Agent(model, model_settings=GREEDY, retries=0, **more), []

    @agent.tool_plain
    def get_weather(city: str, hour: int) -> str:
        calls.append((city, hour))
        return "21 degrees"

    return agent, calls


def _loop(kind):
    agent, calls = _agent(kind("butler"))
    told = agent.run_sync(QUESTION)
    assert calls == [("Madrid", 18)] and told.output == ANSWER, (calls, told.output)
    kinds = [type(part) for message in told.all_messages() for part in message.parts]
    assert ToolCallPart in kinds and ToolReturnPart in kinds, kinds
    again = agent.run_sync("Thank you!", message_history=told.all_messages())
    assert again.output == "You are welcome." and len(calls) == 1, again.output


def chat_loop():
    """chat model: an agent calls a function, tells its result, and answers thanks without a call"""
    _loop(_chat)


def responses_loop():
    """responses model: the same"""
    _loop(_responses)


def messages_loop():
    """Anthropic model: the same"""
    _loop(_messages)


def parallel():
    """chat model: two calls in one answer"""
    agent, calls = _agent(_chat("butler"))
    told = agent.run_sync("How cold is it in Madrid and in Oslo at 9?")
    assert sorted(calls) == [("Madrid", 9), ("Oslo", 9)], calls
    assert told.output == "Madrid at 9: 21 degrees. Oslo at 9: 21 degrees.", told.output


def _typed(kind, output, instructions="Answer in JSON."):
    agent, calls = _agent(kind("butler"), output_type=output, instructions=instructions)
    told = agent.run_sync(QUESTION)
    assert calls == [("Madrid", 18)] and told.output == FORECAST, (calls, told.output)


def tool_output():
    """ToolOutput after a function's result, over chat and responses"""
    for kind in (_chat, _responses):
        agent, calls = _agent(kind("butler"), output_type=ToolOutput(Forecast))
        told = agent.run_sync(QUESTION)
        assert calls == [("Madrid", 18)] and told.output == FORECAST, (calls, told.output)


def native_output():
    """NativeOutput after a function's result, over chat and responses"""
    for kind in (_chat, _responses):
        _typed(kind, NativeOutput(Forecast))


def native_output_alone():
    """NativeOutput of nested models without tools, over chat and responses"""
    for kind in (_chat, _responses):
        told = Agent(kind("order"), model_settings=GREEDY, output_type=NativeOutput(Order), retries=0).run_sync(BUY)
        assert told.output == ORDER, told.output


def prompted_output():
    """PromptedOutput after a function's result: a JSON object, checked by the client"""
    _typed(_chat, PromptedOutput(Forecast, template="Answer in JSON."), instructions=None)


async def streams():
    """run_stream: text and typed output, as they grow"""
    agent, calls = _agent(_chat("butler"))
    async with agent.run_stream(QUESTION) as stream:
        text = [it async for it in stream.stream_text(debounce_by=None)]
    assert calls == [("Madrid", 18)] and len(text) > 3 and text[-1] == ANSWER, text
    typed = Agent(_chat("order"), model_settings=GREEDY, output_type=NativeOutput(Order), retries=0)
    async with typed.run_stream(BUY) as stream:
        parts = [it async for it in stream.stream_output(debounce_by=None)]
    assert len(parts) > 1 and parts[-1] == ORDER, parts


async def together():
    """agents at the same time"""

    async def loop():
        agent, calls = _agent(_chat("butler"))
        return (await agent.run(QUESTION)).output == ANSWER and len(calls) == 1

    async def order():
        agent = Agent(_chat("order"), model_settings=GREEDY, output_type=NativeOutput(Order), retries=0)
        return (await agent.run(BUY)).output == ORDER

    assert all(await asyncio.gather(*(way() for _ in range(4) for way in (loop, order))))
