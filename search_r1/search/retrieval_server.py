"""The retrieval server: `/retrieve` over one engine, which a single thread owns.

python search_r1/search/retrieval_server.py --index_path INDEX/bm25 --corpus_path C.jsonl --topk 3 --retriever_name bm25
"""

import argparse
import asyncio
import random
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from math import exp, log
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by its path, as the original's users do
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import uvicorn
from fastapi import FastAPI

from search_r1.search.bm25 import BM25Retriever
from search_r1.search.corpus import CorpusError
from search_r1.search.engine import Hits, Retriever
from search_r1.search.schema import RetrieveRequest, RetrieveResponse

ENGINES = ("bm25",)
P99 = 2.3263  # 99 % quantile of the standard normal distribution


class BatchingEngine:
    """Gathers the requests that wait while the engine is busy into its next call."""

    def __init__(self, retriever: Retriever) -> None:
        self.retriever = retriever
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.queue: asyncio.Queue[tuple[list[str], int, asyncio.Future[list[Hits]]]] = asyncio.Queue()

    async def search(self, queries: list[str], topk: int) -> list[Hits]:
        """Hits of each query."""
        future: asyncio.Future[list[Hits]] = asyncio.get_running_loop().create_future()
        await self.queue.put((queries, topk, future))
        return await future

    async def run(self) -> None:
        """Serves the queue until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            jobs = [await self.queue.get()]
            while not self.queue.empty():
                jobs.append(self.queue.get_nowait())
            queries = [query for texts, _, _ in jobs for query in texts]
            topk = max(k for _, k, _ in jobs)
            try:
                hits = iter(await loop.run_in_executor(self.thread, self.retriever.search, queries, topk))
            except Exception as error:  # whatever the engine raises belongs to the requests, the server lives on
                for _, _, future in jobs:
                    future.set_exception(error)
                continue
            for texts, k, future in jobs:
                if not future.cancelled():
                    future.set_result([next(hits)[:k] for _ in texts])


class Latency:
    """Log-normal delays, for experiments: `median_ms` and 99 % quantile `p99_ms`."""

    def __init__(self, median_ms: float, p99_ms: float, seed: int = 0) -> None:
        self.mu, self.sigma = log(median_ms / 1000), log(p99_ms / median_ms) / P99
        self.rng = random.Random(seed)

    def draw(self) -> float:
        """Seconds."""
        return exp(self.rng.gauss(self.mu, self.sigma))


def create_app(retriever: Retriever, topk: int, latency: Latency | None = None) -> FastAPI:
    """The application over a loaded engine; `topk` is used where a request names none."""
    engine = BatchingEngine(retriever)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(engine.run())
        yield
        task.cancel()

    app = FastAPI(title="Search-R1 retrieval", lifespan=lifespan)

    @app.post("/retrieve")
    async def retrieve(request: RetrieveRequest) -> RetrieveResponse:
        if latency is not None and request.queries:
            await asyncio.sleep(max(latency.draw() for _ in request.queries))
        results = await engine.search(request.queries, request.topk or topk) if request.queries else []
        return RetrieveResponse(result=[[item(hit, request.return_scores) for hit in hits] for hits in results])

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "retriever": retriever.name, "num_documents": len(retriever)}

    return app


def item(hit: tuple[dict[str, Any], float], with_score: bool) -> dict[str, Any]:
    """A hit as the contract has it."""
    document, score = hit
    return {"document": document, "score": score} if with_score else document


def parse_arguments() -> argparse.Namespace:
    """Command line, with the original's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--index_path", type=Path, required=True, help="folder of the index")
    add("--corpus_path", type=Path, required=True, help="JSONL with id and contents, the one the index was built from")
    add("--topk", type=int, default=3, help="passages per query where a request names no number (default: 3)")
    add("--retriever_name", default="bm25", help=f"engine: {', '.join(ENGINES)} (default: bm25)")
    add("--retriever_model", default=None, help="encoder of a dense engine")
    add("--faiss_gpu", action="store_true", help="dense index on the GPU")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    add("--inject_latency_ms", type=float, default=None, help="experiments: median of an added log-normal delay")
    add("--inject_latency_p99_ms", type=float, default=None, help="experiments: its 99 %% quantile")
    args = parser.parse_args()
    if args.retriever_name not in ENGINES or args.retriever_model or args.faiss_gpu:
        parser.error(f"--retriever_name {args.retriever_name}: available engines are {', '.join(ENGINES)}, on the CPU")
    if (args.inject_latency_ms is None) != (args.inject_latency_p99_ms is None):
        parser.error("--inject_latency_ms and --inject_latency_p99_ms go together")
    return args


def main() -> None:
    """Loads the engine, then serves."""
    args = parse_arguments()
    try:
        retriever = BM25Retriever(args.index_path, args.corpus_path)
    except CorpusError as error:
        sys.exit(f"error: {error}")
    latency = args.inject_latency_ms and Latency(args.inject_latency_ms, args.inject_latency_p99_ms)
    app = create_app(retriever, args.topk, latency or None)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
