"""A task without search: one generation, rewarded by its share of letters `e`."""

from verl.agent import AgentLoop, AnySection, Trajectory
from verl.utils.reward import policy_text


class SingleTurn(AgentLoop):
    async def run(self, prompt_ids, row, generate):
        trajectory = Trajectory(prompt_ids, stop_reason="stop")
        trajectory.add_completion(await generate(prompt_ids, max_tokens=16))
        return trajectory

    @staticmethod
    def reduce_metrics(trajectories):
        return {"toy/count": float(len(trajectories))}


class CountE:
    Config = AnySection

    def __init__(self, config, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, trajectory, row):
        text = policy_text(trajectory, self.tokenizer)
        return {"score": text.count("e") / max(1, len(text))}
