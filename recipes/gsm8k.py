"""
GSM8K (https://huggingface.co/datasets/openai/gsm8k) in TRL's prompt format, and its reward. Downloads from the hub:

    python -m recipes.gsm8k --output outputs/gsm8k

For answers in LaTeX there is `reward_funcs: [accuracy_reward]` of TRL, which needs math-verify. Here an answer is a
plain number behind `####`, and comparing two numbers needs no package.
"""

import argparse
import re
from pathlib import Path

INSTRUCTION = "Solve the problem step by step. Write the final number on the last line after '####'."


def to_prompt(row: dict) -> dict:
    """A row of GSM8K (`question`, `answer` ending in `#### number`) as a conversational prompt and the number."""
    content = f"{row['question']}\n{INSTRUCTION}"
    return {"prompt": [{"role": "user", "content": content}], "number": final_number(row["answer"])}


def final_number(text: str) -> str | None:
    """The number after the last `####`, without thousands separators, or `None`."""
    found = re.findall(r"####\s*(-?[\d,]*\.?\d+)", text)
    return found[-1].replace(",", "") if found else None


def exact_number(completions: list, number: list[str], **kwargs) -> list[float]:
    """Reward: 1.0 for each completion whose number after `####` is the right one, else 0.0."""
    texts = [completion[-1]["content"] if isinstance(completion, list) else completion for completion in completions]
    found = [final_number(text) for text in texts]
    return [
        float(written is not None and float(written) == float(right))
        for written, right in zip(found, number, strict=True)
    ]


def main() -> None:
    from datasets import load_dataset

    parser = argparse.ArgumentParser(description="Write GSM8K as prompts to <output>/{train,test}.jsonl.")
    parser.add_argument("--output", type=Path, default=Path("outputs/gsm8k"))
    output = parser.parse_args().output
    for name, split in load_dataset("openai/gsm8k", "main").items():
        split.map(to_prompt, remove_columns=split.column_names).to_json(output / f"{name}.jsonl")


if __name__ == "__main__":
    main()
