"""Runs that learn nothing although no error says so: one warning each, from what is logged anyway."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import TrainerCallback

from .input_checks import quoted, warn_user

# The evidence: so many optimizer steps and, where the config says how many there are, completions.
STEPS, COMPLETIONS = 10, 256
STEPS_OF_THE_REFERENCE = 100
SAME_MODEL = 1e-9  # a KL in nats below which policy and reference are one model, but for rounding


class NothingLearned(TrainerCallback):
    """
    Warns of a run that samples completions and learns nothing from them. Reads the logged metrics, which are of all
    processes, on the main process alone; nothing is gathered, drawn or changed. Each warning comes once per run, a run
    that goes on from a checkpoint included, and only if none that explains it has come:

    | what | evidence |
    |---|---|
    | the reward functions return one and the same number | since the start, 10 steps and 256 completions |
    | all advantages are 0 | the same |
    | all completions are cut off at `max_completion_length` | in 10 steps on end and 256 completions |
    | the KL to the reference is 0 | in 100 steps on end |

    A function that returns one number once the task is solved is not what this is about: "since the start" ends with
    the first log entry in which rewards, or advantages, differ.
    """

    def __init__(self):
        self._forget(0)

    def _forget(self, step: int) -> None:
        self._first: dict[str, Any] | None = None  # the first entry with a reward
        self._last = step  # of the last entry
        self._since: dict[str, int] = {}  # sign → step after which it has held
        self._over: set[str] = set()  # signs that were warned of or can no longer be seen
        self._said: set[str] = set()

    def on_train_begin(self, args, state, control, **kwargs):
        self._forget(0 if state.log_history else state.global_step)
        for entry in state.log_history:  # of a run that goes on, which has said what there was to say
            self._due(entry, args)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            for sentence in self._due({**(logs or {}), "step": state.global_step}, args):
                warn_user(sentence)

    def _due(self, entry: dict[str, Any], args: Any) -> list[str]:
        """The sentences for which this log entry completes the evidence."""
        if self._first is None and not _is_missing(entry.get("reward")):
            self._first = entry
        sentences = []
        for sign in SIGNS:
            holds = None if sign.name in self._over else sign.holds(entry, self._first, args)
            if holds is False:
                self._since.pop(sign.name, None)
                self._over |= {sign.name} if sign.from_start else set()
            elif holds:
                steps = entry["step"] - self._since.setdefault(sign.name, self._last)
                if steps >= sign.steps and _completions(args, steps) >= sign.completions:
                    self._over.add(sign.name)
                    if not self._said.intersection(sign.explained_by):
                        self._said.add(sign.name)
                        sentences.append(sign.sentence(entry, steps, args))
        if any(name in entry for name in ("reward", "kl", "kl/reference")):
            self._last = entry["step"]
        return sentences


class Sign(NamedTuple):
    """What one warning is about."""

    name: str
    holds: Callable[[dict, dict | None, Any], bool | None]  # (entry, first entry, config); `None`: it does not say
    sentence: Callable[[dict, int, Any], str]  # (entry, steps, config)
    from_start: bool = True  # whether one entry in which it does not hold ends the watch
    steps: int = STEPS
    completions: int = COMPLETIONS
    explained_by: tuple[str, ...] = ()


def _completions(args: Any, steps: int) -> float:
    """Completions that so many optimizer steps see, of all processes; infinite where the config does not say."""
    size = getattr(args, "generation_batch_size", None)
    if size is None:
        return math.inf
    micro_batches = steps * args.gradient_accumulation_steps
    return size * math.ceil(micro_batches / (args.steps_per_generation * args.num_iterations))


def _counted(args: Any, steps: int) -> str:
    completions = _completions(args, steps)
    return "all completions" if completions == math.inf else f"all {completions} completions"


# Rewards


def _rewards(entry: dict[str, Any], weights: list[float] | None) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of what each function with a weight returned, of those that scored anything."""
    names = [name.removeprefix("rewards/") for name in entry if name.startswith("rewards/")]
    if any(name.endswith("/mean") for name in names):
        names = [name.removesuffix("/mean") for name in names if name.endswith("/mean")]
        found = {name: (entry[f"rewards/{name}/mean"], entry.get(f"rewards/{name}/std")) for name in names}
    else:  # TRL's asynchronous trainer: of a group, all functions together
        found = {name: (entry[f"rewards/{name}"], entry.get("reward_std")) for name in names}
    if weights is not None and len(weights) == len(found):
        found = {name: found[name] for name, weight in zip(list(found), weights, strict=True) if weight}
    return {name: values for name, values in found.items() if not any(map(_is_missing, values))}  # type: ignore[misc]


