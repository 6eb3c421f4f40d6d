"""The command line and `python -m trl_ext`, as a user types them."""

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trl
import yaml

import trl_ext
from trl_ext import cli

CONFIG = Path(__file__).parents[2] / "recipes" / "accelerate" / "ddp.yaml"
TWO_PROCESSES = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--mixed_precision", "no"]
TWO_PROCESSES += ["--main_process_port", "0"]


def two_processes(*command, results):
    """What a launch of two workers prints. Both have made their `results`, and ended with status 0 by themselves."""
    environment = {**os.environ, "PYTHONPATH": str(Path(trl_ext.__file__).parent.parent), "ACCELERATE_USE_CPU": "true"}
    with open("printed", "w") as printed:
        launch = subprocess.Popen(
            [sys.executable, *command], stdout=printed, stderr=printed, env=environment, start_new_session=True
        )
    try:
        launch.wait(300)
    except subprocess.TimeoutExpired:
        os.killpg(launch.pid, signal.SIGKILL)
    text = Path("printed").read_text()
    assert launch.wait() == 0, text[-12000:]
    assert all(Path(result).exists() for result in results), text[-3000:]
    return text


def test_trl_ext_grpo_trains_with_our_options_in_every_worker(folder):
    options = yaml.safe_load((folder / "run.yaml").read_text())
    launch = {"multi_gpu": True, "num_processes": 2, "quiet": False}  # options of `accelerate launch`, in YAML
    (folder / "run.yaml").write_text(yaml.safe_dump({**options, **launch}))
    printed = two_processes(
        "-m", "trl_ext.cli", "grpo", "--config", "run.yaml", "--advantage_estimator", "mine.half",
        "--advantage_kwargs", "{}", "--main_process_port", "0", "--dataset_name", "data/train.jsonl",
        results=["rank0of2", "rank1of2", "out/model.safetensors"],
    )  # fmt: skip
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("step ")] == ["1/2", "2/2"]
    entries = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 2] and "advantages/std" in entries[1], "of one process"


def test_a_users_script_gets_our_classes_and_options_in_both_processes(folder):
    command = [*TWO_PROCESSES, "-m", "trl_ext", "user_script.py", "--config", "ours.yaml"]
    two_processes(*command, results=["rank0.json", "rank1.json"])
    for rank in (0, 1):
        found = json.loads((folder / f"rank{rank}.json").read_text())
        assert found["grpo"] == "trl_ext.trainers.grpo.trainer" and found["same"]
        assert found["dpo"] == "trl_ext.trainers.dpo.trainer"
        assert found["processes"] == 2
        assert found["estimator"] == "reinforce_plus_plus" and "advantages/std" in found["logged"]
        script = str(folder / "user_script.py")
        expected = ["__main__", script, ["user_script.py", "--config", "ours.yaml"], str(folder)]
        assert found["name, file, argv, path"] == expected


def test_the_same_script_without_us_is_trls_and_without_our_options_gives_the_same_weights(folder, python):
    results = []
    for launcher in ([], ["-m", "trl_ext"]):
        done = python(*launcher, "user_script.py", "--config", "plain.yaml")
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads((folder / "rank0.json").read_text()))
    theirs, ours = results
    assert (theirs["grpo"], ours["grpo"]) == ("trl.trainer.grpo_trainer", "trl_ext.trainers.grpo.trainer")
    for name in ("same", "processes", "estimator", "logged", "weights", "name, file, argv, path"):
        assert ours[name] == theirs[name], name


