"""Scripted players of the demo task: they write the demonstrations and measure how far guessing and looking get.

A player decides only from what the prompt and the observations show. What it says first in a thought (look, test, guess,
answer) is its decision, so that a model which imitates it can be moved from guessing to looking by one token.
"""

from __future__ import annotations

import random
import sqlite3
from dataclasses import dataclass

from sqlrl_jax.data.demo.questions import Question
from sqlrl_jax.data.demo.schema import RENAMES, Database

Rows = list[tuple[object, ...]]


@dataclass(frozen=True)
class Player:
    """Chances of the careful choice where there is one; 0 everywhere guesses, 1 everywhere is the expert."""

    look: float  # at the values of a filter's column, before answering
    look_again: float  # at those of the second one, having looked at the first
    test: float  # the query before answering, when it reads a number column
    test_again: float  # the same, having looked at values before
    mend: float  # a query that failed or found nothing, by looking; otherwise guesses again
    keep_ties: float

    @staticmethod
    def guesser() -> Player:
        return Player(0, 0, 0, 0, 0, 0)

    @staticmethod
    def expert() -> Player:
        return Player(1, 1, 1, 1, 1, 1)

    @staticmethod
    def mixed(look: float) -> Player:
        """Graded, so that some careful choices are found early in training and others late."""
        return Player(
            look=look,
            look_again=min(1.0, look + 0.3),
            test=look,
            test_again=look,
            mend=min(1.0, look + 0.5),
            keep_ties=0.7 * look,
        )


@dataclass
class Episode:
    """Assistant texts, the observations between them (text alone), and the answer that was given."""

    actions: list[str]
    observations: list[str]
    solution: str


def run_query(connection: sqlite3.Connection, sql: str) -> tuple[Rows, str]:
    """(rows, what a player reads): header and rows, or the error, as the SQL environment shows them."""
    try:
        cursor = connection.execute(sql)
    except sqlite3.Error as error:
        return [], f"SQL Error: {error}"
    rows: Rows = cursor.fetchall()
    header = " | ".join(str(d[0]) for d in cursor.description)
    lines = (" | ".join("NULL" if cell is None else str(cell) for cell in row) for row in rows)
    return rows, "\n".join([header, *(lines if rows else ["(no rows)"])])


class _Game:
    """One question being played."""

    def __init__(self, database: Database, question: Question, connection: sqlite3.Connection, player: Player) -> None:
        self.parent, self.question, self.connection, self.player = database.parent, question, connection, player
        self.values = {f.column.name: f.word for f in question.filters}
        self.number = question.table.number
        self.keep_ties = False
        self.episode = Episode([], [], "")
        self.found = ""  # what the last observation told, said before the next decision

    def sql(self) -> str:
        return self.question.sql(self.parent, self.values, self.number, self.keep_ties)

    def act(self, decision: str, sql: str) -> tuple[Rows, str]:
        self.episode.actions.append(f"<think>{self._thought(decision)}</think><sql>{sql}</sql>")
        rows, text = run_query(self.connection, sql)
        self.episode.observations.append(text)
        return rows, text

    def answer(self, decision: str) -> Episode:
        self.episode.solution = self.sql()
        self.episode.actions.append(
            f"<think>{self._thought(decision)}</think><solution>{self.episode.solution}</solution>"
        )
        return self.episode

    def _thought(self, decision: str) -> str:
        thought = f"{self.found}, {decision}" if self.found else decision
        self.found = ""
        return thought

    def look_at_values(self, index: int, why: str = "") -> None:
        chosen = self.question.filters[index]
        name, word = chosen.column.name, chosen.word
        rows, _ = self.act(f"{why}look at {name}", f"SELECT DISTINCT {name} FROM {chosen.table.name}")
        self.values[name] = next((str(row[0]) for row in rows if word in str(row[0])), word)
        self.found = f"{name} is '{self.values[name]}'"

    def look_at_columns(self) -> None:
        told, table = self.number, self.question.table.name
        _, text = self.act(f"no {told}, look at {table}", f"SELECT * FROM {table} LIMIT 1")
        names = text.split("\n")[0].split(" | ")
        self.number = next((name for name in names if told in name), told)
        self.found = f"{told} is {self.number}"


def play(
    database: Database, question: Question, connection: sqlite3.Connection, player: Player, rng: random.Random
) -> Episode:
    """Plays one question. The players here need at most five turns."""
    game = _Game(database, question, connection, player)
    looked = 0
    while looked < len(question.filters) and rng.random() < (player.look_again if looked else player.look):
        game.look_at_values(looked)
        looked += 1
    form = ""
    if question.kind == "tie":
        game.keep_ties = rng.random() < player.keep_ties
        form = " all ties" if game.keep_ties else " one"
    worth_a_test = question.needs_number or looked < len(question.filters)
    chance = player.test_again if looked else player.test
    if not question.needs_number:
        chance *= 0.25  # nothing but a spelling can be wrong, and looking finds that sooner
    if not worth_a_test or rng.random() >= chance:
        return game.answer(("answer" if looked else "guess") + form)
    rows, text = game.act("test" + form, game.sql())
    return _after_test(game, rows, text, looked, form, rng)


def _after_test(game: _Game, rows: Rows, text: str, looked: int, form: str, rng: random.Random) -> Episode:
    player, question = game.player, game.question
    if text.startswith("SQL Error"):
        if rng.random() >= player.mend:
            game.number = rng.choice(RENAMES).format(game.number)
            return game.answer("guess again" + form)
        game.look_at_columns()
        return game.answer("answer" + form)
    empty = not rows or (len(rows) == 1 and rows[0][0] in (None, 0))
    if not empty:
        return game.answer("fine" + form)
    if rng.random() >= player.mend:
        game.values = {name: f"#{value}" for name, value in game.values.items()}
        return game.answer("guess again" + form)
    for index in range(looked, len(question.filters)):
        game.look_at_values(index, why="nothing, " if index == looked else "")
    return game.answer("answer" + form)
