"""What every page is made of: the document with its style and its policy, sections, tiles."""

import html
from importlib import resources

from diffpref import __version__

# Should a text of the data ever slip through unescaped, the browser still neither runs nor fetches it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, sections: list[str]) -> str:
    """The whole page."""
    style = resources.files("diffpref.report").joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<footer>Made by diffpref {html.escape(__version__)}.</footer>
</body>
</html>
"""


def tile(label: str, value: str, note: str, extra: str = "", kind: str = "") -> str:
    """A number with its name and a note, all of them markup."""
    return (
        f'<div class="tile {kind}"><div class="name">{label}</div><div class="value">{value}</div>'
        f'{extra}<div class="hint">{note}</div></div>'
    )


def section(title: str, content: str) -> str:
    """A part of the page; the content is markup."""
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def count(number: int, noun: str) -> str:
    """A number with its noun, which stands in the plural unless the number is 1."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
