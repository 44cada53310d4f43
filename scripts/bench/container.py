"""The commands of a Dockerfile, line by line, in an empty folder: what can be tried of it without a container engine.

    .venv/bin/python scripts/bench/container.py Dockerfile
    .venv/bin/python scripts/bench/container.py Dockerfile.gpu

/opt and /work of the image are folders below --folder. Lines that need root (packages of the system, users) are left
out, and named. The base of Dockerfile.gpu, which has a torch, is played by links to this environment's torch and what
that needs; the run fails where another torch is found in the end. Takes minutes: pip fetches what the image would hold.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDS_ROOT = ("apt-get", "useradd")


@dataclass(frozen=True)
class Line:
    """An instruction of a Dockerfile, with its words."""

    name: str
    text: str


def read(path: Path) -> list[Line]:
    """Its instructions, continued lines joined."""
    text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [Line(*line.split(maxsplit=1)) for line in lines]


def needs_root(line: Line) -> bool:
    return line.name == "RUN" and any(word in line.text for word in NEEDS_ROOT)


def sources() -> list[str]:
    """What `COPY . .` brings of a clean checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file() or (ROOT / name).is_symlink()]


class Image:
    """Runs lines with the folders of an image below `folder`."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._root, self._env, self._at = folder, environment, folder

    def run(self, line: Line) -> None:
        if line.name == "WORKDIR":
            self._at = Path(self._placed(line.text))
            self._at.mkdir(parents=True, exist_ok=True)
        elif line.name == "COPY":
            for name in sources():
                (self._at / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self._at / name, follow_symlinks=False)
        elif line.name == "ENV":
            name, _, value = line.text.partition("=")
            self._env[name] = self._placed(value).replace("$PATH", self._env["PATH"])
        elif line.name == "RUN":
            subprocess.run(["bash", "-c", self._placed(line.text)], cwd=self._at, env=self._env, check=True)

    def shell(self, command: str) -> str:
        """What a command prints in the image."""
        full = ["bash", "-c", command]
        return subprocess.run(full, cwd=self._at, env=self._env, check=True, stdout=subprocess.PIPE, text=True).stdout

    def _placed(self, text: str) -> str:
        return re.sub(r"(?<![\w.])/(opt|work)\b", lambda found: f"{self._root}/{found[1]}", text)


def play_base(folder: Path) -> Path:
    """A folder of packages with torch and what it needs, as links to this environment's."""
    site, todo, done = folder / "base", ["torch"], set()
    site.mkdir()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:  # of another platform
            continue
        tops = {Path(str(file)).parts[0] for file in package.files or () if not str(file).startswith("..")}
        for top in tops - {"__pycache__"}:
            target = Path(str(package.locate_file(top)))
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)
        for requirement in package.requires or ():
            if "extra ==" not in requirement:
                todo.append(re.split(r"[\[<>=!~; (]", requirement, maxsplit=1)[0])
    return site


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", choices=["Dockerfile", "Dockerfile.gpu"])
    parser.add_argument("--folder", type=Path, default=ROOT / "results/bench/container", help="is emptied first")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    folder = args.folder.resolve()
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    own = str(Path(sys.executable).parent)
    environment["PATH"] = ":".join(part for part in environment["PATH"].split(":") if part != own)
    has_torch = args.dockerfile == "Dockerfile.gpu"
    if has_torch:
        environment["PYTHONPATH"] = str(play_base(folder))
    image = Image(folder, environment)
    for line in read(ROOT / args.dockerfile):
        left_out = needs_root(line)
        print(f"{'left out: ' if left_out else ''}{line.name} {line.text}", flush=True)
        if not left_out:
            image.run(line)
    torch = image.shell("python -c 'import torch; print(torch.__version__, torch.__file__)'")
    print(f"torch {torch.strip()}")
    if has_torch and str(folder / "base") not in torch:
        sys.exit("error: the base's torch was replaced")
    shape = image.shell(
        f"python {folder}/opt/nemo-aligner/scripts/import_hf.py --output tiny.nemo "
        f"--random-init {folder}/opt/nemo-aligner/conf/model/tiny.yaml"
    )
    (folder / "work/prompts.jsonl").write_text(json.dumps({"input": "a"}) + "\n")
    image.shell(
        f"python {folder}/opt/nemo-aligner/examples/nlp/gpt/offline/launch_random_sampler.py gpt_model_file=tiny.nemo "
        "data.file_names=[prompts.jsonl] output_file=out.jsonl trainer.precision=32 inference.tokens_to_generate=4"
    )
    print(shape.splitlines()[-1], (folder / "work/out.jsonl").read_text(), sep="\n")


if __name__ == "__main__":
    main()
