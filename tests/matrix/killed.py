"""
Trains and is killed while it saves its second checkpoint, once at every place of it:

    python killed.py MODEL FOLDER
"""

import os
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path

import tiny
import transformers

from trl_ext.trainers import interruptions
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

OPTIONS = {
    "advantage_estimator": "reinforce_plus_plus",
    "kl_placement": "reward",
    "beta": 0.1,
    "kl_target": 0.01,
    "kl_horizon": 100.0,
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 2,
}


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_state(state, path):
    with open(path, "w") as file:
        file.write('{"global_step": 4, "log_history": [{')
    die()


def second(function, then=None):
    """`function` in the first checkpoint, in the second one `then`, or the function and death."""

    def called(*args, **kwargs):
        count.append(1)
        if len(count) == 2 and then is not None:
            then(*args, **kwargs)
        result = function(*args, **kwargs)
        if len(count) == 2:
            die()
        return result

    count: list[int] = []
    return called


def before_the_controller(trainer):
    interruptions.begin_checkpoint = second(interruptions.begin_checkpoint)


def after_the_controller(trainer):
    trainer.save_model = second(trainer.save_model, then=die)


def after_the_weights(trainer):
    trainer.save_model = second(trainer.save_model)


def after_the_optimizer(trainer):
    trainer._save_optimizer_and_scheduler = second(trainer._save_optimizer_and_scheduler)


def inside_the_state(trainer):
    state = transformers.TrainerState
    state.save_to_json = second(state.save_to_json, then=half_a_state)


def after_the_state(trainer):
    state = transformers.TrainerState
    state.save_to_json = second(state.save_to_json)


PLACES = {
    place.__name__: place
    for place in (
        before_the_controller,
        after_the_controller,
        after_the_weights,
        after_the_optimizer,
        inside_the_state,
        after_the_state,
    )
}

if __name__ == "__main__":
    model, folder = sys.argv[1], Path(sys.argv[2])
    for name, place in PLACES.items():
        child = os.fork()
        if child == 0:
            with redirect_stdout(None):
                trainer = tiny.build(GRPOTrainer, GRPOConfig, model, folder / name, **OPTIONS)
                place(trainer)
                trainer.train()
            os._exit(1)  # it should be dead
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, status)
