"""Bad input: one sentence, from the config, before a model loads."""

import re
import warnings

import pytest

from trl_ext.trainers.grpo import GRPOConfig

NAMES = (
    "['best_of_group', 'gae', 'gpg', 'group_mean', 'group_relative', 'leave_one_out', 'length_weighted', 'pass_at_k', "
    "'prime', 'process_group_relative', 'reinforce', 'reinforce_plus_plus', 'reinforce_plus_plus_baseline', 'remax']"
)


def config(**options):
    return GRPOConfig("out", **{"bf16": False, "use_cpu": True, "report_to": "none", **options})


NOT_CALLABLE = 3


def clipped_mean(batch, *, limit=1.0):
    raise AssertionError("a config runs no function of the user's")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"advantage_estimator": "reinforce++"},
            f"'reinforce++' is neither one of {NAMES} nor a dotted path such as 'my_package.my_function'; did you "
            "mean 'reinforce_plus_plus'?",
        ),
        ({"advantage_estimator": 3}, "advantage_estimator must be a text, got 3. Leave it out for TRL's own."),
        ({"kl_estimator": False, "beta": 0.1}, "kl_estimator is no switch, got False."),
        ({"kl_estimator": True, "beta": 0.1}, "kl_estimator is no switch, got True."),
        ({"kl_placement": False, "beta": 0.1}, "kl_placement is no switch, got False."),
        ({"advantage_estimator": "reinforce", "step_ends_function": False}, "step_ends_function is no switch, got"),
        ({"kl_estimator": "k3", "beta": 0.1, "kl_target": 0.1, "kl_target_unit": 1}, "kl_target_unit must be a text"),
        (
            {"advantage_estimator": "no_such_package.fn"},
            "'no_such_package.fn' cannot be imported: there is no module 'no_such_package'.",
        ),
        (
            {"advantage_estimator": "test_config.no_such_function"},
            "'test_config.no_such_function' cannot be imported: module 'test_config' has no 'no_such_function'.",
        ),
        (
            {"advantage_estimator": "test_config.NOT_CALLABLE"},
            "'test_config.NOT_CALLABLE' is of type int, which cannot be called.",
        ),
        (
            {"advantage_estimator": "leave_one_out", "advantage_kwargs": {"gamma": 0.9}},
            "advantage_kwargs has no 'gamma' for 'leave_one_out'; it takes [].",
        ),
        (
            {"advantage_estimator": "pass_at_k", "advantage_kwargs": {"k": 8}},
            "advantage_estimator='pass_at_k' with advantage_kwargs={'k': 8} needs num_generations >= 9, got 8.",
        ),
        (
            {"advantage_estimator": "pass_at_k", "num_generations": 2},
            "advantage_estimator='pass_at_k' with advantage_kwargs=None needs num_generations >= 3, got 2.",
        ),
        (
            {"advantage_estimator": "pass_at_k", "advantage_kwargs": {"k": 0}},
            "k must be a whole number >= 1, got 0.",
        ),
        (
            {"advantage_estimator": "reinforce_plus_plus", "advantage_kwargs": {"kl_penalty": 1}},
            "advantage_kwargs has no 'kl_penalty' for 'reinforce_plus_plus'; it takes ['correction', 'discount', "
            "'gamma', 'norm', 'weighting'].",
        ),
        (
            {"advantage_estimator": "reinforce_plus_plus", "advantage_kwargs": "gamma=1"},
            "advantage_kwargs must be a mapping of option to value, got 'gamma=1'.",
        ),
        (
            {"advantage_estimator": "test_config.clipped_mean", "advantage_kwargs": {"limt": 0.5}},
            "advantage_kwargs has no 'limt' for 'test_config.clipped_mean'; it takes ['limit'].",
        ),
        (
            {"advantage_estimator": "reinforce", "advantage_kwargs": {"gamma": 1.5}},
            "gamma must be a number in (0, 1], got 1.5.",
        ),
        (
            {"advantage_estimator": "reinforce_plus_plus_baseline", "advantage_kwargs": {"gamma": 0.9}},
            "gamma must be 1.0 for 'reinforce_plus_plus_baseline'",
        ),
        ({"advantage_kwargs": {"gamma": 1.0}}, "advantage_kwargs is read only with advantage_estimator; set that too"),
        ({"reward_clip_range": [0.0, 1.0]}, "reward_clip_range is read only with advantage_estimator; set that too"),
        (
            {"advantage_estimator": "group_mean", "reward_clip_range": [1.0, 0.0]},
            "reward_clip_range must be two numbers, the lower one first, got [1.0, 0.0].",
        ),
        (
            {"advantage_estimator": "group_mean", "reward_clip_range": [float("nan"), 0.0]},
            "reward_clip_range must be two numbers, the lower one first, got [nan, 0.0].",
        ),
        (
            {"advantage_estimator": "group_mean", "reward_clip_range": 1.0},
            "reward_clip_range must be two numbers, the lower one first, got 1.0.",
        ),
        (
            {"advantage_estimator": "leave_one_out", "num_generations": 1},
            "advantage_estimator='leave_one_out' compares completions of one prompt and needs num_generations >= 2, "
            "got 1. These accept 1: 'reinforce', 'remax', 'reinforce_plus_plus'.",
        ),
        ({"num_generations": 1}, "GRPO requires at least 2 generations per prompt"),  # TRL's own
        (
            {"advantage_estimator": "reinforce", "num_generations": 1, "generation_batch_size": 12},
            "generation_batch_size (12) must be divisible by the global batch size",  # TRL's other checks stay
        ),
        (
            {"advantage_estimator": "group_relative", "scale_rewards": "batch"},
            "scale_rewards='batch' is not read when advantage_estimator is set. For 'none' use "
            "advantage_estimator='group_mean'; for 'batch' leave advantage_estimator unset.",
        ),
        (
            {"advantage_estimator": "group_relative", "scale_rewards": False},
            "scale_rewards='none' is not read when advantage_estimator is set.",
        ),
        (
            {"advantage_estimator": "group_mean", "multi_objective_aggregation": "normalize_then_sum"},
            "advantage_estimator works on the weighted sum of the rewards; "
            "multi_objective_aggregation='normalize_then_sum' is not available with it.",
        ),
        (
            {"advantage_estimator": "reinforce_plus_plus", "importance_sampling_level": "sequence"},
            "advantage_estimator='reinforce_plus_plus' gives one advantage per token, but importance_sampling_level="
            "'sequence' uses one ratio per completion: its gradient is that of the mean advantage, so the per-token "
            "signal vanishes. Use 'token'.",
        ),
        (
            {"advantage_estimator": "reinforce", "loss_type": "vespo"},
            "loss_type='vespo' reads the sign of one advantage per completion and is not available with "
            "advantage_estimator='reinforce'.",
        ),
        (
            {"advantage_estimator": "reinforce", "off_policy_mask_threshold": 0.5},
            "off_policy_mask_threshold reads the sign of one advantage per completion and is not available with "
            "advantage_estimator='reinforce'.",
        ),
        (
            {"advantage_estimator": "process_group_relative", "importance_sampling_level": "sequence"},
            "advantage_estimator='process_group_relative' gives one advantage per token, but importance_sampling_",
        ),
        (
            {"advantage_estimator": "process_group_relative", "loss_type": "vespo"},
            "loss_type='vespo' reads the sign of one advantage per completion and is not available with "
            "advantage_estimator='process_group_relative'.",
        ),
        (
            {"advantage_estimator": "process_group_relative", "off_policy_mask_threshold": 0.5},
            "off_policy_mask_threshold reads the sign of one advantage per completion",
        ),
        (
            {"advantage_estimator": "process_group_relative", "num_generations": 1},
            "advantage_estimator='process_group_relative' compares completions of one prompt and needs",
        ),
        (
            {"advantage_estimator": "process_group_relative", "kl_placement": "reward", "beta": 0.1},
            "'process_group_relative' normalises step rewards, and a KL penalty belongs to no step. Use "
            "kl_placement='loss'.",
        ),
        (
            {"advantage_estimator": "process_group_relative", "advantage_kwargs": {"credit": "max"}},
            "credit must be 'sum', 'mean', 'min' or 'softmin', got 'max'.",
        ),
        (
            {"advantage_estimator": "process_group_relative", "advantage_kwargs": {"gamma": 1.0}},
            "advantage_kwargs has no 'gamma' for 'process_group_relative'; it takes ['credit', 'temperature'].",
        ),
        (
            {"advantage_estimator": "process_group_relative", "step_separator": ""},
            "step_separator must be a text of at least one character, got ''.",
        ),
        (
            {"advantage_estimator": "process_group_relative", "step_separator": "\\n\\n"},
            r"step_separator holds a backslash and a letter where a control character is meant, got '\\n\\n'. Write "
            r""""\n\n" with double quotes in YAML, $'\n\n' in a shell.""",
        ),
        (
            {"advantage_estimator": "process_group_relative", "step_separator": "###\\n"},
            "step_separator holds a backslash and a letter",
        ),
        (
            {"advantage_estimator": "process_group_relative", "step_ends_function": "test_config.no_such_function"},
            "'test_config.no_such_function' cannot be imported: module 'test_config' has no 'no_such_function'.",
        ),
        (
            {"advantage_estimator": "reinforce", "step_ends_function": "test_config.config", "step_separator": "."},
            "step_ends_function finds the steps by itself, so step_separator is not read. Remove one.",
        ),
        ({"step_separator": "."}, "step_separator is read only with advantage_estimator; set that too, or remove it."),
        (
            {"process_weight": 0.5},
            "process_weight is read only with an advantage_estimator that takes it: 'process_group_relative', "
            "'prime'.",
        ),
        (
            {"advantage_estimator": "group_mean", "outcome_weight": 0},
            "outcome_weight is read only with an advantage_estimator that takes it: 'process_group_relative', "
            "'prime'.",
        ),
        (
            {"advantage_estimator": "process_group_relative", "outcome_weight": None},
            "outcome_weight must be a number, got None. Use 0 to leave a source out.",
        ),
        (
            {"advantage_estimator": "group_mean", "kl_placement": "reward"},
            "kl_estimator/kl_placement have no effect with beta=0.0: TRL loads no reference model. Set beta > 0 or "
            "remove them.",
        ),
        ({"kl_placement": "reward", "beta": -0.1}, "beta must be positive, got -0.1."),
        (
            {"kl_placement": "reward", "beta": 0.1},
            "kl_placement='reward' changes the advantages, so advantage_estimator must be set; 'group_relative' is "
            "TRL's own normalisation.",
        ),
        ({"kl_estimator": "k2", "beta": 0.0}, "kl_estimator/kl_placement have no effect with beta=0.0"),
        ({"kl_placement": "both", "beta": 0.1}, "kl_placement must be 'loss', 'reward' or 'sequence', got 'both'."),
        (
            {"kl_placement": "sequence", "kl_estimator": "k3", "beta": 0.1},
            "kl_placement='sequence' charges a token for the KL of later ones, which only 'exact' knows without the "
            "noise of their sampling. Remove kl_estimator='k3', or use kl_placement='reward' with 'k1'.",
        ),
        (
            {"kl_placement": "sequence", "beta": 0.1, "use_bias_correction_kl": False},
            "kl_placement='sequence' weights the KL of later tokens by the ratio of policy to sampler, without which "
            "its gradient is that of no KL where rollouts are reused. Remove use_bias_correction_kl=False.",
        ),
        ({"kl_placement": "sequence"}, "kl_estimator/kl_placement have no effect with beta=0.0"),
        (
            {"kl_placement": "sequence", "beta": 0.1, "sync_ref_model": True, "num_iterations": 2},
            "kl_placement='sequence' reads hidden states and head of one reference, and sync_ref_model changes it "
            "between them when rollouts are reused (num_iterations or steps_per_generation). Use ref_refresh_steps,",
        ),
        (
            {"kl_placement": "sequence", "beta": 0.1, "shared_prefix": True, "skip_zero_advantages": True},
            "skip_zero_advantages leaves out rows that the loss does not depend on, but with beta > 0 with the KL in "
            "the loss it depends on all rows.",
        ),
        (
            {"kl_estimator": "k4", "beta": 0.1},
            "'k4' is neither one of ['exact', 'k1', 'k2', 'k3'] nor a dotted path such as 'my_package.my_function'.",
        ),
        ({"kl_estimator": "no_such_package.kl", "beta": 0.1}, "there is no module 'no_such_package'."),
        (
            {"kl_estimator": "k1", "beta": 0.1, "use_bias_correction_kl": False},
            "kl_estimator='k1' in the loss with use_bias_correction_kl=False has an expected gradient of zero: noise, "
            "no penalty. Use 'k2' or 'k3', keep use_bias_correction_kl=True, or set kl_placement='reward'.",
        ),
        (
            {
                "kl_estimator": "k3",
                "kl_placement": "reward",
                "beta": 0.1,
                "advantage_estimator": "reinforce_plus_plus",
            },
            "kl_estimator='k3' in the reward is a biased penalty that vanishes near the reference. Only 'k1' is right "
            "in the reward; use it, or kl_placement='loss'.",
        ),
        ({"kl_estimator": "k2", "kl_placement": "reward", "beta": 0.1}, "kl_estimator='k2' in the reward is a biased"),
        (
            {"kl_estimator": "exact", "kl_placement": "reward", "beta": 0.1},
            "kl_estimator='exact' in the reward has no gradient for its own token. Use kl_placement='loss' or "
            "kl_estimator='k1'.",
        ),
        (
            {"kl_estimator": "exact", "beta": 0.1, "sync_ref_model": True, "num_iterations": 2},
            "kl_estimator='exact' reads hidden states and head of one reference, and sync_ref_model changes it "
            "between them when rollouts are reused",
        ),
        (
            {"kl_estimator": "exact", "beta": 0.1, "sync_ref_model": True, "steps_per_generation": 8},
            "kl_estimator='exact' reads hidden states and head of one reference, and sync_ref_model changes it "
            "between them when rollouts are reused (num_iterations or steps_per_generation). Use ref_refresh_steps, "
            "which moves it between generation batches.",
        ),
        (
            {"kl_target": 0.1, "beta": 0.1},
            "kl_target is read only with kl_estimator or kl_placement; set that too, or remove it.",
        ),
        ({"kl_estimator": "k3", "beta": 0.1, "kl_target": 0.0}, "kl_target must be a positive number, got 0.0."),
        (
            {"kl_estimator": "k3", "beta": 0.1, "kl_target": 0.1, "kl_horizon": -1},
            "kl_horizon must be a positive number, got -1.",
        ),
        (
            {"kl_estimator": "k3", "beta": 0.1, "kl_target": 0.1, "kl_target_unit": "row"},
            "kl_target_unit must be 'token' or 'sequence', got 'row'.",
        ),
        (
            {"kl_estimator": "k3", "beta": 0.1, "kl_horizon": 100.0},
            "kl_horizon is read only with kl_target; set that too, or remove it.",
        ),
        ({"kl_target_unit": "token"}, "kl_target_unit is read only with kl_target; set that too, or remove it."),
        ({"callback_paths": ["test_config.NoSuchCallback"]}, "'test_config.NoSuchCallback' cannot be imported"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"advantage_estimator": "length_weighted", "num_iterations": 2},
            "'length_weighted' is derived for exactly on-policy updates; rollouts are reused here.",
        ),
        (
            {"advantage_estimator": "reinforce_plus_plus", "beta": 0.1},
            "The paper of 'reinforce_plus_plus' puts k1 in the reward; with kl_placement unset the KL stays in TRL's "
            "loss.",
        ),
        (
            {"kl_estimator": "k1", "beta": 0.1},
            "kl_estimator='k1' in the loss is unbiased but has several times the gradient variance of 'k2' and 'k3', "
            "whose gradient is the same in expectation.",
        ),
        (
            {"kl_placement": "loss", "beta": 0.1, "use_bias_correction_kl": False},
            "kl_estimator='k3' with use_bias_correction_kl=False minimises the forward KL(ref‖policy), not "
            "KL(policy‖ref).",
        ),
        (
            {"kl_estimator": "k2", "beta": 0.1, "use_bias_correction_kl": False, "num_iterations": 2},
            "kl_estimator='k2' without use_bias_correction_kl is biased when rollouts are reused (num_iterations or "
            "steps_per_generation).",
        ),
        (
            {"kl_placement": "sequence", "beta": 0.1, "per_device_train_batch_size": 1, "steps_per_generation": 8},
            "kl_placement='sequence' takes its baseline from the other completions of a micro-batch, and "
            "per_device_train_batch_size=1 leaves none: the same gradient on average, with more noise.",
        ),
        (
            {"kl_placement": "sequence", "beta": 0.1, "importance_sampling_level": "sequence"},
            "The KL keeps the token-level ratio;",
        ),
        (
            {"kl_estimator": "exact", "beta": 0.1, "importance_sampling_level": "sequence"},
            "The KL keeps the token-level ratio; TRL's own path would use the sequence ratio, whose KL gradient is "
            "not that of KL(policy‖ref).",
        ),
        (
            {
                "kl_estimator": "test_config.config",
                "kl_placement": "reward",
                "beta": 0.1,
                "advantage_estimator": "group_mean",
            },
            "'test_config.config' is used as a reward penalty. Its gradient is that of the KL only if its value is "
            "log(policy/ref) per token.",
        ),
    ],
)
def test_questionable_options_are_warned_about(options, message):
    with pytest.warns(UserWarning, match=re.escape(message)):
        config(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"advantage_estimator": "length_weighted"},
        {"advantage_estimator": "reinforce_plus_plus", "advantage_kwargs": '{"weighting": "sequence"}'},
        {"advantage_estimator": "reinforce_plus_plus_baseline", "advantage_kwargs": {"gamma": 1.0}},
        {"advantage_estimator": "reinforce_plus_plus", "num_generations": 1, "per_device_train_batch_size": 1},
        {"advantage_estimator": "group_relative", "kl_placement": "reward", "beta": 0.1},
        {"kl_placement": "loss", "beta": 0.1},
        {"kl_estimator": "exact", "beta": 0.1, "kl_target": 0.05, "kl_horizon": 1000, "kl_target_unit": "sequence"},
        {"kl_estimator": "k2", "beta": 0.1, "use_bias_correction_kl": False},
        {"kl_estimator": "test_config.config", "beta": 0.1},
        {"kl_estimator": "exact", "beta": 0.1, "sync_ref_model": True},
        {"kl_estimator": "exact", "beta": 0.1, "ref_refresh_steps": 3, "num_iterations": 2},
        {"advantage_estimator": "test_config.clipped_mean", "advantage_kwargs": {"limit": 1e3}},
        {"advantage_estimator": "process_group_relative", "step_separator": "\\nabla"},
    ],
)
def test_good_options_are_accepted_in_silence(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(**options)


def test_the_error_of_a_module_that_fails_to_import_is_its_own(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_missing")
    monkeypatch.chdir(tmp_path)  # the working directory is searched, as on the command line
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        config(advantage_estimator="needs_more.fn")


def test_exact_is_refused_where_no_head_can_be_found_among_the_weights(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for option in ({"kl_estimator": "exact"}, {"kl_placement": "sequence"}):
        with pytest.raises(
            ValueError, match=r"of the reference, which FSDP1 keeps .* Use FSDP2 \(fsdp_version: 2\), "
        ):
            config(**option, beta=0.1)
    config(kl_estimator="k3", beta=0.1)
    monkeypatch.setenv("FSDP_VERSION", "2")
    config(kl_estimator="exact", beta=0.1)


@pytest.mark.parametrize("how", ["torch_compile", "torch_compile_backend", "ACCELERATE_DYNAMO_BACKEND"])
def test_exact_is_refused_in_a_compiled_model(monkeypatch, how):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR" if how.isupper() else "NO")
    options = {"torch_compile": {"torch_compile": True}, "torch_compile_backend": {how: "eager"}}.get(how, {})
    with pytest.raises(ValueError, match="kl_estimator='exact' reads hidden states through a hook, which a compiled"):
        config(kl_estimator="exact", beta=0.1, **options)


def test_the_help_shows_the_default_separator_readably():
    from trl import TrlParser

    text = " ".join(TrlParser([GRPOConfig]).format_help().split())
    assert r"Text that ends a step of a completion, for rewards of steps. Default: '\n', a line break." in text
    assert "a line break. (default" not in text
