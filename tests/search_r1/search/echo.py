"""A small corpus, and a retrieval service whose engine echoes the query."""

import threading
import time

from search_r1.search.engine import EngineError
from search_r1.search.server.app import create_app
from search_r1.search.server.service import ServerSettings

ROWS = [
    {"id": "0", "contents": '"Torvel"\nTorvel lies in Marna. It has a harbour.'},
    {"id": "1", "contents": '"Ada Marin"\nAda Marin was born in Torvel.'},
    {"id": "2", "contents": '"Bo Keld"\nBo Keld sails. Bo Keld was born at sea.'},
    {"id": "3", "contents": '"Marna"\nMarna is a country of hills.'},
]


class Engine:
    """An engine for tests: echoes the query; `lag` seconds a call; words that break it or fail
    alone."""

    name = "echo"

    def __init__(self, lag=0.0):
        self.lag = lag
        self.calls = []
        self.threads = set()

    def __len__(self):
        return 1

    def search(self, queries, topk):
        self.calls.append((list(queries), topk))
        self.threads.add(threading.get_ident())
        time.sleep(self.lag)
        if "poison" in queries:
            raise RuntimeError("bitter")
        echo = [({"id": "0", "contents": f'"T"\n{q}'}, float(topk)) for q in queries]
        return [
            EngineError("not this one") if q == "sour" else [hit] * topk
            for q, hit in zip(queries, echo, strict=True)
        ]


class Gate(Engine):
    """Finishes no search before it is opened."""

    def __init__(self):
        super().__init__()
        self.opened = threading.Event()

    def search(self, queries, topk):
        found = super().search(queries, topk)
        assert self.opened.wait(60)
        return found


def app(engine, **settings):
    return create_app(lambda: engine, ServerSettings(**{"cache_size": 0, **settings}))
