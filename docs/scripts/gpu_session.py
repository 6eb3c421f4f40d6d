"""
All that wants a GPU, in one session of less than 40 minutes on one: one JSON file, and one Markdown table made of it.

    python docs/scripts/gpu_session.py [--out gpu_session.json] [--minutes 40] [--only "REINFORCE++,IPO"] [--dry_run]

It runs `pytest tests/gpu`, `docs/scripts/shared_prefix.py`, and for each feature training steps of LoRA in bfloat16
and over 4-bit weights, ours and TRL's in turn on the same work: random weights of the dimensions of Qwen2.5-1.5B,
completions that are given, nothing downloaded. Each part is a process of its own, so that one that fails, hangs or
takes the device with it is a row that says so. What is measured is written after every part; a part that is in the
file already is not run again, so that the same line goes on where a session was cut off. `--dry_run`: tiny, on a CPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_ext.trainers.ppo import PPOConfig, PPOTrainer

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "gpu"), str(Path(__file__).parent)]

from gpu_checks import CLASSES, FEATURES, THEIRS, Size, cost, save_tokenizer  # noqa: E402
from shared_prefix import DIMENSIONS  # noqa: E402

SIZES = {  # the first three numbers are those of DIMENSIONS, which rule
    "1.5b": Size(hidden=1536, layers=28, vocabulary=151936, completion=384, batch=16, prompt=256),
    "tiny": Size(hidden=64, layers=2, vocabulary=512, completion=8, batch=8),
}
LOSSES_OF_TRL = {"psipo_identity": "ipo", "psipo_logit": "ipo"}


def _in_trl(kind: str, ours: dict[str, Any]) -> dict[str, Any]:
    """The options of TRL's trainer for the same work."""
    if kind == "dpo":
        return {"loss_type": [LOSSES_OF_TRL.get(ours["loss_type"][0], "sigmoid")]}
    return {name: ours[name] for name in ("beta", "num_iterations") if name in ours}


MORE = {
    "KL of whole completions": {"kl_placement": "sequence", "beta": 0.1},
    "PRIME": {"advantage_estimator": "prime", "implicit_prm": {"beta": 0.05}, "beta": 0.1},
    "a reference that is refreshed": {"kl_estimator": "k3", "beta": 0.1, "ref_refresh_steps": 2},
    "a bound on the policy's KL": {"policy_kl_stop": 1.0, "num_iterations": 2},
}
STEPS = {name: (CLASSES[kind], kind, options) for name, (kind, options) in FEATURES.items()}
STEPS |= {name: (CLASSES["grpo"], "grpo", options) for name, options in MORE.items()}
STEPS["PPO, critic as an adapter"] = ((PPOTrainer, PPOConfig), "grpo", {"beta": 0.1})


def save_model(path: Path, dims: str, device: str) -> None:
    """Random weights in bfloat16, made on the device."""
    layers, hidden, intermediate, heads, kv, vocabulary = DIMENSIONS[dims]
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=True, max_position_embeddings=8192,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    save_tokenizer(path, SIZES[dims])


def steps_of(feature: str, folder: Path, dims: str, device: str, steps: int) -> dict[str, Any]:
    """Milliseconds and MiB of a step, TRL's and ours, with LoRA and over 4-bit weights."""
    classes, kind, ours = STEPS[feature]
    if not (folder / "model").exists():
        save_model(folder / "model", dims, device)
    found: dict[str, Any] = {}
    for weights in ("LoRA", "4-bit"):
        settings: dict[str, Any] = {"four_bit": weights == "4-bit", "lora": True}
        if device != "cpu":
            settings |= {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}
        found[weights] = {}
        for who, (trainer, options) in {"trl": (THEIRS[kind], _in_trl(kind, ours)), "ours": (classes, ours)}.items():
            where = str(folder / "model"), folder / "out", SIZES[dims], device
            milliseconds, memory = cost(trainer, kind, *where, steps, **settings, **options)
            found[weights][who] = {"ms": milliseconds, "MiB": None if device == "cpu" else memory}
    return found


# Parts


