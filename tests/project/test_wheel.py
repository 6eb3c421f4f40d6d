"""The wheel: what it holds, what is said of it, and that it is enough."""

import email
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import trl_ext

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as `pip` builds it, with the backend of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.strip()


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith("/METADATA")]
        return email.message_from_bytes(files.read(name))


def test_no_link_of_the_long_description_is_relative(metadata):
    text = metadata.get_payload()
    links = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    assert len(links) > 20 and [link for link in links if not link.startswith(("https://", "http://", "#"))] == []
    assert text.count("# ") == (ROOT / "README.md").read_text().count("# "), "the README, and nothing else changed"


def test_what_is_said_of_it(metadata):
    assert metadata["Version"] == trl_ext.__version__ and metadata["License-Expression"] == "Apache-2.0"
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Changelog"} <= {*urls}
    for word in ("advantage estimators", "KL", "preference losses", "process-reward", "PPO"):
        assert word in metadata["Summary"]
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra" not in line]
    assert sorted(re.match(r"[\w-]+", line)[0] for line in needed) == [
        "accelerate", "datasets", "psutil", "pyyaml", "torch", "transformers", "trl",
    ]  # fmt: skip
    extras = {line for line in metadata.get_all("Requires-Dist") if "extra" in line}
    assert "bitsandbytes>=0.46.1; extra == 'quantization'" in extras and "matplotlib>=3.8; extra == 'plots'" in extras


def test_it_holds_the_package_and_the_recipes_as_they_are_here(wheel):
    with zipfile.ZipFile(wheel) as files:
        names = {name for name in files.namelist() if ".dist-info/" not in name}
        for folder, place in (("trl_ext", "trl_ext"), ("recipes", "trl_ext/recipes")):
            here = {path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
            for path in here:
                name = f"{place}/{path.relative_to(ROOT / folder)}"
                assert files.read(name) == path.read_bytes(), name
                names.remove(name)
    assert names == set()
    assert wheel.stat().st_size < 2e6


@pytest.mark.slow
def test_the_wheel_alone_reaches_the_line_of_the_accuracy(wheel, tmp_path):
    """In an environment of its own, which sees what the package depends on, but not the repository."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files are not read
    (tmp_path / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python.parent / "trl-ext"), "example", "--run"]
    done = subprocess.run(
        command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = re.findall(r"^Held-out accuracy, 200 prompts: greedy (.*) -> (.*), sampled", done.stdout, re.MULTILINE)
    assert float(line[0]) < 0.3 and float(line[1]) > 0.9
    where = "import trl_ext; print(trl_ext.__file__)"
    found = subprocess.run([python, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(tmp_path / "env"), "and not the one under test"
