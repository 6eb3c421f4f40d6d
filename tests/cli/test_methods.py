"""`trl-ext methods` and docs/options.md: generated from the rows and the dataclasses."""

import ast
import runpy
from pathlib import Path

import pytest

from trl_ext.cli.methods import as_text, first_line, main, methods
from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.functional.kl import KL_ESTIMATORS
from trl_ext.functional.preference import PREFERENCE_LOSSES, UNPAIRED_LOSSES
from trl_ext.functional.step_objectives import STEP_OBJECTIVES
from trl_ext.papers import PAPERS

ROOT = Path(__file__).parents[2]
TABLES = {
    "advantage_estimator": [ADVANTAGE_ESTIMATORS],
    "kl_estimator": [KL_ESTIMATORS, {"exact": None}],
    "loss_type": [PREFERENCE_LOSSES, UNPAIRED_LOSSES],
    "objective": [STEP_OBJECTIVES],
}


def test_every_row_of_every_table_is_listed_once_with_a_line_and_a_page():
    found = [*methods()]
    expected = [(option, name) for option, tables in TABLES.items() for table in tables for name in table]
    assert [(method.option, method.value) for method in found] == expected
    papers = {paper.url for paper in PAPERS.values()} | {""}
    for method in found:
        assert method.line.endswith(".") and not {*"\\`*[]"} & {*method.line}, method
        page = (ROOT / method.page).read_text()
        assert f"`{method.value}`" in page or (method.value == "gae" and "GAE" in page), method
        assert method.paper in papers


def test_the_page_of_an_estimator_is_the_one_of_its_kind():
    pages = {method.value: (method.page, method.commands) for method in methods()}
    assert pages["reinforce_plus_plus"] == ("docs/methods/advantages.md", ("grpo",))
    assert pages["process_group_relative"] == ("docs/methods/process_rewards.md", ("grpo",))
    assert pages["gae"] == ("docs/methods/ppo.md", ("ppo",))


def test_a_line_is_plain_text_with_what_its_row_has_filled_in():
    losses = {method.value: method.line for method in methods() if method.option == "loss_type"}
    assert losses["psipo_identity"] == (
        "IPO. Squared distance of the margin from the one that ΨPO asks for (psi: identity)."
    )
    assert losses["chipo"] == "χPO. DPO with a χ² term beside the KL."
    assert first_line(lambda batch: None) == ""


def test_a_word_chooses_rows_and_one_that_is_in_none_is_refused(capsys):
    assert main(["gae"]) == 0
    assert (
        capsys.readouterr().out.splitlines()[0].startswith("advantage_estimator of trl-ext ppo: docs/methods/ppo.md")
    )
    with pytest.raises(ValueError, match="no method has 'nosuch' in its row"):
        main(["nosuch"])


def test_the_text_has_one_heading_per_option_and_commands():
    headings = [line for line in as_text([*methods()]).splitlines() if line and not line.startswith(" ")]
    assert len(headings) == len({*headings}) == 7
    assert "loss_type of trl-ext dpo, or a dotted path: docs/methods/preference.md" in headings


def test_it_loads_no_trl(python):
    """And so takes two seconds, not ten."""
    code = (
        "import sys; from trl_ext.cli import main; code = main(['methods', 'ipo']);"
        "print(code, sorted({'trl', 'transformers', 'datasets', 'accelerate'} & {*sys.modules}))"
    )
    assert ast.literal_eval(python("-c", code).stdout.splitlines()[-1].split(" ", 1)[1]) == []


# docs/options.md


@pytest.fixture(scope="module")
def options():
    return runpy.run_path(str(ROOT / "docs/scripts/options.py"))


def test_the_page_of_options_is_what_the_classes_say(options):
    page = (ROOT / "docs/options.md").read_text()
    assert page == options["page"](), "write it again: python docs/scripts/options.py"


def test_every_option_of_ours_is_on_it_with_its_help(options):
    page = (ROOT / "docs/options.md").read_text()
    for command, config in options["CONFIGS"].items():
        fields = [*options["our_fields"](config)]
        assert fields, command
        for field in fields:
            assert f"\n| `{field.name}` |" in page, (command, field.name)


def test_what_is_said_of_an_option_alone_is_what_the_config_says(options):
    said = options["said_alone"]
    assert said("grpo", "kl_horizon") == "kl_horizon is read only with kl_target; set that too, or remove it."
    assert said("grpo", "shared_prefix") == ""
    for command, alone in options["SET_ALONE"].items():
        for option in alone:
            assert said(command, option), f"{option} of {command} stands alone: leave it out of the table"


def test_the_names_that_an_option_may_be_are_accepted_and_no_other():
    from trl_ext.cli.values import CHOICES, NAMES
    from trl_ext.trainers.dpo import DPOConfig
    from trl_ext.trainers.grpo import GRPOConfig
    from trl_ext.trainers.prm import PRMConfig

    def config(cls, **options):
        return cls("outputs/none", bf16=False, report_to="none", **options)

    for name in NAMES["grpo", "advantage_estimator"]:
        config(GRPOConfig, advantage_estimator=name)
    for placement in CHOICES["grpo", "kl_placement"]:
        config(GRPOConfig, kl_placement=placement, beta=0.1, advantage_estimator="reinforce_plus_plus")
    for unit in CHOICES["grpo", "kl_target_unit"]:
        config(GRPOConfig, kl_placement="loss", beta=0.1, kl_target=0.1, kl_target_unit=unit)
    for name in CHOICES["grpo", "loss_type"]:
        config(GRPOConfig, loss_type=name, **({"importance_sampling_level": "sequence"} if name == "luspo" else {}))
    for kind in CHOICES["prm", "kind"]:
        config(PRMConfig, kind=kind)
    for reduction in CHOICES["dpo", "logp_reduction"]:
        config(DPOConfig, logp_reduction=reduction, loss_type=["dpop"])
    for style in CHOICES["grpo", "log_style"]:
        config(GRPOConfig, log_style=style)
    for cls, options in [
        (GRPOConfig, {"log_style": "typo"}),
        (GRPOConfig, {"kl_placement": "typo", "beta": 0.1}),
        (GRPOConfig, {"kl_placement": "loss", "beta": 0.1, "kl_target": 0.1, "kl_target_unit": "typo"}),
        (PRMConfig, {"kind": "typo"}),
        (PRMConfig, {"objective": "typo"}),
        (DPOConfig, {"logp_reduction": "typo", "loss_type": ["dpop"]}),
    ]:
        with pytest.raises(ValueError, match="typo"):
            config(cls, **options)
