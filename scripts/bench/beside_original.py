"""This project beside the original Search-R1, of which you name a checkout; nothing of it is here.

    python scripts/bench/beside_original.py --original CHECKOUT retrieval --corpus C --queries Q
    python scripts/bench/beside_original.py --original CHECKOUT rollout --model MODEL

`retrieval`: BM25 under load, both servers in turn. The original's listens on port 8000, and needs
pyserini with a JDK that it accepts. Ids of the corpus are its line numbers, as the original
expects. `rollout`: the loop of the closed world over vLLM, both in turn: the same questions, model,
sampling and search server, each with an engine of its own whose settings are ours. The original
samples every turn to its limit, because it has no stop strings; `original+stop` gives it ours. Its
loop needs tensordict.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval_beside_lucene import prepare, row, unique
from retrieval_load import DIRECT, ROOT, Load, run_clients, server

from search_r1.launch import prepare_and_serve
from search_r1.rewards.matching import exact_match, extract_answer, gold_answers
from verl.agent import Completion, Source, Trajectory
from verl.rollout.agent_worker import AgentLoopWorker
from verl.rollout.job import make_jobs
from verl.rollout.vllm_server import VLLMServer
from verl.trainer.compose import as_plain, composed
from verl.trainer.config import PPOConfig, build_tokenizer, validate
from verl.trainer.preparation import load_dataset
from verl.utils.dataset import RLHFDataset

THEIR_PORT = 8000
"""Which the original's server has fixed."""
BATCH = 256
"""Queries of one request, as a training step of the original sends them."""
PER_PROMPT = 5


@contextmanager
def their_server(checkout: Path, index: Path, corpus: Path) -> Iterator[int]:
    """The port of the original's retrieval server, once it answers."""
    program = [sys.executable, str(checkout / "search_r1" / "search" / "retrieval_server.py")]
    flags = ["--retriever_name", "bm25", "--index_path", str(index), "--corpus_path", str(corpus)]
    process = subprocess.Popen(
        [*program, *flags], env=with_path(checkout), cwd=checkout, stdout=sys.stderr
    )
    try:
        while not answers(THEIR_PORT):
            if process.poll() is not None:
                sys.exit("error: the original's server ended; its output is above")
            time.sleep(0.2)
        yield THEIR_PORT
    finally:
        process.terminate()
        process.wait()


def with_path(checkout: Path) -> dict[str, str]:
    """An environment in which the packages of the checkout are found, and not ours."""
    return {**os.environ, "PYTHONPATH": str(checkout)}


def answers(port: int) -> bool:
    """Whether an application listens there."""
    try:
        DIRECT.open(f"http://127.0.0.1:{port}/openapi.json", timeout=5)
    except OSError:
        return False
    return True


