"""The dry run of the session on a GPU: each part is measured or says why not, and a second call goes on."""

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "scripts"))
import gpu_session


@pytest.fixture(autouse=True)
def plain_four_bit(monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)  # see test_gpu_checks.py


def run(out, *words):
    status = gpu_session.main(["--dry_run", "--out", str(out), *words])
    return status, json.loads(out.read_text()), out.with_suffix(".md").read_text()


def test_a_feature_that_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    out, words = tmp_path / "session.json", ("--only", "IPO,REINFORCE++")
    with monkeypatch.context() as broken:
        broken.setitem(gpu_session.STEPS, "IPO", ("no class", "no kind", {}))
        status, results, page = run(out, *words)
    assert status == 1 and [*results["parts"]] == ["IPO", "REINFORCE++"]
    assert "| IPO | – | failed: KeyError: 'no kind' |" in page
    for weights in ("LoRA", "4-bit"):
        both = results["parts"]["REINFORCE++"]["result"][weights]
        assert both["trl"]["ms"] > 0 and both["ours"]["ms"] > 0
        assert f"| REINFORCE++ | {weights} | " in page
    # A second call does what is missing, and nothing else.
    measured = []
    monkeypatch.setattr(gpu_session, "steps_of", lambda name, *a: measured.append(name) or {"LoRA": both})
    status, again, page = run(out, *words)
    assert status == 0 and measured == ["IPO"] and "| IPO | LoRA | " in page and "failed" not in page
    assert again["parts"]["REINFORCE++"] == results["parts"]["REINFORCE++"]


def test_no_part_is_begun_after_its_time_and_other_devices_are_not_mixed(tmp_path):
    out = tmp_path / "session.json"
    results = gpu_session.session({"IPO": lambda seconds: pytest.fail("begun")}, out, 0.1)
    assert results["parts"]["IPO"]["error"] == "TimeoutError: no time was left"
    out.write_text(json.dumps({**results, "about": {**results["about"], "device": "another"}}))
    with pytest.raises(SystemExit, match=r"is of another, this is no GPU\. Choose another --out\."):
        gpu_session.session({}, out, 1)


def test_without_a_gpu_or_with_an_unknown_part_it_says_so(tmp_path):
    with pytest.raises(SystemExit, match="There is no GPU here"):
        gpu_session.main([])
    with pytest.raises(SystemExit, match=r"--only names \['IPOO'\]; the parts are"):
        run(tmp_path / "session.json", "--only", "IPOO")


def test_a_process_that_fails_says_its_last_line():
    with pytest.raises(RuntimeError, match="exit status 1: ValueError: why"):
        gpu_session._process(["-c", "raise ValueError('why')"], 60)


@pytest.mark.slow
def test_the_whole_session(tmp_path):
    status, results, page = run(tmp_path / "session.json")
    assert status == 0, [part for part in results["parts"].values() if "error" in part]
    parts = gpu_session.parts_of(argparse.Namespace(dry_run=True, only=""), tmp_path)
    assert results["parts"].keys() == parts.keys() and "failed" not in page
    assert page.count("| LoRA |") == page.count("| 4-bit |") == len(gpu_session.STEPS)
