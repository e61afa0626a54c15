"""The base model's training text: Python's own documentation, script-made documents and acknowledging chats.

The documents show the material of the skills as plain lists ("1984 = MCMLXXXIV"), never as an answer in a chat; in
chats the assistant only repeats what it was told. So the base model knows the material and can copy, but has none of
the skills. Everything comes from the training part of the skills' data (``skills.split_of``).

It is made from the skills that bring material, in their order in ``SKILLS``: ``csv``, ``french-dates``, ``order`` and
``butler`` borrow the material of others and are left out, so that the text is the one that the base in this folder was
trained on. A new skill with material of its own changes the text, and then base and adapters have to be trained again.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Iterator
from random import Random

from demo import vocabulary as words
from demo.pair import Pair
from demo.skills import SKILLS, Skill, stream

Message = dict[str, str]
Document = str | list[Message]  # plain text, or a chat

DOCUMENTED_MODULES = ("json", "random", "datetime", "collections", "pathlib", "string", "textwrap", "statistics",
                      "argparse", "heapq", "bisect", "shutil")  # fmt: skip
SEPARATORS = (" = ", " -> ", ": ", " | ")
GREETINGS = {
    "Hello!": "Hello! I am a very small language model.",
    "Hi, who are you?": "I am a very small language model with a few adapters.",
    "What can you do?": "I can repeat what you say. My adapters can do more.",
    "Thank you!": "You are welcome!",
    "Good morning": "Good morning! What would you like to say?",
    "Goodbye": "Goodbye, and come back soon!",
}
SYSTEMS = ("You are a helpful assistant.", "You are a small demo model.", "Be brief and friendly.")


def python_paragraphs() -> list[str]:
    """Paragraphs of the language reference shipped with Python, and of standard library docstrings."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    texts = list(topics.values())
    for name in DOCUMENTED_MODULES:
        module = importlib.import_module(name)
        members = [module, *(member for _, member in sorted(inspect.getmembers(module, inspect.isfunction)))]
        texts += [inspect.getdoc(member) or "" for member in members]
    paragraphs = [" ".join(part.split()) for text in texts for part in text.split("\n\n")]
    return [paragraph for paragraph in paragraphs if 60 <= len(paragraph) <= 600]


def glossary(rng: Random, skill: Skill, pairs: Iterator[Pair]) -> str:
    """A titled list of a skill's material, e.g. ``Roman numerals`` over lines of ``14 = XIV``."""
    separator = rng.choice(SEPARATORS)
    lines = [f"{pair.text}{separator}{pair.answer}" for pair, _ in zip(pairs, range(rng.randint(3, 7)), strict=False)]
    return "\n".join([skill.rule[0].upper() + skill.rule[1:], *lines])


def drill(rng: Random, lexicon: list[str]) -> str:
    """Random words said twice: the fastest way for a small model to learn to copy."""
    said = " ".join(rng.choices(lexicon, k=rng.randint(5, 25)))
    return f"{said}\n{said}"


def acknowledge(message: str) -> str:
    """What the assistant of the base model answers to any message that is not small talk."""
    return f'You {"asked" if message.endswith("?") else "said"}: "{message}" My adapters know more.'


def chat(rng: Random, pairs: list[Iterator[Pair]], paragraphs: list[str]) -> list[Message]:
    """One to three turns of small talk and acknowledged messages, sometimes after a system message."""
    messages: list[Message] = []
    if rng.random() < 0.1:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        dice = rng.random()
        if dice < 0.05:
            message, reply = rng.choice(list(GREETINGS.items()))
        else:
            message = next(rng.choice(pairs)).question if dice < 0.92 else rng.choice(paragraphs)[:80].strip()
            reply = acknowledge(message)
        messages += [{"role": "user", "content": message}, {"role": "assistant", "content": reply}]
    return messages


def documents(seed: int) -> Iterator[Document]:
    """Endless training documents; the same seed gives the same documents (on the same Python version)."""
    rng = Random(f"corpus/{seed}")
    paragraphs = python_paragraphs()
    skills = [skill for skill in SKILLS.values() if not skill.material]
    pairs = {skill.name: stream(skill, "train", seed + 1) for skill in skills}
    lexicon = sorted({word for text in paragraphs for word in text.split() if word.isalpha()})[::7]
    lexicon += [*words.FIRST_NAMES, *words.LAST_NAMES, *words.CITIES, *words.TABLES, *words.ITEMS]
    lexicon += [str(number) for number in range(1, 100)]
    for count in itertools.count():
        if rng.random() < max(0.08, 0.4 - count / 8000):  # many drills first: copying is the slowest thing to learn
            yield drill(rng, lexicon)
            continue
        dice = rng.random()
        if dice < 0.1:
            yield rng.choice(paragraphs)
        elif dice < 0.55:
            skill = rng.choice(skills)
            yield glossary(rng, skill, pairs[skill.name])
        else:
            yield chat(rng, list(pairs.values()), paragraphs)
