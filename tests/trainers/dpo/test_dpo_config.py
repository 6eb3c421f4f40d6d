"""DPOConfig: bad input is refused in one sentence, before a model loads."""

import re
import warnings

import pytest
import torch

from trl_ext.functional.preference import PREFERENCE_LOSSES
from trl_ext.trainers.dpo import DPOConfig
from trl_ext.trainers.dpo.losses import SAME_AS_TRL, TRL_LOSSES

REWARDS = {"chosen_reward_column": "good", "rejected_reward_column": "bad"}
IPO = {"loss_type": ["psipo_identity"]}
BETA_DPO = {"loss_type": ["beta_dpo"]}


def config(**options):
    return DPOConfig("out", **{"bf16": False, "use_cpu": True, "report_to": "none", **options})


def infinite_at_one(prob):
    return -torch.log(1 - prob)


def pair_loss(batch, *, strength=1.0):
    return strength * batch.margin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["dpo"]}, "'dpo' is neither one of ['aot', 'aot_unpaired', 'apo_down'"),
        ({"loss_type": ["no_such_module.loss"]}, "'no_such_module.loss' cannot be imported"),
        ({**IPO, "loss_weights": [1.0, 2.0]}, "`loss_weights` must have the same length as `loss_type`"),  # TRL's
        ({**IPO, "logp_reduction": "max"}, "logp_reduction must be 'sum' or 'mean', got 'max'."),
        ({**IPO, "beta": 0.0}, "beta must be positive, got 0.0."),
        ({**IPO, "reward_margin_scale": "1"}, "reward_margin_scale must be a finite number and not 0, got '1'."),
        (
            {"loss_type": ["rpo_sq"], **REWARDS, "reward_margin_scale": 0},
            "reward_margin_scale must be a finite number and not 0, got 0.",
        ),
        (
            {"loss_type": ["rpo_sq"], "chosen_reward_column": "good", "rejected_reward_column": "good"},
            "chosen_reward_column and rejected_reward_column are both 'good', so that every difference of scores is",
        ),
        ({"loss_type": ["chipo"], "loss_kwargs": {"chipo": {"bound": -1}}}, "bound must be positive, got -1."),
        ({"loss_type": ["dpop"], "loss_kwargs": {"dpop": {"lam": -5}}}, "lam must be at least 0, got -5."),
        (
            {"loss_type": ["cal_dpo"], "loss_kwargs": {"cal_dpo": {"coefficient": -1}}},
            "coefficient must be at least 0, got -1.",
        ),
        ({"loss_type": ["dpop", "simpo", "dpop"]}, "loss_type has 'dpop' 2 times; name it once, with the sum of its"),
        (
            {"loss_type": ["gpo_logistc"]},
            "nor a dotted path such as 'my_package.my_function'; did you mean 'gpo_logistic'?",
        ),
        (
            {"loss_type": ["psipo"], "psi": "math.log"},
            "Ψ must map a tensor of probabilities, (B,), to a tensor of that shape, got a float.",
        ),
        (
            {"loss_type": ["psipo"], "loss_kwargs": {"psipo": {"psi": "torch.sin"}}},
            "psi is an option of its own and not one of loss_kwargs; write psi: torch.sin beside loss_type.",
        ),
        # as YAML and the shell write them
        ({**IPO, "psi": False}, "psi is no switch, got False. For its default leave it out, or write null."),
        ({**IPO, "callback_paths": True}, "callback_paths is no switch, got True."),
        ({"loss_type": ["dpop"], "loss_kwargs": "{dpop: {lam: 5"}, "loss_kwargs cannot be read as a mapping, got"),
        (
            {**IPO, "reward_margin_scale": 2.0},
            "reward_margin_scale is the factor on the difference of two scores; set chosen_reward_column and",
        ),
        ({**IPO, "callback_paths": ["test_dpo_config.Nothing"]}, "'test_dpo_config.Nothing' cannot be imported"),
        ({**IPO, "callback_paths": "Nothing"}, "'Nothing' is not a dotted path such as 'my_package.my_function'."),
        ({**IPO, "callback_paths": ["push-to.hub"]}, "'push-to.hub' is not a dotted path such as"),
        # psi
        ({**IPO, "psi": "identity"}, "psi and loss_type 'psipo' need each other; set both, or neither."),
        ({"loss_type": ["psipo"]}, "psi and loss_type 'psipo' need each other; set both, or neither."),
        (
            {"loss_type": ["psipo"], "psi": "cubic"},
            "'cubic' is neither one of ['identity', 'logit'] nor a dotted path",
        ),
        (
            {"loss_type": ["psipo_logit"]},
            "loss_type 'psipo_logit' needs preference_prob_column: its Ψ is infinite at 0 or 1, and with hard labels "
            "E[Ψ(label)] = Ψ(0) + (Ψ(1) - Ψ(0))·p, so a finite Ψ collapses to IPO and an infinite one diverges.",
        ),
        ({"loss_type": ["psipo"], "psi": "logit"}, "loss_type 'psipo' needs preference_prob_column"),
        (
            {"loss_type": ["psipo"], "psi": "test_dpo_config.infinite_at_one"},
            "loss_type 'psipo' needs preference_prob_column",
        ),
        # what TRL's names cannot do
        (
            {"loss_type": ["exo_pair"], "logp_reduction": "mean"},
            "loss_type 'exo_pair' is TRL's and cannot take logp_reduction, preference_prob_column or "
            "pair_weight_column; only ['hinge', 'ipo', 'sigmoid', 'sigmoid_norm'] of TRL's names can.",
        ),
        (
            {"loss_type": ["sigmoid_norm"], "logp_reduction": "sum"},
            "loss_type 'sigmoid_norm' is the mean over tokens and contradicts logp_reduction='sum'; use 'sigmoid'",
        ),
        (
            {"loss_type": ["sigmoid", "sft"], "pair_weight_column": "w"},
            "loss_type 'sft' is TRL's, which cannot weight it; remove it or pair_weight_column.",
        ),
        (
            {"loss_type": ["gpo_hinge", "sft"], "use_weighting": True},
            "loss_type 'sft' is TRL's, which cannot weight it; remove it or use_weighting.",
        ),
        (
            {**IPO, "f_divergence_type": "forward_kl"},
            "f_divergence_type='forward_kl' is not available with the losses of trl_ext (['psipo_identity'])",
        ),
        # columns
        (
            {"loss_type": ["rpo_sq"], "chosen_reward_column": "good"},
            "chosen_reward_column and rejected_reward_column must be set both or neither, got 'good' and None.",
        ),
        (
            {"loss_type": ["odpo"]},
            "loss_type 'odpo' compares scores of the two completions; set chosen_reward_column and "
            "rejected_reward_column.",
        ),
        ({**IPO, **REWARDS}, "The reward columns are read by none of loss_type ['psipo_identity']; remove them."),
        (
            {"loss_type": ["dpop"], "preference_prob_column": "p"},
            "preference_prob_column is read by none of loss_type ['dpop']; remove it.",
        ),
        ({"loss_type": ["sft"], "logp_reduction": "sum"}, "have no effect with loss_type ['sft']"),
        (REWARDS, "have no effect with loss_type ['sigmoid']"),
        # label smoothing
        ({**IPO, "label_smoothing": 1.5}, "label_smoothing must be between 0 and 1, got 1.5."),
        (
            {"loss_type": ["simpo"], "label_smoothing": 0.1},
            "label_smoothing is not read by loss_type 'simpo'; set it to 0.",
        ),
        # keyword arguments
        ({**IPO, "loss_kwargs": [1]}, "loss_kwargs must map entries of loss_type to mappings of option to value"),
        ({**IPO, "loss_kwargs": {"psipo_identity": 1}}, "loss_kwargs must map entries of loss_type to mappings"),
        (
            {**IPO, "loss_kwargs": {"dpop": {"lam": 5.0}}},
            "loss_kwargs is for 'dpop', which is not among the losses of trl_ext in loss_type (['psipo_identity']).",
        ),
        (
            {"loss_type": ["dpop"], "loss_kwargs": {"dpop": {"lambda": 5.0}}},
            "loss_kwargs has no 'lambda' for 'dpop'; it takes ['lam'].",
        ),
        (
            {"loss_type": ["dpop"], "loss_kwargs": {"dpop": {"lam": "5"}}},
            "loss_kwargs 'lam' of 'dpop' must be a finite number, got '5'.",
        ),
        (
            {
                "loss_type": ["psipo_logit"],
                "preference_prob_column": "p",
                "loss_kwargs": {"psipo_logit": {"eps": 0.7}},
            },
            "eps must be between 0 and 0.5, got 0.7.",
        ),
        (
            {"loss_type": ["test_dpo_config.pair_loss"], "loss_kwargs": {"test_dpo_config.pair_loss": {"power": 2}}},
            "loss_kwargs has no 'power' for 'test_dpo_config.pair_loss'; it takes ['strength'].",
        ),
        # a beta of the batch
        (
            {**BETA_DPO, "loss_kwargs": {"beta_dpo": {"alpha": -0.5}}},
            "alpha must be at least 0, got -0.5.",
        ),
        (
            {**BETA_DPO, "loss_kwargs": {"beta_dpo": {"keep": 0.0}}},
            "keep must be above 0 and at most 1, got 0.0.",
        ),
        (
            {**BETA_DPO, "loss_kwargs": {"beta_dpo": {"keep": 1.5}}},
            "keep must be above 0 and at most 1, got 1.5.",
        ),
        (
            {**BETA_DPO, "loss_kwargs": {"beta_dpo": {"rho": 0.2}}},
            "loss_kwargs has no 'rho' for 'beta_dpo'; it takes ['alpha', 'keep'].",
        ),
        (
            {**BETA_DPO, "beta": 0.0005},
            "beta must be at least 0.001, the least that beta_dpo uses, got 0.0005.",
        ),
        (
            {**BETA_DPO, "label_smoothing": 0.1},
            "label_smoothing is not read by loss_type 'beta_dpo'; set it to 0.",
        ),
        (
            {**BETA_DPO, "preference_prob_column": "p"},
            "preference_prob_column is read by none of loss_type ['beta_dpo']; remove it.",
        ),
        # without a reference
        (
            {"loss_type": ["simpo"], "precompute_ref_log_probs": True},
            "precompute_ref_log_probs has no effect: loss_type ['simpo'] reads no reference model.",
        ),
        ({"loss_type": ["simpo", "sft"], "sync_ref_model": True}, "sync_ref_model has no effect: loss_type"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**options)


