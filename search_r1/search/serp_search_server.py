"""Web search behind the `/retrieve` contract.

python search_r1/search/serp_search_server.py --search_url https://serpapi.com/search \\
    --topk 3 --serp_api_key KEY
python search_r1/search/serp_search_server.py --provider google \\
    --google_api_key KEY --google_cse_id ID
python search_r1/search/serp_search_server.py --provider brave --brave_api_key KEY

Keys may stand in SERPAPI_API_KEY, GOOGLE_API_KEY, GOOGLE_CSE_ID and BRAVE_API_KEY instead. With
--documents id --cache FILE the pages that were found can be opened (docs/retriever.md).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by its path, as the original's users do
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from search_r1.search.engine import Retriever
from search_r1.search.engines.experiments import Record
from search_r1.search.engines.web import Provider, WebRetriever, brave, google, serpapi
from search_r1.search.engines.web_pages import WebPages
from search_r1.search.errors import RetrieverError
from search_r1.search.serve import add_document_flags, add_flags, positive, serve
from search_r1.search.store import StoreLimits

KEY_FLAGS = {
    "serpapi": ("serp_api_key",),
    "google": ("google_api_key", "google_cse_id"),
    "brave": ("brave_api_key",),
}
"""The flags that each provider needs."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line, which has the original's flags."""
    parser = argparse.ArgumentParser(
        prog="serp_search_server.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_provider_flags(parser)
    add_searching_flags(parser)
    add_flags(parser)
    add_document_flags(parser)
    args = parser.parse_args(argv)
    if args.requests_per_s <= 0:
        parser.error("--requests_per_s must be positive")
    if args.documents not in (None, "id"):
        parser.error(f"--documents {args.documents}: a page is named by its address: id")
    if args.documents and not args.cache:
        parser.error("--documents needs --cache FILE, which keeps what was found and read")
    return args


def add_provider_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the providers, whose keys may stand in the environment."""
    env = os.environ.get
    add = parser.add_argument_group("provider").add_argument
    add(
        "--provider",
        choices=("serpapi", "google", "brave"),
        default="serpapi",
        help="(default: serpapi)",
    )
    add("--search_url", help="address of the provider's API (default: its public one)")
    add("--serp_api_key", default=env("SERPAPI_API_KEY"), help="key of SerpAPI")
    add(
        "--serp_engine",
        default="google",
        help="SerpAPI's engine: google, bing, duckduckgo, … (default: google)",
    )
    add("--google_api_key", default=env("GOOGLE_API_KEY"), help="key of Google Custom Search")
    add(
        "--google_cse_id", default=env("GOOGLE_CSE_ID"), help="id of the Programmable Search Engine"
    )
    add("--brave_api_key", default=env("BRAVE_API_KEY"), help="key of Brave Search")


def add_searching_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the engine."""
    add = parser.add_argument_group("searching").add_argument
    add("--cache", type=Path, help="SQLite file that keeps what was found (default: none)")
    add(
        "--fetch_pages",
        action="store_true",
        help="give the pages' text instead of the provider's snippets",
    )
    add(
        "--max_page_chars",
        type=positive,
        default=2000,
        help="characters of a page's text (default: 2000)",
    )
    add(
        "--requests_per_s",
        type=float,
        default=5.0,
        help="requests to the provider per second (default: 5)",
    )
    add(
        "--max_retries",
        type=int,
        default=4,
        help="further attempts after errors and rate limits (default: 4)",
    )
    add(
        "--timeout_s",
        type=float,
        default=10.0,
        help="seconds a request to the provider may take (default: 10)",
    )
    add("--record", type=Path, help="append every search to this file, for --retriever_name replay")


def provider_of(args: argparse.Namespace) -> Provider:
    """Makes the provider with its key. Raises RetrieverError when the key is missing."""
    url = {"url": args.search_url} if args.search_url else {}
    keys = KEY_FLAGS[args.provider]
    if missing := [f"--{name}" for name in keys if not getattr(args, name)]:
        raise RetrieverError(
            f"--provider {args.provider} needs {' and '.join(missing)} (or the environment, see "
            "--help)"
        )
    if args.provider == "serpapi":
        return serpapi(args.serp_api_key, args.serp_engine, **url)
    if args.provider == "google":
        return google(args.google_api_key, args.google_cse_id, **url)
    return brave(args.brave_api_key, **url)


def load(args: argparse.Namespace) -> Retriever:
    """Makes the web search engine. Raises RetrieverError when the key is missing."""
    retriever = WebRetriever(
        provider_of(args),
        args.cache,
        args.fetch_pages,
        args.max_page_chars,
        args.requests_per_s,
        args.max_retries,
        args.timeout_s,
        pages=load_documents(args) if args.documents else None,
    )
    return Record(retriever, args.record) if args.record else retriever


def load_documents(args: argparse.Namespace) -> WebPages:
    """The pages that this server's searches have found."""
    limits = StoreLimits(args.page_chars, args.max_matches, args.max_document_chars)
    return WebPages(args.cache, limits, args.timeout_s)


def main() -> int:
    """Serves until told to stop."""
    return serve("search_r1.search.serp_search_server")


if __name__ == "__main__":
    sys.exit(main())
