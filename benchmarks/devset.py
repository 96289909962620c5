"""Writes a by-database split of a question set as the two files that a run takes.

    python benchmarks/devset.py --devset DIR --out data/devset

DIR holds questions.jsonl and splits.json ({"train": [db_id, …], "valid": [db_id, …]}).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devset", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    splits = json.loads((args.devset / "splits.json").read_text())
    lines = (args.devset / "questions.jsonl").read_text().splitlines()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("train", "valid"):
        chosen = [line for line in lines if json.loads(line)["db_id"] in set(splits[name])]
        (args.out / f"{name}.jsonl").write_text("".join(line + "\n" for line in chosen))
        print(f"{args.out / name}.jsonl: {len(chosen)} questions over {len(splits[name])} databases")


if __name__ == "__main__":
    main()
