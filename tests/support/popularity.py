"""How the requests of a batch may spread over adapters."""

import random

POPULARITIES = ("distinct", "uniform", "zipf", "identical", "skewed")


def pick(popularity: str, count: int, choices: int, rng: random.Random) -> list[int]:
    """`count` adapters out of 0..choices-1, as a batch may ask for them."""
    match popularity:
        case "distinct":
            return [index % choices for index in range(count)]
        case "uniform":
            return [rng.randrange(choices) for _ in range(count)]
        case "zipf":
            return rng.choices(range(choices), [1 / (1 + index) ** 1.5 for index in range(choices)], k=count)
        case "identical":
            return [choices - 1] * count
        case _:  # one takes nearly all
            return [0 if rng.random() < 0.95 else rng.randrange(choices) for _ in range(count)]
