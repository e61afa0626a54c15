"""Random JSON Schemas of what is served, and random values that nearly fit them: the same for the same seed."""

from random import Random
from typing import Any

Schema = dict[str, Any] | bool
_NAMES = ("a", "b", "name", "value", "x y", "é", '"')
_TEXTS = ("", "a", "ab", "abc", "b", "é", "😀", "0", "true", 'a"b', "line\nbreak", "x" * 12)
_NUMBERS = (0, 1, -1, 2, 3, 7, 10, 100, -5, 0.5, 1.5, -2.25, 1e3, 12345.678)
_PATTERNS = ("^a", "b$", "^[a-c]*$", "^.{2,4}$", "[0-9]", "^(a|bc)+$", r"^\S+$", r"\d{2}")


def schemas(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = Random(seed)
    return [_Maker(rng).whole() for _ in range(count)]


class _Maker:
    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._defs: dict[str, Schema] = {}

    def whole(self) -> dict[str, Any]:
        num_defs = self._rng.choice((0, 0, 1, 2))
        self._defs = {f"d{index}": True for index in range(num_defs)}
        made = self._schema(3)
        whole = dict(made) if isinstance(made, dict) else {}
        if self._defs:
            whole["$defs"] = {name: self._schema(2) for name in self._defs}
        return whole

    def _schema(self, depth: int) -> Schema:
        rng = self._rng
        if rng.random() < 0.04:
            return True
        kinds = ["string", "number", "integer", "const", "enum", "plain"]
        if depth > 0:
            kinds += ["object", "object", "object", "array", "array", "anyOf", "oneOf", "allOf", "beside", "types"]
            kinds += ["ref"] * bool(self._defs)
        kind = rng.choice(kinds)
        made: dict[str, Any] = getattr(self, f"_{kind}")(depth)
        if rng.random() < 0.1:
            made["description"] = "about it"
        items = list(made.items())
        if rng.random() < 0.5:
            rng.shuffle(items)
        return dict(items)

    def _plain(self, depth: int) -> dict[str, Any]:
        return {"type": self._rng.choice(("null", "boolean"))}

    def _string(self, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {"type": "string"}
        low = self._rng.randint(0, 3)
        if self._rng.random() < 0.4:
            made["minLength"] = low
        if self._rng.random() < 0.4:
            made["maxLength"] = low + self._rng.randint(0, 5)
        elif self._rng.random() < 0.4:
            made = {"type": "string", "pattern": self._rng.choice(_PATTERNS)}
        return made

    def _number(self, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {"type": "number"}
        low = self._rng.choice((-10, -2.5, 0, 0.5, 3))
        if self._rng.random() < 0.5:
            made[self._rng.choice(("minimum", "exclusiveMinimum"))] = low
        if self._rng.random() < 0.5:
            made[self._rng.choice(("maximum", "exclusiveMaximum"))] = low + self._rng.choice((1, 2.75, 100))
        return made

    def _integer(self, depth: int) -> dict[str, Any]:
        made = self._number(depth) | {"type": "integer"}
        if self._rng.random() < 0.3:
            made["multipleOf"] = self._rng.choice((1, 2, 3, 10))
        return made

    def _const(self, depth: int) -> dict[str, Any]:
        return {"const": self.value(1)}

    def _enum(self, depth: int) -> dict[str, Any]:
        return {"enum": [self.value(1) for _ in range(self._rng.randint(1, 4))]}

    def _types(self, depth: int) -> dict[str, Any]:
        kinds = self._rng.sample(("string", "integer", "object", "array", "null", "boolean"), 2)
        made = {**self._object(depth), **self._string(depth)}
        return made | {"type": kinds}

    def _object(self, depth: int) -> dict[str, Any]:
        rng = self._rng
        names = rng.sample(_NAMES, rng.randint(0, 3))
        made: dict[str, Any] = {"type": "object", "properties": {name: self._schema(depth - 1) for name in names}}
        if rng.random() < 0.7:
            made["required"] = [name for name in names if rng.random() < 0.6]
            if rng.random() < 0.15:
                made["required"].append("more")
        if rng.random() < 0.5:
            made["additionalProperties"] = False if rng.random() < 0.6 else self._schema(depth - 1)
        if rng.random() < 0.15:
            made["patternProperties"] = {"^p_": self._schema(depth - 1)}
        if rng.random() < 0.15:
            made["minProperties"] = 1
        if rng.random() < 0.1:
            made["maxProperties"] = len(names) + 1
        return made

    def _array(self, depth: int) -> dict[str, Any]:
        rng = self._rng
        made: dict[str, Any] = {"type": "array"}
        if rng.random() < 0.3:
            made["prefixItems"] = [self._schema(depth - 1) for _ in range(rng.randint(1, 2))]
        if rng.random() < 0.7:
            made["items"] = self._schema(depth - 1) if rng.random() < 0.8 else False
        low = rng.randint(0, 2)
        if rng.random() < 0.4:
            made["minItems"] = low
        if rng.random() < 0.5:
            made["maxItems"] = low + rng.randint(0, 2)
        return made

    def _anyOf(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._schema(depth - 1) for _ in range(self._rng.randint(1, 3))]}

    def _oneOf(self, depth: int) -> dict[str, Any]:
        return {"oneOf": [self._schema(depth - 1) for _ in range(self._rng.randint(1, 3))]}

    def _allOf(self, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {"allOf": [self._object(depth - 1) for _ in range(2)]}
        return made

    def _beside(self, depth: int) -> dict[str, Any]:
        """Applicators with other keywords around them."""
        made = {**self._object(depth - 1), **self._rng.choice((self._anyOf, self._allOf, self._oneOf))(depth)}
        return made | ({"$ref": self._reference()} if self._defs and self._rng.random() < 0.3 else {})

    def _ref(self, depth: int) -> dict[str, Any]:
        return {"$ref": self._reference()}

    def _reference(self) -> str:
        return f"#/$defs/{self._rng.choice(list(self._defs))}"

    def value(self, depth: int) -> Any:
        rng = self._rng
        kind = rng.choice(("text", "text", "number", "number", "list", "object", None, True, False))
        if kind == "text":
            return rng.choice(_TEXTS)
        if kind == "number":
            return rng.choice(_NUMBERS)
        if kind == "list":
            return [self.value(depth - 1) for _ in range(rng.randint(0, 3) if depth > 0 else 0)]
        if kind == "object":
            names = rng.sample((*_NAMES, "more", "p_q"), rng.randint(0, 3) if depth > 0 else 0)
            return {name: self.value(depth - 1) for name in names}
        return kind


def values_for(schema: Any, rng: Random, count: int) -> list[Any]:
    """Of which some follow the schema: made along its properties, in their order, with what its bounds suggest."""
    return [_value_for(schema, schema, rng, 4) for _ in range(count)]


def _value_for(schema: Any, whole: Any, rng: Random, depth: int) -> Any:
    if not isinstance(schema, dict) or depth == 0 or rng.random() < 0.05:
        return _Maker(rng).value(2)
    if "$ref" in schema:
        meant = whole["$defs"][schema["$ref"].rpartition("/")[2]]
        rest = {key: it for key, it in schema.items() if key != "$ref"}
        schema = {**meant, **rest} if isinstance(meant, dict) else rest
        if "$ref" in schema:
            return _Maker(rng).value(1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema and (len(schema) == 1 or rng.random() < 0.7):
            chosen = rng.choice(schema[key])
            return _value_for(_merged(schema, chosen), whole, rng, depth - 1)
    kind = schema.get("type", "object" if "properties" in schema else None)
    if isinstance(kind, list):
        kind = rng.choice(kind)
    if kind == "object":
        return _object_for(schema, whole, rng, depth)
    if kind == "array":
        first = schema.get("prefixItems", [])
        count = rng.randint(schema.get("minItems", 0), schema.get("maxItems", 3))
        return [_value_for(first[i] if i < len(first) else schema.get("items", True), whole, rng, depth - 1)
                for i in range(count)]  # fmt: skip
    if kind == "string":
        size = rng.randint(max(0, schema.get("minLength", 0) - 1), schema.get("maxLength", 5) + 1)
        return "".join(rng.choice("abc0é😀") for _ in range(size))
    if kind in ("number", "integer"):
        around = [
            schema[key] for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if key in schema
        ]
        number = rng.choice([*around, *_NUMBERS]) + rng.choice((0, 0, 1, -1, 0.5))
        return int(number) if float(number).is_integer() else number
    return {"null": None, "boolean": rng.random() < 0.5}.get(str(kind), _Maker(rng).value(1))


def _merged(schema: dict[str, Any], chosen: Any) -> Any:
    if not isinstance(chosen, dict):
        return {key: it for key, it in schema.items() if key not in ("anyOf", "oneOf", "allOf")}
    rest = {key: it for key, it in schema.items() if key not in ("anyOf", "oneOf", "allOf")}
    merged = {**rest, **chosen}
    if "properties" in rest and "properties" in chosen:
        merged["properties"] = {**rest["properties"], **chosen["properties"]}
    return merged


def _object_for(schema: dict[str, Any], whole: Any, rng: Random, depth: int) -> Any:
    required = schema.get("required", ())
    made = {
        name: _value_for(below, whole, rng, depth - 1)
        for name, below in schema.get("properties", {}).items()
        if rng.random() < (0.95 if name in required else 0.5)
    }
    for name in required:
        if name not in made and rng.random() < 0.9:
            made[name] = _value_for(schema.get("additionalProperties", True), whole, rng, depth - 1)
    if rng.random() < 0.2:
        name = rng.choice(("more", "p_q", "a"))
        below = schema.get("patternProperties", {}).get("^p_", True) if name == "p_q" else True
        made.setdefault(name, _value_for(schema.get("additionalProperties", below), whole, rng, depth - 1))
    return made
