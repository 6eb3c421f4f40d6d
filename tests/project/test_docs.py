"""Docs and recipes are kept: links lead somewhere, every entry has its row, every YAML parses, examples are right."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import yaml
from strict_options import read_options

from recipes.gsm8k import exact_number, to_prompt
from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.functional.preference import PREFERENCE_LOSSES, UNPAIRED_LOSSES
from trl_ext.functional.step_objectives import STEP_OBJECTIVES

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")])
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FUNCTIONAL = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "trl_ext/functional").rglob("[a-z]*.py"))
]


def name_of(path):
    return str(path.relative_to(ROOT))


def anchors(page):
    """Of its headings, as GitHub makes them: small letters, hyphens for spaces, no other signs, the second with -1."""
    found = {}
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
        yield f"{name}-{found[name]}" if found[name] else name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_to_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            where = page.parent / file if file else page
            assert where.exists(), target
            assert not anchor or anchor in anchors(where), target


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A beta of the batch\n## `exact`, in 4-bit: why?\n## Twice\n```\n# no heading\n```\n## Twice\n")
    assert [*anchors(page)] == ["a-beta-of-the-batch", "exact-in-4-bit-why", "twice", "twice-1"]


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


@pytest.mark.parametrize("module", [*FUNCTIONAL, "recipes.clock.task"])
def test_examples_of_the_docstrings_are_right(module):
    globs = {"torch": importlib.import_module("torch")}
    results = doctest.testmod(importlib.import_module(module), extraglobs=globs)
    assert results.attempted > 0 or module.endswith("advantages") or ".preference" in module
    assert results.failed == 0


def test_every_public_function_says_what_it_returns():
    for module in FUNCTIONAL:
        for name, function in inspect.getmembers(importlib.import_module(module), inspect.isfunction):
            of_one_number = [*inspect.signature(function).parameters] in (
                ["t"],
                ["prob"],
            )  # the module says what it is
            if not name.startswith("_") and function.__module__ == module and not of_one_number:
                doc = inspect.getdoc(function)
                assert "Args:" in doc and "Returns:" in doc and "`" in doc, name


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_parses_without_unknown_keys(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    assert "run to the end" in text.lower(), "the header says whether anyone has"
    read_options(command_of(path), yaml.safe_load(text))


def command_of(recipe):
    """The command of `trl-ext`; `async` for the scripts of asynchronous GRPO, for which there is none."""
    how = r"(?:trl-ext ([\w-]+)|python -m trl_ext recipes/(async)_\w+\.py)"
    found = re.search(rf"{how} --config recipes/{recipe.name}", recipe.read_text())
    return found[1] or found[2]


def in_code(cell):
    return {*re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_row_of_a_recipe_is_true(path):
    options, header = yaml.safe_load(path.read_text()), path.read_text().split("\n\n")[0]
    table = (ROOT / "recipes/README.md").read_text()
    row = re.search(rf"^\| \[{path.stem}\]\({path.name}\) \|(.*)\|$", table, re.MULTILINE)
    method, model, data, needs, run = (cell.strip() for cell in row[1].split("|"))

    if command_of(path) == "dpo":
        names, also = options["loss_type"], {"trl-ext dpo"}
        title = PREFERENCE_LOSSES[names[0]].method
    elif command_of(path) == "prm":
        names, also = [options.get("objective", "classification")], {"trl-ext prm"}
        title = STEP_OBJECTIVES[names[0]].method
    elif command_of(path) == "kto":
        names, also = [options["loss_type"]], {"trl-ext kto"}
        title = UNPAIRED_LOSSES[names[0]].method
    elif command_of(path) == "label-steps":
        names, also, title = [options.get("search", "all")], {"trl-ext label-steps"}, "Labels of steps"
    elif command_of(path) in ("rejection-sampling", "sft"):
        names, also, title = ["accepted"], {f"trl-ext {command_of(path)}"}, "RFT"
    elif command_of(path) == "ppo":
        names, also = ["gae"], {"trl-ext ppo"}
        title = ADVANTAGE_ESTIMATORS["gae"].method
    else:
        names, also = [options["advantage_estimator"]], {*filter(None, [options.get("kl_estimator")])}
        title = ADVANTAGE_ESTIMATORS[names[0]].method or "GRPO"  # TRL's name stands where ours has none
    assert method.startswith(f"{title} (`{names[0]}`)") and in_code(method) == {*names} | also

    scorer = options.get("process_reward_model")
    further = {*filter(None, [options.get("completer"), scorer and scorer["model"]])}
    assert in_code(model) == {options["model_name_or_path"]} | further
    assert ("LoRA" in model) == options.get("use_peft", False)
    assert ("4-bit" in model) == (options.get("load_in_4bit", False) or bool(scorer and scorer.get("load_in_4bit")))
    assert in_code(data) == {options["dataset_name"]}
    made_here = options["dataset_name"].startswith("outputs/clock_")  # by a module of `recipes.clock`
    made_here |= options["dataset_name"].endswith("_quickstart")  # by another recipe, which needs no hub
    data_here = made_here or (ROOT / options["dataset_name"]).exists()
    embedded = (ROOT / options["model_name_or_path"]).exists() and data_here
    assert ("the hub" in needs) != embedded and ("a CPU" in needs) == embedded
    was_run = re.search("^# (Run|Not run) to the end", header, re.MULTILINE)[1] == "Run"
    assert run == ("yes" if was_run else "no")


def test_every_row_of_the_recipes_has_its_file():
    rows = re.findall(r"^\| \[.*\]\((.*\.yaml)\)", (ROOT / "recipes/README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == [path.name for path in RECIPES]


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


ASKED_MOST = {  # threads of other projects' users, by the question that answers them
    "The loss is 0": ["trl/issues/2703", "trl/issues/3452", "open-r1/issues/239"],
    "How do I resume": ["trl/issues/3179", "trl/issues/3635"],
    "my own data": ["axolotl/issues/3269", "trl/issues/3949"],
    "Has it learnt": ["mlx-examples/issues/1233"],
    "merge, generate": ["torchtune/issues/819"],
    "k1, k2, k3": ["OpenRLHF/pull/797", "trl/pull/3240"],
    "as an option of GRPO": ["axolotl/issues/3676"],
    "Step rewards": ["ms-swift/issues/3952", "ms-swift/issues/4024"],
    "IPO": ["trl/pull/1265", "trl/issues/1677"],
    "take effect": ["verl/issues/5712"],
    "GPU memory": ["DeepSeek-R1/issues/559"],
    "update of TRL": ["unsloth/issues/7376"],
    "does not rise": [],
    "negative": [],
    "vLLM": [],
    "How many completions": [],
    "When REINFORCE++": [],
    "verl, OpenRLHF": [],
}


def test_the_questions_that_are_asked_most_have_an_answer():
    _, *entries = re.split(r"^## (.+)$", (ROOT / "docs/faq.md").read_text(), flags=re.MULTILINE)
    answers = dict(zip(entries[::2], entries[1::2], strict=True))
    for words, threads in ASKED_MOST.items():
        (answer,) = (text for question, text in answers.items() if words in question)
        assert all(
            f"https://github.com/{thread}" in re.sub(r"github\.com/[\w-]+/", "github.com/", answer)
            for thread in threads
        )
        assert "](" in answer or "`" in answer, "without a page or an option to go on with"
    assert len(answers) == len(ASKED_MOST)


def test_what_the_page_on_resuming_names_as_its_test_is_one():
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs/resume.md").read_text())
    assert len(named) >= 10 and all(f"def {name}(" in sources for name in named)