def _process(words: list[str], seconds: float) -> str:
    """What a Python process writes; its last line as an error where it fails."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(f"exit status {done.returncode}: {lines[-1] if lines else 'no word'}")
    return done.stdout


def parts_of(a: argparse.Namespace, folder: Path) -> dict[str, Callable[[float], Any]]:
    """Each part as a function of the seconds that it may take."""
    tiny = [
        "--device",
        "cpu",
        "--dims",
        "tiny",
        "--steps",
        "1",
        "--shrink",
        "16",
        "--like",
        "cuda",
        "--cases",
        "one group",
    ]
    json_of_prefixes = folder / "shared_prefix.json"

    def tests(seconds: float) -> Any:
        words = ["-m", "pytest", "-q", "-n", "0", *(["--collect-only"] if a.dry_run else []), "tests/gpu"]
        return _process(words, min(seconds, 540)).strip().splitlines()[-60:]

    def prefixes(seconds: float) -> Any:
        words = tiny if a.dry_run else ["--budget", str(min(seconds, 420))]
        _process(["docs/scripts/shared_prefix.py", *words, "--out", str(json_of_prefixes)], min(seconds, 480))
        return json.loads(json_of_prefixes.read_text())

    def feature(name: str) -> Callable[[float], Any]:
        if a.dry_run:
            return lambda seconds: steps_of(name, folder, "tiny", "cpu", 3)
        words = [__file__, "--part", name, "--folder", str(folder)]
        return lambda seconds: json.loads(_process(words, min(seconds, 240)).splitlines()[-1])

    parts = {"tests/gpu": tests, "shared prefixes": prefixes, **{name: feature(name) for name in STEPS}}
    chosen = [name.strip() for name in a.only.split(",")] if a.only else list(parts)
    if unknown := [name for name in chosen if name not in parts]:
        raise SystemExit(f"--only names {unknown}; the parts are {list(parts)}.")
    return {name: parts[name] for name in chosen}


def session(parts: dict[str, Callable[[float], Any]], out: Path, minutes: float) -> dict[str, Any]:
    """Runs the parts that `out` does not hold yet; one that fails does not take the others with it."""
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"about": about(), "parts": {}}
    if results["about"]["device"] != about()["device"]:
        raise SystemExit(
            f"{out} is of {results['about']['device']}, this is {about()['device']}. Choose another --out."
        )
    started = time.monotonic()
    for name, part in parts.items():
        if "error" not in results["parts"].get(name, {"error": ""}):
            continue
        begun, left = time.monotonic(), 60 * minutes - (time.monotonic() - started)
        try:
            if left < 10:
                raise TimeoutError("no time was left")
            results["parts"][name] = {"result": part(left)}
        except Exception as error:
            results["parts"][name] = {"error": f"{type(error).__name__}: {error}"}
        results["parts"][name]["seconds"] = round(time.monotonic() - begun, 1)
        out.write_text(json.dumps(results, indent=1))
        out.with_suffix(".md").write_text(table(results))
        print(f"{name}: {results['parts'][name].get('error', 'done')}", flush=True)
    return results


def about() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = {"torch": torch.__version__, "trl": trl.__version__, "transformers": transformers.__version__}
    return {"device": device, "date": time.strftime("%Y-%m-%d"), **versions}


HEAD = "| feature | weights | TRL, ms/step | trl_ext, ms/step | ratio | TRL, peak MiB | trl_ext, peak MiB |"


def table(results: dict[str, Any]) -> str:
    """The whole session as a page."""
    lines = [", ".join(f"{name} {value}" for name, value in results["about"].items()), "", HEAD, "|---" * 7 + "|"]
    others = []
    for name, part in results["parts"].items():
        if "error" in part:
            error = part["error"].replace("|", "/").replace("\n", " ")[:200]
            lines.append(f"| {name} | – | failed: {error} | | | | |")
        elif name in STEPS:
            lines += [_row(name, weights, both["trl"], both["ours"]) for weights, both in part["result"].items()]
        else:
            text = (
                part["result"]
                if isinstance(part["result"], list)
                else json.dumps(part["result"], indent=1).split("\n")
            )
            others += ["", f"{name}, {part['seconds']} s:", "", "```text", *text, "```"]
    return "\n".join([*lines, *others, ""])


def _row(name: str, weights: str, trl: dict[str, float], ours: dict[str, float]) -> str:
    memory = ["–" if x["MiB"] is None else f"{x['MiB']:.0f}" for x in (trl, ours)]
    times = f"{trl['ms']:.0f} | {ours['ms']:.0f} | {ours['ms'] / trl['ms']:.2f}"
    return f"| {name} | {weights} | {times} | {' | '.join(memory)} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_session.json"))
    parser.add_argument("--minutes", type=float, default=40.0, help="After these no part is begun, and none goes on.")
    parser.add_argument("--only", default="", help="Names of parts, with commas.")
    parser.add_argument("--dry_run", action="store_true", help="Tiny dimensions, on a CPU.")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.part:
        print(json.dumps(steps_of(a.part, a.folder, "1.5b", "cuda", 8)))
        return 0
    if not a.dry_run and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here. --dry_run tries the script on a CPU.")
    with tempfile.TemporaryDirectory() as folder:
        results = session(parts_of(a, Path(folder)), a.out, a.minutes)
    return int(any("error" in part for part in results["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
