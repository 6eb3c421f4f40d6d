"""Docs and recipes are kept: links lead somewhere, every entry has its row, every YAML parses, examples are right."""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
from trl.scripts.grpo import GRPOScriptArguments

from recipes.gsm8k import exact_number, to_prompt
from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.lookup import import_path
from trl_ext.trainers.dpo import DPOConfig
from trl_ext.trainers.grpo import GRPOConfig
from trl_ext.trainers.ppo import PPOConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")])
KINDS = {
    "grpo": (GRPOScriptArguments, GRPOConfig),
    "dpo": (ScriptArguments, DPOConfig),
    "ppo": (GRPOScriptArguments, PPOConfig),
}
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FUNCTIONAL = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "trl_ext/functional").rglob("[a-z]*.py"))
]


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_the_docs_parses(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(code)


def test_every_estimator_has_its_row():
    page = (ROOT / "docs/methods/advantages.md").read_text()
    found = re.findall(r"^\| `(\w+)` \|.*\| (\w+) \| (\w+) \| [^|]* \|$", page, re.MULTILINE)
    of = {True: "token", False: "completion"}
    facts = [(name, of[row.per_token], "yes" if row.siblings else "no") for name, row in ADVANTAGE_ESTIMATORS.items()]
    assert found[1:] == facts, "behind the heading"


def test_every_method_page_is_in_the_index_and_in_the_readme():
    index, readme = (ROOT / "docs/index.md").read_text(), (ROOT / "README.md").read_text()
    for page in (ROOT / "docs/methods").glob("*.md"):
        assert f"methods/{page.name}" in index and f"docs/methods/{page.name}" in readme, page.name


def test_the_estimator_of_the_docs_works(tmp_path, monkeypatch):
    import torch

    code = re.search(r"# my_estimators.py\n(.*?)```", (ROOT / "docs/extend.md").read_text(), re.DOTALL)[1]
    (tmp_path / "my_estimators.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    function = import_path("my_estimators.clipped_mean")
    rewards = torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    assert function(rewards, None, None, 2, limit=0.5).tolist() == [0.5, -0.5]


@pytest.mark.parametrize("module", [*FUNCTIONAL, "recipes.clock.task"])
def test_examples_of_the_docstrings_are_right(module):
    globs = {"torch": importlib.import_module("torch")}
    results = doctest.testmod(importlib.import_module(module), extraglobs=globs)
    assert results.attempted > 0 or module.endswith("advantages") or ".preference" in module
    assert results.failed == 0


def test_every_public_function_says_what_it_returns():
    for module in FUNCTIONAL:
        if module.endswith("margin_losses"):  # functions of one number; the module says what it is
            continue
        for name, function in inspect.getmembers(importlib.import_module(module), inspect.isfunction):
            if not name.startswith("_") and function.__module__ == module:
                doc = inspect.getdoc(function)
                assert "Args:" in doc and "Returns:" in doc and "`" in doc, name


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_parses_without_unknown_keys(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    assert "run to the end" in text.lower(), "the header says whether anyone has"
    command = re.search(rf"trl-ext (\w+) --config recipes/{path.name}", text)[1]
    script_arguments, config_class = KINDS[command]
    parser = TrlParser((script_arguments, config_class, ModelConfig, DatasetMixtureConfig))
    on_this_machine = {"bf16": False, "use_cpu": True}
    options = yaml.safe_load(text) | on_this_machine
    assert parser.set_defaults_with_config(**options) == []
    script_args, *_ = parser.parse_args_into_dataclasses(args=[])
    for reward in getattr(script_args, "reward_funcs", None) or []:
        import_path(reward)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_in_the_table(path):
    assert f"({path.name})" in (ROOT / "recipes/README.md").read_text()


def test_the_gsm8k_reward_compares_numbers():
    row = to_prompt({"question": "How many?", "answer": "2 * 600 = 1200\n#### 1,200"})
    assert row["number"] == "1200" and row["prompt"][0]["content"].startswith("How many?\n")
    completions = ["#### 1200", "so #### 1,200.0", "#### 7\n#### 1200", "1200", "####", "#### -1200", ""]
    expected = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert exact_number(completions, ["1200"] * 7) == expected
    conversations = [[{"role": "assistant", "content": text}] for text in completions]
    assert exact_number(conversations, ["1200"] * 7) == expected


def test_the_readme_and_ci_run_the_same_test_command():
    install, test = re.search(
        r"^pip install (.*) && (pytest)$", (ROOT / "README.md").read_text(), re.MULTILINE
    ).groups()
    run = (ROOT / ".ci/run").read_text().splitlines()
    assert f"pip install --quiet {install}" in run and test in run
    assert {"ruff check .", "ruff format --check .", "mypy"} <= {*run[: run.index(test)]}


def test_the_public_names_exist():
    import trl_ext

    for name in trl_ext.__all__:
        assert getattr(trl_ext, name) is not None
