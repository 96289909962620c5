"""Queries that would take time, memory or space without end."""

from __future__ import annotations

from attacks.attack import CONTAINED, COUNTER, ERROR, OK, STOPPED, TIMEOUT, Attack, attacks

_THREE_MILLION = "printf('%.*c', 3000000, 'x')"
_DOUBLED = ", ".join(f"c{i} AS (SELECT a.x FROM c{i - 1} a, c{i - 1} b)" for i in range(1, 40))
_MATERIALIZED = ", ".join(f"c{i} AS MATERIALIZED (SELECT a.x FROM c{i - 1} a, c{i - 1} b)" for i in range(1, 30))
_UNITED = ", ".join(f"c{i} AS (SELECT x FROM c{i - 1} UNION ALL SELECT x FROM c{i - 1})" for i in range(1, 40))


def _kill(*statements: str) -> list[Attack]:
    """Inside of one VM step, so that only the kernel's CPU limit can stop it."""
    return [Attack((statement,), TIMEOUT, kills=True) for statement in statements]


KINDS = {
    "endless": attacks(
        TIMEOUT,
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n WHERE i < 0",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n) SELECT max(i) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n ORDER BY 1 DESC) SELECT count(*) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT a FROM t UNION ALL SELECT n.i + t.a FROM n, t) SELECT count(*) FROM n",
        "WITH RECURSIVE a(i) AS (SELECT 1 UNION ALL SELECT i FROM a), b AS (SELECT * FROM a) SELECT * FROM b WHERE i > 1",
        "SELECT (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT 1 FROM n) SELECT count(*) FROM n)",
        "SELECT 1 WHERE EXISTS (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT 1 FROM n) SELECT 1 FROM n WHERE i = 2)",
    ),
    "product": attacks(
        TIMEOUT,
        "SELECT count(*) FROM t a, t b, t c, t d",
        "SELECT count(*) FROM t NATURAL JOIN (SELECT a AS x FROM t) NATURAL JOIN (SELECT a AS y FROM t), t AS z",
        "SELECT a.a FROM t a, t b, t c WHERE a.a + b.a + c.a < -1",
        "SELECT max(x) FROM (SELECT a.a * b.a AS x FROM t a, t b, t c ORDER BY x)",
        "SELECT DISTINCT a.a + b.a * c.a AS x FROM t a, t b, t c WHERE x < 0",
        "SELECT a.a, count(DISTINCT b.a * c.a) FROM t a, t b, t c GROUP BY 1",
        "SELECT * FROM t a LEFT JOIN t b ON a.a < b.a LEFT JOIN t c ON b.a < c.a WHERE c.b || b.b = 'x'",
        "SELECT count(*) FROM t WHERE (SELECT count(*) FROM t x, t y WHERE x.a + y.a > t.a) > 1000000",
        "SELECT count(*) FROM f a, f b, f c WHERE a.x MATCH 'common' AND b.x MATCH 'common' AND c.x MATCH 'common'",
        "SELECT count(*) FROM r a, r b, r c WHERE a.x0 <= b.x1 AND c.x0 <= b.x1",
        "WITH a AS (SELECT 1 x UNION ALL SELECT 2), b AS (SELECT a.x FROM a, a p, a q, a r, a s, a t), "
        "c AS (SELECT b.x FROM b, b p, b q, b r, b s) SELECT count(*) FROM c",
        COUNTER.format(100000) + "SELECT count(*) FROM n WHERE i IN (SELECT x.i + n.i FROM n AS x)",
        f"WITH c0(x) AS (VALUES (1), (2)), {_MATERIALIZED} SELECT count(*) FROM c8",
    ),
    "window": attacks(
        STOPPED,
        COUNTER.format(3000000) + "SELECT sum(i) OVER (ORDER BY i DESC) FROM n",
        COUNTER.format(60000)
        + "SELECT count(*) FROM (SELECT max(i % 999) OVER (ORDER BY -i ROWS 30000 PRECEDING) AS x FROM n) WHERE x < 0",
        COUNTER.format(30000) + "SELECT sum(length(g)) FROM (SELECT group_concat(i) OVER "
        "(ORDER BY i ROWS BETWEEN 20000 PRECEDING AND CURRENT ROW) AS g FROM n)",
        "SELECT sum(x) FROM (SELECT nth_value(a.a, 400) OVER (ORDER BY b.a ROWS BETWEEN 500 PRECEDING AND 500 FOLLOWING) x "
        "FROM t a, t b, t c)",
        COUNTER.format(100000)
        + "SELECT count(*) FROM (SELECT percent_rank() OVER (ORDER BY i % 7 GROUPS 3 PRECEDING), "
        "min(-i) OVER (ORDER BY i RANGE BETWEEN 90000 PRECEDING AND CURRENT ROW EXCLUDE TIES) FROM n)",
    ),
    "memory": attacks(
        STOPPED,
        COUNTER.format(60) + "SELECT group_concat(hex(zeroblob(100000))) FROM n",
        COUNTER.format(2000) + "SELECT count(*) FROM (SELECT DISTINCT i, zeroblob(1000000 + i) AS z FROM n ORDER BY z)",
        COUNTER.format(2000) + "SELECT count(*) FROM (SELECT i, randomblob(900000) AS z FROM n GROUP BY z)",
        COUNTER.format(2000) + "SELECT i FROM n ORDER BY hex(zeroblob(500000)) || i",
        "WITH RECURSIVE n(x) AS (SELECT zeroblob(3000000) UNION ALL SELECT x FROM n ORDER BY 1) SELECT count(*) FROM n",
        COUNTER.format(1000) + "SELECT json_group_array(hex(zeroblob(3000))) FROM n",
        COUNTER.format(1000) + "SELECT json_group_object(i, hex(zeroblob(3000))) FROM n",
        COUNTER.format(1000) + "SELECT max(x) OVER () FROM (SELECT zeroblob(700000 + i) AS x FROM n)",
        COUNTER.format(400) + "SELECT count(*) FROM n WHERE hex(zeroblob(1900000)) || i NOT IN "
        "(SELECT hex(zeroblob(1900000)) || i FROM n)",
        "SELECT " + ",".join(["x"] * 2000) + " FROM (SELECT hex(zeroblob(1900000)) AS x)",
        "SELECT " + ",".join(["x"] * 30) + " FROM (SELECT hex(zeroblob(1900000)) AS x)",
        'WITH t AS (SELECT 1 AS "' + "x" * 80_000 + '") SELECT ' + ",".join(["t.*"] * 2000) + " FROM t",
        'WITH t AS (SELECT 1 AS "' + "x" * 20_000 + '") SELECT ' + ",".join(["t.*"] * 60) + " FROM t",
        "SELECT matchinfo(f4, replace(hex(zeroblob(1000000)), '0', 'x')) FROM f4 WHERE f4 MATCH 'common'",
        # Found by attacking: the fixed clock remembered every call, and so kept gigabytes for good.
        COUNTER.format(400) + "SELECT length(group_concat(strftime(hex(zeroblob(1000000)) || i, 0))) FROM n",
    ),
    "prepare": attacks(  # exponential before the first step
        STOPPED,
        f"WITH c0 AS (SELECT 1 AS x), {_DOUBLED} SELECT * FROM c39",
        f"WITH c0 AS (SELECT 1 AS x), {_UNITED} SELECT * FROM c39",
        "SELECT 1 FROM "
        + ",".join(f"(SELECT * FROM t WHERE a IN ({','.join(map(str, range(200)))})) x{i}" for i in range(60)),
    ),
    "cell": attacks(
        ERROR,
        "SELECT zeroblob(2000000000)",
        "SELECT zeroblob(5000000)",
        "SELECT hex(zeroblob(2500000))",
        "SELECT randomblob(2000000000)",
        "SELECT randomblob(1e300)",
        "SELECT randomblob(9223372036854775807)",
        "SELECT hex(zeroblob(3900000))",
        "SELECT quote(zeroblob(3900000))",
        "SELECT replace(hex(zeroblob(900000)), '00', 'aaaaaaaaaaaa')",
        "SELECT replace(hex(zeroblob(100000)), '0', hex(zeroblob(1000)))",
        "SELECT hex(zeroblob(1900000)) || hex(zeroblob(1900000))",
        f"SELECT upper({_THREE_MILLION}) || lower({_THREE_MILLION})",
        "SELECT group_concat(hex(zeroblob(10000)), hex(zeroblob(10000))) FROM t",
        f"SELECT json_array({_THREE_MILLION}, {_THREE_MILLION})",
        f"SELECT json_quote({_THREE_MILLION} || '\"') || {_THREE_MILLION}",
        f"SELECT strftime({_THREE_MILLION} || '%J' || {_THREE_MILLION}, 0)",
    ),
    "format": attacks(
        CONTAINED,
        "SELECT printf('%2000000000d', 1)",
        "SELECT printf('%.2000000000f', 1.5)",
        "SELECT printf('%!.*f', 1000000, 1.1)",
        "SELECT printf('%,.3000000f', 1e300)",
        "SELECT format('%*s%*s', 3000000, 'a', 3000000, 'b')",
        "SELECT printf('%-*.*s|', -2147483648, 2147483647, 'x')",
        "SELECT length(printf('%.*c', 100000000, 'x'))",
        "SELECT strftime(replace(hex(zeroblob(30000)), '0', '%J'), 'now')",
        "SELECT date('now', " + ", ".join(["'+1 day'"] * 120) + ")",
        f"SELECT date({_THREE_MILLION}), julianday('now', {_THREE_MILLION}), soundex({_THREE_MILLION})",
        "SELECT round(1e308, 2000000000), round(-1e-320, -5), char(1114112, -1, 55296, 0)",
    ),
    "rows": attacks(
        CONTAINED,
        "SELECT * FROM t a, t b",
        "SELECT * FROM t a, t b, t c",
        COUNTER.format(1000000) + "SELECT i, i, i, i FROM n",
        "SELECT hex(zeroblob(1900000)) FROM t",
        "SELECT zeroblob(3900000), a FROM t",
        "SELECT printf('%.*c', 3900000, char(9)) || char(7) FROM t",
        "SELECT replace(hex(zeroblob(400000)), '00', char(27) || '[2J') FROM t",
        "SELECT replace(hex(zeroblob(400000)), '00', char(128512)) FROM t",
        "SELECT " + ",".join(f"{i} AS c{i}" for i in range(1500)) + " FROM t a, t b",
    ),
    "spill": attacks(  # sorting, grouping and materializing must not make files
        CONTAINED,
        COUNTER.format(30000) + "SELECT count(*) FROM (SELECT i, randomblob(2000) AS z FROM n ORDER BY z)",
        COUNTER.format(30000) + "SELECT count(DISTINCT randomblob(2000)) FROM n",
        COUNTER.format(20000) + "SELECT i FROM n UNION SELECT -i FROM n EXCEPT SELECT 5 ORDER BY 1 DESC",
        "SELECT count(*) FROM (SELECT a.b || b.b AS x FROM t a, t b GROUP BY x ORDER BY max(a.a))",
    ),
    "search": _kill(  # quadratic and worse
        "SELECT instr(hex(zeroblob(1900000)), hex(zeroblob(900000)) || '1')",
        "SELECT replace(printf('%.*c', 1900000, 'a'), printf('%.*c', 900000, 'a') || 'b', '')",
        "SELECT trim(replace(hex(zeroblob(500000)), '0', 'x'), replace(hex(zeroblob(150000)), '0', 'y') || 'x')",
    )
    + attacks(
        ERROR,
        "SELECT 'a' LIKE '" + "%a" * 2000 + "'",
        "SELECT 'a' GLOB '" + "*a" * 2000 + "'",
        "SELECT b LIKE '%' ESCAPE 'xx' FROM t",
    ),
    "pattern": [
        Attack(
            (
                f"SELECT count(*) FROM t a, t b WHERE hex(zeroblob(900000 + a.a)) {pattern} || hex(zeroblob(245)) || '1'",
            ),
            TIMEOUT,
            kills=None,
        )
        for pattern in ("LIKE '%'", "GLOB '*'")
    ],
    "json": attacks(
        CONTAINED,
        "SELECT json_array_length('[" + "1," * 49_000 + "1]')",
        "SELECT json_type('" + "[" * 40_000 + "')",
        "SELECT json(replace(hex(zeroblob(1500)), '0', '[') || replace(hex(zeroblob(1500)), '0', ']'))",
        "SELECT json_extract('{\"a\":1}', '$' || replace(hex(zeroblob(500000)), '0', '.a'))",
        "SELECT count(*) FROM json_each((SELECT '[' || group_concat(a.a || ',' || b.a) || ']' FROM t a, t b))",
        "WITH j(j) AS (SELECT json_group_array(a) FROM t) SELECT count(*) FROM json_tree((SELECT j FROM j)) x, "
        "json_tree((SELECT j FROM j)) y, json_each('[1,2,3,4,5,6,7,8,9]')",
        "SELECT json_patch('{\"a\":1}', '{\"a\":' || replace(hex(zeroblob(900)), '0', '[') || '}')",
        "SELECT json_set('[]', '$[99999999999]', 1), json_insert('{}', '$.\"\"', 1), json_remove('[1]', '$[#-9]')",
        "SELECT '{\"a\": 1}' ->> '$.a', '[1, 2]' -> -1, json_quote(x'00')",
        "SELECT value FROM json_each('" + '{"a":' * 900 + "1" + "}" * 900 + "')",
    ),
    "fulltext": attacks(
        CONTAINED,
        "SELECT count(*) FROM f WHERE f MATCH '" + "(" * 2000 + "common" + ")" * 2000 + "'",
        "SELECT count(*) FROM f4 WHERE f4 MATCH '" + "(" * 2000 + "common" + ")" * 2000 + "'",
        "SELECT count(*) FROM f WHERE f MATCH '" + " OR ".join(["w*"] * 2000) + "'",
        "SELECT count(*) FROM f WHERE f MATCH '" + " NOT ".join(["common"] * 5000) + "'",
        "SELECT count(*) FROM f4 WHERE f4 MATCH '" + " NEAR/9999 ".join(["common"] * 2000) + "'",
        "SELECT length(highlight(f, 0, hex(zeroblob(900000)), hex(zeroblob(900000)))) FROM f WHERE f MATCH 'common'",
        "SELECT snippet(f4, '', '', '', -1, 64), offsets(f4), matchinfo(f4, 'pcnalsxyb') FROM f4 WHERE f4 MATCH 'w1* common'",
        "SELECT bm25(f, 1e308, -1e308), rank FROM f('common') ORDER BY rank",
        "SELECT * FROM f WHERE f MATCH char(0) || 'x'",
        "SELECT * FROM f WHERE f = ''",
    ),
    "series": [
        Attack(("SELECT count(*) FROM generate_series(1, 1000000000)",), "error|timeout"),
        Attack(("SELECT * FROM r WHERE x0 > -1e308 AND x1 < 1e308 AND id MATCH 1",), CONTAINED),
        Attack(("SELECT count(*) FROM r WHERE x0 > 4",), OK, rows=[(495,)]),
        Attack(("SELECT rtreenode(2, zeroblob(3000000)), rtreedepth(x'ffff'), rtreenode(-1, x'00')",), CONTAINED),
    ],
}
