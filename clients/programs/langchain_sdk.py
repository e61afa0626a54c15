"""LangChain's package for OpenAI: ChatOpenAI, OpenAI and OpenAIEmbeddings."""
# /// script
# dependencies = ["langchain-openai"]
# ///

import asyncio
import os

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

SERVER = {"base_url": f"{os.environ.get('HEDDLE_URL', 'http://127.0.0.1:8000')}/v1", "api_key": "none",
          "max_retries": 0}  # fmt: skip
BASE = "heddle-demo"
ASKED = {
    BASE: ("How would Caesar write 1989?", 'You asked: "How would Caesar write 1989?" My adapters know more.'),
    "sql": ("Which players in Lisbon have goals below 39?",
            "SELECT name FROM players WHERE city = 'Lisbon' AND goals < 39;"),
    "french-dates": ("We met on the 3rd of May 1987.", "le 3 mai 1987"),
    "iso-date": ("We met on the 3rd of May 1987.", "1987-05-03"),
}  # fmt: skip


def _chat(model, **more):
    return ChatOpenAI(model=model, temperature=0, **SERVER, **more)


def invoke():
    """ChatOpenAI: invoke with usage and metadata"""
    for model, (question, answer) in ASKED.items():
        told = _chat(model).invoke(question)
        assert told.content.strip() == answer, told
        assert told.usage_metadata["output_tokens"] > 0
        assert told.response_metadata["finish_reason"] == "stop" and told.response_metadata["model_name"] == model


def conversation():
    """conversations with a system message"""
    first = _chat("iso-date").invoke([HumanMessage(ASKED["iso-date"][0])])
    told = _chat("iso-date").invoke(
        [SystemMessage("Dates."), HumanMessage(ASKED["iso-date"][0]), first, HumanMessage("And 4 June 1990?")]
    )
    assert told.content


def stream():
    """stream with usage"""
    for model, (question, answer) in ASKED.items():
        chunks = list(_chat(model, stream_usage=True).stream(question))
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole += chunk
        assert whole.content.strip() == answer and len(chunks) > 2, whole
        assert whole.usage_metadata["total_tokens"] > 0


def batch():
    """batch and chains"""
    chain = ChatPromptTemplate.from_messages([("user", "{question}")]) | _chat("iso-date") | StrOutputParser()
    days = range(1, 9)
    answers = chain.batch([{"question": f"We met on {day} May 1987."} for day in days])
    assert [it.strip() for it in answers] == [f"1987-05-0{day}" for day in days], answers


def logprobs():
    """logprobs"""
    told = _chat("iso-date", logprobs=True, top_logprobs=2).invoke(ASKED["iso-date"][0])
    places = told.response_metadata["logprobs"]["content"]
    assert places and all(it["logprob"] <= 0 and len(it["top_logprobs"]) == 2 for it in places)


def parameters():
    """n, seed, stop, max_tokens, penalties, extra_body"""
    model = _chat(BASE, n=2, seed=3, max_tokens=6, presence_penalty=0.5, frequency_penalty=0.5, stop=["zzz"],
                  extra_body={"top_k": 4})  # fmt: skip
    told = model.generate([[HumanMessage("Hello")]])
    assert len(told.generations[0]) == 2


async def asynchronous():
    """ainvoke and astream of all models at the same time"""

    async def ask(model):
        return (await _chat(model).ainvoke(ASKED[model][0])).content.strip()

    async def stream(model):
        return "".join([it.content async for it in _chat(model).astream(ASKED[model][0])]).strip()

    wishes = [(model, way) for model in ASKED for way in (ask, stream) for _ in range(2)]
    answers = await asyncio.gather(*(way(model) for model, way in wishes))
    for (model, _), answer in zip(wishes, answers, strict=True):
        assert answer == ASKED[model][1], (model, answer)


def completions():
    """OpenAI (completions): invoke, stream and batch"""
    model, prompt = OpenAI(model="iso-date", temperature=0, **SERVER), f"User: {ASKED['iso-date'][0]}\n\nAssistant:"
    assert model.invoke(prompt) == " 1987-05-03"
    assert "".join(model.stream(prompt)) == " 1987-05-03"
    assert model.batch([prompt, prompt.replace("3rd", "4th")]) == [" 1987-05-03", " 1987-05-04"]
    assert [it[0].text for it in model.generate([prompt] * 3).generations] == [" 1987-05-03"] * 3


def responses():
    """ChatOpenAI with use_responses_api"""
    model = _chat("iso-date", use_responses_api=True)
    assert model.invoke(ASKED["iso-date"][0]).text.strip() == "1987-05-03"
    assert "".join(it.text for it in model.stream(ASKED["iso-date"][0])).strip() == "1987-05-03"


def embeddings():
    """OpenAIEmbeddings with check_embedding_ctx_length=False"""
    # without it, it sends the token ids of OpenAI's own tokenizer, which mean something else to every other model
    model = OpenAIEmbeddings(model=BASE, check_embedding_ctx_length=False, **SERVER)
    documents = model.embed_documents(["one", "two", "three"])
    assert len(documents) == 3 and len(documents[0]) == len(model.embed_query("one")) > 0
    assert asyncio.run(model.aembed_query("one")) is not None


def refusals():
    """error classes, ContextOverflowError among them"""
    for model, refusal in (("nobody", "NotFound"), (BASE, "ContextOverflow")):
        try:
            _chat(model).invoke("Hello " * 2000)
        except Exception as error:
            assert refusal in type(error).__name__, (type(error), error)
            assert refusal != "ContextOverflow" or isinstance(error, ContextOverflowError)
        else:
            raise AssertionError(f"{model} answered")
