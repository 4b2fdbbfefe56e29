"""Lays the pages of the site out in a folder, from which a builder of sites takes them.

    python scripts/docs/stage.py FOLDER

These are the files of docs/ and

- README.md and CONTRIBUTING.md;
- for each page `api/MODULE.md` of the navigation (mkdocs.yml) the reference of that module, which
  mkdocstrings fills in from the docstrings;
- every other file of the repository that a page links to, as text.

Links are written for the repository, where they work as they stand. Here they are turned to where
their targets are on the site.
"""

import posixpath
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DOCS = "docs/"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages that are no files of docs/, by their path in the repository."""
NAVIGATION = re.compile(r"^ +- (?:[^#\n]+: )?([\w./]+\.md)$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(?=[)#])")
"""The path of a link within the repository."""


def navigation() -> list[str]:
    """The pages that the navigation names."""
    return NAVIGATION.findall((HERE / "mkdocs.yml").read_text(encoding="utf-8"))


def documented_modules() -> list[str]:
    """The modules whose reference the navigation has."""
    pages = [page for page in navigation() if page.startswith("api/")]
    return [page.removeprefix("api/").removesuffix(".md") for page in pages]


def sources() -> dict[str, str]:
    """The files of the site, by their path in the repository: pages, images, data."""
    files = [path for path in sorted((ROOT / DOCS).rglob("*")) if path.is_file()]
    paths = [path.relative_to(ROOT).as_posix() for path in files]
    return PAGES | {path: path.removeprefix(DOCS) for path in paths}


def on_site(path: str, modules: list[str]) -> str:
    """Where a file of the repository is on the site."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"api/{module}.md" if module in modules else f"source/{path}.txt"


def target_of(link: str, path: str) -> str:
    """The path in the repository to which a link of the file `path` leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def turned(text: str, path: str, modules: list[str]) -> str:
    """A page of the repository with its links turned to where their targets are on the site."""
    folder = posixpath.dirname(on_site(path, modules)) or "."

    def on_page(match: re.Match[str]) -> str:
        return posixpath.relpath(on_site(target_of(match[1], path), modules), folder)

    return LINK.sub(on_page, text)


def pages() -> dict[str, bytes]:
    """All files of the site, by their path on it."""
    modules = documented_modules()
    files: dict[str, bytes] = {}
    linked: set[str] = set()
    for path, uri in sources().items():
        files[uri] = (ROOT / path).read_bytes()
        if uri.endswith(".md"):
            text = files[uri].decode()
            linked |= {target_of(link, path) for link in LINK.findall(text)}
            files[uri] = turned(text, path, modules).encode()
    for path in sorted(linked):
        uri = on_site(path, modules)
        if uri.startswith("source/") and (ROOT / path).is_file():
            files[uri] = (ROOT / path).read_bytes()
    files |= {f"api/{m}.md": f"# {m}\n\n::: {m}\n".encode() for m in modules}
    files |= {f"assets/{path.name}": path.read_bytes() for path in (HERE / "assets").iterdir()}
    return files


def stage(folder: Path) -> None:
    """Makes a folder hold the pages and nothing else; what did not change is not written."""
    files = pages()
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in files:
            path.unlink()
    for uri, content in files.items():
        path = folder / uri
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    stage(Path(sys.argv[1]))
