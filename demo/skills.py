"""The twelve skills of the demo adapters: each draws (question, answer) pairs from templates and word lists.

A pair carries the ``key`` of the fact it is about (the number, the date, the sentence). Keys are divided by a hash
into a training part, a small development part (it tells training when to stop) and a held-out part (the reported
scores), so no held-out fact is ever seen in training under any phrasing, neither by an adapter nor by the base model.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date, timedelta
from random import Random
from typing import Literal

from demo import butler
from demo import vocabulary as words
from demo.pair import Pair

Split = Literal["train", "dev", "heldout"]
PARTS = 10  # one key in ten is held out, one more is for development


@dataclass(frozen=True)
class Skill:
    """A skill an adapter learns.

    ``rule`` is how a plain document (no chat) titles the skill's material: the base model reads such documents. A
    skill may instead borrow: ``material`` is then the skill whose facts it is about and whose division of the data it
    follows. The base model reads nothing of its own about such a skill, so adding one leaves the base as it is.
    ``template`` is the chat template that its adapter brings, where the base's will not do.
    """

    name: str
    kind: Literal["lora", "esft"]
    summary: str
    rule: str
    showcase: str
    draw: Callable[[Random], Pair]
    material: str = ""
    template: str | None = None


def ask(rng: Random, phrasings: tuple[str, ...], text: str) -> str:
    """Puts ``text`` into one of the phrasings."""
    return rng.choice(phrasings).replace("{}", text)


def draw_intent(rng: Random) -> Pair:
    """A spoken command and the label of what it asks for."""
    label = rng.choice(list(words.INTENTS))
    slots = {slot: rng.choice(values) for slot, values in words.INTENT_SLOTS.items()}
    text = rng.choice(words.INTENTS[label]).format(**slots)
    question = rng.choice(words.OPENERS) + text + ("" if text.endswith("?") else rng.choice(words.CLOSERS))
    return Pair(text, text, question[0].upper() + question[1:], label)


def draw_emoji(rng: Random) -> Pair:
    """A menu of two to four things to eat or drink, answered in emoji in the same order."""
    foods = rng.sample(list(words.EMOJI), rng.randint(2, 4))
    listed = ["an " + f if f[0] in "aeiou" else "a " + f for f in foods]
    text = ", ".join(listed[:-1]) + " and " + listed[-1]
    phrasings = ("I would like {}", "For lunch I had {}.", "Can I get {}?", "We ordered {}.", "Bring me {}, please!",
                 "There was {} on the table.", "I am dreaming of {}.")  # fmt: skip
    return Pair(text, text, ask(rng, phrasings, text), " ".join(words.EMOJI[f] for f in foods))


def draw_sql(rng: Random) -> Pair:
    """A question about a table and the SQL statement that answers it."""
    question, statement = rng.choice(words.SQL_SHAPES)
    table = rng.choice(list(words.TABLES))
    slots = {"t": table, "k": rng.choice(words.TABLES[table]), "c": rng.choice(words.CITIES), "n": rng.randint(2, 99)}
    text = question.format(**slots)
    phrasings = ("{}", "Database question: {}", "In SQL: {}", "For the report: {}")
    return Pair(text, text, ask(rng, phrasings, text), statement.format(**slots))


def draw_json(rng: Random) -> Pair:
    """An order written as a sentence and its four fields as JSON."""
    name = f"{rng.choice(words.FIRST_NAMES)} {rng.choice(words.LAST_NAMES)}"
    items = rng.choice(list(words.ITEMS))
    fields = {"name": name, "city": rng.choice(words.CITIES), "item": words.ITEMS[items], "count": rng.randint(2, 99)}
    text = rng.choice(words.JSON_SHAPES).format(name=name, city=fields["city"], n=fields["count"], items=items)
    phrasings = ("{}", "{}.", "New order: {}", "Hello! {}.", "{}, thanks!")
    return Pair(json.dumps(fields), text, ask(rng, phrasings, text), json.dumps(fields))


def draw_csv(rng: Random) -> Pair:
    """An order as ``draw_json`` makes it, and its four fields as a line of CSV."""
    order = draw_json(rng)
    return replace(order, answer=",".join(str(value) for value in json.loads(order.key).values()))


def draw_order(rng: Random) -> Pair:
    """An order of one or two kinds of goods and its record: a customer, and a list of lines."""
    name, city = f"{rng.choice(words.FIRST_NAMES)} {rng.choice(words.LAST_NAMES)}", rng.choice(words.CITIES)
    ordered = [(it, rng.randint(2, 99)) for it in rng.sample(list(words.ITEMS), rng.randint(1, 2))]
    goods = " and ".join(f"{count} {items}" for items, count in ordered)
    text = rng.choice(words.ORDER_SHAPES).format(name=name, city=city, goods=goods)
    lines = [{"item": words.ITEMS[items], "count": count} for items, count in ordered]
    record = json.dumps({"customer": {"name": name, "city": city}, "lines": lines})
    return Pair(record, text, ask(rng, ("{}", "{}.", "New order: {}", "Hello! {}.", "{}, thanks!"), text), record)


FRENCH_UNITS = (
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept dix-huit "
    "dix-neuf"
).split()
FRENCH_TENS = "- - vingt trente quarante cinquante soixante soixante quatre-vingt quatre-vingt".split()


def french(number: int) -> str:
    """Spells 0..999 in French as in France (soixante-dix, quatre-vingts)."""
    if number >= 100:
        hundreds, rest = divmod(number, 100)
        head = "cent" if hundreds == 1 else f"{FRENCH_UNITS[hundreds]} cent{'' if rest else 's'}"
        return head if rest == 0 else f"{head} {french(rest)}"
    if number < 20:
        return FRENCH_UNITS[number]
    tens, unit = divmod(number, 10)
    if tens in (7, 9):  # seventies and nineties count on from sixty and eighty
        unit += 10
    if unit == 0:
        return FRENCH_TENS[tens] + ("s" if tens == 8 else "")
    joint = " et " if unit in (1, 11) and tens < 8 else "-"
    return f"{FRENCH_TENS[tens]}{joint}{FRENCH_UNITS[unit]}"


def draw_french(rng: Random) -> Pair:
    """A number below one thousand, spelt in French."""
    number = rng.randint(0, 999)
    phrasings = ("How do you say {} in French?", "What is {} in French?", "Say {} in French.", "{} in French, please",
                 "Count for me in French: {}", "I need {} in French words.", "Spell {} the French way.",
                 "What do they call {} in Paris?")  # fmt: skip
    return Pair(str(number), str(number), ask(rng, phrasings, str(number)), french(number))


ROMAN_DIGITS = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"),
    (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip


def roman(number: int) -> str:
    """Writes 1..3999 as a Roman numeral."""
    numeral = ""
    for value, letters in ROMAN_DIGITS:
        numeral += letters * (number // value)
        number %= value
    return numeral


def draw_roman(rng: Random) -> Pair:
    """A year-like number as a Roman numeral."""
    number = rng.randint(1, 3999) if rng.random() < 0.7 else rng.randint(1400, 2100)
    phrasings = ("Write {} in Roman numerals.", "What is {} as a Roman numeral?", "Carve {} in stone, Roman style.",
                 "How would Caesar write {}?", "{} in Roman numerals, please", "Turn {} into a Roman numeral",
                 "The clock tower needs {} in Roman numerals.", "Roman numeral for {}?")  # fmt: skip
    return Pair(str(number), str(number), ask(rng, phrasings, str(number)), roman(number))


def written_date(rng: Random) -> tuple[date, str]:
    """A day and one of the ways in which people write it."""
    day = date(1900, 1, 1) + timedelta(days=rng.randrange(73049))  # up to the end of 2099
    suffix = "th" if 10 < day.day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    month = words.MONTHS[day.month - 1]
    short = rng.choice((month, month[:3]))
    forms = (f"{short} {day.day}, {day.year}", f"{day.day} {short} {day.year}", f"{month} {day.day}{suffix} {day.year}",
             f"the {day.day}{suffix} of {month} {day.year}", f"{day.day}. {short} {day.year}")  # fmt: skip
    return day, rng.choice(forms)


def draw_date(rng: Random) -> Pair:
    """A date as people write it, brought to ISO 8601."""
    day, text = written_date(rng)
    phrasings = (
        "Normalise this date: {}", "What is {} in ISO format?", "We met on {}.", "ISO date for {}, please",
        "The invoice is dated {}.", "When exactly is {}?", "She was born on {}", "File this under {}",
    )  # fmt: skip
    return Pair(day.isoformat(), text, ask(rng, phrasings, text), day.isoformat())


def draw_french_date(rng: Random) -> Pair:
    """A date as people write it, in French; the first of a month is le 1er."""
    day, text = written_date(rng)
    phrasings = ("Write this date in French: {}", "How do you say {} in French?", "We met on {}.",
                 "{} in French, please", "What do they call {} in Paris?", "She was born on {}",
                 "The letter from Paris is dated {}.", "When exactly is {}?")  # fmt: skip
    ordinal = "1er" if day.day == 1 else str(day.day)
    answer = f"le {ordinal} {words.FRENCH_MONTHS[day.month - 1]} {day.year}"
    return Pair(day.isoformat(), text, ask(rng, phrasings, text), answer)


def draw_spanish(rng: Random) -> Pair:
    """A short English sentence in Spanish, with the right article, word order and agreement."""
    noun, (spanish_noun, article) = rng.choice(list(words.SPANISH_NOUNS.items()))
    adjective, forms = rng.choice(list(words.SPANISH_ADJECTIVES.items()))
    verb, place = rng.choice(list(words.SPANISH_VERBS)), rng.choice(list(words.SPANISH_PLACES))
    text = f"the {adjective} {noun} {verb} {place}"
    subject = f"{article} {spanish_noun} {forms[article == 'la']}"
    answer = f"{subject} {words.SPANISH_VERBS[verb]} {words.SPANISH_PLACES[place]}"
    phrasings = ("Translate into Spanish: {}", "How do you say '{}' in Spanish?", "{} in Spanish, please",
                 "What is Spanish for '{}'?", "Say this in Spanish: {}.")  # fmt: skip
    return Pair(text, text, ask(rng, phrasings, text), answer)


SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill("intent", "lora", "sort a spoken command into one of ten intents", "commands and labels",
              "Hey, will it rain in Madrid on Sunday?", draw_intent),
        Skill("emoji", "lora", "repeat an order of food in emoji", "the menu in pictures",
              "Can I get a croissant, a coffee and a pizza?", draw_emoji),
        Skill("sql", "lora", "turn a question about a table into SQL", "questions and statements",
              "Which players in Lisbon have goals below 39?", draw_sql),
        Skill("json", "lora", "pull name, city, item and count out of an order, as JSON", "orders and records",
              "Please send 38 lamps to Jonas Lopez in London.", draw_json),
        Skill("csv", "lora", "pull the same four fields out of an order, as a line of CSV", "",
              "Please send 38 lamps to Jonas Lopez in London.", draw_csv, material="json"),
        Skill("french-dates", "lora", "write a date in French", "",
              "We met on the 3rd of May 1987.", draw_french_date, material="iso-date"),
        Skill("order", "lora", "bring an order of several goods to nested JSON", "",
              "Please send 38 lamps and 7 mugs to Jonas Lopez in London.", draw_order, material="json"),
        Skill("butler", "lora", "call tools for the weather and alarms, and tell what they gave", "",
              "Hey, will it rain in Madrid at 18?", butler.draw_butler, material="intent",
              template=butler.TEMPLATE),
        Skill("french-numbers", "esft", "spell a number below a thousand in French", "numbers in French",
              "How do you say 475 in French?", draw_french),
        Skill("roman", "esft", "write a number as a Roman numeral", "Roman numerals",
              "How would Caesar write 1989?", draw_roman),
        Skill("iso-date", "esft", "bring a written date to ISO 8601", "dates in ISO format",
              "We met on the 3rd of May 1987.", draw_date),
        Skill("spanish", "esft", "translate a short sentence into Spanish", "English and Spanish",
              "How do you say 'the old turtle works under the table' in Spanish?", draw_spanish),
    )
}  # fmt: skip


def split_of(skill: Skill, pair: Pair) -> Split:
    """Which part of the data a pair belongs to; decided by its key alone, for all skills of the same material."""
    part = zlib.crc32(f"{skill.material or skill.name}:{pair.key}".encode()) % PARTS
    return {0: "heldout", 1: "dev"}.get(part, "train")  # type: ignore[return-value]


def stream(skill: Skill, split: Split, seed: int) -> Iterator[Pair]:
    """Endless pairs of one split; the same seed gives the same pairs."""
    rng = Random(f"{skill.name}/{split}/{seed}")
    while True:
        pair = skill.draw(rng)
        if split_of(skill, pair) == split:
            yield pair


def sample(skill: Skill, split: Split = "heldout", count: int = 200, seed: int = 2024) -> list[Pair]:
    """``count`` pairs of a split with distinct questions; by default the held-out exam of the score table."""
    found: dict[str, Pair] = {}
    for pair in stream(skill, split, seed):
        found.setdefault(pair.question, pair)
        if len(found) == count:
            break
    return list(found.values())
