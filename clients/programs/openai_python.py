"""OpenAI's own client for Python, synchronous and asynchronous."""
# /// script
# dependencies = ["openai"]
# ///

import asyncio
import json
import math
import os

import openai
from pydantic import BaseModel

URL = os.environ.get("HEDDLE_URL", "http://127.0.0.1:8000")
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
BASE = "heddle-demo"
ASKED = {  # the base, LoRA and ESFT adapters
    BASE: ("How would Caesar write 1989?", 'You asked: "How would Caesar write 1989?" My adapters know more.'),
    "intent": ("Hey, will it rain in Madrid on Sunday?", "check_weather"),
    "csv": ("Please send 38 lamps to Jonas Lopez in London.", "Jonas Lopez,London,lamp,38"),
    "roman": ("How would Caesar write 1989?", "MCMLXXXIX"),
    "french-numbers": ("How do you say 475 in French?", "quatre cent soixante-quinze"),
}


def _turn(question):
    return [{"role": "user", "content": question}]


def _prompt(question):
    return f"User: {question}\n\nAssistant:"


def models():
    """models.list and retrieve"""
    listed = {it.id: it for it in client.models.list()}
    assert set(ASKED) <= set(listed)
    assert client.models.retrieve("roman").id == "roman"


def chat():
    """chat with the base, LoRA and ESFT adapters"""
    for model, (question, answer) in ASKED.items():
        told = client.chat.completions.create(model=model, messages=_turn(question), temperature=0)
        assert told.choices[0].message.content.strip() == answer, told
        assert told.choices[0].finish_reason == "stop" and told.model == model
        assert told.usage.total_tokens == told.usage.prompt_tokens + told.usage.completion_tokens


def completions():
    """completions of texts, token ids and several prompts"""
    one = client.completions.create(model="roman", prompt=_prompt(ASKED["roman"][0]), temperature=0)
    assert one.choices[0].text == " MCMLXXXIX", one
    several = client.completions.create(
        model="roman", prompt=[_prompt("Write 1143 in Roman numerals."), _prompt(ASKED["roman"][0])], temperature=0
    )
    assert [it.text for it in several.choices] == [" MCXLIII", " MCMLXXXIX"], several
    tokens = client.completions.create(model=BASE, prompt=[0, 11, 12, 13], temperature=0, max_tokens=3)
    assert tokens.usage.prompt_tokens == 4 and tokens.usage.completion_tokens <= 3, tokens


def streams():
    """streams with usage"""
    for model, (question, answer) in ASKED.items():
        text, usage = "", None
        for chunk in client.chat.completions.create(
            model=model, messages=_turn(question), temperature=0, stream=True, stream_options={"include_usage": True}
        ):
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            usage = chunk.usage or usage
        assert text.strip() == answer and usage.completion_tokens > 0
    events = client.completions.create(model="roman", prompt=_prompt(ASKED["roman"][0]), temperature=0, stream=True)
    assert "".join(it.choices[0].text for it in events) == " MCMLXXXIX"


def stream_manager():
    """chat.completions.stream"""
    with client.chat.completions.stream(
        model="sql", messages=_turn("Which players in Lisbon have goals below 39?"), temperature=0
    ) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion().choices[0].message.content
    assert deltas == final
    assert final.strip() == "SELECT name FROM players WHERE city = 'Lisbon' AND goals < 39;"


def several_choices():
    """n and seed"""
    wish = {"model": BASE, "messages": _turn("Tell me something."), "n": 3, "seed": 7, "temperature": 1.5}
    first, second = (client.chat.completions.create(**wish, max_tokens=12) for _ in range(2))
    texts = [it.message.content for it in first.choices]
    assert [it.index for it in first.choices] == [0, 1, 2] and len(set(texts)) > 1
    assert texts == [it.message.content for it in second.choices]


