"""SVG of figures: the same bytes for the same figure, values that show when a pointer rests on them, ids of its own."""

import json
import re
from collections.abc import Sequence
from xml.etree import ElementTree

from matplotlib.artist import Artist

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_HOVER = "hover:"
_REFERENCE = re.compile(r"(?<=#)[\w.-]+")  # to an id; colours look alike, and no id is named as one
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)


def hover(artist: Artist, texts: Sequence[str]) -> None:
    """Notes what an SVG says when a pointer rests on an artist: one text for each of its markers, in their order, or
    one for all of it."""
    artist.set_gid(_HOVER + json.dumps(list(texts)))


def tidy_svg(drawn: bytes, name: str) -> bytes:
    """An SVG of matplotlib with the notes of `hover` as titles, ids that begin with `name`, and no metadata."""
    root = ElementTree.fromstring(drawn)
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    # A rule for every element would hold for the whole page that the figure stands in.
    for parent in root.findall(f"{{{_SVG}}}defs"):
        for rule in parent.findall(f"{{{_SVG}}}style"):
            parent.remove(rule)
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    for element in list(root.iter()):
        if (note := element.get("id", "")).startswith(_HOVER):
            _add_titles(element, json.loads(note.removeprefix(_HOVER)))
    # Matplotlib's ids are random in part, and the same in all figures in part; most are never referred to.
    used = {id_ for element in root.iter() for value in element.attrib.values() for id_ in _REFERENCE.findall(value)}
    ids = {id_: f"{name}-{number}" for number, id_ in enumerate(e.get("id") for e in root.iter()) if id_ in used}
    for element in root.iter():
        for key, value in list(element.items()):
            if key == "id" and value in ids:
                element.set(key, ids[value])
            elif key == "id":
                del element.attrib[key]
            elif "#" in value:
                element.set(key, _REFERENCE.sub(lambda match: ids.get(match[0], match[0]), value))
    return ElementTree.tostring(root, encoding="utf-8")


def _add_titles(group: ElementTree.Element, texts: list[str]) -> None:
    markers = list(group.iter(f"{{{_SVG}}}use"))
    for element, text in zip(markers if len(markers) == len(texts) > 1 else [group], texts, strict=False):
        title = ElementTree.Element(f"{{{_SVG}}}title")
        title.text = text
        element.insert(0, title)
