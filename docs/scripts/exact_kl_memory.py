"""
Peak memory of the exact KL, forward and backward, against the size of the vocabulary: chunked as in the trainer, and
from full logits. One process per figure; the memory of the two LM heads is not counted.

    python docs/scripts/exact_kl_memory.py
"""

import resource
import subprocess
import sys

TOKENS, WIDTH = 256, 64


def measure(form: str, vocabulary: int) -> float:
    """Peak resident memory in MB above what the process holds before the KL is computed."""
    import torch

    from trl_ext.trainers.grpo.exact_kl import Head, exact_kl

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    ref_hidden = torch.randn(1, TOKENS, WIDTH)
    weight, ref_weight = torch.randn(vocabulary, WIDTH), torch.randn(vocabulary, WIDTH)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if form == "chunked":
        head, ref_head = Head(weight, None, 1.0, None, False), Head(ref_weight, None, 1.0, None, False)
        kl = exact_kl(hidden, head, ref_hidden, ref_head, torch.ones(1, TOKENS), temperature=1.0)
    else:
        policy, reference = (hidden @ weight.T).log_softmax(-1), (ref_hidden @ ref_weight.T).log_softmax(-1)
        kl = (policy.exp() * (policy - reference)).sum(-1)
    kl.mean().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    print("| vocabulary | chunked, MB | full logits, MB |\n|---|---|---|")
    for vocabulary in (32_768, 65_536, 131_072, 262_144):
        figures = []
        for form in ("chunked", "logits"):
            command = [sys.executable, __file__, form, str(vocabulary)]
            figures.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        print(f"| {vocabulary:,} | {figures[0]} | {figures[1]} |")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(f"{measure(sys.argv[1], int(sys.argv[2])):.0f}")
    else:
        main()