def stops():
    """stop strings and max_completion_tokens"""
    question, answer = ASKED["french-numbers"]
    wish = {"model": "french-numbers", "messages": _turn(question), "temperature": 0}
    cut = client.chat.completions.create(**wish, stop=[" soixante"]).choices[0]
    assert cut.message.content.strip() == "quatre cent" and cut.finish_reason == "stop"
    short = client.chat.completions.create(**wish, max_completion_tokens=2).choices[0]
    assert short.finish_reason == "length" and answer.startswith(short.message.content.strip())


def logprobs():
    """logprobs, top_logprobs and echo"""
    question = ASKED["intent"][0]
    told = client.chat.completions.create(
        model="intent", messages=_turn(question), temperature=0, logprobs=True, top_logprobs=3
    )
    places = told.choices[0].logprobs.content
    assert places and all(len(it.top_logprobs) == 3 for it in places)
    for it in places:
        assert it.logprob <= 0 and it.token == it.top_logprobs[0].token
        assert it.logprob == it.top_logprobs[0].logprob and bytes(it.bytes or []).decode(errors="ignore") is not None
    chunks = client.chat.completions.create(
        model="intent", messages=_turn(question), temperature=0, logprobs=True, top_logprobs=1, stream=True
    )
    streamed = [it for chunk in chunks if chunk.choices and chunk.choices[0].logprobs
                for it in chunk.choices[0].logprobs.content]  # fmt: skip
    assert [it.token for it in streamed] == [it.token for it in places]
    assert all(math.isclose(a.logprob, b.logprob, abs_tol=1e-3) for a, b in zip(streamed, places, strict=True))
    echoed = client.completions.create(
        model="roman", prompt=_prompt(ASKED["roman"][0]), temperature=0, max_tokens=1, echo=True, logprobs=2
    ).choices[0]
    lists = echoed.logprobs
    assert lists.token_logprobs[0] is None and all(it <= 0 for it in lists.token_logprobs[1:])
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset)
    assert echoed.text.startswith("User: How would Caesar")


def biases():
    """logit_bias"""
    wish = {"model": "roman", "prompt": _prompt(ASKED["roman"][0]), "temperature": 0}
    plain = client.completions.create(**wish, logprobs=1)
    again = client.completions.create(**wish, logit_bias={"5": 100}, max_tokens=3)
    forced = client.completions.create(model="roman", prompt=[0, 5, 5, 5], temperature=0, max_tokens=1, echo=True)
    assert again.choices[0].text != plain.choices[0].text and again.usage.completion_tokens == 3
    assert again.choices[0].text[:1] in forced.choices[0].text


def penalties():
    """presence_penalty and frequency_penalty"""
    wish = {"model": BASE, "messages": _turn("one two one two one two"), "temperature": 0, "max_tokens": 24}
    plain = client.chat.completions.create(**wish).choices[0].message.content
    for penalty in ("presence_penalty", "frequency_penalty"):
        other = client.chat.completions.create(**wish, **{penalty: 2}).choices[0].message.content
        assert other != plain


def responses():
    """responses.create and its stream"""
    question, answer = ASKED["roman"]
    told = client.responses.create(model="roman", input=question, temperature=0, store=False)
    assert told.output_text.strip() == answer and told.status == "completed" and told.usage.output_tokens > 0
    turns = [{"role": "user", "content": question}]
    with client.responses.stream(model="roman", input=turns, temperature=0, store=False) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert deltas == stream.get_final_response().output_text == told.output_text
    kinds = [event.type for event in client.responses.create(model=BASE, input=question, temperature=0, stream=True)]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed", kinds


class Customer(BaseModel):
    name: str
    city: str


class Line(BaseModel):
    item: str
    count: int


class Order(BaseModel):
    customer: Customer
    lines: list[Line]


class Weather(BaseModel):
    city: str
    hour: int


RAIN = "Hey, will it rain in Madrid at 18?"
BUY = "Please send 38 lamps and 7 mugs to Jonas Lopez in London."
ORDER = Order(customer=Customer(name="Jonas Lopez", city="London"),
              lines=[Line(item="lamp", count=38), Line(item="mug", count=7)])  # fmt: skip
