"""The readable text of a web page."""

import re

UNREAD = (
    "title",
    "script",
    "style",
    "noscript",
    "template",
    "svg",
    "nav",
    "header",
    "footer",
    "aside",
    "form",
    "iframe",
    "head",
)
BLOCKS = (
    "p",
    "div",
    "li",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "tr",
    "br",
    "section",
    "article",
    "blockquote",
    "pre",
)


def title_and_text(html: str | bytes) -> tuple[str, str]:
    """The title and the visible text of a page, one line for each block.

    Scripts, styles, menus and forms are left out.
    """
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    for tag in soup(UNREAD):
        tag.decompose()
    for tag in soup(BLOCKS):
        tag.insert_before("\n")
        tag.append("\n")
    lines = (re.sub(r"\s+", " ", line).strip() for line in soup.get_text().splitlines())
    return title, "\n".join(line for line in lines if line)
