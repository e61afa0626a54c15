"""Adapters in memory: experts at fixed virtual addresses, pages only under those in use; LoRA slabs at their ranks."""

from docs.pictures.drawing import WIDTH, Picture

M, E_MAX = 6, 6  # of this drawing; the demo has 16 and 16
LEFT, CELL = 30, 45.5
PAGE = CELL / 1.5  # an expert of a page and a half
# slot -> (name, how it is drawn, the experts that it tunes)
TUNED = {1: ("roman", "two", (1, 4)), 2: ("spanish", "one", (0, 2, 4))}
# name, ranks in words, ranks of its first linears
SLABS = (
    ("intent", "rank 4", (4, 4, 4, 4)),
    ("emoji", "rank 8", (8, 8, 8, 8)),
    ("sql", "ranks 16 and 8", (16, 8, 16, 16)),
    ("json", "rank 32", (32, 32, 32, 32)),
)


def draw() -> Picture:
    picture = Picture(
        700,
        "Two ESFT adapters and four LoRA adapters in memory",
        "The experts of one layer lie in one range of virtual addresses: the base's first, then a range of equal size "
        "for each adapter slot. Pages of memory are mapped only under the base's and the tuned experts. A map with a "
        "row for each slot sends the expert ids that the router chose to places in that range. LoRA adapters lie in "
        "slabs beside it, each as large as its own rank needs.",
    )
    _arena(picture)
    _map(picture)
    _slabs(picture)
    return picture


def place(slot: int, expert: int) -> int:
    """Where a token of this slot's adapter finds an expert."""
    tuned = TUNED[slot][2] if slot else ()
    return M + (slot - 1) * E_MAX + tuned.index(expert) if expert in tuned else expert


def _x(at: int) -> float:
    return LEFT + CELL * at


def _arena(picture: Picture) -> None:
    picture.text(24, 34, "The experts of one layer: one range of virtual addresses", "bold", 17)
    picture.lines(24, 58, [
        "M base experts, then E_max places for each adapter slot (here M = E_max = 6). roman tunes experts 1 and 4,",
        "spanish 0, 2 and 4. Addresses never move; a place without a page costs nothing.",
    ], "dim", 13)  # fmt: skip
    headings = ["base"] + [f"slot {slot}: {name}" for slot, (name, _, _) in TUNED.items()]
    for index, heading in enumerate(headings):
        start, end = _x(index * M), _x(index * M + M)
        picture.text((start + end) / 2, 108, heading, "bold", 13, "middle")
        picture.line("line", (start + 2, 122), (start + 2, 116), (end - 2, 116), (end - 2, 122))
    for at in range(M + len(TUNED) * E_MAX):
        picture.text(_x(at) + CELL / 2, 138, str(at), "mono dim", 12, "middle")
        picture.box("free", _x(at), 144, CELL, 44, 0)
    for expert in range(M):
        _expert(picture, "base", expert, expert)
    for slot, (_, kind, experts) in TUNED.items():
        for expert in experts:
            _expert(picture, kind, place(slot, expert), expert)

    _pages(picture, "base", 0, M)
    for slot, (_, kind, experts) in TUNED.items():
        _pages(picture, kind, M + (slot - 1) * E_MAX, len(experts))
    picture.text(LEFT, 240, "pages of memory: 4 KiB on the CPU, 2 MiB on a GPU", "dim", 13)
    picture.text(_x(M + 2) + 10, 211, "nothing mapped", "dim", 13)
    last = _x(M + E_MAX) + 4.5 * PAGE
    picture.line("line", (last + 8, 228), (last + 8, 216), arrow=True)
    picture.text(WIDTH - 30, 240, "lost is only the rest of the last page", "dim", 13, "end")


def _expert(picture: Picture, kind: str, at: int, expert: int) -> None:
    picture.box(kind, _x(at), 144, CELL, 44, 0)
    picture.text(_x(at) + CELL / 2, 171, f"e{expert}", "bold", 14, "middle")


def _pages(picture: Picture, kind: str, first: int, count: int) -> None:
    """As many as it takes, from the page at which the range begins."""
    for page in range(-(-count * 3 // 2)):
        picture.box(kind, _x(first) + page * PAGE + 1, 198, PAGE - 2, 16, 2)


def _map(picture: Picture) -> None:
    picture.line("grid", (24, 262), (WIDTH - 24, 262))
    picture.text(24, 294, "The expert map: from the router's choice to a place", "bold", 17)
    picture.lines(24, 318, [
        "One row for each slot. The router chooses among the base's ids for everybody; the row of the token's adapter",
        "says where that expert lies for it. Row 0, the base's, changes nothing.",
    ], "dim", 13)  # fmt: skip
    left, top, width, height = 190, 368, 54, 32
    picture.text(left - 12, top + 2, "router's choice", "dim", 13, "end")
    for expert in range(M):
        picture.text(left + expert * width + width / 2, top + 2, f"e{expert}", "bold", 13, "middle")
    for slot in range(len(TUNED) + 1):
        name, kind, _ = TUNED.get(slot, ("base", "base", ()))
        y = top + 12 + slot * height
        picture.text(left - 12, y + 21, f"row {slot}: {name}", "", 13, "end")
        for expert in range(M):
            at = place(slot, expert)
            picture.box("inner" if at == expert else kind, left + expert * width, y, width, height, 0)
            picture.text(left + expert * width + width / 2, y + 21, str(at), "mono", 14, "middle")
    middle = top + 12 + height * 1.5
    picture.lines(560, middle - 16, [
        "A token of roman for which the",
        "router chose e3 and e4 uses places",
        f"{place(1, 3)} (the base's e3) and {place(1, 4)} (roman's e4).",
    ], "", 13)  # fmt: skip
    picture.line("line", (546, middle), (left + M * width + 8, middle), arrow=True)


def _slabs(picture: Picture) -> None:
    picture.line("grid", (24, 500), (WIDTH - 24, 500))
    picture.text(24, 532, "LoRA slabs: each adapter at its true rank", "bold", 17)
    picture.lines(24, 556, [
        "A and B of all its linears, one behind the other. Nothing is padded to the largest rank in the batch. Slabs",
        "and experts draw their pages from one budget, which KV blocks share; what was unused longest makes room.",
    ], "dim", 13)  # fmt: skip
    unit = 0.75  # pixels of an A or a B for one of its rank
    room = (WIDTH - 2 * LEFT - 3 * 12) / 4
    for index, (name, says, ranks) in enumerate(SLABS):
        x: float = LEFT + index * (room + 12)
        picture.text(x, 606, f"slot {index + 3}: {name}, {says}", "bold", 13)
        picture.box("free", x, 616, room, 34, 0)
        for rank in ranks:
            picture.box("three", x, 616, rank * unit, 34, 0)
            picture.box("base", x + rank * unit, 616, rank * unit, 34, 0)
            x += 2 * rank * unit
    picture.box("three", LEFT, 666, 14, 14, 2)
    picture.text(LEFT + 20, 678, "A of a linear", "dim", 13)
    picture.box("base", LEFT + 130, 666, 14, 14, 2)
    picture.text(LEFT + 150, 678, "its B", "dim", 13)
    picture.text(LEFT + 210, 678, "width stands for rank; dashed: addresses without pages", "dim", 13)
