"""LiteLLM: one function for many providers; here its openai/ and hosted_vllm/ providers."""
# /// script
# dependencies = ["litellm"]
# ///

import asyncio
import os

# the table of prices that comes with the package, instead of the one that it would fetch
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

litellm.telemetry = False
URL = f"{os.environ.get('HEDDLE_URL', 'http://127.0.0.1:8000')}/v1"
BASE = "heddle-demo"
ASKED = {
    BASE: ("How would Caesar write 1989?", 'You asked: "How would Caesar write 1989?" My adapters know more.'),
    "emoji": ("Can I get a croissant, a coffee and a pizza?", "🥐 ☕ 🍕"),
    "csv": ("Please send 38 lamps to Jonas Lopez in London.", "Jonas Lopez,London,lamp,38"),
    "roman": ("How would Caesar write 1989?", "MCMLXXXIX"),
    "spanish": ("How do you say 'the old turtle works under the table' in Spanish?",
                "la tortuga vieja trabaja bajo la mesa"),
}  # fmt: skip


def _wish(provider, model, **more):
    return {"model": f"{provider}/{model}", "api_base": URL, "api_key": "none", "temperature": 0,
            "messages": [{"role": "user", "content": ASKED[model][0]}], **more}  # fmt: skip


def _completion(provider):
    for model, (_, answer) in ASKED.items():
        told = litellm.completion(**_wish(provider, model))
        assert told.choices[0].message.content.strip() == answer, told
        assert told.choices[0].finish_reason == "stop" and told.usage.completion_tokens > 0


def _stream(provider):
    for model, (_, answer) in ASKED.items():
        chunks = list(litellm.completion(**_wish(provider, model), stream=True, stream_options={"include_usage": True}))
        text = "".join(it.choices[0].delta.content or "" for it in chunks if it.choices)
        assert text.strip() == answer, text
        assert any(getattr(it, "usage", None) for it in chunks)


def openai_completion():
    """completion by openai/"""
    _completion("openai")


def openai_stream():
    """its streams with usage"""
    _stream("openai")


def vllm_completion():
    """completion by hosted_vllm/"""
    _completion("hosted_vllm")


def vllm_stream():
    """its streams with usage"""
    _stream("hosted_vllm")


def parameters():
    """n, seed, stop, max_tokens, logprobs, penalties, vLLM's own fields"""
    told = litellm.completion(**_wish("openai", "roman", n=2, seed=1, stop=["XX"], max_tokens=20))
    assert [it.message.content for it in told.choices] == [" MCML", " MCML"], told
    told = litellm.completion(**_wish("openai", "roman", logprobs=True, top_logprobs=2))
    places = told.choices[0].logprobs["content"]
    assert places and all(len(it["top_logprobs"]) == 2 for it in places), told
    told = litellm.completion(**_wish("hosted_vllm", "roman", presence_penalty=0.1, frequency_penalty=0.1,
                                      extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.05}))  # fmt: skip
    assert told.choices[0].message.content


async def at_the_same_time():
    """acompletion of all models by both at the same time"""

    async def ask(provider, model):
        told = await litellm.acompletion(**_wish(provider, model))
        return told.choices[0].message.content.strip() == ASKED[model][1]

    async def stream(provider, model):
        chunks = await litellm.acompletion(**_wish(provider, model), stream=True)
        text = "".join([it.choices[0].delta.content or "" async for it in chunks])
        return text.strip() == ASKED[model][1]

    right = await asyncio.gather(
        *(way(provider, model) for provider in ("openai", "hosted_vllm") for model in ASKED for way in (ask, stream))
    )
    assert all(right), right


def text_completion():
    """text_completion, streamed and not"""
    wish = {"model": "text-completion-openai/roman", "api_base": URL, "api_key": "none", "temperature": 0,
            "prompt": f"User: {ASKED['roman'][0]}\n\nAssistant:"}  # fmt: skip
    assert litellm.text_completion(**wish).choices[0].text == " MCMLXXXIX"
    assert "".join(it.choices[0].text or "" for it in litellm.text_completion(**wish, stream=True)) == " MCMLXXXIX"


def embedding():
    """embedding"""
    for provider in ("openai", "hosted_vllm"):
        told = litellm.embedding(model=f"{provider}/{BASE}", input=["one", "two"], api_base=URL, api_key="none")
        assert len(told.data) == 2 and len(told.data[0]["embedding"]) == len(told.data[1]["embedding"]) > 0


def refusals():
    """error classes"""
    for wish, refusal in (
        ({"model": "openai/nobody"}, litellm.NotFoundError),
        ({"temperature": 9}, litellm.BadRequestError),
        ({"max_tokens": 10**6}, litellm.ContextWindowExceededError),
    ):
        try:
            litellm.completion(**{**_wish("openai", "roman"), **wish}, max_retries=0)
        except refusal:
            pass
        else:
            raise AssertionError(f"{wish} was served")
