"""Whether a prediction's result is the gold's, by one of three gradings. Pure functions; nothing is run here.

In every grading a prediction must be one statement that returned columns, within the executor's limits; clock and dice
stand still (rollout.sql.guard) and bytes that are not UTF-8 are read as U+FFFD. What each grading says of the rows:

`rows`, ours. As many columns and the same rows: in order where the gold's outermost query orders (rows that tie in that
order may come in any), else as a multiset, so a missing DISTINCT or a doubled row is wrong. Integers are equal exactly,
anything with a float to 1e-6 relative; text is never a number (rollout.sql.rows). Column names don't matter; their order
does, unless `column_permutation` is on. A prediction that reads no table where the gold reads one is a guess, or was copied
from what the model saw, and is wrong (rollout.sql.judge, by the parse tree). Literals in a query that names some table
beside them can't be told from an answer by its result; several databases, as in `spider_test_suite`, tell.

`bird_set`, BIRD's published measure (Li et al. 2023, arXiv:2305.03111; `calculate_ex` in evaluation/evaluation_ex.py of
bird-bench/mini_dev): the sets of rows are equal as Python compares tuples. So order and repetitions don't matter, 1 is
1.0, floats are equal exactly, and two empty results are equal whatever their columns. Differs only in the limits (30 s of
wall time there) and in what the first paragraph says.

`spider_test_suite`, test-suite accuracy (Zhong et al. 2020, arXiv:2010.02840; `eval_exec_match` in exec_eval.py of
taoyds/test-suite-sql-eval, as called by default: values are not plugged in, DISTINCT is dropped from both queries).
The results agree on every database of the suite: as many rows and columns, and some order of columns gives the same
multiset of rows, or list if "order by" is anywhere in the gold's text, as Python compares tuples; two empty results are
equal whatever their columns. `prepared` does to a query what the script does before it runs one. Differs where the script
has slips: its quick rejection sorts the cells of a row by their text, so it refuses some rows that mix 1 and 1.0; and
IS [NOT] DISTINCT FROM keeps its DISTINCT. YEAR(CURDATE()), which is not SQLite, isn't rewritten.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

from rollout.sql.executor import Result
from rollout.sql.observation import Cell
from rollout.sql.rows import Rows, same_in_some_column_order, same_rows
from rollout.sql.syntax import is_ordered, without_distinct

Grading = Literal["rows", "bird_set", "spider_test_suite"]

FINGERPRINT_DIGITS = 6  # of a float
FINGERPRINT_OFFSET = 0.618  # where rounding turns upwards: a half would part the two sides of many a price or mean
EXACT_FLOATS = 2.0**53  # from here on every float is an integer


def correct(
    predicted: Result,
    gold: Result,
    gold_sql: str,
    grading: Grading = "rows",
    column_permutation: bool = False,
    runs: Sequence[int] | None = None,
) -> bool:
    """Whether a prediction's whole result is the gold's. A prediction that failed or returned no columns never is.

    `column_permutation` and `runs`, the gold's rows that tie (rollout.sql.rows), are for `rows`. `spider_test_suite` looks
    at one of its databases here, and all have to agree.
    """
    if predicted.status != "ok" or gold.status != "ok" or predicted.truncated or gold.truncated:
        return False
    if not predicted.columns:
        return False
    if grading == "bird_set":
        return set(predicted.rows) == set(gold.rows)
    if grading == "spider_test_suite":
        return same_for_spider(predicted.rows, gold.rows, "order by" in gold_sql.lower())
    if len(predicted.columns) != len(gold.columns):
        return False
    return same_rows(predicted.rows, gold.rows, is_ordered(gold_sql), column_permutation, runs)


def same_for_spider(predicted: Rows, gold: Rows, ordered: bool) -> bool:
    """Whether some order of columns makes the rows equal, exactly: the test suite's comparison of two results."""
    if len(predicted) != len(gold):
        return False
    same = _equal_lists if ordered else _equal_multisets
    return same_in_some_column_order(predicted, gold, ordered, same, exact=True)


def _equal_lists(left: Rows, right: Rows) -> bool:
    return list(left) == list(right)


def _equal_multisets(left: Rows, right: Rows) -> bool:
    return Counter(left) == Counter(right)


def prepared(sql: str, keep_distinct: bool) -> str:
    """A query as the test suite's script runs it: blanks inside of >=, <= and != closed, DISTINCT dropped."""
    for wide, narrow in (("> =", ">="), ("< =", "<="), ("! =", "!=")):
        sql = sql.replace(wide, narrow)
    return sql if keep_distinct else without_distinct(sql)


def fingerprint(result: Result) -> str:
    """A short hash, equal for results that `rows` calls equal without order: what votes are counted by.

    Exactly so without floats. A float counts as the integer it is, and otherwise by its first six digits, never cut above
    the decimal point. So two floats that differ in the twelfth digit, as sums in another order do, agree but for one pair
    in about a million; two that differ by the whole tolerance of 1e-6 agree mostly, and above a million, where an integer's
    last digit is finer than the tolerance, seldom. Empty for a result that failed or was not fetched whole.
    """
    if result.status != "ok" or result.truncated or not result.columns:
        return ""
    rows = sorted(repr([_canonical(cell) for cell in row]) for row in result.rows)
    text = "\n".join([str(len(result.columns)), *rows])
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


def _canonical(cell: Cell) -> Cell | tuple[str]:
    """Equal for nearly equal numbers; numbers in a tuple, so that they are never text."""
    if isinstance(cell, int):
        return (str(cell),)
    if not isinstance(cell, float):
        return cell
    if not math.isfinite(cell) or cell == 0:
        return (str(cell) if cell else "0",)
    size = abs(cell)
    if size >= EXACT_FLOATS:
        return (str(int(cell)),)
    places = min(max(FINGERPRINT_DIGITS - 1 - math.floor(math.log10(size)), 0), 300)
    digits = math.floor(size * 10.0**places + FINGERPRINT_OFFSET)
    sign = "-" if cell < 0 and digits else ""
    return (sign + format(Decimal(digits).scaleb(-places).normalize(), "f"),)
