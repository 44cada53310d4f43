r"""Run an online loop: sample, label, train, and again with the better policy.

    aligner loop rs PROMPTS_PATH=prompts.jsonl POLICY_MODEL_PATH=sft_model.nemo REWARD_MODEL_PATH=reward_model.nemo \
        RESULT_PATH=results TRAINING_ITERS=20 ROLLOUT_BATCH_SIZE=2048 SAMPLER_ARGS="data.n=16"
    aligner loop rest THRESHOLD=0.5 ...
    aligner loop dt TARGET_REWARD=1 ...

A setting that is not given is taken from the environment. After a kill the same command goes on where it was.

All stages run in one process (ONE_PROCESS=1, as long as nothing else is said), and no model is loaded twice.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.errors import ConfigError

_FOLDER = Path(__file__).resolve().parent / "loops"
LOOPS = ("rs", "rest", "dt")


def script_of(loop: str) -> Path:
    """The shell script of one of `LOOPS`."""
    return _FOLDER / f"online_{loop}.sh"


def settings_of(loop: str) -> set[str]:
    """Names of what its script takes from the environment."""
    scripts = {script_of("rs"), script_of(loop)}
    return {name for path in scripts for name in re.findall(r"\$\{([A-Z_]+):[=?-]", path.read_text(encoding="utf-8"))}


def environment_of(loop: str, words: list[str]) -> dict[str, str]:
    """What `words`, each NAME=value, say. Raises ConfigError for another form, and names the script does not know."""
    given, known = {}, settings_of(loop)
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not of the form NAME=value; aligner loop --help says which names there are")
        if name not in known:
            raise ConfigError(f"no such setting of aligner loop {loop}; it takes {', '.join(sorted(known))}", name)
        given[name] = value
    return given


def usage() -> str:
    """What --help prints: the comments that the scripts begin with."""
    blocks = [(__doc__ or "").strip()]
    for loop in LOOPS:
        head, _, _ = script_of(loop).read_text(encoding="utf-8").partition("\nset ")
        said = (line.removeprefix("#").rstrip() for line in head.splitlines()[1:])
        blocks.append("\n".join([loop, *(f" {line}".rstrip() for line in said)]))
    return "\n\n".join(blocks)


def completions(words: list[str]) -> list[str]:
    """What may be typed after `aligner loop`, of which `words` are there already, the last perhaps in part."""
    loop, *settings = words
    if not settings or loop not in LOOPS:
        return [*LOOPS]
    return sorted(f"{name}=" for name in settings_of(loop))


@one_line_errors()
def main() -> None:
    loop, *words = sys.argv[1:] or [""]
    if {"-h", "--help"} & {loop, *words}:
        print(usage())
        return
    if loop not in LOOPS:
        raise ConfigError(f"aligner loop {loop}: which loop? One of {', '.join(LOOPS)}")
    environment = {"PYTHON": sys.executable, "ONE_PROCESS": "1", **os.environ, **environment_of(loop, words)}
    os.execvpe("bash", ["bash", str(script_of(loop))], environment)
