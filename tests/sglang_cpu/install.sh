#!/usr/bin/env bash
# Makes FOLDER a Python environment with the real SGLang on a CPU, for tests: bash tests/sglang_cpu/install.sh FOLDER
# Where pip would take PyTorch with CUDA, name its index of CPU builds in PIP_EXTRA_INDEX_URL (needs 3 GB, 2 minutes).
set -euo pipefail
folder=${1:?usage: install.sh FOLDER}
python3 -m venv "$folder"
pip() { "$folder/bin/python" -m pip --quiet --disable-pip-version-check install "$@"; }
pip torch==2.13.0
pip --no-deps -r "$(dirname "$0")/requirements.txt"
