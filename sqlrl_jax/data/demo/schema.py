"""Random small databases of the demo task: tables, rows, and what they hide from whoever only reads the prompt.

Every database has one parent table, such as `shop(id, city, style)`, and one or two child tables, such as
`sale(shop_id, item, price)`. Two things are hidden: how a text column spells its values (`paris` in a question may be
stored as `#paris` or `paris/7`), and the real name of a number column (the prompt says `price`, the table has
`price_net`). Both are drawn anew for each database, so no amount of training replaces a look. Words come from one small
vocabulary for all databases: generalising to unknown words is not what this task is about. Upper-case spellings are left
out because a small byte-pair vocabulary breaks them into pieces that share nothing with the lower-case word.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

PARENTS = ("shop", "club", "farm", "hotel", "lab", "team", "school", "ship", "bank", "park")
CHILDREN = ("sale", "visit", "trip", "game", "loan", "class", "task", "repair", "event", "show")
NUMBERS = ("price", "score", "weight", "hours", "age", "size", "cost", "points", "length", "speed")
PARENT_TEXT = {
    "city": ("paris", "rome", "oslo", "lima", "cairo", "delhi", "tokyo", "quito"),
    "color": ("red", "blue", "green", "black", "white", "pink", "gold", "gray"),
    "owner": ("anna", "ben", "carl", "dora", "emil", "fred", "gina", "hugo"),
    "style": ("old", "new", "big", "small", "plain", "fancy", "quiet", "loud"),
    "region": ("north", "south", "east", "west", "coast", "hill", "lake", "river"),
    "level": ("low", "high", "top", "mid", "base", "first", "last", "extra"),
}
CHILD_TEXT = {
    "item": ("apple", "bread", "lamp", "chair", "book", "shoe", "cup", "ring"),
    "month": ("jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep"),
    "animal": ("cat", "dog", "horse", "sheep", "duck", "goat", "fox", "owl"),
    "tool": ("saw", "drill", "rope", "nail", "hammer", "brush", "knife", "pump"),
    "sport": ("golf", "chess", "judo", "rugby", "polo", "tennis", "yoga", "surf"),
    "food": ("soup", "rice", "fish", "pie", "salad", "cake", "egg", "corn"),
}
PLAIN = "plain"
SPELLINGS = ("hash", "code", "bracket", "star", "level")
# Many, so that guessing the new name is hopeless and copying it from a result is what pays.
SUFFIXES = "usd raw now two net sum day max real unit mean full kg cm eur pct base all avg total mine prev next old"
RENAMES = tuple(f"{{}}_{suffix}" for suffix in SUFFIXES.split())
LETTERS = "abcdefghjkmnpqrstuvwxyz"


@dataclass(frozen=True)
class TextColumn:
    """A text column: `stored` maps each word a question may use to the value in the database."""

    name: str
    spelling: str
    stored: dict[str, str]


@dataclass(frozen=True)
class Table:
    """`number` is the name the prompt tells, `real_number` the one in the database; both empty in the parent table."""

    name: str
    key: str
    texts: tuple[TextColumn, ...]
    number: str = ""
    real_number: str = ""

    def columns(self, real: bool) -> list[str]:
        number = self.real_number if real else self.number
        return [self.key, *(t.name for t in self.texts), *([number] if number else [])]


@dataclass(frozen=True)
class Database:
    """One parent table, its children, and all rows by table name."""

    db_id: str
    parent: Table
    children: tuple[Table, ...]
    rows: dict[str, list[tuple[int | str, ...]]]

    @property
    def tables(self) -> tuple[Table, ...]:
        return (self.parent, *self.children)

    @property
    def prompt_schema(self) -> str:
        """What the prompt shows: one `table(column, column)` a line, number columns under the name that is told."""
        return "\n".join(f"{t.name}({', '.join(t.columns(real=False))})" for t in self.tables)


def spell(words: tuple[str, ...], spelling: str, rng: random.Random) -> dict[str, str]:
    """Word → stored value. One spelling, with one letter or digit, for a column."""
    letter, digit = rng.choice(LETTERS), rng.randrange(10)
    forms = {
        PLAIN: lambda word: word,
        "hash": lambda word: f"#{word}",
        "code": lambda word: f"{letter}-{word}",
        "bracket": lambda word: f"[{word}]",
        "star": lambda word: f"{word}*",
        "level": lambda word: f"{word}/{digit}",
    }
    return {word: forms[spelling](word) for word in words}


def make_database(db_id: str, rng: random.Random, *, spelled: float, renamed: float) -> Database:
    """Draws a database. `spelled` and `renamed` are the chances that a text or number column hides something."""
    parent_name = rng.choice(PARENTS)

    def text(pool: Mapping[str, tuple[str, ...]], name: str) -> TextColumn:
        words = tuple(rng.sample(pool[name], rng.randint(4, 5)))
        spelling = rng.choice(SPELLINGS) if rng.random() < spelled else PLAIN
        return TextColumn(name, spelling, spell(words, spelling, rng))

    parent = Table(parent_name, "id", tuple(text(PARENT_TEXT, n) for n in rng.sample(sorted(PARENT_TEXT), 2)))
    n_children = rng.randint(1, 2)
    children = []
    for name, column, number in zip(
        rng.sample(CHILDREN, n_children),
        rng.sample(sorted(CHILD_TEXT), n_children),
        rng.sample(NUMBERS, n_children),
        strict=True,
    ):
        real = rng.choice(RENAMES).format(number) if rng.random() < renamed else number
        children.append(Table(name, f"{parent_name}_id", (text(CHILD_TEXT, column),), number, real))
    return Database(db_id, parent, tuple(children), _rows(parent, children, rng))


def _rows(parent: Table, children: list[Table], rng: random.Random) -> dict[str, list[tuple[int | str, ...]]]:
    keys = list(range(1, rng.randint(5, 7) + 1))
    rows: dict[str, list[tuple[int | str, ...]]] = {
        parent.name: [(key, *(_any_value(t, i, rng) for t in parent.texts)) for i, key in enumerate(keys)]
    }
    for child in children:
        count = rng.randint(8, 12)
        numbers = _tie(rng.sample(range(2, 99), count), rng)
        rows[child.name] = [
            (rng.choice(keys), _any_value(child.texts[0], i, rng), number) for i, number in enumerate(numbers)
        ]
        rng.shuffle(rows[child.name])
    return rows


def _any_value(column: TextColumn, i: int, rng: random.Random) -> str:
    """The first rows take each value once, so that every value a question may name is there."""
    values = list(column.stored.values())
    return values[i] if i < len(values) else rng.choice(values)


def _tie(numbers: list[int], rng: random.Random) -> list[int]:
    """Half of the time the highest is held twice, half of the time the lowest: in the first four rows, whose texts differ."""
    low, *middle, high = sorted(numbers)
    rng.shuffle(middle)
    if rng.random() < 0.5:
        middle[-1] = high
    if rng.random() < 0.5:
        middle[0] = low
    return [high, middle[-1], low, middle[0], *middle[1:-1]]


def build(database: Database) -> sqlite3.Connection:
    """The database in memory; `connection.serialize()` is the file's content."""
    connection = sqlite3.connect(":memory:")
    connection.execute("PRAGMA page_size = 1024")
    for table in database.tables:
        texts = [f"{t.name} TEXT" for t in table.texts]
        number = [f"{table.real_number} INTEGER"] if table.real_number else []
        key = "id INTEGER PRIMARY KEY" if table.key == "id" else f"{table.key} INTEGER"
        connection.execute(f"CREATE TABLE {table.name} ({', '.join([key, *texts, *number])})")
        marks = ", ".join("?" * len(table.columns(real=True)))
        connection.executemany(f"INSERT INTO {table.name} VALUES ({marks})", database.rows[table.name])
    connection.commit()
    return connection
