"""Trains one step and saves it, then waits for ever in a reward function: `hanging.py MODEL FOLDER sync|async`."""

import asyncio
import sys
import time

from tiny import build, digits

from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

CALLS = []


def waits() -> bool:
    CALLS.append(1)
    if len(CALLS) == 2:
        print("hanging", flush=True)
    return len(CALLS) == 2


def sync(completions, **kwargs):
    if waits():
        time.sleep(3600)
    return digits(completions)


async def asynchronous(completions, **kwargs):
    if waits():
        await asyncio.sleep(3600)
    return digits(completions)


if __name__ == "__main__":
    model, folder, kind = sys.argv[1:]
    function = sync if kind == "sync" else asynchronous
    options = {"advantage_estimator": "group_relative", "save_strategy": "steps", "save_steps": 1}
    build(GRPOTrainer, GRPOConfig, model, folder, reward_funcs=function, **options).train()
