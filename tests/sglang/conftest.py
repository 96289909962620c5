"""Where SGLang is installed, prepares it: on a GPU as it is, else on this CPU with the stand-ins of tests/sglang_cpu."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from small_model import installed

ROOT = Path(__file__).resolve().parents[2]
CPU = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "SGLANG_FORCE_STREAM_INTERVAL": "4",  # tokens are counted while a turn runs
}

if installed("sglang") and not installed("sglang-kernel"):
    os.environ.update(CPU)
    stand_ins = str(ROOT / "tests" / "sglang_cpu")
    sys.path.insert(0, stand_ins)
    os.environ["PYTHONPATH"] = os.pathsep.join([stand_ins, *filter(None, [os.environ.get("PYTHONPATH", "")])])
