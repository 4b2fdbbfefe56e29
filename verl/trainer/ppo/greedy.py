"""The greedy trajectory of each prompt, with whose score its other trajectories are compared.

ReMax (arXiv 2310.10505). It is rolled out beside the sampled ones, under the same weights and with
the same limits, scored by the same reward, and never trained on.
"""

from collections.abc import Sequence

from verl.agent import Source, Trajectory
from verl.rollout.agent_worker import Failure, Job
from verl.workers.config import ValSamplingConfig

GREEDY = ValSamplingConfig(temperature=0.0, n=1)
"""How it is sampled: one trajectory for a prompt, without log-probs."""


def with_greedy_scores(
    jobs: Sequence[Job],
    results: Sequence[Trajectory | Failure],
    greedy: Sequence[Trajectory | Failure],
) -> list[Trajectory | Failure]:
    """Writes to each trajectory the score of the greedy one of its prompt, and returns the results.

    `greedy` has one result for each prompt, in the order in which the prompts come in `jobs`. A
    greedy trajectory in which the policy said nothing has score 0, as in a validation. Where the
    environment broke it, its prompt has no baseline: all results of the prompt become failures.
    """
    uids = list(dict.fromkeys(job.uid for job in jobs))
    greedy_of_prompt = dict(zip(uids, greedy, strict=True))
    compared: list[Trajectory | Failure] = []
    for job, result in zip(jobs, results, strict=True):
        baseline = greedy_of_prompt[job.uid]
        if isinstance(result, Trajectory) and isinstance(baseline, Failure):
            message = f"the greedy trajectory of this prompt failed: {baseline.message}"
            compared.append(Failure(message, baseline.num_calls))
            continue
        if isinstance(result, Trajectory) and isinstance(baseline, Trajectory):
            result.greedy_score = score_of(baseline)
        compared.append(result)
    return compared


def score_of(trajectory: Trajectory) -> float:
    """The score; 0 where the policy said nothing, so that nothing was scored."""
    return trajectory.reward["score"] if trajectory.num_tokens(Source.MODEL) else 0.0


def greedy_metrics(
    greedy: Sequence[Trajectory | Failure], sampled: Sequence[Trajectory | Failure]
) -> dict[str, float]:
    """The mean score of the greedy trajectories of a step, and what they cost.

    The cost is the number of tokens that the policy wrote in them, and its share of all tokens that
    the policy wrote for the step. Without a greedy trajectory there are no metrics.
    """
    done = [result for result in greedy if isinstance(result, Trajectory)]
    if not done:
        return {}
    tokens = model_tokens(done)
    others = model_tokens([result for result in sampled if isinstance(result, Trajectory)])
    return {
        "greedy/score": sum(score_of(trajectory) for trajectory in done) / len(done),
        "greedy/model_tokens": float(tokens),
        "greedy/model_tokens_share": tokens / max(1, tokens + others),
    }


def model_tokens(trajectories: Sequence[Trajectory]) -> int:
    """The tokens that the policy wrote in all of them."""
    return sum(trajectory.num_tokens(Source.MODEL) for trajectory in trajectories)
