"""Trajectories written by hand, for rewards to judge."""

from verl.agent import Segment, Source, Trajectory
from verl.utils.tokenizer import encode_text


def trajectory_of(tokenizer, *segments):
    made = [
        Segment(
            Source.MODEL if author == "M" else Source.OBSERVATION,
            encode_text(tokenizer, text),
            policy_version=3,
        )
        for author, text in segments
    ]
    return Trajectory(
        encode_text(tokenizer, "For example, <answer> Beijing </answer>. Question: x?\n"), made
    )
