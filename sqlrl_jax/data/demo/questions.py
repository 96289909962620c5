"""Questions about a demo database: what is asked, the gold query, and what a query looks like that was written unseen.

Six kinds, by what it takes to be right:
  value   one filter on a text column of the asked table      look at the column's values
  join    one filter on a column of the parent table          look, and join
  two     two filters                                         look twice
  column  highest, total, ... of a number column              try the query, mend the column name
  both    the same with a filter                              look, try, mend
  tie     which item has the highest ...                      keep all that are tied; the column name may need mending
A guess is right when the database happens to hide nothing. Phrases are few and fixed on purpose: reading varied
English is not what this task is about.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from sqlrl_jax.data.demo.schema import Database, Table, TextColumn

KINDS = {"value": 0.15, "join": 0.17, "two": 0.2, "column": 0.12, "both": 0.22, "tie": 0.14}
AGGREGATES = {"total": "SUM", "average": "AVG", "highest": "MAX", "lowest": "MIN"}


@dataclass(frozen=True)
class Filter:
    """`column = word`, where the word is spelled as in the question."""

    table: Table
    column: TextColumn
    word: str

    @property
    def stored(self) -> str:
        return self.column.stored[self.word]


@dataclass(frozen=True)
class Question:
    """`output` is COUNT(*), a text column, or empty when `aggregate` (highest, ...) of the table's number is asked.

    A tie question has both: the text column of the rows that hold the highest or lowest number.
    """

    kind: str
    table: Table
    filters: tuple[Filter, ...]
    output: str = ""
    aggregate: str = ""

    @property
    def needs_number(self) -> bool:
        return bool(self.aggregate)

    def text(self) -> str:
        where = " and ".join(f"{f.column.name} '{f.word}'" for f in self.filters)
        if self.kind == "tie":
            return f"Which {self.output} has the {self.aggregate} {self.table.number} in {self.table.name}?"
        if self.output == "COUNT(*)":
            return f"How many {self.table.name} rows have {where}?"
        if self.output:
            return f"List the {self.output} of {self.table.name} rows with {where}."
        of = f"{self.table.name} rows with {where}" if where else f"all {self.table.name} rows"
        return f"What is the {self.aggregate} {self.table.number} of {of}?"

    def sql(self, parent: Table, values: Mapping[str, str], number: str, keep_ties: bool = True) -> str:
        """The query for given stored values by column and a given name of the number column."""
        name = self.table.name
        if self.kind == "tie":
            extreme = AGGREGATES[self.aggregate]
            if keep_ties:
                return f"SELECT {self.output} FROM {name} WHERE {number} = (SELECT {extreme}({number}) FROM {name})"
            order = "DESC" if extreme == "MAX" else "ASC"
            return f"SELECT {self.output} FROM {name} ORDER BY {number} {order} LIMIT 1"
        output = self.output or f"{AGGREGATES[self.aggregate]}({number})"
        joined = any(f.table.name != name for f in self.filters)
        source = f"{name} JOIN {parent.name} ON {self.table.key} = id" if joined else name
        where = " AND ".join(f"{f.column.name} = '{values[f.column.name]}'" for f in self.filters)
        return f"SELECT {output} FROM {source}" + (f" WHERE {where}" if where else "")

    def gold(self, parent: Table) -> str:
        return self.sql(parent, {f.column.name: f.stored for f in self.filters}, self.table.real_number)

    def guess(self, parent: Table) -> str:
        """The query of one who believes the question and the prompt's schema, and forgets ties."""
        return self.sql(parent, {f.column.name: f.word for f in self.filters}, self.table.number, keep_ties=False)

    def hidden(self) -> list[str]:
        """What the prompt does not tell: columns whose spelling differs, a renamed number column."""
        spelled = [f.column.name for f in self.filters if f.stored != f.word]
        renamed = self.needs_number and self.table.number != self.table.real_number
        return spelled + ([self.table.number] if renamed else [])


def draw_kind(rng: random.Random) -> str:
    return rng.choices(list(KINDS), list(KINDS.values()))[0]


def draw_question(database: Database, kind: str, rng: random.Random) -> Question:
    """One random question of a kind; it may turn out to have an empty answer."""
    parent, child = database.parent, rng.choice(database.children)
    of_parent = [Filter(parent, c, rng.choice(list(c.stored))) for c in rng.sample(parent.texts, 2)]
    of_child = Filter(child, child.texts[0], rng.choice(list(child.texts[0].stored)))
    aggregate = rng.choice(list(AGGREGATES))
    count = rng.random() < 0.5
    if kind == "value":
        if rng.random() < 0.5:
            return Question(kind, child, (of_child,), "COUNT(*)")
        return Question(kind, parent, (of_parent[0],), "COUNT(*)" if count else of_parent[1].column.name)
    if kind == "join":
        return Question(kind, child, (of_parent[0],), "COUNT(*)" if count else of_child.column.name)
    if kind == "two":
        if rng.random() < 0.5:
            return Question(kind, child, (of_child, of_parent[0]), "COUNT(*)")
        return Question(kind, parent, tuple(of_parent), "COUNT(*)" if count else "id")
    if kind == "column":
        return Question(kind, child, (), aggregate=aggregate)
    if kind == "both":
        return Question(kind, child, (rng.choice((of_child, of_parent[0])),), aggregate=aggregate)
    return Question(kind, child, (), of_child.column.name, rng.choice(("highest", "lowest")))