def test_a_failure_in_the_worker_is_an_exit_code(folder, python):
    done = python("-m", "trl_ext.cli", "grpo", "--config", "run.yaml", "--reward_funcs", "mine.broken")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "raise KeyError('answer')" in done.stderr, "a bug keeps its traceback"
    assert "CalledProcessError" not in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_placment": "reward"}, "there is no option 'kl_placment' for `trl-ext grpo` or `accelerate launch`; did "
                                    "you mean 'kl_placement'?"),
        ({"num_proceses": 2}, "there is no option 'num_proceses' for `trl-ext grpo` or `accelerate launch`; did you "
                              "mean 'num_processes'?"),
        ({"num-generations": 2}, "there is no option 'num-generations' for `trl-ext grpo`"),
        ({"accelerate_confg": "multi_gpu"}, "did you mean 'accelerate_config'?"),
        ({"qqqqq": 2}, "there is no option 'qqqqq' for `trl-ext grpo` or `accelerate launch`; see `trl-ext grpo "
                       "--help`."),
        ({"advantage_estimatr": "reinforce", "advantage_estimator": None}, "did you mean 'advantage_estimator'?"),
        ({"advantage_kwargs": {"gamma": 7}}, "gamma must be a number in (0, 1], got 7."),
        ({"advantage_estimator": "reinforce"}, "advantage_kwargs has no 'weighting' for 'reinforce'"),
        ({"dtype": "float31"}, "dtype must be one of ['auto', 'bfloat16', 'float16', 'float32'], got 'float31'."),
        ({"eval_strategy": "step"}, "eval_strategy must be one of ['no', 'steps', 'epoch'], got 'step'."),
    ],
)  # fmt: skip
def test_a_mistake_in_the_yaml_is_one_sentence_before_a_worker_starts(folder, capsys, monkeypatch, change, message):
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda args: pytest.fail("a worker was started"))
    options = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump({**options, **change}))
    assert cli.main(["grpo", "--config", "run.yaml"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-ext: error: ") and message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config", "run.yaml", "--kl_placment", "reward"],
            "no option 'kl_placment' for `trl-ext grpo` or `accelerate launch`; did you mean 'kl_placement'?",
        ),
        (["--config", "run.yaml", "--kl-placment=reward"], "did you mean 'kl_placement'?"),
        (["--config", "run.yaml", "--num_process", "2"], "did you mean 'num_processes'?"),
        (
            ["run.yaml", "--use_cpu", "--bf16", "no"],
            "'run.yaml' is neither an option nor the value of one. A YAML file is given with --config.",
        ),
        (["--config", "no.yaml"], "No such file or directory: 'no.yaml'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda args: pytest.fail("a worker was started"))
    assert cli.main(["grpo", *arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("command", ["sft", "dpo", "kto", "reward", "rloo", "distillation"])
def test_every_training_command_launches_trls_script_under_us(folder, monkeypatch, command):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    (folder / "run.yaml").write_text(yaml.safe_dump({"dataset_name": "data", "num_processes": 2, "bf16": False}))
    arguments = ["--config", "run.yaml", "--model_name_or_path", "m", "--mixed_precision", "no"]
    assert cli.main([command, *arguments]) == 0
    (args,) = launched
    assert args.module and args.training_script == "trl_ext"
    script, *rest = args.training_script_args
    assert script.endswith(f"scripts/{command}.py") and Path(script).exists()
    ours = ["--log_style", "line"] if command in ("dpo", "kto") else []  # the others have configs of TRL's
    assert rest == ["--config", "run.yaml", "--model_name_or_path", "m", *ours]
    assert (args.num_processes, args.mixed_precision) == (2, "no")
    with pytest.raises(AssertionError):  # the strict parser serves this command too
        assert cli.main([command, *arguments, "--mixed_precison", "no"]) == 0


def test_vllm_serve_passes_on_what_it_does_not_know(monkeypatch):
    served = []
    monkeypatch.setattr("trl.scripts.vllm_serve.main", lambda args, extra: served.append((args.model, extra)))
    assert cli.main(["vllm-serve", "--model", "m", "--some_vllm_option", "3"]) == 0
    assert served == [("m", ["--some_vllm_option", "3"])]


def test_the_command_line_leaves_trl_as_it_was(folder, monkeypatch):
    from trl.cli import accelerate_launcher

    before = trl.TrlParser, trl.GRPOConfig, accelerate_launcher.launch_training_script
    cli.main(["grpo", "--config", "no.yaml"])
    assert (trl.TrlParser, trl.GRPOConfig, accelerate_launcher.launch_training_script) == before


def test_help_shows_our_options_with_their_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["grpo", "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: trl-ext grpo ")
    for name, field in trl_ext.GRPOConfig.__dataclass_fields__.items():
        if name not in trl.GRPOConfig.__dataclass_fields__:
            text = field.metadata["help"].replace("%(default)r", repr(field.default))
            assert f"--{name}" in shown and " ".join(text.split()) in shown, name


@pytest.mark.parametrize(
    ("command", "ours"),
    [
        ("grpo", ["advantage_estimator", "kl_estimator", "step_separator"]),
        ("ppo", ["critic_lam", "value_model"]),
        ("dpo", ["psi", "loss_kwargs", "preference_prob_column"]),
        ("kto", ["loss_type", "bco_momentum"]),
        ("prm", ["kind", "objective", "skip_after_bad_step"]),
    ],
)
def test_help_begins_with_our_options_and_ends_with_three_examples(capsys, command, ours):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: trl-ext {command} [--config FILE.yaml] [--dry_run]")
    top = lines[: lines.index("options of TRL and transformers:")]
    assert {f"--{option}" for option in ours} <= {word for line in top for word in line.split()}
    assert "--dry_run" in "\n".join(top[:6]) and "options of trl_ext:" in top
    if command == "grpo":
        assert {f"--{option}" for option in ours} <= {word for line in lines[:60] for word in line.split()}
    *_, heading, first, second, third = lines
    assert heading == "examples:"
    assert all(line.startswith(f"  trl-ext {command} --") for line in (first, second, third))


def test_help_of_a_command_without_options_of_ours(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sft", "--help"])
    shown = capsys.readouterr().out
    assert "options of trl_ext" not in shown and shown.startswith(
        "usage: trl-ext sft [--config FILE.yaml] [--dry_run]"
    )
    with pytest.raises(SystemExit):
        cli.main(["label-steps", "--help"])
    shown = capsys.readouterr().out
    assert "--dry_run" not in shown and "--backend vllm" in shown


def test_the_overview_and_an_unknown_command_bear_our_name(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: trl-ext [-h]") and "TRL's command line with what TRL lacks" in shown
    with pytest.raises(SystemExit) as stop:
        cli.main(["grop"])
    assert (
        stop.value.code == 2 and "trl-ext: error: argument command: invalid choice: 'grop'" in capsys.readouterr().err
    )


QUICK = """
import sys, time
start = time.process_time()
from trl_ext.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print(code, time.process_time() - start)
print(sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(("words", "code"), [((), 0), (("--help",), 0), (("--version",), 0), (("grop", "--x"), 2)])
def test_without_a_command_to_run_nothing_heavy_is_loaded(python, words, code):
    *_, result, loaded = python("-c", QUICK, *words).stdout.splitlines()
    assert result.split()[0] == str(code)
    heavy = {"torch", "transformers", "accelerate", "datasets", "peft", "numpy", "yaml"}
    assert heavy.isdisjoint(ast.literal_eval(loaded))
    assert float(result.split()[1]) < 1.0, "CPU seconds; 0.22 measured"


def test_the_version_is_ours_and_of_those_below(capsys):
    import torch
    import transformers

    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    below = f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    assert capsys.readouterr().out == f"trl-ext {trl_ext.__version__} ({below})\n"


def test_env_adds_our_version_and_checks_trl_on_request(capsys, monkeypatch):
    monkeypatch.setattr("trl_ext.upstream.CHECKS", {"a part": lambda: None})
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    assert f"- TRL version: {trl.__version__}" in printed
    assert printed.endswith(f"- trl_ext version: {trl_ext.__version__}\n\n") and "a part" not in printed
    assert cli.main(["env", "--check"]) == 0
    assert "- a part: ok\n" in capsys.readouterr().out

    def moved():
        raise RuntimeError("it moved")

    monkeypatch.setattr("trl_ext.upstream.CHECKS", {"a part": moved})
    assert cli.main(["env", "--check"]) == 1
    assert "- a part: FAILED: it moved\n" in capsys.readouterr().out


SCRIPT = """
import sys, beside, trl

def inner():
    raise RuntimeError("of the script")

print("__getattr__" in vars(trl))  # whether the names are ours; asking for one would load it
print(__name__, __file__, sys.argv, sys.path[0], beside.value, __spec__ and __spec__.name)
if "fail" in sys.argv:
    inner()
sys.exit(3)
"""


def test_python_m_trl_ext_runs_a_script_as_python_does(folder, python):
    (folder / "script").mkdir()
    (folder / "script" / "beside.py").write_text("value = 7\n")
    (folder / "script" / "main.py").write_text(SCRIPT)
    (folder / "beside.py").write_text("value = 8\n")
    for command in (["script/main.py", "a", "--b"], ["script/main.py", "fail"], ["-m", "script.main", "a", "-m"]):
        ours, theirs = python("-m", "trl_ext", *command), python(*command)
        assert theirs.stdout.startswith("False\n")
        assert ours.stdout == theirs.stdout.replace("False", "True", 1)
        assert ours.returncode == theirs.returncode == (1 if "fail" in command else 3), ours.stderr
        traceback = [text[text.find("Traceback") :] for text in (ours.stderr, theirs.stderr) if "Traceback" in text]
        assert len(traceback) == (2 if "fail" in command else 0)
        assert len(set(traceback)) <= 1, "the traceback starts in the script"


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ([], 1, "usage: python -m trl_ext script.py"),
        (["-m"], 1, "usage: python -m trl_ext script.py"),
        (["--no-such-option", "script.py"], 1, "usage: python -m trl_ext script.py"),
        (["no_such_script.py"], 2, "python -m trl_ext: can't open file '/"),
    ],
)
def test_python_m_trl_ext_says_how_it_is_used(python, command, code, says):
    done = python("-m", "trl_ext", *command)
    assert done.returncode == code
    assert done.stderr.startswith(says) and "Traceback" not in done.stderr