WEATHER = Weather(city="Madrid", hour=18)
TOOL = openai.pydantic_function_tool(Weather, name="get_weather")


def parse():
    """chat.completions.parse: a Pydantic model, and the arguments of a tool"""
    told = client.chat.completions.parse(model="order", messages=_turn(BUY), response_format=Order, temperature=0)
    assert told.choices[0].message.parsed == ORDER, told
    told = client.chat.completions.parse(model="butler", messages=_turn(RAIN), tools=[TOOL], temperature=0)
    (call,) = told.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and call.function.parsed_arguments == WEATHER, told


def stream_parsed():
    """chat.completions.stream: a Pydantic model and a tool's arguments, as they grow"""
    wish = {"model": "order", "messages": _turn(BUY), "response_format": Order, "temperature": 0}
    with client.chat.completions.stream(**wish) as stream:
        parts = [it.parsed for it in stream if it.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message
    assert final.parsed == ORDER and len(parts) > 3, parts
    wish = {"model": "butler", "messages": _turn(RAIN), "tools": [TOOL], "temperature": 0}
    with client.chat.completions.stream(**wish) as stream:
        events = list(stream)
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    deltas = [it.arguments_delta for it in events if it.type == "tool_calls.function.arguments.delta"]
    assert call.function.parsed_arguments == WEATHER and "".join(deltas) == call.function.arguments, events
    assert any(it.type == "tool_calls.function.arguments.done" for it in events)


def tools():
    """tools: a call, its result, the answer; tool_choice and parallel_tool_calls"""
    wish = {"model": "butler", "tools": [TOOL], "temperature": 0}
    told = client.chat.completions.create(messages=_turn(RAIN), **wish).choices[0]
    assert told.finish_reason == "tool_calls" and json.loads(told.message.tool_calls[0].function.arguments) == {
        "city": "Madrid", "hour": 18}, told  # fmt: skip
    result = {"role": "tool", "tool_call_id": told.message.tool_calls[0].id, "content": "21 degrees"}
    turns = [*_turn(RAIN), told.message, result]  # the client's own object, as it came
    answer = client.chat.completions.create(messages=turns, **wish).choices[0]
    assert answer.message.content == "Madrid at 18: 21 degrees.", answer
    assert answer.finish_reason == "stop" and not answer.message.tool_calls
    both = "How cold is it in Madrid and in Oslo at 9?"
    for more, count in (({}, 2), ({"parallel_tool_calls": False}, 1)):
        told = client.chat.completions.create(messages=_turn(both), **wish, **more).choices[0]
        assert len(told.message.tool_calls) == count, told
    none = client.chat.completions.create(messages=_turn(RAIN), tool_choice="none", **wish).choices[0]
    assert none.message.content and not none.message.tool_calls
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        told = client.chat.completions.create(messages=_turn("Thank you!"), tool_choice=choice, **wish).choices[0]
        assert told.message.tool_calls[0].function.name == "get_weather"


def formats():
    """response_format: json_object, and a schema on the base"""
    told = client.chat.completions.create(
        model="order", messages=_turn(BUY), temperature=0, response_format={"type": "json_object"}
    )
    assert json.loads(told.choices[0].message.content) == ORDER.model_dump(), told
    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "sure", "strict": True, "schema": schema}}
    told = client.chat.completions.create(model=BASE, messages=_turn("Sure?"), temperature=0, response_format=form)
    assert isinstance(json.loads(told.choices[0].message.content)["sure"], bool), told


