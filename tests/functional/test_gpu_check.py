"""scripts/gpu_check.sh, every line of it, where there is no GPU: on a pretend one, and with nothing else installed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu_check import check, models
from scripts.gpu_check.report import Report
from tests.pretend_gpu import pretend_gpu

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.processes
MEASURED = [
    *("memory bandwidth", "bf16 products", "peak of MFU"),
    *("generation, 4 slots", "SFT, 32 tokens packed", "SFT, model-FLOP utilisation"),
    *("REINFORCE", "REINFORCE, responses", "REINFORCE, initial log-probabilities", "REINFORCE, update"),
    "REINFORCE, update, model-FLOP utilisation",
]
DIFFERENCES = ["decode step, 4 slots", "decode step, part of the bandwidth bound"]
"""Of two times, which may be anything on a busy machine."""
COMPARED = ["logits", "log-probabilities", "rewards", "greedy text", "gradients"]
COMPARED += ["initial log-probabilities", "log-probabilities after a step"]


def only_what_a_gpu_machine_has(folder: Path) -> None:
    """Links to torch, numpy and megatron-core and to all they require."""
    waiting, done = ["torch", "numpy", "megatron-core"], set()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # required on other platforms
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))).resolve())
        required = [line for line in found.requires or () if "extra ==" not in line]
        waiting += [re.split(r"[^\w.-]", line)[0].lower() for line in required]


def figures(path: Path) -> dict[str, dict[str, Any]]:
    return {figure["name"]: figure for figure in json.loads(path.read_text())["figures"]}


def test_the_check_runs_with_torch_numpy_and_megatron_core_alone(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    only_what_a_gpu_machine_has(packages)
    python, told = tmp_path / "python", tmp_path / "figures.json"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without its own packages
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    command = [
        "bash",
        str(ROOT / "scripts" / "gpu_check.sh"),
        "--device",
        "cpu",
        "--shapes",
        "tiny",
        "--json",
        str(told),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = figures(told)
    assert all(found[name]["value"] == 0 for name in COMPARED)
    assert all(found[name]["value"] > 0 and name in done.stdout for name in MEASURED)
    assert all(found[name]["value"] is not None for name in DIFFERENCES)
    assert found["generation over transformers"]["note"] == "transformers cannot be imported here"


def test_every_line_of_it_runs_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = tmp_path / "figures.json"
    with pretend_gpu():
        assert check.main(["--shapes", "tiny", "--json", str(told)]) == 0
    found = figures(told)
    assert all(found[name]["value"] <= 1e-3 and found[name]["note"].startswith("ok") for name in COMPARED)
    peaks = [f"{name}: peak memory" for name in ("generation", "SFT", "REINFORCE")]
    assert [found[name]["value"] for name in peaks] == [0, 0, 0]
    assert all(found[name]["value"] > 0 for name in (*MEASURED, "generation over transformers"))
    assert "| tiny | SFT, model-FLOP utilisation |" in capsys.readouterr().out


def test_a_device_that_is_not_equal_to_the_cpu_is_a_fault(tmp_path: Path) -> None:
    report = Report(tmp_path / "figures.json", {}, minutes=1)
    for gap in (1e-4, 2e-3, float("nan")):
        report.compared(f"gap {gap}", gap, 1e-3)
    assert report.faults == ["gap 0.002", "gap nan"]


def test_flops_are_those_of_the_products_of_a_model() -> None:
    """Against torch's own count, over the dense model with its attention in full."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    arch, length = models.SHAPES["tiny"], 24
    model = models.peer(arch, torch.device("cpu")).float()
    model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.int64)).logits.sum().backward()
    in_full = counter.get_total_flops()
    causal = models.training_flops(arch, [(0, length)])
    unseen = 6 * arch.num_layers * arch.num_attention_heads * arch.head_dim * length**2
    assert causal + unseen == pytest.approx(in_full, rel=0.02)
    prefix_once = models.training_flops(arch, [(0, 10), (10, length - 10)])
    assert prefix_once == pytest.approx(causal)
