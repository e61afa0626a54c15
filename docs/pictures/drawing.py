"""A small SVG canvas. The same calls always make the same bytes.

A picture brings a background of its own, and follows the reader's light or dark scheme by a media query: it can be read
whatever is behind it. Sizes are in pixels at 880, about the width of a README; no text is smaller than 12.
"""

from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

WIDTH = 880
FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

# class -> (light, dark); the three hues of adapters differ in lightness too, and every use of them is labelled
FILLS = {
    "paper": ("#ffffff", "#0d1117"), "panel": ("#f6f8fa", "#161b22"), "inner": ("#ffffff", "#0d1117"),
    "base": ("#d8dee4", "#3d444d"), "one": ("#b6d9fb", "#14508f"), "two": ("#ffd8a8", "#7a4410"),
    "three": ("#bfe5c4", "#1d5f2c"), "text": ("#1f2328", "#f0f6fc"), "dim": ("#59636e", "#9da7b1"),
    "dot": ("#0969da", "#58a6ff"),
}  # fmt: skip
STROKES = {
    "paper": ("#d1d9e0", "#3d444d"), "panel": ("#afb8c1", "#545d68"), "inner": ("#afb8c1", "#545d68"),
    "base": ("#818b98", "#818b98"), "one": ("#0969da", "#58a6ff"), "two": ("#bc4c00", "#f0883e"),
    "three": ("#1a7f37", "#3fb950"), "free": ("#9aa4ae", "#6e7781"), "line": ("#59636e", "#9da7b1"),
    "grid": ("#dfe4e9", "#2a3038"), "curve": ("#0969da", "#58a6ff"),
    "line-one": ("#0969da", "#58a6ff"), "line-two": ("#bc4c00", "#f0883e"), "line-three": ("#1a7f37", "#3fb950"),
}  # fmt: skip


class Picture:
    def __init__(self, height: int, title: str, description: str) -> None:
        """`title` and `description` are for readers who do not see it."""
        self.height = height
        self._root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {height}",
                                     "width": str(WIDTH), "height": str(height), "role": "img"})  # fmt: skip
        SubElement(self._root, "title").text = title
        SubElement(self._root, "desc").text = description
        SubElement(self._root, "style").text = _styles()
        self._heads = SubElement(self._root, "defs")
        self._markers: set[str] = set()
        self.box("paper", 0.5, 0.5, WIDTH - 1, height - 1, radius=8)

    def box(self, kind: str, x: float, y: float, width: float, height: float, radius: float = 4) -> None:
        self._add("rect", {"class": kind}, x=x, y=y, width=width, height=height, rx=radius)

    def text(self, x: float, y: float, text: str, kind: str = "", size: int = 14, anchor: str = "start") -> None:
        """One line; `y` is its base line. Words of `kind`: dim, bold, mono."""
        named = {"class": f"text {kind}".strip(), "text-anchor": anchor, "font-size": str(size)}
        self._add("text", named, x=x, y=y).text = text

    def lines(
        self, x: float, y: float, texts: list[str], kind: str = "", size: int = 14, anchor: str = "start"
    ) -> None:
        for index, line in enumerate(texts):
            self.text(x, y + index * size * 1.35, line, kind, size, anchor)

    def line(self, kind: str, *points: tuple[float, float], arrow: bool = False, dashed: bool = False) -> None:
        more = {"stroke-dasharray": "4 3"} if dashed else {}
        if arrow:
            more["marker-end"] = f"url(#{self._head(kind)})"
        path = " L".join(f"{_number(x)} {_number(y)}" for x, y in points)
        self._add("path", {"class": f"stroke {kind}", "d": f"M{path}"} | more)

    def dot(self, x: float, y: float, radius: float = 4) -> None:
        self._add("circle", {"class": "dot"}, cx=x, cy=y, r=radius)

    def svg(self) -> str:
        ElementTree.indent(self._root, " ")
        return ElementTree.tostring(self._root, encoding="unicode") + "\n"

    def _add(self, tag: str, named: dict[str, str], **numbers: float) -> Element:
        return SubElement(self._root, tag, named | {name: _number(value) for name, value in numbers.items()})

    def _head(self, kind: str) -> str:
        """The id of an arrow's head in the colour of `kind`."""
        name = f"head-{kind}"
        if name not in self._markers:
            self._markers.add(name)
            marker = SubElement(self._heads, "marker", {"id": name, "viewBox": "0 0 8 8", "refX": "7", "refY": "4",
                                "markerWidth": "7", "markerHeight": "7", "orient": "auto"})  # fmt: skip
            SubElement(marker, "path", {"class": f"fill-{kind}", "d": "M0 0 L8 4 L0 8 z"})
        return name


def write(name: str, picture: Picture) -> None:
    (Path(__file__).parent / name).write_text(picture.svg(), encoding="utf-8")


def _styles() -> str:
    general = (
        f"text {{ font-family: {FONT} }} .mono {{ font-family: {MONO} }} .bold {{ font-weight: 600 }} "
        ".stroke { fill: none; stroke-width: 1.5 } .grid { stroke-width: 1 } .curve { stroke-width: 2.5 } "
        ".free { fill: none; stroke-dasharray: 3 3 } .base, .one, .two, .three { stroke-width: 1.2 }"
    )
    return f"{general}\n{_scheme(0)}\n@media (prefers-color-scheme: dark) {{ {_scheme(1)} }}"


def _scheme(index: int) -> str:
    rules = [f".{name} {{ fill: {pair[index]} }}" for name, pair in FILLS.items()]
    rules += [f".{name} {{ stroke: {pair[index]} }}" for name, pair in STROKES.items()]
    # text may be dim and is never outlined; an arrow's head has its line's colour
    rules += [f".text.dim {{ fill: {FILLS['dim'][index]} }}"]
    rules += [f".fill-{name} {{ fill: {pair[index]} }}" for name, pair in STROKES.items() if name.startswith("line")]
    return " ".join(rules)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
