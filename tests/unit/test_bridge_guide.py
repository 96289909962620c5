"""docs/bridge.md says what is there: the tests of its fault table, the settings and metrics that it names."""

import re
from pathlib import Path

from sqlrl_jax.config import BridgeConfig

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs/bridge.md").read_text()


def test_every_fault_has_the_test_that_is_named():
    rows = [line.split("|") for line in GUIDE.splitlines() if re.match(r"\| .*\| test_\w+", line)]
    assert len(rows) > 12
    for row in rows:
        files = [ROOT / "tests/integration" / f"{name.strip()}.py" for name in row[3].split(",")]
        text = "\n".join(file.read_text() for file in files)
        for name in re.findall("`([^`]+)`", row[4]):
            assert re.search(rf"def test_{name.removesuffix('…')}", text), f"{name} is not in {row[3]}"


def test_settings_and_metrics_are_named_as_they_are():
    for name in set(re.findall(r"`bridge\.(\w+)", GUIDE)) - {"proto"}:
        assert name in BridgeConfig.model_fields, name
    source = (ROOT / "sqlrl_jax/weights.py").read_text() + (ROOT / "sqlrl_jax/buckets.py").read_text()
    table = GUIDE[GUIDE.index("| metric under") : GUIDE.index("### What can go wrong")]
    for name in re.findall(r"`(\w+)`", table.replace("`bridge/`", "")):
        assert f'"{name.removesuffix("_seconds")}' in source, name
