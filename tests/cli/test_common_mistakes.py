"""
The mistakes that newcomers were seen to make, each with all that is said of it: one sentence, status 2, no traceback.

They are made with `--dry_run`, which finds them without a worker; those that need no model are found without it too.
"""

import json
from pathlib import Path

import pytest
import yaml
from tiny import PROMPTS
from tiny.command import SMALL

from trl_ext import cli

FUNCTIONS = """
def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def one_number(completions, **kwargs):
    return 1.0


def of_answer(completions, answer, **kwargs):
    return [1.0 for _ in answer]


def limited(batch, *, limit=1.0):
    return batch.rewards.sum(1).clamp(-limit, limit)
"""
ESTIMATORS = (
    "['best_of_group', 'gae', 'gpg', 'group_mean', 'group_relative', 'leave_one_out', 'length_weighted', 'pass_at_k', "
    "'prime', 'process_group_relative', 'reinforce', 'reinforce_plus_plus', 'reinforce_plus_plus_baseline', 'remax']"
)
LOSSES = "['bnpo', 'cispo', 'dapo', 'dr_grpo', 'grpo', 'luspo', 'sapo', 'vespo']"
PREFERENCE_LOSSES = (
    "['aot', 'aot_unpaired', 'apo_down', 'apo_zero', 'bco_pair', 'beta_dpo', 'cal_dpo', 'chipo', 'discopop', 'dpop', "
    "'exo_pair', 'gpo_exponential', 'gpo_hinge', 'gpo_logistic', 'gpo_savage', 'gpo_squared', "
    "'gpo_truncated_quadratic', 'hinge', 'ipo', 'length_dpo', 'margin_dpo', 'nca_pair', 'odpo', 'psipo', "
    "'psipo_identity', 'psipo_logit', 'robust', 'rpo_bwd_kl', 'rpo_fwd_kl', 'rpo_sq', 'rrhf', 'sft', 'sigmoid', "
    "'sigmoid_norm', 'simpo', 'sppo', 'sppo_hard']"
)
OR_A_PATH = "nor a dotted path such as 'my_package.my_function'"

