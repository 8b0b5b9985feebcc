"""Pages as a browser would read them."""

import base64
import hashlib
from html.parser import HTMLParser
from pathlib import Path

NASTY = """<script>alert(1)</script> & "double" 'single' </style></title>"""


class Page(HTMLParser):
    """What a browser would make of the page: elements with their attributes, and the text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == "img"]


def assert_self_contained(file: Path) -> None:
    """The page runs nothing but the script that its policy names by its sum, and asks for nothing."""
    page = Page(file)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"iframe", "object", "embed", "base", "form"}
    policy = next(each["content"] for tag, each in page.elements if each.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert len(page.scripts) <= 1
    for script in page.scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert policy.endswith(f"; script-src 'sha256-{digest}'")
        assert "fetch" not in script
        assert "XMLHttp" not in script
        assert "innerHTML" not in script
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    text = file.read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
