"""Reading pages as strictly as a test should."""

import base64
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The text and the tags of a page; fails at a tag that is closed out of turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[bytes] = []
        self.outside: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "src" and (match := re.fullmatch(r"data:image/svg\+xml;base64,(.+)", value or "")):
                self.images.append(base64.b64decode(match[1]))
            elif name in ("src", "href"):
                self.outside.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_svg(picture: bytes) -> None:
    root = ElementTree.fromstring(picture)
    assert root.tag.endswith("}svg")
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 5
