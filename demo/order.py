"""The schema that the adapter `order` is shown with (benchmarks/structured.py measures what it is worth)."""

from __future__ import annotations

from typing import Any

from demo import vocabulary as words

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "customer": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "city": {"enum": words.CITIES}},
            "required": ["name", "city"],
            "additionalProperties": False,
        },
        "lines": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "item": {"enum": list(words.ITEMS.values())},
                    "count": {"type": "integer", "minimum": 1, "maximum": 99},
                },
                "required": ["item", "count"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["customer", "lines"],
    "additionalProperties": False,
}
