"""The wheel holds all that the package reads, and works where there is no checkout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from scripts.bench.container import sources
from tests.functional.conftest import ENV, ROOT


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints, without anything of this checkout in its environment."""
    environment = {name: value for name, value in ENV.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in sources():
        if name.startswith("nemo_aligner/") or ("/" not in name and not (ROOT / name).is_dir()):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    build = ("wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, ".")
    run(sys.executable, "-m", "pip", *build, cwd=folder / "source")
    [path] = folder.glob("*.whl")
    return path


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    assert [name for name in sources() if name.startswith("nemo_aligner/") and name not in held] == []


def test_an_environment_with_the_wheel_alone_samples(wheel: Path, tmp_path: Path) -> None:
    """Its requirements are those of the environment that runs the tests, by a path to them."""
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=tmp_path)
    own = tmp_path / "env/bin"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        own / "python",
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )
    [site] = (tmp_path / "env/lib").glob("python*/site-packages")
    (site / "requirements.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    work = tmp_path / "work"
    work.mkdir()
    where = run(own / "python", "-c", "import nemo_aligner; print(nemo_aligner.__file__)", cwd=work)
    assert where == f"{site}/nemo_aligner/__init__.py\n"
    assert "\n  sample " in run(own / "aligner", "--help", cwd=work)
    assert "TRAINING_ITERS" in run(own / "aligner", "loop", "--help", cwd=work)
    run(own / "aligner", "import", "--random-init", "tiny", "--dtype", "32", "--output", "tiny.nemo", cwd=work)
    (work / "prompts.jsonl").write_text('{"input": "a"}\n{"input": "b"}\n')
    run(
        own / "aligner", "sample", "-m", "data.n=1,2", "gpt_model_file=tiny.nemo", "data.file_names=[prompts.jsonl]",
        "output_file=out.jsonl", "+trainer=cpu", "inference.tokens_to_generate=4", "data.hf_dataset=False", cwd=work,
    )  # fmt: skip
    one, two = (
        [json.loads(line) for line in (work / f"multirun/megatron_random_sampler/data.n={n}/out.jsonl").open()]
        for n in (1, 2)
    )
    assert [row["input"] for row in one] == ["a", "b"]
    assert [row["input"] for row in two] == ["a", "a", "b", "b"]
    assert two[::2] == one, "a sample depends on its index, not on how many there are"
    assert sorted(path.name for path in work.iterdir()) == ["multirun", "prompts.jsonl", "tiny.nemo"]