def batch_seconds(port: int, queries: Iterator[str]) -> float:
    """Seconds of one request of BATCH queries."""
    asked = {"queries": [next(queries) for _ in range(BATCH)], "topk": 3, "return_scores": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/retrieve",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    began = time.perf_counter()
    with DIRECT.open(request) as response:
        found = json.load(response)
    if len(found["result"]) != BATCH:
        raise RuntimeError(f"port {port}: {len(found['result'])} results for {BATCH} queries")
    return time.perf_counter() - began


def beside_retrieval(args: argparse.Namespace) -> None:
    """Prints queries per second and latencies of both servers, and their ratios."""
    if answers(THEIR_PORT):
        sys.exit(f"error: port {THEIR_PORT}, which the original's server takes, is in use")
    lines = [line for path in args.queries for line in path.read_text("utf-8").splitlines()]
    queries = unique([json.loads(line)["question"] for line in lines])
    flags = prepare("bm25", args.corpus, args.work)
    prepare("lucene", args.corpus, args.work)
    index = (args.work / "lucene").resolve()
    with ExitStack() as stack:
        ports = {
            "ours": stack.enter_context(server(flags)),
            "original": stack.enter_context(
                their_server(args.original, index, args.corpus.resolve())
            ),
        }
        for port in ports.values():
            asyncio.run(run_clients(port, 4, queries, 4.0))  # warms up
        sys.stdout.write("| clients | server | q/s | p50 ms | p95 ms | p99 ms |\n")
        sys.stdout.write("|---|---|---|---|---|---|\n")
        for count in args.clients:
            loads: dict[str, list[Load]] = {name: [] for name in ports}
            for _ in range(args.rounds):
                for name, port in ports.items():
                    load = asyncio.run(run_clients(port, count, queries, args.seconds))
                    loads[name].append(load)
            rates = {
                name: [load.statuses["200"] / load.seconds for load in loads[name]]
                for name in ports
            }
            for name in ports:
                row(str(count), name, rates[name], loads[name])
            say_ratio(f"{count} clients", rates["ours"], rates["original"])
        seconds = in_turn(
            args.rounds,
            {name: lambda port=port: batch_seconds(port, queries) for name, port in ports.items()},
        )
        say_ratio(f"a request of {BATCH} queries", seconds["original"], seconds["ours"])


def in_turn(rounds: int, players: dict[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """What each returned in each round, after one that warms up."""
    results: dict[str, list[Any]] = {name: [] for name in players}
    for number in range(rounds + 1):
        for name, play in players.items():
            result = play()
            if number:
                results[name].append(result)
    return results


def say_ratio(what: str, larger: list[float], smaller: list[float]) -> None:
    ratios = sorted(a / b for a, b in zip(larger, smaller, strict=True))
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    median = statistics.median(ratios)
    sys.stdout.write(f"{what}: ours is {median:.2f} times as fast (rounds: {shown})\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Played:
    """What came of a batch of trajectories."""

    seconds: float
    texts: list[str]
    """What was written after each prompt."""
    searches: int
    generated: int
    """Tokens that the engine sampled, those included that were thrown away."""


class OneEngine:
    """The engine of this process, for the sessions of an agent worker."""

    def __init__(self, engine: VLLMServer) -> None:
        self.engine = engine
        self.calls = 0

    async def generate(
        self, session: str, prompt_ids: list[int], sampling: dict[str, Any]
    ) -> Completion:
        self.calls += 1
        return await self.engine.generate(f"{session}-{self.calls}", prompt_ids, sampling)

    def forget(self, session: str) -> None:
        """An engine alone keeps nothing of a session."""


class Ours:
    """Our loop, over an engine of its own."""

    def __init__(self, config: PPOConfig, questions: RLHFDataset) -> None:
        rollout = config.actor_rollout_ref.rollout
        model = config.actor_rollout_ref.model
        self.questions = questions
        self.engine = VLLMServer(
            rollout,
            model,
            max_model_len=config.data.max_prompt_length,
            device="cpu",
            replica_rank=0,
            num_replicas=1,
        )
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.engine.start())
        count = len(questions) * PER_PROMPT
        self.worker = AgentLoopWorker(config, OneEngine(self.engine), count)
        self.sampling = rollout.model_copy(update={"n": PER_PROMPT})

    def play(self) -> Played:
        jobs = make_jobs(self.questions.rows, self.questions.prompt_ids, self.sampling, None)
        began = time.perf_counter()
        done = self.loop.run_until_complete(self.worker.run(jobs, self.sampling.params()))
        seconds = time.perf_counter() - began
        finished = [each for each in done if isinstance(each, Trajectory)]
        if len(finished) < len(done):
            raise RuntimeError(f"{len(done) - len(finished)} trajectories failed")
        decode = self.worker.agent.tokenizer.decode
        return Played(
            seconds,
            [decode([id for s in each.segments for id in s.token_ids]) for each in finished],
            sum(each.info["searches"] for each in finished),
            sum(each.num_tokens(Source.MODEL) for each in finished),
        )

    def close(self) -> None:
        self.loop.run_until_complete(self.engine.shutdown())


class Theirs:
    """The original's loop, in a process that finds its packages before ours."""

    def __init__(self, checkout: Path, given: dict[str, Any]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        file = Path(self.folder.name, "given.json")
        file.write_text(json.dumps(given), encoding="utf-8")
        program = Path(__file__).with_name("beside_original_loop.py")
        quiet = {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(program), str(file)],
            env=with_path(checkout) | quiet,
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def play(self) -> Played:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("result "):
                return Played(**json.loads(line.removeprefix("result ")))
        sys.exit("error: the original's loop ended; its output is above")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


def given_to_theirs(config: PPOConfig, questions: RLHFDataset, url: str) -> dict[str, Any]:
    """What the original's process is told: model, engine, limits of the loop, prompts."""
    rollout = config.actor_rollout_ref.rollout
    data = config.data
    return {
        "model": str(Path(config.actor_rollout_ref.model.path).resolve()),
        "engine": {
            "dtype": rollout.dtype,
            "max_model_len": data.max_prompt_length,
            "max_num_seqs": rollout.max_num_seqs,
            "enforce_eager": True,
            "enable_prefix_caching": rollout.enable_prefix_caching,
            "kv_cache_memory_bytes": int(rollout.cpu_kvcache_gb * 2**30),
            "block_size": 32,
            "generation_config": "vllm",
        },
        "stop": [],
        "loop": {
            "max_turns": config.agent["max_turns"],
            "max_start_length": data.max_start_length,
            "max_prompt_length": data.max_prompt_length,
            "max_response_length": data.max_response_length,
            "max_obs_length": data.max_obs_length,
            "search_url": url,
            "topk": config.agent["retriever"]["topk"],
        },
        "max_response_length": data.max_response_length,
        "prompts": [prompt for prompt in questions.prompt_ids for _ in range(PER_PROMPT)],
    }


def beside_rollout(args: argparse.Namespace) -> None:
    """Prints seconds, tokens, searches and exact match of both loops, and the ratio of seconds."""
    overrides = [f"actor_rollout_ref.model.path={args.model.resolve()}"]
    if args.latency_ms:
        median = f"'--inject_latency_ms','{args.latency_ms}'"
        slowest = f"'--inject_latency_p99_ms','{args.p99_ms}'"
        overrides.append(f"setup.server_flags=[{median},{slowest}]")
    raw = composed("grpo", overrides)
    with prepare_and_serve(raw, overrides) as found, ExitStack() as stack:
        assert found is not None
        overrides.append(f"retriever.url={found.url}")
        config = validate(as_plain(composed("grpo", overrides)))
        tokenizer = build_tokenizer(config)
        files = config.data.train_files
        questions = load_dataset(config, tokenizer, files, args.prompts, 0)
        ours = Ours(config, questions)
        stack.callback(ours.close)
        given = given_to_theirs(config, questions, found.url)
        with_stop = {**given, "stop": ["</search>", "</answer>"]}
        players = {"ours": ours.play}
        for name, told in {"original": given, "original+stop": with_stop}.items():
            theirs = Theirs(args.original, told)
            stack.callback(theirs.close)
            players[name] = theirs.play
        played = in_turn(args.rounds, players)
    golds = [gold_answers(each["reward_model"]["ground_truth"]) for each in questions.rows]
    sys.stdout.write("| loop | seconds | tokens sampled | searches | exact match |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    for name, rounds in played.items():
        cells = [
            f"{statistics.median(each.seconds for each in rounds):.1f}",
            f"{statistics.mean(each.generated for each in rounds):,.0f}",
            f"{statistics.mean(each.searches for each in rounds):.0f}",
            f"{statistics.mean(right(each, golds) for each in rounds):.3f}",
        ]
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
    seconds = {name: [each.seconds for each in rounds] for name, rounds in played.items()}
    for name in ("original", "original+stop"):
        say_ratio(f"beside {name}", seconds[name], seconds["ours"])


def right(played: Played, golds: list[list[str]]) -> float:
    """Share of the trajectories whose answer is right."""
    scores = [
        exact_match(extract_answer(text) or "", golds[place // PER_PROMPT])
        for place, text in enumerate(played.texts)
    ]
    return statistics.mean(scores)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--original", type=Path, required=True, help="a checkout of Search-R1")
    parser.add_argument("--rounds", type=int, default=3, help="of each, in turn (default: 3)")
    parts = parser.add_subparsers(required=True)
    retrieval = parts.add_parser("retrieval", help="the retrieval server under load")
    retrieval.add_argument("--corpus", type=Path, required=True)
    retrieval.add_argument("--queries", type=Path, nargs="+", required=True)
    retrieval.add_argument("--work", type=Path, default=Path("runs/bench/beside"))
    retrieval.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64, 256])
    retrieval.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    retrieval.set_defaults(measure=beside_retrieval)
    rollout = parts.add_parser("rollout", help="the rollout loop over vLLM")
    rollout.add_argument("--model", type=Path, required=True, help="a policy of the closed world")
    rollout.add_argument("--prompts", type=int, default=48, help=f"asked {PER_PROMPT} times each")
    rollout.add_argument("--latency-ms", type=float, help="median delay of a search")
    rollout.add_argument("--p99-ms", type=float, default=2000, help="its 99 %% quantile")
    rollout.set_defaults(measure=beside_rollout)
    args = parser.parse_args()
    args.original = args.original.resolve()
    os.chdir(ROOT)
    args.measure(args)


if __name__ == "__main__":
    main()
