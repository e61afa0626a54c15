"""The committed pictures are what their scripts draw, and can be read in both schemes."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from docs.pictures.__main__ import PICTURES
from docs.pictures.drawing import FILLS, WIDTH

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"


def test_every_committed_picture_has_a_script() -> None:
    assert {file.name for file in FOLDER.glob("*.svg")} == set(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_what_the_scripts_draw(name: str) -> None:
    drawn = PICTURES[name]().svg()
    assert (FOLDER / name).read_text(encoding="utf-8") == drawn, "draw them again: python -m docs.pictures"
    assert drawn == PICTURES[name]().svg()


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_stand_alone(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.findtext(f"{SVG}title") and root.findtext(f"{SVG}desc")
    # nothing is fetched and nothing runs
    assert not re.search(r"href|@import|url\((?!#)|<script|<image|font-face", text)
    height = float(root.attrib["height"])
    for element in root.iter(f"{SVG}text"):
        size = float(element.attrib["font-size"])
        assert size >= 12
        x, y, width = float(element.attrib["x"]), float(element.attrib["y"]), _width(element, size)
        left = x - width * {"start": 0, "middle": 0.5, "end": 1}[element.attrib["text-anchor"]]
        assert 8 <= left and left + width <= WIDTH - 8 and size <= y <= height - 6, element.text


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast_on_everything_that_it_may_stand_on(scheme: int) -> None:
    for ground in ("paper", "panel", "inner", "base", "one", "two", "three"):
        assert _contrast(FILLS["text"][scheme], FILLS[ground][scheme]) >= 7, ground
    for ground in ("paper", "panel", "inner"):
        assert _contrast(FILLS["dim"][scheme], FILLS[ground][scheme]) >= 4.5, ground


def _width(element: ElementTree.Element, size: float) -> float:
    """About what the text takes in DejaVu, the widest of the usual fonts."""
    kinds = element.attrib["class"].split()
    return size * len(element.text or "") * (0.602 if "mono" in kinds else 0.62 if "bold" in kinds else 0.55)


def _contrast(one: str, other: str) -> float:
    """Of the Web Content Accessibility Guidelines: 4.5 is asked for, 7 is better."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = (int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5))
    red, green, blue = (it / 12.92 if it <= 0.04045 else ((it + 0.055) / 1.055) ** 2.4 for it in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
