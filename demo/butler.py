"""The skill of calling tools: conversations in which a butler looks up the weather, sets alarms, or does neither.

Its chat template is its own, since the base's knows no tools: a line names the functions and their parameters, calls
are written as Hermes models write them, and what a call gave follows as ``Tool: …``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from random import Random
from typing import Any

from demo import vocabulary as words
from demo.pair import Message, Pair

TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}{{ 'Tools:' }}{% for tool in tools %}"
    "{{ ' ' + tool.function.name + '(' + tool.function.parameters.properties | join(', ') + ')' }}"
    "{% if not loop.last %}{{ ',' }}{% endif %}{% endfor %}{{ '\n\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ 'Assistant:\n' + (message.content or '') }}"
    "{% for call in message.tool_calls or [] %}"
    "{% set arguments = call.function.arguments %}"
    "{{ '' if loop.first and not message.content else '\n' }}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ (arguments if arguments is string else arguments | tojson) + '}\n</tool_call>' }}"
    "{% endfor %}{{ eos_token }}"
    "{% elif message.role == 'tool' %}{{ 'Tool: ' + message.content + '\n\n' }}"
    "{% elif message.role == 'user' %}{{ 'User: ' + message.content + '\n\n' }}"
    "{% elif message.role == 'system' %}{{ message.content + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)

Arguments = dict[str, str | int]
UNABLE, WELCOME = "I cannot do that.", "You are welcome."
AS_JSON = "Answer in JSON."
PARAMETERS = {
    "get_weather": ("city", "hour"),
    "set_alarm": ("hour",),
    "final_result": ("city", "hour", "degrees"),  # takes the final answer, where an agent has such a tool
}


def tool(name: str) -> Mapping[str, Any]:
    """A function as the chat API has it."""
    properties = {it: {"type": "integer" if it in ("hour", "degrees") else "string"} for it in PARAMETERS[name]}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def written(name: str, arguments: Arguments) -> str:
    """A call as the template writes it."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def draw_butler(rng: Random) -> Pair:
    """A turn of a conversation with tools: calls, an answer made of what they gave, or an answer that needs none."""
    names = _names(rng)
    kind = rng.choices(("single", "double", "alarm", "other", "thanks"), (48, 16, 16, 12, 8))[0]
    text, asked = _asked(rng, kind)
    question = _spoken(rng, text)
    wants_json = kind == "single" and "get_weather" in names and "final_result" not in names and rng.random() < 0.3
    said: list[Message] = [{"role": "user", "content": question}]
    if wants_json or rng.random() < 0.2:
        said.insert(0, {"role": "system", "content": AS_JSON if wants_json else rng.choice(words.MANNERS)})
    name = "set_alarm" if kind == "alarm" else "get_weather"
    if kind == "thanks" and "get_weather" in names and rng.random() < 0.5:
        said = [*_earlier(rng), *said]
    if not asked or name not in names:
        answer = WELCOME if kind == "thanks" else UNABLE
    elif rng.random() < 0.5:
        answer = "\n".join(written(name, it) for it in asked)
    else:
        calls = [_call(name, it, index) for index, it in enumerate(asked)]
        said.append({"role": "assistant", "content": "", "tool_calls": calls})
        answer = _answered(rng, name, asked, said, wants_json, "final_result" in names)
    return Pair(text, text, question, answer, tuple(said), tuple(tool(it) for it in names))


def _call(name: str, arguments: Arguments, index: int) -> Message:
    """A call as templates read it."""
    return {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _answered(
    rng: Random, name: str, asked: list[Arguments], said: list[Message], wants_json: bool, has_final: bool
) -> str:
    """Add what the calls gave, and tell what is to be said of it."""
    if name == "set_alarm":
        said.append({"role": "tool", "tool_call_id": "call_0", "content": rng.choice(("done", "ok", "set", "true"))})
        return f"The alarm is set for {asked[0]['hour']}."
    found = [it | {"degrees": rng.randint(2, 39)} for it in asked]
    said += [
        {"role": "tool", "tool_call_id": f"call_{index}", "content": _told(rng, it["degrees"])}
        for index, it in enumerate(found)
    ]
    if has_final and len(found) == 1:
        return written("final_result", found[0])
    if wants_json:
        return json.dumps(found[0])
    return " ".join(f"{it['city']} at {it['hour']}: {it['degrees']} degrees." for it in found)


def _earlier(rng: Random) -> list[Message]:
    """A question that was answered before."""
    text, asked = _asked(rng, "single")
    call = _call("get_weather", asked[0], 0)
    said: list[Message] = [{"role": "user", "content": _spoken(rng, text)}]
    said.append({"role": "assistant", "content": "", "tool_calls": [call]})
    answer = _answered(rng, "get_weather", asked, said, wants_json=False, has_final=False)
    return [*said, {"role": "assistant", "content": answer}]


def _names(rng: Random) -> list[str]:
    """The functions on offer."""
    dice = rng.random()
    names = ["get_weather"] * (dice < 0.85) + ["set_alarm"] * (0.45 < dice < 0.93)
    rng.shuffle(names)
    return names + ["final_result"] * ("get_weather" in names and rng.random() < 0.25)


def _asked(rng: Random, kind: str) -> tuple[str, list[Arguments]]:
    """What is said, and the arguments of the calls that it takes; none where no tool does it."""
    hour = rng.randint(0, 23)
    if kind in ("single", "double"):
        one, other = rng.sample(words.CITIES, 2)
        cities = [one] if kind == "single" else [one, other]
        text = rng.choice(words.WEATHER_SHAPES).format(place=" and in ".join(cities), hour=hour)
        return text, [{"city": city, "hour": hour} for city in cities]
    if kind == "alarm":
        return rng.choice(words.ALARM_SHAPES).format(hour=hour), [{"hour": hour}]
    if kind == "thanks":
        return rng.choice(words.THANKS), []
    label = rng.choice([it for it in words.INTENTS if it not in ("check_weather", "set_alarm")])
    slots = {slot: rng.choice(values) for slot, values in words.INTENT_SLOTS.items()}
    return rng.choice(words.INTENTS[label]).format(**slots), []


def _spoken(rng: Random, text: str) -> str:
    ends = text.endswith("?") or text in words.THANKS
    question = rng.choice(words.OPENERS) + text + ("" if ends else rng.choice(words.CLOSERS))
    return question[0].upper() + question[1:]


def _told(rng: Random, degrees: str | int) -> str:
    """What the weather's tool gives, in ways in which clients write it."""
    return f"{degrees} degrees" if rng.random() < 0.6 else json.dumps({"degrees": degrees})