# Command, what is changed in a right YAML file, further words, and the sentence.
MISTAKES = {
    "an unknown key": (
        "grpo", {"advantage_estimatr": "reinforce"}, [],
        "there is no option 'advantage_estimatr' for `trl-ext grpo` or `accelerate launch`; did you mean "
        "'advantage_estimator'?",
    ),
    "an unknown flag": (
        "grpo", {}, ["--kl-placment", "reward"],
        "there is no option 'kl-placment' for `trl-ext grpo` or `accelerate launch`; did you mean 'kl_placement'?",
    ),
    "the name in the paper": (
        "grpo", {"advantage_estimator": "reinforce++"}, [],
        f"advantage_estimator 'reinforce++' is neither one of {ESTIMATORS} {OR_A_PATH}; did you mean "
        "'reinforce_plus_plus'?",
    ),
    "an estimator of the KL that nobody has": (
        "grpo", {"kl_estimator": "k4", "beta": 0.1}, [],
        f"kl_estimator 'k4' is neither one of ['exact', 'k1', 'k2', 'k3'] {OR_A_PATH}.",
    ),
    "a placement in the plural": (
        "grpo", {"kl_placement": "rewards", "beta": 0.1}, [],
        "kl_placement must be 'loss', 'reward' or 'sequence', got 'rewards'.",
    ),
    "a penalty without a coefficient": (
        "grpo", {"advantage_estimator": "reinforce_plus_plus", "kl_placement": "reward", "beta": 0.0}, [],
        "kl_estimator/kl_placement have no effect with beta=0.0: TRL loads no reference model. Set beta > 0 or remove "
        "them.",
    ),
    "a group that does not divide the batch": (
        "grpo", {"num_generations": 7}, [], "generation_batch_size (4) must be divisible by num_generations (7).",
    ),
    "a group of one that is compared": (
        "grpo", {"num_generations": 1, "advantage_estimator": "group_mean"}, [],
        "advantage_estimator='group_mean' compares completions of one prompt and needs num_generations >= 2, got 1. "
        "These accept 1: 'reinforce', 'remax', 'reinforce_plus_plus'.",
    ),
    "a wrong key of the estimator": (
        "grpo", {"advantage_estimator": "reinforce_plus_plus", "advantage_kwargs": {"weights": 1}}, [],
        "advantage_kwargs has no 'weights' for 'reinforce_plus_plus'; it takes ['correction', 'discount', 'gamma', "
        "'norm', 'weighting'].",
    ),
    "a wrong key of an estimator of one's own": (
        "grpo", {"advantage_estimator": "my_functions.limited", "advantage_kwargs": {"limits": 1}}, [],
        "advantage_kwargs has no 'limits' for 'my_functions.limited'; it takes ['limit'].",
    ),
    "a weight that nobody reads": (
        "grpo", {"process_weight": 0.5}, [],
        "process_weight is read only with an advantage_estimator that takes it: 'process_group_relative', 'prime'.",
    ),
    "a function for steps that is not there": (
        "grpo", {"advantage_estimator": "process_group_relative", "step_ends_function": "my_functions.ends"}, [],
        "step_ends_function 'my_functions.ends' cannot be imported: module 'my_functions' has no 'ends'.",
    ),
    "a mapping that is none": (
        "grpo", {"advantage_kwargs": "{limit"}, [],
        "advantage_kwargs cannot be read as a mapping, got '{limit'. Write '{option: value}' or "
        "'{\"option\": \"value\"}', in quotes on a command line.",
    ),
    "a loss that nobody has": (
        "grpo", {"loss_type": "dapoo"}, [], f"loss_type must be one of {LOSSES}, got 'dapoo'; did you mean 'dapo'?",
    ),
    "a loss of DPO in GRPO": (
        "grpo", {"loss_type": "psipo_identity"}, [],
        f"loss_type must be one of {LOSSES}, got 'psipo_identity'; that is a loss of `trl-ext dpo`.",
    ),
    "a loss of DPO misspelt": (
        "dpo", {"loss_type": ["ipoo"]}, [],
        f"loss_type 'ipoo' is neither one of {PREFERENCE_LOSSES} {OR_A_PATH}; did you mean 'ipo'?",
    ),
    "options of a loss without its name": (
        "dpo", {"loss_type": ["psipo_logit"], "loss_kwargs": {"eps": 0.1}}, [],
        "loss_kwargs must map entries of loss_type to mappings of option to value, such as {'psipo_logit': {'eps': "
        "0.01}}, got {'eps': 0.1}.",
    ),
    "options of GRPO in DPO": (
        "dpo", {"reward_funcs": ["my_functions.length"]}, [],
        "'reward_funcs' is an option of `trl-ext grpo`, not of `trl-ext dpo`.",
    ),
    "a file without --config": (
        "grpo", {}, ["mine.yaml"],
        "'mine.yaml' is neither an option nor the value of one. A YAML file is given with --config.",
    ),
    "a reward function that is not there": (
        "grpo", {"reward_funcs": ["my_functions.lenght"]}, [],
        "reward_funcs 'my_functions.lenght' cannot be imported: module 'my_functions' has no 'lenght'; did you mean "
        "'length'?",
    ),
    "a module that is not there": (
        "grpo", {"reward_funcs": ["nosuch.f"]}, [],
        "reward_funcs 'nosuch.f' cannot be imported: there is no module 'nosuch'. Install it, or start the run from "
        "the folder that contains it.",
    ),
    "a file in place of a function": (
        "grpo", {"reward_funcs": ["my_functions.py"]}, [],
        "reward_funcs 'my_functions.py' cannot be imported: module 'my_functions' has no 'py'.",
    ),
    "a function in place of a list": (
        "grpo", {"reward_funcs": "my_functions.length"}, [],
        "reward_funcs must be a list, got 'my_functions.length'; write reward_funcs: [my_functions.length].",
    ),
    "precision that the machine does not have": (
        "grpo", {"bf16": None, "use_cpu": None}, [],
        "bf16, which is on by default, needs a GPU that has it, and there is none. Add --bf16 false, or --use_cpu to "
        "train on the CPU in spite of it.",
    ),
    # With a model
    "another name of the column": (
        "grpo", {"dataset_name": "questions.jsonl"}, [],
        "train_dataset has no column 'prompt'; it has ['question']. Rename one: "
        "dataset.rename_column('question', 'prompt').",
    ),
    "data of GRPO in DPO": (
        "dpo", {"dataset_name": "prompts.jsonl"}, [],
        "train_dataset has no column 'chosen'; it has ['prompt']. Rename a column to 'chosen', or make it with "
        "dataset.map.",
    ),
    "a column misspelt": (
        "dpo", {"loss_type": ["psipo_logit"], "preference_prob_column": "probb"}, [],
        "train_dataset has no column 'probb'; it has ['chosen', 'prob', 'prompt', 'rejected']; did you mean 'prob'?",
    ),
    "one number for all": (
        "grpo", {"reward_funcs": ["my_functions.one_number"], "advantage_estimator": "group_mean"}, [],
        "Reward function 'one_number' returned 1.0; it must return a list, one reward per completion.",
    ),
    "one number for all, with TRL's own advantages": (
        "grpo", {"reward_funcs": ["my_functions.one_number"]}, [],
        "reward function 'one_number': TypeError: 'float' object is not iterable",
    ),
    "a column that the data do not have": (
        "grpo", {"reward_funcs": ["my_functions.of_answer"], "advantage_estimator": "group_mean"}, [],
        "Reward function 'of_answer' raised TypeError: of_answer() missing 1 required positional argument: 'answer'",
    ),
    "outcomes where steps are needed": (
        "grpo", {"advantage_estimator": "process_group_relative"}, [],
        "advantage_estimator='process_group_relative' needs a reward function that returns one list per completion; "
        "got numbers only.",
    ),
    "a model that does not exist": (
        "grpo", {"model_name_or_path": "nobody/nosuch"}, [],
        "the model, or the tokenizer, 'nobody/nosuch' cannot be opened: We couldn't connect to "
        "'https://huggingface.co' to load the files, and couldn't find them in the cached files.",
    ),
    "data that do not exist": (
        "grpo", {"dataset_name": "nobody/nosuch"}, [],
        "the data set 'nobody/nosuch' cannot be opened: Couldn't reach 'nobody/nosuch' on the Hub "
        "(OfflineModeIsEnabled).",
    ),
}  # fmt: skip
WITH_A_MODEL = [*MISTAKES][[*MISTAKES].index("another name of the column") :]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """Right data, right functions, and two right runs to make mistakes in."""
    place = tmp_path_factory.mktemp("place")
    names = {"prompts": ["prompt"], "questions": ["question"], "pairs": ["prompt", "chosen", "rejected"]}
    for file, columns in names.items():
        rows = [{"prob": 0.9} | dict.fromkeys(columns, p) if "chosen" in columns else {columns[0]: p} for p in PROMPTS]
        (place / f"{file}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "my_functions.py").write_text(FUNCTIONS)
    both = {"model_name_or_path": tiny_model, **SMALL, "use_cpu": True}
    grpo = {**both, "dataset_name": "prompts.jsonl", "reward_funcs": ["my_functions.length"], "num_generations": 4}
    dpo = {**both, "dataset_name": "pairs.jsonl", "max_completion_length": None}
    return place, {"grpo": grpo, "dpo": dpo}


@pytest.fixture
def make(place, monkeypatch, capsys):
    """`make(command, options, words)`: the exit code and the lines of standard error."""
    folder, runs = place
    monkeypatch.chdir(folder)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda args: pytest.fail("a worker was started"))

    def run(command, options, words):
        chosen = {name: value for name, value in (runs[command] | options).items() if value is not None}
        Path("run.yaml").write_text(yaml.safe_dump(chosen))
        code = cli.main([command, "--config", "run.yaml", *words])
        assert not Path("out").exists()
        return code, capsys.readouterr().err.strip().splitlines()

    return run


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_exact_sentence_and_status_2(make, name):
    command, options, words, sentence = MISTAKES[name]
    assert make(command, options, ["--dry_run", *words]) == (2, [f"trl-ext: error: {sentence}"])


@pytest.mark.parametrize("name", [name for name in MISTAKES if name not in WITH_A_MODEL])
def test_what_needs_no_model_is_said_before_a_worker_starts(make, name):
    command, options, words, sentence = MISTAKES[name]
    assert make(command, options, words) == (2, [f"trl-ext: error: {sentence}"])


@pytest.mark.parametrize("command", ["grpo", "dpo"])
def test_without_a_mistake_it_is_ready(make, command):
    assert make(command, {}, ["--dry_run"])[0] == 0
