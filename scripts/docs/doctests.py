"""Shows the doctests of docstrings as code: an extension of griffe, which reads the docstrings."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)
"""A prompt and what follows up to the next empty line."""


class FencedDoctests(griffe.Extension):
    """Puts doctests into fences."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Changes the docstring of an object that was read."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = DOCTEST.sub(r"\n```pycon\n\g<0>\n```\n", text)
