"""Two processes with messages between them, and the path of each token through one step of a mixed batch."""

from docs.pictures.drawing import WIDTH, Picture

LANE, FIRST_LANE = 38, 402
# a token: what it belongs to, how it is drawn, whether a next token is sampled from it
TOKENS = (
    ("base", "base", True),
    ("sql", "one", True),
    ("roman", "two", True),
    ("emoji", "three", False),
    ("emoji", "three", False),
    ("emoji", "three", True),
)


def draw() -> Picture:
    picture = Picture(
        700,
        "Two processes, and one step of a mixed batch",
        "The front process speaks HTTP, turns text into tokens and knows the adapters by name. The engine process "
        "schedules, keeps adapters in memory and computes. In one step all tokens go through the same base weights; a "
        "token of a LoRA adapter adds that adapter's low-rank product, a token of an ESFT adapter goes through the "
        "experts which that adapter tuned.",
    )
    _processes(picture)
    _step(picture)
    return picture


def _processes(picture: Picture) -> None:
    picture.text(24, 34, "Two processes", "bold", 17)
    picture.text(24, 74, "clients", "bold", 15)
    picture.lines(24, 98, ["model: base", "model: sql", "model: roman", "model: emoji"], "mono dim", 12)
    picture.line("line", (112, 118), (140, 118), arrow=True)
    picture.text(24, 194, "answers", "dim", 13)
    picture.line("line", (140, 190), (112, 190), arrow=True)

    picture.box("panel", 144, 50, 216, 206, 8)
    picture.text(156, 74, "front process", "bold", 15)
    picture.text(350, 74, "no torch", "dim", 13, "end")
    _parts(picture, 156, 192, ("HTTP", "parse, refuse, stream"), ("tokenizer", "text to ids and back"),
           ("catalogue", "adapter names"))  # fmt: skip

    picture.lines(462, 68, ["typed messages", "over one local socket"], "dim", 13, "middle")
    for index, name in enumerate(("AddRequest, Abort", "AddAdapter, RemoveAdapter")):
        picture.text(462, 116 + 36 * index, name, "mono", 12, "middle")
        picture.line("line", (366, 124 + 36 * index), (558, 124 + 36 * index), arrow=True)
    for index, name in enumerate(("StepDone: tokens, ends", "Progress, Ready")):
        picture.text(462, 198 + 36 * index, name, "mono", 12, "middle")
        picture.line("line", (558, 206 + 36 * index), (366, 206 + 36 * index), arrow=True)

    picture.box("panel", 564, 50, 292, 206, 8)
    picture.text(576, 74, "engine process", "bold", 15)
    picture.text(846, 74, "one loop, torch", "dim", 13, "end")
    _parts(picture, 576, 268, ("scheduler", "which tokens run in this step"),
           ("residency", "which adapters are in memory"), ("runner", "computes the step, samples"))  # fmt: skip


def _parts(picture: Picture, x: float, width: float, *parts: tuple[str, str]) -> None:
    for index, (name, does) in enumerate(parts):
        picture.box("inner", x, 88 + 54 * index, width, 46)
        picture.text(x + 10, 107 + 54 * index, name, "bold", 13)
        picture.text(x + 10, 125 + 54 * index, does, "dim", 13)


def _step(picture: Picture) -> None:
    bottom = FIRST_LANE + LANE * len(TOKENS)
    picture.line("grid", (24, 280), (WIDTH - 24, 280))
    picture.text(24, 312, "One step of a mixed batch", "bold", 17)
    picture.text(24, 334, "All tokens go through a layer together; what it adds or exchanges depends on each "
                 "token's adapter.", "dim", 14)  # fmt: skip
    columns = (  # x, width, heading
        (196, 74, ["linears", "q, k, v"]), (292, 96, ["low-rank", "product"]), (410, 84, ["attention"]),
        (530, 74, ["router"]), (646, 122, ["experts"]),
    )  # fmt: skip
    for x, width, heading in columns:
        picture.lines(x + width / 2, 378 - 18 * (len(heading) - 1), heading, "bold", 13, "middle")
    picture.text(110, 378, "token of", "bold", 13, "middle")
    picture.text(820, 378, "next token", "bold", 13, "middle")

    for index, (_, kind, samples) in enumerate(TOKENS):  # the lanes, below all else
        y = _lane(index)
        picture.line(_line(kind), (164, y), (768, y))
        if samples:
            picture.line(_line(kind), (768, y), (796, y), arrow=True)

    for x, width, says in ((196, 74, "W"), (410, 84, ""), (530, 74, "")):
        picture.box("base", x, FIRST_LANE - 8, width, bottom - FIRST_LANE + 8)
        picture.text(x + width / 2, FIRST_LANE + 118, says, "bold", 17, "middle")
    picture.lines(452, FIRST_LANE + 88, ["each over", "the keys of", "its own", "request"], "", 13, "middle")
    picture.lines(567, FIRST_LANE + 97, ["chooses", "experts", "by id"], "", 13, "middle")
    picture.text(233, FIRST_LANE + 136, "once for all", "", 12, "middle")

    _labels(picture)
    _deltas(picture)
    _experts(picture, bottom)
    for index, (_, kind, samples) in enumerate(TOKENS):
        if samples:
            picture.box(kind, 800, _lane(index) - 11, 40, 22)
    picture.lines(24, bottom + 28, [
        "Base, sql and roman decode a token each; emoji's prompt is computed beside them, and only its last token is",
        "sampled from. The map sends an expert that roman tuned to roman's copy, by the adapter of each token.",
    ], "dim", 13)  # fmt: skip


def _labels(picture: Picture) -> None:
    kinds = {"base": "base", "sql": "sql (LoRA)", "roman": "roman (ESFT)"}
    for index, (name, kind, _) in enumerate(TOKENS):
        picture.box(kind, 140, _lane(index) - 11, 24, 22)
        if name in kinds:
            picture.text(130, _lane(index) + 5, kinds[name], "", 13, "end")
    picture.lines(130, _lane(4) - 5, ["emoji (LoRA)", "a prompt's piece"], "", 13, "end")


def _deltas(picture: Picture) -> None:
    picture.box("one", 292, _lane(1) - 17, 96, 34)
    picture.lines(340, _lane(1) - 3, ["+ s·B(Ax)", "rank 16"], "", 12, "middle")
    picture.box("three", 292, _lane(3) - 17, 96, 34 + 2 * LANE)
    picture.lines(340, _lane(4) - 2, ["+ s·B(Ax)", "rank 8"], "", 12, "middle")


def _experts(picture: Picture, bottom: float) -> None:
    picture.box("base", 646, FIRST_LANE - 8, 122, bottom - FIRST_LANE + 8)
    picture.text(707, _lane(0) + 5, "base's experts", "", 13, "middle")
    picture.text(707, _lane(1) + 5, "base's experts", "", 13, "middle")
    picture.box("two", 652, _lane(2) - 17, 110, 34)
    picture.lines(707, _lane(2) - 3, ["tuned by roman,", "else the base's"], "", 12, "middle")
    picture.text(707, _lane(4) + 5, "base's experts", "", 13, "middle")
    picture.lines(625, _lane(2) - 12, ["map"], "dim", 12, "middle")


def _lane(index: int) -> float:
    return FIRST_LANE + LANE * (index + 0.5) - 4


def _line(kind: str) -> str:
    return "line" if kind == "base" else f"line-{kind}"
