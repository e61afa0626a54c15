"""LangChain: tools, typed output in its three methods, and agents that loop through LangGraph."""
# /// script
# dependencies = ["langchain", "langchain-openai"]
# ///

import asyncio
import os

from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, create_model

SERVER = {"base_url": f"{os.environ.get('HEDDLE_URL', 'http://127.0.0.1:8000')}/v1", "api_key": "none",
          "max_retries": 0}  # fmt: skip
QUESTION = "Hey, will it rain in Madrid at 18?"
ANSWER = "Madrid at 18: 21 degrees."
BUY = "Please send 38 lamps and 7 mugs to Jonas Lopez in London."
ARGUMENTS = {"city": "Madrid", "hour": 18}


class Weather(BaseModel):
    city: str
    hour: int


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


FINAL_RESULT = create_model("final_result", __base__=Forecast)  # a tool is called what its model is called


@tool("get_weather")
def _weather(city: str, hour: int) -> str:
    """Looks up the weather."""
    return "21 degrees"


@tool("set_alarm")
def _alarm(hour: int) -> str:
    """Sets an alarm."""
    return "done"


def _chat(model="butler", **more):
    return ChatOpenAI(model=model, temperature=0, **SERVER, **more)


def _loop(model):
    turns = [HumanMessage(QUESTION)]
    told = model.invoke(turns)
    (call,) = told.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", ARGUMENTS) and not told.invalid_tool_calls, told
    result = _weather.invoke(call)
    assert isinstance(result, ToolMessage)
    answer = model.invoke([*turns, told, result])
    assert answer.text.strip() == ANSWER and not answer.tool_calls, answer


def bind_tools():
    """bind_tools: a call, its result, and the answer"""
    _loop(_chat().bind_tools([_weather]))


def bind_tools_over_responses():
    """bind_tools with use_responses_api"""
    _loop(_chat(use_responses_api=True).bind_tools([_weather]))


def choices_of_tools():
    """tool_choice: the model's own among several, any, one by name, none"""
    tools = [_weather, _alarm]
    for question, name in ((QUESTION, "get_weather"), ("Wake me up at 7", "set_alarm")):
        (call,) = _chat().bind_tools(tools).invoke(question).tool_calls
        assert call["name"] == name, call
    (call,) = _chat().bind_tools(tools, tool_choice="any").invoke("Thank you!").tool_calls
    assert call["name"] in ("get_weather", "set_alarm")
    (call,) = _chat().bind_tools(tools, tool_choice="set_alarm").invoke("Wake me up at 7").tool_calls
    assert call["args"] == {"hour": 7}, call
    assert _chat().bind_tools(tools, tool_choice="none").invoke(QUESTION).tool_calls == []


def parallel_calls():
    """parallel_tool_calls: two calls, or one"""
    question = "How cold is it in Madrid and in Oslo at 9?"
    told = _chat().bind_tools([_weather]).invoke(question)
    assert [it["args"]["city"] for it in told.tool_calls] == ["Madrid", "Oslo"], told
    told = _chat().bind_tools([_weather], parallel_tool_calls=False).invoke(question)
    assert [it["args"]["city"] for it in told.tool_calls] == ["Madrid"], told


def streamed_calls():
    """stream: calls in pieces that add up"""
    whole, pieces = None, 0
    for chunk in _chat().bind_tools([_weather]).stream(QUESTION):
        pieces += bool(chunk.tool_call_chunks)
        whole = chunk if whole is None else whole + chunk
    assert pieces > 2 and [(it["name"], it["args"]) for it in whole.tool_calls] == [("get_weather", ARGUMENTS)], whole


def structured_output():
    """with_structured_output: json_schema, function_calling and json_mode, parsed and raw"""
    assert _chat("order").with_structured_output(Order, method="json_schema").invoke(BUY) == ORDER
    assert _chat("order").with_structured_output(Order, method="json_mode").invoke(BUY) == ORDER
    told = _chat().with_structured_output(Weather, method="function_calling").invoke(QUESTION)
    assert told == Weather(**ARGUMENTS), told
    raw = _chat("order").with_structured_output(Order, method="json_schema", include_raw=True).invoke(BUY)
    assert raw["parsed"] == ORDER and raw["parsing_error"] is None and isinstance(raw["raw"], AIMessage)
    as_dict = _chat("order").with_structured_output(Order.model_json_schema(), method="json_schema").invoke(BUY)
    assert as_dict == ORDER.model_dump(), as_dict


def strict_structured_output():
    """with_structured_output: strict"""
    assert _chat("order").with_structured_output(Order, method="json_schema", strict=True).invoke(BUY) == ORDER
    told = _chat().with_structured_output(Weather, method="function_calling", strict=True).invoke(QUESTION)
    assert told == Weather(**ARGUMENTS), told


def structured_output_over_responses():
    """with_structured_output with use_responses_api"""
    model = _chat("order", use_responses_api=True).with_structured_output(Order, method="json_schema")
    assert model.invoke(BUY) == ORDER


def agents():
    """create_agent: the loop of calls and results"""
    told = create_agent(_chat(), [_weather, _alarm]).invoke({"messages": [HumanMessage(QUESTION)]})
    assert [it.type for it in told["messages"]] == ["human", "ai", "tool", "ai"], told
    assert told["messages"][1].tool_calls[0]["args"] == ARGUMENTS and told["messages"][-1].text == ANSWER, told


def typed_agents():
    """create_agent with response_format: ToolStrategy and ProviderStrategy"""
    for strategy, prompt in ((ToolStrategy(FINAL_RESULT), None), (ProviderStrategy(Forecast), "Answer in JSON.")):
        agent = create_agent(_chat(), [_weather], response_format=strategy, system_prompt=prompt)
        told = agent.invoke({"messages": [HumanMessage(QUESTION)]})
        assert told["structured_response"].model_dump() == FORECAST.model_dump(), told
        assert [it for it in told["messages"] if isinstance(it, ToolMessage)][0].content == "21 degrees"


async def streamed_agents():
    """create_agent: streams of several agents at the same time"""

    async def run():
        agent, text = create_agent(_chat(), [_weather]), ""
        async for chunk, _ in agent.astream({"messages": [HumanMessage(QUESTION)]}, stream_mode="messages"):
            text += chunk.text if isinstance(chunk, AIMessage) else ""
        return text == ANSWER

    assert all(await asyncio.gather(*(run() for _ in range(4))))
