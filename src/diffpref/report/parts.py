"""What every page is made of: the document with its style and its policy, sections, tiles."""

import base64
import hashlib
import html
from importlib import resources

from diffpref import __version__

GENERATOR = '<meta name="generator" content="diffpref'


def document(title: str, sections: list[str], script: str = "", files: bool = False) -> str:
    """The whole page. script: the one that may run. files: its pictures may stand beside it."""
    style = resources.files("diffpref.report").joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(script, files)}">
{GENERATOR} {html.escape(__version__)}">
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
<footer>Made by diffpref {html.escape(__version__)}.</footer>{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def _policy(script: str, files: bool) -> str:
    """What the browser may run and fetch: should a text of the data ever slip through unescaped, it does neither."""
    pictures = "img-src data:" + " 'self' file:" * files
    allowed = ""
    if script:
        allowed = f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    return f"default-src 'none'; {pictures}; style-src 'unsafe-inline'{allowed}"


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
