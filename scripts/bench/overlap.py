"""Does a rollout wait for more than it must? 64 trajectories of two slow searches, against what
bounds them.

    python scripts/bench/overlap.py --model data/closed_world/base

The bound is the larger of (a) the slowest trajectory alone: its latencies plus its tokens at the
speed of a trajectory that has the engine for itself, and (b) the engine's time for all tokens when
searches take no time. Beside it, in the same engine, the same trajectories in lock-step: a barrier
after every turn, as the original has it.
"""

import argparse
import asyncio
import json
import math
import random
import sys
import time

from verl.rollout.vllm_server import VLLMServer
from verl.workers.config import ModelConfig, RolloutConfig

SEARCHES = 2
TURN_TOKENS = 20
OBSERVATION_TOKENS = 100
PROMPT_TOKENS = 16
SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "max_tokens": TURN_TOKENS,
    "stop": [],
    "seed": None,
    "log_probs": True,
}


class Rollout:
    """Trajectories over one engine; `latencies[i]` are the delays of trajectory i in seconds."""

    def __init__(self, server: VLLMServer, vocab: int, seed: int) -> None:
        self.server = server
        self.vocab = vocab
        self.rng = random.Random(seed)
        self.calls = 0

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(self.vocab) for _ in range(count)]

    async def turn(self, context: list[int]) -> list[int]:
        self.calls += 1
        done = await self.server.generate(f"{id(self)}-{self.calls}", context, SAMPLING)
        return context + done.token_ids

    async def trajectory(self, latencies: list[float]) -> None:
        context = self.tokens(PROMPT_TOKENS)
        for latency in latencies:
            context = await self.turn(context)
            await asyncio.sleep(latency)
            context = context + self.tokens(OBSERVATION_TOKENS)
        await self.turn(context)

    async def free(self, latencies: list[list[float]]) -> float:
        """Seconds of all trajectories, each at its own pace."""
        began = time.perf_counter()
        await asyncio.gather(*(self.trajectory(one) for one in latencies))
        return time.perf_counter() - began

    async def lock_step(self, latencies: list[list[float]]) -> float:
        """Seconds of all trajectories with a barrier after every turn and every search."""
        began = time.perf_counter()
        contexts = [self.tokens(PROMPT_TOKENS) for _ in latencies]
        for step in range(SEARCHES):
            contexts = await asyncio.gather(*(self.turn(context) for context in contexts))
            await asyncio.gather(*(asyncio.sleep(one[step]) for one in latencies))
            contexts = [context + self.tokens(OBSERVATION_TOKENS) for context in contexts]
        await asyncio.gather(*(self.turn(context) for context in contexts))
        return time.perf_counter() - began


async def measure(
    model: str, count: int, median_ms: float, p99_ms: float, seed: int
) -> dict[str, float]:
    config = RolloutConfig(dtype="float32", enforce_eager=True, cpu_kvcache_gb=0.5)
    server = VLLMServer(
        config,
        ModelConfig(path=model),
        max_model_len=512,
        device="cpu",
        replica_rank=0,
        num_replicas=1,
    )
    await server.start()
    try:
        rollout = Rollout(server, vocab=256, seed=seed)
        # 99 % quantile of N(0, 1)
        mu = math.log(median_ms / 1000)
        sigma = math.log(p99_ms / median_ms) / 2.3263
        latencies = [
            [rollout.rng.lognormvariate(mu, sigma) for _ in range(SEARCHES)] for _ in range(count)
        ]
        instant = [[0.0] * SEARCHES for _ in range(count)]
        await rollout.free(instant)  # warm-up
        alone = await rollout.free(instant[:1])
        engine = await rollout.free(instant)
        wall = await rollout.free(latencies)
        lock_step = await rollout.lock_step(latencies)
    finally:
        await server.shutdown()
    bound = max(max(sum(one) for one in latencies) + alone, engine)
    return {
        "alone_s": alone,
        "engine_s": engine,
        "bound_s": bound,
        "wall_s": wall,
        "wall_over_bound": wall / bound,
        "lock_step_s": lock_step,
        "lock_step_over_wall": lock_step / wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="data/closed_world/base")
    parser.add_argument("--count", type=int, default=64, help="trajectories (default: 64)")
    parser.add_argument(
        "--median-ms", type=float, default=200, help="median latency (default: 200)"
    )
    parser.add_argument("--p99-ms", type=float, default=2000, help="99 %% quantile (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = asyncio.run(measure(args.model, args.count, args.median_ms, args.p99_ms, args.seed))
    sys.stdout.write(json.dumps({k: round(v, 3) for k, v in result.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
