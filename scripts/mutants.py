#!/usr/bin/env python
"""Which changes of the code the fast tests (tests/unit) notice: mutmut on a random sample of one-line mutants.

    .venv/bin/python scripts/mutants.py stages servers                 200 mutants of each of the two areas
    .venv/bin/python scripts/mutants.py stages/checkpoints.py --sample 0        every mutant of a file
    .venv/bin/python scripts/mutants.py nemo_aligner.data.journal.x_flush__mutmut_3      one again, by its name

An area is a folder, file or module of nemo_aligner, or the name of a mutant. Survivors are shown as diffs. Left alone
are module and class level and decorated functions (by mutmut), log lines, assertions, and the wording of messages.
Mutants, and which test reaches which function, are kept in mutants/; remove it after moving code.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import filecmp
import functools
import io
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "mutants"
NOTICED = {"killed", "timeout", "segfault", "suspicious"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="+")
    parser.add_argument("--sample", type=int, default=200, help="mutants of each area, 0 = all")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="mutants tested at once")
    given = parser.parse_args()
    os.chdir(ROOT)
    os.environ.update(OMP_NUM_THREADS="1")
    os.environ.pop("PYTHONPATH", None)  # or the code would be imported from there, without its mutants
    forget_changed_tests()
    generate(given.processes)
    chosen = {area: choose(area, given.sample, given.seed) for area in given.areas}
    everything = sorted({name for names in chosen.values() for name in names})
    tool = [str(Path(sys.executable).with_name("mutmut")), "run", f"--max-children={given.processes}", *everything]
    done = subprocess.run(tool, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    status = verdicts()
    if done.returncode or any(status[name] == "not checked" for name in everything):
        sys.exit(f"{done.stdout[-4000:]}\nmutmut ended with status {done.returncode}")
    for area, names in chosen.items():
        show(area, names, status)


def forget_changed_tests() -> None:
    """Tests that were edited may reach other functions than before: mutmut looks again at those it does not know."""
    path = WORK / "mutmut-stats.json"
    if not path.exists():
        return
    stats = json.loads(path.read_text())

    def is_same(test: str) -> bool:
        file = test.partition("::")[0]
        return all(p.exists() for p in (ROOT / file, WORK / file)) and filecmp.cmp(ROOT / file, WORK / file, False)

    same = {file for file in {test.partition("::")[0] for test in stats["duration_by_test"]} if is_same(file)}
    stats["duration_by_test"] = {t: s for t, s in stats["duration_by_test"].items() if t.partition("::")[0] in same}
    for name, tests in stats["tests_by_mangled_function_name"].items():
        stats["tests_by_mangled_function_name"][name] = [t for t in tests if t.partition("::")[0] in same]
    path.write_text(json.dumps(stats, indent=4))


def generate(processes: int) -> None:
    """Write the mutants, as the first step of `mutmut run` does: a sample needs their names."""
    from mutmut import __main__ as mutmut

    WORK.mkdir(exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        mutmut.copy_src_dir()
        mutmut.copy_also_copy_files()
        mutmut.create_mutants(processes)


def verdicts() -> dict[str, str]:
    """What is known of each mutant."""
    from mutmut.stats import status_by_exit_code

    found = {}
    for path in (WORK / "nemo_aligner").rglob("*.py.meta"):
        if (ROOT / path.relative_to(WORK).with_suffix("")).exists():
            results = json.loads(path.read_text())["exit_code_by_key"]
            found |= {name: status_by_exit_code[code] for name, code in results.items()}
    return found


def choose(area: str, count: int, seed: int) -> list[str]:
    """`count` mutants of one area."""
    module = area.strip("/").removesuffix(".py").replace("/", ".").removeprefix("nemo_aligner.")
    prefix = f"nemo_aligner.{module}"
    names = sorted(name for name in verdicts() if name == prefix or name.startswith(f"{prefix}."))
    if not names:
        sys.exit(f"{area}: no mutants")
    random.Random(seed).shuffle(names)
    chosen: list[str] = []
    for name in names:
        if len(chosen) == (count or len(names)):
            break
        if not is_talk(changed_lines(name)):
            chosen.append(name)
    return chosen


@functools.cache
def functions(module: str) -> dict[str, list[str]]:
    """Every function of a module with its mutants, one statement a line."""
    path = WORK / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text())
    bodies = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node.name: [ast.unparse(node.args), *ast.unparse(node.body).splitlines()] for node in bodies}


def changed_lines(name: str) -> list[str]:
    """What a mutant changes: lines with - and +."""
    module, _, function = name.rpartition(".")
    found = functions(module)
    before, after = (found[name] for name in (re.sub(r"\d+$", "orig", function), function))
    return [line for line in difflib.ndiff(before, after) if line[0] in "-+"]


def is_talk(lines: list[str]) -> bool:
    """Whether a mutant changes only what is logged, what is asserted, or the words of a message."""
    if all(line[1:].lstrip().startswith(("log.", "assert ")) for line in lines):
        return True
    plain = {re.sub(r"xx", "", line[1:].lower()) for line in lines}
    return len(plain) == 1 and bool(re.search(r"""["'][^"']* [^"']*["']""", plain.pop()))


def show(area: str, names: list[str], status: dict[str, str]) -> None:
    missed = sorted(name for name in names if status[name] not in NOTICED)
    for name in missed:
        print("\n    ".join([f"\n{name}: {status[name]}", *changed_lines(name)]))
    untested = sum(status[name] == "no tests" for name in missed)
    print(
        f"\n== {area}: {len(names)} mutants, {1 - len(missed) / len(names):.1%} noticed, "
        f"{len(missed) - untested} survived, {untested} in code that no fast test reaches"
    )


if __name__ == "__main__":
    main()