def _is_missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _constant_rewards(entry: dict, first: dict | None, args: Any) -> bool | None:
    if first is None or _is_missing(entry.get("reward")):
        return None
    weights = getattr(args, "reward_weights", None)
    now, before = _rewards(entry, weights), _rewards(first, weights)
    if not now or now.keys() != before.keys():  # one has begun to score something, or ceased to
        return False
    if entry.get("process/frac_groups_zero_std", 1.0) != 1.0:  # of a function of steps, the mean alone is constant
        return False
    some_cut_off = 0.0 < entry.get("completions/clipped_ratio", 0.0) < 1.0
    if some_cut_off and getattr(args, "missing_eos_penalty", None) is not None:
        return False
    near = [
        std <= 1e-6 * abs(mean) and math.isclose(mean, before[name][0], rel_tol=1e-6)
        for name, (mean, std) in now.items()
    ]
    return all(near)


def _of_constant_rewards(entry: dict, steps: int, args: Any) -> str:
    found = _rewards(entry, getattr(args, "reward_weights", None))
    values = " and ".join(f"{mean:.4g}" if mean % 1 else str(float(mean)) for mean, _ in found.values())
    who = f"Reward function {quoted(found)}" if len(found) == 1 else f"Reward functions {quoted(found)}"
    return (
        f"{who} returned {values} for {_counted(args, steps)} of the first {steps} steps: nothing to learn. See what "
        "is sampled with log_completions: true; does the function find there what it looks for, and can a completion "
        "of this model earn another reward?"
    )


# Advantages


def _no_advantages(entry: dict, first: dict | None, args: Any) -> bool | None:
    if "advantages/std" in entry:
        found = [entry["advantages/mean"], entry["advantages/std"]]
        return None if any(map(_is_missing, found)) else not any(found)
    if "frac_reward_zero_std" in entry:
        share = entry["frac_reward_zero_std"]
        return None if _is_missing(share) else share == 1.0
    std = entry.get("reward_std")  # of the asynchronous trainer, the mean over the groups
    return None if _is_missing(std) else std == 0.0


def _of_no_advantages(entry: dict, steps: int, args: Any) -> str:
    name = getattr(args, "advantage_estimator", None)
    option = "" if name is None else f" of advantage_estimator={name!r}"
    why = "the completions of a prompt all earn one reward. Does a reward function read the prompt alone?"
    if entry.get("frac_reward_zero_std", 1.0) != 1.0:
        why = "and yet rewards differ. Look at advantage_kwargs, reward_clip_range, process_weight, outcome_weight."
    return f"All advantages{option} were 0 in the first {steps} steps, so that nothing is learned: {why}"


# Length


def _all_cut_off(entry: dict, first: dict | None, args: Any) -> bool | None:
    ratio = entry.get("completions/clipped_ratio")
    return None if _is_missing(ratio) else ratio == 1.0


def _of_all_cut_off(entry: dict, steps: int, args: Any) -> str:
    masked = ", and mask_truncated_completions leaves them out of the loss"
    return (
        f"{_counted(args, steps).capitalize()} of the last {steps} steps were cut off at max_completion_length="
        f"{args.max_completion_length}{masked if getattr(args, 'mask_truncated_completions', False) else ''}. Raise "
        "it, or see with log_completions: true whether the model ever writes its end-of-sequence token."
    )


# Reference


def _same_as_reference(entry: dict, first: dict | None, args: Any) -> bool | None:
    if not getattr(args, "beta", 0.0):
        return None
    if entry["step"] <= (getattr(args, "critic_warmup_steps", None) or 0):
        return False  # the policy is meant to stay as it is
    kl = entry.get("kl/reference", entry.get("kl"))  # the asynchronous trainer's `kl` is another one
    return None if kl is None or _is_missing(kl) else abs(kl) <= SAME_MODEL


def _of_same_as_reference(entry: dict, steps: int, args: Any) -> str:
    names = ["beta", "kl_estimator", "kl_placement", "kl_target", "ref_refresh_steps", "sync_ref_model"]
    options = [f"{name}={value!r}" for name in names if (value := getattr(args, name, None))]
    return (
        f"The KL to the reference was 0 in the last {steps} steps ({', '.join(options)}): policy and reference are "
        f"the same model. Does the policy move? learning_rate is {entry.get('learning_rate', args.learning_rate)}; "
        "weights that are kept in bfloat16 do not take up small updates."
    )


SIGNS = (
    Sign("rewards", _constant_rewards, _of_constant_rewards),
    Sign("advantages", _no_advantages, _of_no_advantages, explained_by=("rewards",)),
    Sign("length", _all_cut_off, _of_all_cut_off, from_start=False),
    Sign(
        "reference",
        _same_as_reference,
        _of_same_as_reference,
        from_start=False,
        steps=STEPS_OF_THE_REFERENCE,
        completions=0,
        explained_by=("rewards", "advantages", "length"),
    ),
)
