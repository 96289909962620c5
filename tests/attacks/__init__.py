"""A corpus of hostile SQL: every way that we know to write, to look out of a database, to exhaust the machine or to break
the engine. Each module holds the attacks of some kinds; tests/unit/test_sql_attacks.py runs them, benchmarks/soak.py mixes
them among harmless queries.
"""

from __future__ import annotations

from attacks import bombs, changes, files, harmless, pragmas, schemas, secrets, texts
from attacks.attack import Attack

__all__ = ["ATTACKS", "Attack"]

_MODULES = (changes, pragmas, secrets, bombs, texts, harmless, schemas, files)

ATTACKS: dict[str, Attack] = {}  # by "kind-number", for the tests' names
for _module in _MODULES:
    for _kind, _attacks in _module.KINDS.items():
        for _number, _attack in enumerate(_attacks):
            ATTACKS[f"{_kind}-{_number:02}"] = _attack
