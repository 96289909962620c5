"""What a statement says, read with sqlglot: whether its outermost query orders, whether it reads a table, what is volatile.

SQLite accepts more than sqlglot's SQLite dialect does. Where the parse tree is not to be had, the tokens decide: they are
SQLite's comments, strings and quoted names all the same, only the grammar is reduced to counting parentheses.

Left out: any judgement of meaning (is a column there, is a subquery correlated), which only SQLite itself can give.
"""

from __future__ import annotations

import functools
import logging

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.tokens import Token, TokenType

logging.getLogger("sqlglot").setLevel(logging.ERROR)  # it warns of what it can't parse; here the tokens then decide

CLOCK_WORDS = {"CURRENT_DATE", "CURRENT_TIME", "CURRENT_TIMESTAMP"}
CLOCK_FUNCTIONS = {"DATE", "TIME", "DATETIME", "JULIANDAY", "UNIXEPOCH", "STRFTIME", "TIMEDIFF"}
DICE_FUNCTIONS = {"RANDOM", "RANDOMBLOB", "UUID", "GEN_RANDOM_UUID"}  # the last two are DuckDB's
NOW_FUNCTIONS = {"NOW", "TODAY", "GET_CURRENT_TIMESTAMP"}  # DuckDB's
QUOTED = {TokenType.IDENTIFIER, TokenType.STRING}


def parse(sql: str) -> exp.Expr | None:
    """The parse tree of the one statement there is; None where sqlglot can't read it."""
    try:
        trees = [tree for tree in sqlglot.parse(sql, read="sqlite") if tree is not None]
    except (SqlglotError, RecursionError, ValueError):
        return None
    trees = [tree for tree in trees if not isinstance(tree, exp.Semicolon)]
    return trees[0] if len(trees) == 1 and isinstance(trees[0], exp.Query | exp.Values) else None


def tokens(sql: str) -> list[Token] | None:
    """The tokens without comments; None where sqlglot finds a string that doesn't end or the like."""
    try:
        return sqlglot.tokenize(sql, read="sqlite")
    except (SqlglotError, ValueError):
        return None


@functools.lru_cache(maxsize=65536)
def is_ordered(sql: str) -> bool:
    """Whether the outermost query has an ORDER BY that can order rows: `ORDER BY NULL`, `'x'` or `1 + 1` is none.

    A whole number is a column's place. A double-quoted word is a column, though SQLite takes one that names nothing for
    text. ORDER BY inside of subqueries, common table expressions, windows and aggregates doesn't count, not even where
    the outermost query does no more than read it: SQL promises no order then.
    """
    tree = parse(sql)
    if tree is None:
        return _is_ordered_by_tokens(tokens(sql) or [])
    while isinstance(tree, exp.Subquery) and not tree.args.get("order"):
        tree = tree.this
    order = tree.args.get("order")
    return order is not None and any(map(_can_order, order.expressions))


def _can_order(term: exp.Expr) -> bool:
    while isinstance(term, exp.Ordered | exp.Paren | exp.Collate):
        term = term.this
    if isinstance(term, exp.Literal):
        return term.is_int
    return term.find(exp.Column, exp.Query, exp.Func) is not None


def _is_ordered_by_tokens(found: list[Token]) -> bool:
    depth = 0
    for index, token in enumerate(found):
        depth += (token.token_type == TokenType.L_PAREN) - (token.token_type == TokenType.R_PAREN)
        if depth:
            continue
        if token.token_type == TokenType.ORDER_BY:
            return True
        if token.token_type == TokenType.VAR and token.text.lower() == "order":  # ORDER /* */ BY
            return index + 1 < len(found) and found[index + 1].text.lower() == "by"
    return False


def reads_a_table(sql: str) -> bool:
    """Whether the statement reads any table or view of the database; so is one taken that sqlglot can't parse.

    Common table expressions, table functions and SQLite's own tables, which hold the schema, are none.
    """
    tree = parse(sql)
    if tree is None:
        return True
    if any(node.args.get("field") is not None for node in tree.find_all(exp.In)):  # x IN t
        return True
    return any(isinstance(table.this, exp.Identifier) and _is_stored(table) for table in tree.find_all(exp.Table))


def _is_stored(table: exp.Table) -> bool:
    name = table.name.lower()
    if name.startswith(("sqlite_", "pragma_")):
        return False
    node: exp.Expr | None = table
    while node is not None and not table.db:
        node = node.parent
        known = node.args.get("with_") if node is not None else None
        if known is not None and any(name == cte.alias.lower() for cte in known.expressions):
            return False
    return True


def without_distinct(sql: str) -> str:
    """The statement without its DISTINCT keywords, in count(DISTINCT x) too; IS [NOT] DISTINCT FROM stays."""
    parts: list[str] = []
    position = 0
    before = ""
    for token in tokens(sql) or []:
        if token.token_type == TokenType.DISTINCT and before not in ("IS", "NOT"):
            parts.append(sql[position : token.start])
            position = token.end + 1
        before = token.text.upper()
    return "".join(parts) + sql[position:]


def volatile_parts(sql: str) -> list[str]:
    """What in the statement gives another value at another time: dice, the current time, 'now' as a time."""
    found = tokens(sql) or []
    parts: list[str] = []
    for index, token in enumerate(found):
        if token.token_type in QUOTED:
            continue
        word = token.text.upper()
        called = index + 1 < len(found) and found[index + 1].token_type == TokenType.L_PAREN
        after_dot = index > 0 and found[index - 1].token_type == TokenType.DOT
        if word in CLOCK_WORDS and not after_dot:
            parts.append(word)
        elif called and word in DICE_FUNCTIONS | NOW_FUNCTIONS:
            parts.append(f"{word.lower()}()")
        elif called and word in CLOCK_FUNCTIONS and _asks_now(found[index + 2 :], word):
            parts.append(f"{word.lower()} of now")
    return list(dict.fromkeys(parts))


def _asks_now(rest: list[Token], function: str) -> bool:
    """Whether the arguments that `rest` begins with name 'now' or leave the time out, which means now."""
    depth, commas, empty = 1, 0, True
    for token in rest:
        depth += (token.token_type == TokenType.L_PAREN) - (token.token_type == TokenType.R_PAREN)
        if depth == 0:
            break
        empty = False
        commas += depth == 1 and token.token_type == TokenType.COMMA
        if depth == 1 and token.token_type in QUOTED and token.text.lower() == "now":
            return True
    return empty or (function == "STRFTIME" and commas == 0)
