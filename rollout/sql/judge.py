"""Verdicts on predictions: runs the gold queries, once each, and grades by what the settings ask for.

Left out: when two results are equal (rollout.sql.grader), and what a verdict is worth (rollout.text2sql).
"""

from __future__ import annotations

from pathlib import Path

from rollout.cache import Cache
from rollout.errors import InfrastructureError
from rollout.sql import grader, rewrite
from rollout.sql.executor import Executor, Result
from rollout.sql.grader import Grading
from rollout.sql.rows import tied_runs
from rollout.sql.syntax import is_ordered, reads_a_table

CACHED_GOLDS = 2_000  # more than a step's questions; some results are large
CACHED_SUITES = 2_000
SUITE_BATCH = 8  # databases of a suite that a prediction runs on before the next look


class Suites:
    """The test suites: for each db_id the databases `<root>/<db_id>/*.sqlite`, and the gold's results on them."""

    def __init__(self, root: Path, executor: Executor, keep_distinct: bool) -> None:
        self._root, self._executor, self._keep_distinct = root, executor, keep_distinct
        self._files: Cache[list[Path]] = Cache(CACHED_SUITES)
        self._golds: Cache[list[Result]] = Cache(CACHED_SUITES)

    def covers(self, db_id: str) -> bool:
        """Whether there is a suite for a db_id."""
        return bool(self._databases(db_id))

    def require(self, task_id: str, db_id: str) -> list[str]:
        """The databases of a suite. Raises InfrastructureError if there are none."""
        databases = self._databases(db_id)
        if not databases:
            raise InfrastructureError(
                f"task {task_id}: no databases in {self._root / db_id} (environment.text2sql.test_suite_root); "
                "the suite's folder for each db_id holds several .sqlite files"
            )
        return databases

    def agrees(self, task_id: str, db_id: str, predicted_sql: str, gold_sql: str) -> bool:
        """Whether the prediction agrees with the gold on every database.

        Raises InfrastructureError if there is none or the gold fails.
        """
        databases = self.require(task_id, db_id)
        golds = self._golds.get((db_id, gold_sql), lambda: self._run(databases, gold_sql))
        for name, gold in zip(databases, golds, strict=True):
            if gold.status != "ok":
                raise InfrastructureError(
                    f"task {task_id}: its gold query failed on {name} of the test suite ({gold.error})"
                )
        for start in range(0, len(databases), SUITE_BATCH):
            predicted = self._run(databases[start : start + SUITE_BATCH], predicted_sql)
            pairs = zip(predicted, golds[start : start + SUITE_BATCH], strict=True)
            if not all(grader.correct(p, g, gold_sql, "spider_test_suite") for p, g in pairs):
                return False
        return True

    def close(self) -> None:
        self._executor.close()

    def _databases(self, db_id: str) -> list[str]:
        """Their names for the executor; hidden files, which archivers leave beside others, are none."""
        paths = self._files.get(db_id, lambda: sorted((self._root / db_id).glob("[!.]*.sqlite")))
        return [f"{db_id}/{path.name}" for path in paths]

    def _run(self, databases: list[str], sql: str) -> list[Result]:
        sql = grader.prepared(sql, self._keep_distinct)
        return self._executor.run_many([(name, sql) for name in databases], whole=True)


class Judge:
    """Grades by `grading` and reports `measures` beside it. Threads may share one."""

    def __init__(
        self,
        executor: Executor,
        grading: Grading = "rows",
        measures: tuple[Grading, ...] = (),
        column_permutation: bool = False,
        suites: Suites | None = None,
    ) -> None:
        self._executor, self._suites = executor, suites
        self.grading, self.measures, self._column_permutation = grading, measures, column_permutation
        self._golds: Cache[Result] = Cache(CACHED_GOLDS)
        self._runs: Cache[list[int] | None] = Cache(CACHED_GOLDS)

    def gold(self, task_id: str, database: str, sql: str) -> Result:
        """The gold query's whole result. Raises InfrastructureError naming the task if it has none."""
        result = self._golds.get((database, sql), lambda: self._executor.run(database, sql, whole=True))
        if result.status != "ok":
            raise InfrastructureError(
                f"task {task_id}: its gold query on {database} failed ({result.error}); repair or drop it"
            )
        return result

    def gradings_of(self, task_id: str, database: str) -> tuple[Grading, ...]:
        """The grading and the measures that can be taken on a database, whose last name is the db_id of its suite.

        A measure by a suite that lacks it is left out. Raises InfrastructureError if it is the grading that needs one.
        """
        gradings = dict.fromkeys((self.grading, *self.measures))
        if self._suites is not None and not self._suites.covers(_db_id(database)):
            if self.grading == "spider_test_suite":
                self._suites.require(task_id, _db_id(database))
            gradings.pop("spider_test_suite", None)
        return tuple(gradings)

    def verdicts(
        self, task_id: str, database: str, predicted_sql: str, predicted: Result, gold_sql: str
    ) -> dict[Grading, bool]:
        """Right or wrong by each of `gradings_of`. `predicted` is the whole result of `predicted_sql` on `database`."""
        found: dict[Grading, bool] = {}
        for grading in self.gradings_of(task_id, database):
            if grading == "spider_test_suite":
                assert self._suites is not None
                found[grading] = self._suites.agrees(task_id, _db_id(database), predicted_sql, gold_sql)
                continue
            gold = self.gold(task_id, database, gold_sql)
            found[grading] = self._correct(predicted, gold, database, gold_sql, grading)
            if grading == "rows" and found[grading] and not reads_a_table(predicted_sql):
                found[grading] = not reads_a_table(gold_sql)
        return found

    def _correct(self, predicted: Result, gold: Result, database: str, gold_sql: str, grading: Grading) -> bool:
        columns = self._column_permutation
        if grader.correct(predicted, gold, gold_sql, grading, columns):
            return True
        if grading != "rows" or len(predicted.rows) != len(gold.rows) or not is_ordered(gold_sql):
            return False
        runs = self._runs.get((database, gold_sql), lambda: self._tied_runs(database, gold_sql, gold))
        return runs is not None and grader.correct(predicted, gold, gold_sql, grading, columns, runs)

    def _tied_runs(self, database: str, gold_sql: str, gold: Result) -> list[int] | None:
        """Which of the gold's rows tie in its order; None if it can't be told."""
        pair = rewrite.ties_broken(gold_sql, len(gold.columns))
        if pair is None:
            return None
        upwards, downwards = self._executor.run_many([(database, sql) for sql in pair], whole=True)
        if upwards.status != "ok" or downwards.status != "ok":
            return None
        return tied_runs(gold.rows, upwards.rows, downwards.rows)

    def close(self) -> None:
        if self._suites is not None:
            self._suites.close()


def _db_id(database: str) -> str:
    return database.rpartition("/")[2]