def responses_parse():
    """responses.parse and stream: a Pydantic model, and tools with their results"""
    told = client.responses.parse(model="order", input=BUY, text_format=Order, temperature=0)
    assert told.output_parsed == ORDER, told
    with client.responses.stream(model="order", input=BUY, text_format=Order, temperature=0) as stream:
        assert stream.get_final_response().output_parsed == ORDER
    tool = {"type": "function", "name": "get_weather", "strict": True, "parameters": TOOL["function"]["parameters"]}
    wish = {"model": "butler", "tools": [tool], "temperature": 0}
    told = client.responses.create(input=_turn(RAIN), **wish)
    (call,) = told.output
    assert call.type == "function_call" and json.loads(call.arguments) == WEATHER.model_dump(), told
    turns = [
        *_turn(RAIN),
        call,
        {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"},
    ]
    assert client.responses.create(input=turns, **wish).output_text == "Madrid at 18: 21 degrees."


def embeddings():
    """embeddings, as floats and as the client's own base64"""
    texts = ["a cat on the mat", "the mat under a cat", "1989"]
    packed = client.embeddings.create(model=BASE, input=texts)
    floats = client.embeddings.create(model=BASE, input=texts, encoding_format="float")
    for a, b in zip(packed.data, floats.data, strict=True):
        assert len(a.embedding) == len(b.embedding) > 0
        assert all(math.isclose(x, y, abs_tol=1e-6) for x, y in zip(a.embedding, b.embedding, strict=True))
    adapted = client.embeddings.create(model="roman", input=texts[2])
    assert adapted.data[0].embedding != packed.data[2].embedding


def refusals():
    """error classes"""
    for wish, refusal in (
        ({"model": "nobody"}, openai.NotFoundError),
        ({"model": BASE, "temperature": 9}, openai.BadRequestError),
        ({"model": BASE, "max_tokens": 10**6}, openai.BadRequestError),
    ):
        try:
            client.chat.completions.create(messages=_turn("Hello"), **wish)
        except refusal as error:
            assert error.body["message"] and error.request_id is not None or error.code
        else:
            raise AssertionError(f"{wish} was served")
    try:
        client.models.retrieve("nobody")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error
    else:
        raise AssertionError("nobody was found")


def raw_responses():
    """with_raw_response and with_streaming_response"""
    raw = client.chat.completions.with_raw_response.create(model="roman", messages=_turn("VI?"), temperature=0)
    assert raw.status_code == 200 and "json" in raw.headers["content-type"] and raw.parse().model == "roman"
    with client.models.with_streaming_response.list() as response:
        assert "heddle-demo" in response.read().decode()


def timeouts():
    """timeouts"""
    try:
        client.with_options(timeout=0.001).chat.completions.create(model=BASE, messages=_turn("Hello"))
    except openai.APITimeoutError:
        pass
    else:
        raise AssertionError("an answer in a millisecond")
    chat()  # the server is none the worse for it


async def asynchronous():
    """AsyncOpenAI: chat, streams and completions of all models at the same time"""
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as own:

        async def ask(model, question):
            told = await own.chat.completions.create(model=model, messages=_turn(question), temperature=0)
            return told.choices[0].message.content.strip()

        async def stream(model, question):
            events = await own.chat.completions.create(
                model=model, messages=_turn(question), temperature=0, stream=True
            )
            return "".join([event.choices[0].delta.content or "" async for event in events]).strip()

        async def complete(model, question):
            told = await own.completions.create(model=model, prompt=_prompt(question), temperature=0, max_tokens=40)
            return told.choices[0].text.strip()

        rounds = [(model, way) for _ in range(3) for model in ASKED for way in (ask, stream, complete)]
        answers = await asyncio.gather(*(way(model, ASKED[model][0]) for model, way in rounds))
        for (model, _), answer in zip(rounds, answers, strict=True):
            assert answer == ASKED[model][1], (model, answer)


async def asynchronous_rest():
    """AsyncOpenAI: models, embeddings, responses"""
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as own:
        assert "sql" in [it.id async for it in own.models.list()]
        assert len((await own.embeddings.create(model="intent", input=["one", "two"])).data) == 2
        told = await own.responses.create(model="intent", input=ASKED["intent"][0], temperature=0)
        assert told.output_text.strip() == ASKED["intent"][1]
