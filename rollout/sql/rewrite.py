"""Queries written anew so that what SQL leaves open goes one way or the other: ties, and columns outside of their group.

Two runs that differ show that a query's answer hangs on chance. Rows that tie in an ORDER BY may come in any order, and a
LIMIT may cut through them; a column that is neither grouped by nor aggregated is taken from any row of its group. Left
out: what needs a plan or a proof, such as window functions over ties, text aggregated in no order, and a column beside
min() or max(), which SQLite takes from the row of the extreme.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlglot import exp
from sqlglot.errors import SqlglotError

from rollout.sql.syntax import parse

UNNAMED_AGGREGATES = {"TOTAL", "JSON_GROUP_ARRAY", "JSON_GROUP_OBJECT"}  # which sqlglot knows as plain functions

Pair = tuple[str, str]


def ties_broken(sql: str, width: int) -> Pair | None:
    """The query with the ties of its outermost ORDER BY broken by its columns upwards, and downwards. `width`: columns.

    None where there is no ORDER BY or the query can't be parsed.
    """
    tree = parse(sql)
    if tree is None or tree.args.get("order") is None:
        return None
    return _pair([_break(tree.copy(), width, descending) for descending in (False, True)])


def limits_broken(sql: str, width: int) -> Pair | None:
    """The same for every LIMIT in the query, in subqueries too, ordered or not; None where there is none."""
    tree = parse(sql) if "limit" in sql.lower() else None
    if tree is None:
        return None
    trees = [tree.copy(), tree.copy()]
    found = False
    for copy, descending in zip(trees, (False, True), strict=True):
        for node in copy.find_all(exp.Query):
            columns = width if node is copy else _width(node)
            if node.args.get("limit") is not None and columns:
                _break(node, columns, descending)
                found = True
    return _pair(trees) if found else None


def groups_broken(sql: str) -> Pair | None:
    """The query with every column outside of its group at its least in the group, and at its greatest; None without."""
    tree = parse(sql)
    if tree is None or (not any(_is_aggregate(node) for node in tree.walk()) and tree.find(exp.Group) is None):
        return None
    trees = [tree.copy(), tree.copy()]
    found = False
    for copy, extreme in zip(trees, (exp.Min, exp.Max), strict=True):
        for select in list(copy.find_all(exp.Select)):
            for column in list(_loose_columns(select)):
                found = True
                least: exp.Expr = extreme(this=column.copy())
                named = column.parent is select and column.arg_key == "expressions"
                column.replace(exp.alias_(least, column.name, quoted=True) if named else least)
    return _pair(trees) if found else None


def _pair(trees: list[exp.Expr]) -> Pair | None:
    try:
        first, second = (tree.sql(dialect="sqlite") for tree in trees)
    except (SqlglotError, RecursionError, ValueError):
        return None
    return first, second


def _break(query: exp.Expr, width: int, descending: bool) -> exp.Expr:
    """Adds all columns, by number, to the query's ORDER BY."""
    order = query.args.get("order") or exp.Order(expressions=[])
    for place in range(1, width + 1):
        order.append("expressions", exp.Ordered(this=exp.Literal.number(place), desc=descending))
    query.set("order", order)
    return query


def _width(query: exp.Expr) -> int:
    """Columns of a query; 0 where a star hides their number."""
    selects: list[exp.Expr] = getattr(query, "selects", [])
    return 0 if any(select.is_star for select in selects) else len(selects)


def _loose_columns(select: exp.Select) -> Iterator[exp.Column]:
    """Columns in the results, HAVING and ORDER BY of an aggregating query that are neither grouped by nor aggregated."""
    roots = [*select.expressions, select.args.get("having"), select.args.get("order")]
    nodes = [node for root in roots if root is not None for node in _own(root)]
    group = select.args.get("group")
    aggregates = [node for node in nodes if _is_aggregate(node)]
    if (group is None and not aggregates) or any(isinstance(node, exp.Min | exp.Max) for node in aggregates):
        return
    keys = _keys(select, group)
    for node in nodes:
        if isinstance(node, exp.Column) and not node.is_star and node.name.lower() not in keys:
            yield node


def _keys(select: exp.Select, group: exp.Expr | None) -> set[str]:
    """Lower-case names that are one and the same in a group: columns grouped by, and names of results grouped by."""
    keys: set[str] = set()
    results = select.expressions
    for term in group.expressions if group is not None else []:
        if isinstance(term, exp.Literal) and term.is_int and 0 < int(term.this) <= len(results):
            term = results[int(term.this) - 1]
        keys |= {column.name.lower() for column in term.find_all(exp.Column)}
        keys |= {column.name.lower() for result in results if result.alias == term.name for column in _columns(result)}
        keys.add(term.alias_or_name.lower())
    keys |= {result.alias.lower() for result in results if result.alias}  # a result's name, used in HAVING or ORDER BY
    return keys


def _columns(tree: exp.Expr) -> list[exp.Column]:
    return [node for node in _own(tree) if isinstance(node, exp.Column)]


def _own(tree: exp.Expr) -> Iterator[exp.Expr]:
    """Nodes of an expression without what is inside of aggregates, windows and subqueries."""
    open_ends = [tree]
    while open_ends:  # a sum of a thousand terms is a thousand deep
        node = open_ends.pop()
        yield node
        if not _is_aggregate(node) and not isinstance(node, exp.Window | exp.Query):
            open_ends.extend(node.iter_expressions(reverse=True))


def _is_aggregate(node: exp.Expr) -> bool:
    return isinstance(node, exp.AggFunc) or (
        isinstance(node, exp.Anonymous) and node.name.upper() in UNNAMED_AGGREGATES
    )
