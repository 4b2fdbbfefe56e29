"""The HTML of pages: scripts and styles of `assets` within it, and nothing that it would fetch.

Data are blocks of base64, which no text can leave. The policy of the page (CSP) lets only its own
script run, which it names by hash, and forbids every request and every text that becomes HTML.
"""

import base64
import gzip
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

ASSETS = files("search_r1.pages") / "assets"
TRAJECTORY_MODULES = (
    "dom.js",
    "theme.js",
    "data.js",
    "parts.js",
    "tokens.js",
    "passages.js",
    "trajectory.js",
)
"""What shows a trajectory, on whatever page, in the order in which they need each other."""
IMPORT = re.compile(r"^import\s[^;]*?from\s+\"\./[\w.]+\";\n", re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|class) )", re.MULTILINE)


def asset(name: str) -> str:
    """The text of a file of `assets`."""
    return (ASSETS / name).read_text(encoding="utf-8")


def script_of(modules: Sequence[str]) -> str:
    """One script of several modules, in the order in which they need each other.

    A page on a disk cannot import from files beside it, so what they import of each other is left
    out: all are in one scope.
    """
    texts = [EXPORT.sub("", IMPORT.sub("", asset(name))) for name in modules]
    return "\n".join(f"// {name}\n{text}" for name, text in zip(modules, texts, strict=True))


def source_hash(text: str) -> str:
    """The source of a content security policy that allows exactly `text`."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def policy(script: str, style: str, connects: bool = False) -> str:
    """The content security policy of a page with this script and this style, and no more.

    `connects`: whether the script may ask the server that the page comes from.
    """
    rules = {
        "default-src": "'none'",
        "script-src": source_hash(script),
        "style-src": source_hash(style),
        **({"connect-src": "'self'"} if connects else {}),
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def page_html(
    title: str,
    modules: Sequence[str],
    styles: Sequence[str],
    blocks: Mapping[str, str],
    connects: bool = False,
) -> str:
    """A page that runs `modules` over its `blocks`, which are base64 by name.

    `connects`: whether its script may ask the server that the page comes from.
    """
    script = script_of(modules)
    style = "\n".join(asset(name) for name in styles)
    data = "\n".join(
        f'<script type="application/gzip+base64" id="{escape(name)}">{text}</script>'
        for name, text in blocks.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy(script, style, connects)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<noscript>This page shows its content by a script of its own: allow scripts to read it.</noscript>
<div id="app"></div>
{data}
<script type="module">{script}</script>
</body>
</html>
"""


def json_text(value: object) -> str:
    """JSON in one line, without spaces. Half of a surrogate pair stays an escape.

    A number that is not finite becomes null, because a browser reads no other JSON.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json_text(without_nonfinite(value))
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"))
    return text


def without_nonfinite(value: object) -> object:
    """The same value with None in the place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: without_nonfinite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nonfinite(item) for item in value]
    return value


def packed(text: str) -> str:
    """`text` as gzip in base64; the same text always gives the same."""
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()
