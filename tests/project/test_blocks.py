"""
The code in the pages is run: Python and YAML in the order of a page, with one namespace per page; shell lines singly.

In a page, `<!-- invisible-code-block: python … -->` holds set-up and assertions that a reader does not need,
`<!-- skip: next "why" -->` leaves the next block out, and `<!-- slow: next "why" -->` leaves a shell block to
`pytest -m ''`. Lines that read a YAML file train for one step, or sample answers to one prompt. What is written stays
in a temporary folder.
A block that begins with the comment `# name.py` or `# name.yaml` is written to that file as well.

A page of `WALKS` is one run, told from the first line to the last: all its blocks are run in their order, in an empty
folder; by plain `pytest` with two steps of training.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import SkipTest

import pytest
import yaml
from strict_options import WITHOUT_TRAINER, read_options
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from tiny.command import trl_ext_here

import trl_ext
from trl_ext.cli import main

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")])
WALKS = {"docs/start.md"}
NOT_HERE = ("pip ",)  # commands that are left out of a line: installing is the business of `.ci/run`

# How many blocks of a page are left out, and how many are left to `pytest -m ''`. A new one is a decision, taken here.
SKIPPED = {"CONTRIBUTING.md": 3, "README.md": 1, "docs/async.md": 1, "docs/vllm.md": 2}
SLOW = {
    "docs/async.md": 1,
    "docs/commands.md": 1,
    "docs/methods/preference.md": 3,
    "docs/methods/process_rewards.md": 1,
    "docs/methods/reward_models.md": 3,
    "docs/quantization.md": 1,
    "docs/resume.md": 1,
}


def written_to_its_file(example):
    if name := re.match(r"# (\w+\.(py|yaml))\n", example.parsed):
        Path(name[1]).write_text(example.parsed)


def run_python(example):
    written_to_its_file(example)
    PythonEvaluator()(example)


def run_yaml(example):
    written_to_its_file(example)
    options = yaml.safe_load(example.parsed)
    of_trl = "dpo" if isinstance(options.get("loss_type"), list) else "prm" if "kind" in options else "grpo"
    read_options("label-steps" if "verifier" in options else of_trl, options)


def left_to_the_other_test(example):
    return None


def examples(page, run_shell=left_to_the_other_test):
    parsers = [("python", run_python), ("yaml", run_yaml), ("bash", run_shell)]
    sybil = Sybil(parsers=[*(CodeBlockParser(*parser) for parser in parsers), SkipParser()], patterns=["*.md"])
    return sybil.parse(page).examples()


def name_of(page):
    return str(page.relative_to(ROOT))


PAGES_TO_RUN = [
    page
    for page in PAGES
    if name_of(page) not in WALKS and re.search("^```(python|yaml)", page.read_text(), re.MULTILINE)
]


def comments(page, kind):
    """The reasons in the comments of this kind."""
    return re.findall(rf'^<!-- {kind}: next "(.+)" -->$', page.read_text(), re.MULTILINE)


def shell_blocks():
    """`(page and line, comment before it, lines)` of every block of shell lines."""
    for page in PAGES:
        text = page.read_text() if name_of(page) not in WALKS else ""
        for found in re.finditer(r"(?:<!-- (\w+): next [^\n]*-->\n)?```bash\n(.*?)```", text, re.DOTALL):
            line = text.count("\n", 0, found.start(2))
            yield f"{name_of(page)}:{line}", found[1], found[2].replace("\\\n", "").splitlines()


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """The working directory, an empty folder, of which nothing stays imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    loaded = {*sys.modules}
    yield tmp_path
    trl_ext.unregister()
    for name in {*sys.modules} - loaded:  # files that a page has written
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path / "my_")):
            del sys.modules[name]


