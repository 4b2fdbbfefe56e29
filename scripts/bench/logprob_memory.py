"""Peak memory of log-probs and entropy, with their backward pass, for a large vocabulary, against
the naive way.

    python scripts/bench/logprob_memory.py [--tokens 2048] [--vocab 152000]

Each way runs in a process of its own on bfloat16 logits that are there already. Reported is how far
the process's resident memory rises above that, at its highest: the gradient of the logits, as large
as they are, is part of it. Where there is a GPU it is the memory that torch allocated there.
"""

import argparse
import resource
import subprocess
import sys
import time
from typing import Any

WAYS = ("naive", "ours")


def peak_gib(device: str) -> float:
    """Highest so far: the resident memory of this process, or what torch allocated on the GPU since
    the last reset."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def forward_backward(way: str, logits: Any, labels: Any) -> tuple[float, float]:
    """The sums of log-probs and entropy."""
    from verl.utils.torch_functional import logprobs_and_entropy

    if way == "naive":
        log_p = logits.float().log_softmax(-1)
        log_prob = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
    else:
        log_prob, entropy = logprobs_and_entropy(logits, labels)
    (log_prob.mean() + 0.01 * entropy.mean()).backward()
    return log_prob.sum().item(), entropy.sum().item()


def measure(way: str, tokens: int, vocab: int, device: str) -> tuple[float, float, float, float]:
    """The rise in GiB, the seconds, and the sums of log-probs and entropy."""
    import torch

    torch.manual_seed(0)
    logits = torch.empty(tokens, vocab, dtype=torch.bfloat16, device=device)
    for row in logits:
        row.copy_(torch.randn(vocab))  # row by row: a float32 copy of all would set the peak
    logits.requires_grad_()
    labels = torch.randint(0, vocab, (tokens,)).to(device)
    if device == "cuda":
        forward_backward(way, logits[:8].detach().requires_grad_(), labels[:8])  # loads the kernels
        torch.cuda.reset_peak_memory_stats()
    before = peak_gib(device)
    began = time.perf_counter()
    sums = forward_backward(way, logits, labels)
    return peak_gib(device) - before, time.perf_counter() - began, *sums


def measure_here(way: str, tokens: int, vocab: int) -> None:
    """Prints what `measure` gives on the GPU, where there is none on the CPU."""
    import torch

    rise, seconds, *sums = measure(
        way, tokens, vocab, "cuda" if torch.cuda.is_available() else "cpu"
    )
    sys.stdout.write(f"{rise:.2f} {seconds:.2f} {sums[0]:.1f} {sums[1]:.1f}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=152_000)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        return measure_here(args.way, args.tokens, args.vocab)
    sizes = ["--tokens", str(args.tokens), "--vocab", str(args.vocab)]
    sys.stdout.write(f"logits: {args.tokens * args.vocab * 2 / 2**30:.2f} GiB in bfloat16\n")
    rises = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sizes, "--way", way]
        rise, seconds, *sums = subprocess.check_output(command, text=True).split()
        rises[way] = float(rise)
        sys.stdout.write(
            f"{way}: {rise} GiB above the logits, {seconds} s (sums {', '.join(sums)})\n"
        )
    sys.stdout.write(f"ratio: {rises['ours'] / rises['naive']:.2f}\n")


if __name__ == "__main__":
    main()