SIGMOID = (
    "TRL ignores label_smoothing with loss_type 'sigmoid'. For conservative DPO use loss_type 'gpo_logistic' (the "
    "same loss with soft labels)."
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sigmoid", SIGMOID),
        (
            "hinge",
            "with loss_type 'hinge'. For soft labels use loss_type 'gpo_hinge' (the same loss with soft labels).",
        ),
        ("ipo", "For soft labels use loss_type 'psipo_identity' and logp_reduction 'mean' (the same loss"),
        ("sigmoid_norm", "For soft labels use loss_type 'gpo_logistic' and logp_reduction 'mean' (the same loss"),
    ],
)
def test_ignored_label_smoothing_is_mentioned_once(name, message):
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        config(loss_type=[name], label_smoothing=0.1)
    assert len([w for w in caught if "label_smoothing" in str(w.message)]) == 1


@pytest.mark.parametrize(
    "options",
    [
        *({"loss_type": [name]} for name in TRL_LOSSES),
        *({"loss_type": [name], "label_smoothing": 0.1} for name in ("robust", "exo_pair", "aot", "gpo_logistic")),
        {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1},  # the field is robust's
        {"loss_type": ["simpo", "robust"], "label_smoothing": 0.1, "beta": 2.0},
        {"loss_type": "psipo_identity"},  # as in YAML
        {"loss_type": ["sigmoid"], "label_smoothing": 0.1, "logp_reduction": "sum"},
        *({"loss_type": [name], **REWARDS} for name, row in PREFERENCE_LOSSES.items() if row.scores),
        {"loss_type": ["sigmoid", "rpo_sq"], **REWARDS, "reward_margin_scale": 2.0},
        {"loss_type": ["psipo"], "psi": "torch.sin"},
        {"loss_type": ["psipo"], "psi": "test_dpo_config.infinite_at_one", "preference_prob_column": "p"},
        {"loss_type": ["dpop"], "loss_kwargs": '{"dpop": {"lam": 5.0}}'},  # JSON, as on the command line
        {"loss_type": ["dpop", "simpo"], "beta": 2.0, "loss_kwargs": "{dpop: {lam: 5.0}}"},  # YAML, likewise
        {"loss_type": ["test_dpo_config.pair_loss"], "loss_kwargs": {"test_dpo_config.pair_loss": {"strength": 2}}},
        {"loss_type": ["test_dpo_config.pair_loss"], "preference_prob_column": "p", **REWARDS},
        {**BETA_DPO, "loss_kwargs": '{"beta_dpo": {"alpha": 0, "keep": 1}}'},
        *({"loss_type": [name], "preference_prob_column": "p"} for name in SAME_AS_TRL),
    ],
)
def test_good_options_are_accepted_in_silence(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(**options)


@pytest.mark.parametrize("written", ["1e-3", "1E-03", "+.1e-2", "1.e-3"])
def test_a_number_that_yaml_takes_for_a_text_is_a_number(written):
    logit = {"loss_type": ["psipo_logit"], "preference_prob_column": "p"}
    for kwargs in ({"psipo_logit": {"eps": written}}, f"{{psipo_logit: {{eps: {written}}}}}"):
        assert config(**logit, loss_kwargs=kwargs).loss_kwargs == {"psipo_logit": {"eps": 0.001}}


def test_simpo_with_trls_default_beta_is_mentioned():
    with pytest.warns(UserWarning, match="loss_type 'simpo' with beta=0.1, which is TRL's default: .* 2 and more"):
        config(loss_type=["simpo"])


@pytest.mark.parametrize(("written", "meant"), [("true", True), ("True", True), ("false", None), ("a/b", "a/b")])
def test_resuming_is_a_switch_from_a_shell_too(written, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config(resume_from_checkpoint=written).resume_from_checkpoint == meant
    (tmp_path / "true").mkdir()
    assert config(resume_from_checkpoint="true").resume_from_checkpoint == "true"