@pytest.fixture
def root(empty):
    """The working directory: the root of the repository as it seems, in which nothing that is written stays."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "outputs":
            (empty / path.name).symlink_to(path)
    return empty


@pytest.mark.parametrize("page", PAGES_TO_RUN, ids=name_of)
def test_the_python_and_the_yaml_of_a_page_run(page, root):
    for example in examples(page):
        try:
            example.evaluate()
        except SkipTest as reason:
            print(f"{name_of(page)}:{example.line} is left out: {reason}")


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(lines, id=name, marks=[pytest.mark.slow] if mark == "slow" else [])
        for name, mark, lines in shell_blocks()
        if mark != "skip"
    ],
)
def test_the_lines_of_a_shell_block_run(lines, root, request, monkeypatch, capfd):
    in_a_process = "README" in request.node.name  # those of the other pages train in this one, which has imported TRL
    ran = 0
    for line in lines:
        for command in line.split("&&"):
            if command.strip().startswith(NOT_HERE):
                continue
            if "--config" in command:
                command += " --limit 1" if {*WITHOUT_TRAINER}.intersection(command.split()) else " --max_steps 1"
            if command.split()[0] == "trl-ext" and ">" not in command and not in_a_process:
                done = trl_ext_here(monkeypatch, capfd, *shlex.split(command, comments=True)[1:])
                assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
            else:
                run_command(command)
            ran += 1
    assert ran, "nothing to run: mark the block with a skip and its reason"


def run_command(command):
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def two_steps_here(command):
    """What the command does, without a process of its own, and two steps of `trl-ext grpo`."""
    program, *words = command.split()
    assert program == "trl-ext"
    if words[0] != "grpo":
        assert main(words) == 0
    elif "--dry_run" not in words:
        with trl_ext.register():
            from trl.scripts import grpo

            words = [*words[1:], "--max_steps", "2", "--use_cpu", "true"]
            grpo.main(*grpo.make_parser().parse_args_and_config(args=words))


def walked(page, run):
    """The names that the blocks of a page have defined in the end."""
    for example in examples(ROOT / page, lambda example: [run(line) for line in example.parsed.splitlines()] and None):
        example.evaluate()
    return example.namespace


@pytest.mark.parametrize("run", [two_steps_here, pytest.param(run_command, marks=pytest.mark.slow)])
def test_the_page_for_beginners_is_one_run_in_an_empty_folder(empty, run):
    sys.path.insert(0, str(empty))  # as `python my_eval.py` has it
    names = walked("docs/start.md", run)
    assert len(names["before"]) == len(names["after"]) == 200
    if run is run_command:
        assert names["after"].mean() > names["before"].mean() + 0.3


def test_what_is_left_out_is_counted_and_has_a_reason():
    for kind, counts in (("skip", SKIPPED), ("slow", SLOW)):
        assert {name_of(page): len(comments(page, kind)) for page in PAGES if comments(page, kind)} == counts
        for page in PAGES:
            assert page.read_text().count(f"<!-- {kind}") == len(comments(page, kind)), (
                "without a reason, or not for `next`"
            )
            for reason in comments(page, kind):
                print(f"{kind} {name_of(page)}: {reason}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_of_a_language_that_is_run(page):
    text = page.read_text()
    opened = re.findall(r"^\s*```(.*)$", text, re.MULTILINE)[::2]
    assert {*opened} <= {"python", "yaml", "bash", *([""] if page.name == "design.md" else [])}
    assert not re.search(r"^ {4}(trl-ext|python|pip|pytest|accelerate) ", text, re.MULTILINE), (
        "fence it: then it is run"
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_installs_exists_and_has_the_tested_versions(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in re.findall(r"^pip install .*?(?= &&|$)", page.read_text(), re.MULTILINE):
        assert (found := re.fullmatch(r"pip install -c constraints\.txt -e '\.\[([\w,]+)\]'", line)), line
        assert {*found[1].split(",")} <= {*extras}, line


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_files_that_a_page_names_exist(page):
    for name in re.findall(r"(?<![\w/.])((?:tests|docs|recipes|trl_ext|\.ci|\.github)/[\w./-]*\w)", page.read_text()):
        assert (ROOT / name).exists() or name == "recipes/NAME.yaml", name


def helpers():
    """`(module or file, its path, flags)` of the Python lines in the running text, as far as they take arguments."""
    for page in PAGES:
        for kind, name, rest in re.findall(
            r"`python (-m )?((?:recipes|docs|tests)[\w./]+)([^`\n]*)`", page.read_text()
        ):
            path = ROOT / (name.replace(".", "/") + ".py" if kind else name)
            flags = re.findall(r"--\w+", rest)
            if path.exists() and (flags or "argparse" in path.read_text()):  # else another test says so
                yield pytest.param(name, path, flags, id=f"{name_of(page)} {name}{rest}")


@pytest.mark.parametrize(("name", "path", "flags"), [*helpers()])
def test_a_helper_that_a_page_names_has_the_flags(name, path, flags, monkeypatch, capsys):
    assert "argparse" in path.read_text(), f"{name} takes no arguments"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and all(flag in printed for flag in flags)
