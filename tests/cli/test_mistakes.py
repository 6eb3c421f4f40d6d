"""Mistakes of a first day at the command line: each is one sentence, exit status 2, before a model loads."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny.command import trl_ext_here

import trl_ext
from trl_ext import cli
from trl_ext.cli.interrupted import how_to_go_on
from trl_ext.cli.words import checked_words


@pytest.fixture
def refused(folder, capsys, monkeypatch):
    """`refused(command, *words)`: the one sentence with which it ends before a worker starts."""
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda args: pytest.fail("a worker was started"))

    def sentence(*words):
        assert cli.main([*words]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line.removeprefix("trl-ext: error: ")

    return sentence


def change(name, **options):
    path = Path(name)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **options}))


# The words, and the file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", "run.yaml, line 2, column 2: this is no YAML, expected ',' or ']', but got ':'."),
        ("a: 1\n\tb: 2\n", "run.yaml, line 2, column 1: this is no YAML, found character '\\t' that cannot start any"),
        ("1: 2\n", "run.yaml: the key 1 is no text. Put it in quotes"),
        (
            "on: 2\n",
            "run.yaml: the key True is no text. Put it in quotes (YAML reads yes, no, on and off as booleans).",
        ),
        ("env: {1: 2}\n", "run.yaml, env: the key 1 is no text."),
        ("- 1\n", "Config file run.yaml must contain a YAML mapping."),
        ("", "Config file run.yaml must contain a YAML mapping."),
    ],
)
def test_a_file_that_is_no_mapping_of_texts_is_refused_with_the_place(refused, folder, text, message):
    (folder / "run.yaml").write_text(text)
    assert message in refused("grpo", "--config", "run.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config"], "--config has no value; write --config run.yaml."),
        (["--config="], "--config has no value; write --config run.yaml."),
        (["--config", "--bf16", "no"], "--config has no value; write --config run.yaml."),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given 2 times (a.yaml, b.yaml); a run has one YAML"),
        (["run.yaml"], "'run.yaml' is neither an option nor the value of one. A YAML file is given with --config."),
        (["--beta", "0.1", "run.yaml"], "'run.yaml' is neither an option nor the value of one."),
        (["--confg", "run.yaml"], "there is no option 'confg' for `trl-ext grpo` or `accelerate launch`; did you mean "
                                  "'config'?"),
    ],
)  # fmt: skip
def test_a_file_is_named_once_with_config(refused, words, message):
    assert message in refused("grpo", *words)  # also on a machine where bf16, TRL's default, is an error


def test_config_with_an_equals_sign_is_the_same(folder):
    assert checked_words(["grpo", "--config=run.yaml", "--x=1"]) == ["grpo", "--config", "run.yaml", "--x=1"]


# Values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_estimator": False}, "kl_estimator is no switch, got False. For its default leave it out, or write"),
        ({"advantage_estimator": True}, "advantage_estimator is no switch, got True."),
        ({"process_reward_model": False}, "process_reward_model is no switch, got False."),
        (
            {"advantage_estimator": "reinforce++"},
            "advantage_estimator 'reinforce++' is neither one of ['best_of_group', 'gae'",
        ),
        ({"advantage_estimator": "reinforce++"}, "; did you mean 'reinforce_plus_plus'?"),
        ({"kl_estimator": "k4"}, "kl_estimator 'k4' is neither one of ['exact', 'k1', 'k2', 'k3'] nor a dotted path"),
        ({"kl_estimator": "exakt"}, "; did you mean 'exact'?"),
        ({"reward_funcs": ["mine.lenght"]}, "reward_funcs 'mine.lenght' cannot be imported: module 'mine' has no "
                                            "'lenght'; did you mean 'length'?"),
        ({"reward_funcs": ["mine.length", "nosuch.f"]}, "'nosuch.f' cannot be imported: there is no module 'nosuch'."),
        ({"reward_funcs": ["mine.py"]}, "reward_funcs 'mine.py' cannot be imported: module 'mine' has no 'py'"),
        ({"reward_funcs": ["acuracy_reward"]}, "reward_funcs 'acuracy_reward' is neither one of TRL's ['accuracy"),
        ({"reward_funcs": ["acuracy_reward"]}, "; did you mean 'accuracy_reward'?"),
        ({"loss_type": "dapoo"}, "loss_type must be one of ['bnpo', 'cispo', 'dapo', 'dr_grpo', 'grpo', "
                                 "'luspo', 'sapo', 'vespo'], got 'dapoo'; did you mean 'dapo'?"),
        ({"loss_type": "sigmoid"}, "got 'sigmoid'; that is a loss of `trl-ext dpo`."),
        ({"loss_type": ["psipo_identity"]}, "got ['psipo_identity']; that is a loss of `trl-ext dpo`."),
    ],
)  # fmt: skip
def test_a_wrong_value_in_the_yaml_is_named_with_its_option(refused, options, message):
    change("run.yaml", **options)
    assert message in refused("grpo", "--config", "run.yaml")


def test_a_yaml_of_another_command_says_whose_options_it_has(refused):
    change("run.yaml", advantage_estimator=None)
    assert refused("dpo", "--config", "run.yaml").endswith("is an option of `trl-ext grpo`, not of `trl-ext dpo`.")
    Path("dpo.yaml").write_text("psi: identity\n")
    assert refused("grpo", "--config", "dpo.yaml") == "'psi' is an option of `trl-ext dpo`, not of `trl-ext grpo`."
    assert "'reward_funcs' is an option of `trl-ext grpo`" in refused("dpo", "--reward_funcs", "mine.length")


@pytest.mark.parametrize("option", ["advantage_kwargs", "model_init_kwargs"])
def test_a_mapping_on_the_command_line_that_cannot_be_read_is_named(refused, option):
    assert refused("grpo", "--config", "run.yaml", f"--{option}", "{weighting: ").startswith(f"{option} ")


@pytest.mark.parametrize(
    "written", ["{weighting: sequence}", '{"weighting": "sequence"}', "{weighting: sequence, gamma: 1e-1}"]
)
def test_a_mapping_on_the_command_line_may_be_written_as_in_yaml(folder, monkeypatch, written):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    assert cli.main(["grpo", "--config=run.yaml", "--advantage_kwargs", written]) == 0
    (args,) = launched
    words = ["--config", "run.yaml", "--advantage_kwargs", written, "--log_style", "line"]  # the command's own default
    assert args.training_script_args[1:] == words


@pytest.mark.parametrize("written", ["full", "line"])
def test_the_style_of_the_log_is_the_users_choice(folder, monkeypatch, written):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    change("run.yaml", log_style=written)
    of_trl = ["--output_dir", "out", "--bf16", "False", "--use_cpu", "True"]  # a command without the option
    assert [cli.main(words) for words in (["grpo", "--config", "run.yaml"], ["sft", *of_trl])] == [0, 0]
    assert [args.training_script_args[1:] for args in launched] == [["--config", "run.yaml"], of_trl]


def test_accelerates_defaults_are_passed_unless_there_is_something_to_say(folder, monkeypatch, tmp_path):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    monkeypatch.setattr("trl_ext.cli.launch.default_config_file", str(tmp_path / "none.yaml"))
    words = ["grpo", "--config", "run.yaml"]
    names = ("num_processes", "num_machines", "mixed_precision", "dynamo_backend")

    def passed(*more):
        assert cli.main([*words, *more]) == 0
        return [getattr(launched[-1], name) for name in names]

    assert passed() == [1, 1, "no", "no"]
    assert passed("--num_processes", "2", "--mixed_precision", "bf16") == [2, 1, "bf16", "no"]
    assert passed("--multi_gpu") == [None] * 4, "several devices: accelerate says how many it takes"
    shutil.copy(Path(trl_ext.__file__).parents[1] / "recipes/accelerate/ddp.yaml", tmp_path / "accelerate.yaml")
    assert passed("--config_file", str(tmp_path / "accelerate.yaml")) == [None] * 4
    for module in ("trl_ext.cli.launch", "accelerate.commands.config.config_args"):
        monkeypatch.setattr(f"{module}.default_config_file", str(tmp_path / "accelerate.yaml"))
    assert passed() == [None] * 4, "the user's own configuration"
    monkeypatch.setattr("trl_ext.cli.launch.default_config_file", str(tmp_path / "none.yaml"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert passed() == [None] * 4


# In a worker


def test_what_we_refuse_in_a_worker_arrives_as_a_sentence(folder, monkeypatch, capfd):
    rows = [{"question": "ab"}, {"question": "cde"}]
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = trl_ext_here(monkeypatch, capfd, "grpo", "--config", "run.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "trl-ext: error: train_dataset has no column 'prompt'; it has ['question']. Rename one: "
        "dataset.rename_column('question', 'prompt')."
    )


def test_in_a_script_of_the_users_a_refusal_shows_their_line(folder, python):
    Path("mine_too.py").write_text(
        "import trl\n\ntrl.GRPOConfig('out', use_cpu=True, bf16=False, beta=1.0, kl_estimator='k4')\n"
    )
    done = python("-m", "trl_ext", "mine_too.py")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "trl.GRPOConfig('out'" in done.stderr
    assert "ValueError: kl_estimator 'k4' is neither one of" in done.stderr


# Ctrl-C


def interrupted(words, checkpoint):
    """What a run prints that is stopped with Ctrl-C once a checkpoint is whole."""
    with open("printed", "w") as printed:
        run = subprocess.Popen([sys.executable, *words], stdout=printed, stderr=printed, start_new_session=True)
    until = time.monotonic() + 240
    while not (checkpoint / "trainer_state.json").exists() and run.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    code, text = run.wait(120), Path("printed").read_text()
    assert code == 130, text[-3000:]
    return text


def test_ctrl_c_says_how_to_go_on_and_the_run_goes_on(folder, monkeypatch, capfd):
    change("run.yaml", save_strategy="steps", save_steps=1, max_steps=10_000)
    words = ["-m", "trl_ext.cli", "grpo", "--config=run.yaml"]
    *before, stopped, last, again = interrupted(words, Path("out/checkpoint-2")).strip().splitlines()
    assert stopped == "trl-ext: stopped."
    checkpoint = last.removeprefix("The last whole checkpoint is ").removesuffix(".")
    assert (folder / checkpoint / "trainer_state.json").exists()
    command = f"trl-ext grpo --config run.yaml --resume_from_checkpoint {checkpoint}"
    assert again == f"To go on: {command}"
    assert not any("Traceback" in line or "Interrupt" in line for line in before), "nothing else of the end"
    step = int(checkpoint.rpartition("-")[2])
    words = [*command.split()[1:], "--max_steps", str(step + 1), "--save_strategy", "no"]
    done = trl_ext_here(monkeypatch, capfd, *words)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_same_command_goes_on_to_the_same_weights_bit_for_bit(folder, python):
    """Stopped with Ctrl-C, and then `--resume_from_checkpoint true`."""
    (folder / "slow.py").write_text(
        "import time\n\n\ndef length(completions, **kwargs):\n    time.sleep(0.5)\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    change("run.yaml", save_strategy="steps", save_steps=1, max_steps=12, reward_funcs=["slow.length"])
    words = ["-m", "trl_ext.cli", "grpo", "--config", "run.yaml"]
    assert python(*words, "--output_dir", "whole").returncode == 0
    interrupted(words, Path("out/checkpoint-3"))
    assert not Path("out/checkpoint-12").exists(), "it was stopped on the way"
    done = python(*words, "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_what_is_said_without_a_checkpoint_or_with_an_earlier_resumption(tmp_path):
    lines = how_to_go_on(["grpo", "--config", "a b.yaml"], str(tmp_path), patience=0.0).splitlines()
    expected = ["trl-ext: stopped.", f"There is no whole checkpoint in {tmp_path}."]
    assert lines == [*expected, "Anew: trl-ext grpo --config 'a b.yaml'"]
    assert how_to_go_on([], None, patience=0.0).splitlines()[1] == "There is no whole checkpoint in the output_dir."
    (tmp_path / "checkpoint-3").mkdir()  # cut off
    assert how_to_go_on(["grpo", "--config", "a b.yaml"], str(tmp_path), patience=0.0).splitlines()[:2] == expected
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    for words in (["--resume_from_checkpoint", "x"], ["--resume_from_checkpoint=true"], ["--resume_from_checkpoint"]):
        assert how_to_go_on(["grpo", *words, "--beta", "1"], str(tmp_path), patience=0.0).splitlines()[1:] == [
            f"The last whole checkpoint is {tmp_path}/checkpoint-3.",
            f"To go on: trl-ext grpo --beta 1 --resume_from_checkpoint {tmp_path}/checkpoint-3",
        ]
