"""What a query on DuckDB may try: statements by what has to become of them."""

DENIED = [
    "INSERT INTO shop VALUES (3, 'x', NULL, NULL)",
    "INSERT INTO shop SELECT * FROM shop RETURNING id",
    "WITH x AS (INSERT INTO shop VALUES (3, 'x', NULL, NULL) RETURNING id) SELECT * FROM x",
    "WITH x AS (DELETE FROM shop RETURNING id) SELECT * FROM x",
    "UPDATE shop SET id = 0",
    "DELETE FROM shop",
    "TRUNCATE shop",
    "MERGE INTO shop USING sale ON shop.id = sale.nr WHEN MATCHED THEN DELETE",
    "CREATE TABLE u (a INTEGER)",
    "CREATE TEMP TABLE shop (a INTEGER)",
    "CREATE TABLE memory.main.u AS SELECT 1",
    "CREATE TEMP VIEW shop AS SELECT 1",
    "CREATE TEMP MACRO now() AS 1",
    "CREATE OR REPLACE TEMP MACRO lower(x) AS x",
    "CREATE SECRET s (TYPE s3)",
    "DROP TABLE shop",
    "ALTER TABLE shop RENAME TO u",
    "COMMENT ON TABLE shop IS 'x'",
    "BEGIN",
    "COMMIT",
    "CHECKPOINT",
    "VACUUM",
    "ANALYZE",
    "ATTACH '{root}/other/other.duckdb' AS o",
    "ATTACH ':memory:' AS o",
    "DETACH shop",
    "USE memory",
    "INSTALL httpfs",
    "LOAD json",
    "COPY shop TO '{scratch}/x.csv'",
    "COPY (SELECT 1) TO '/dev/stdout'",
    "COPY shop FROM '{root}/shop/data.csv'",
    "EXPORT DATABASE '{scratch}/copy'",
    "IMPORT DATABASE '{scratch}/copy'",
    "SET memory_limit = '100GB'",
    "SET enable_external_access = true",
    "SET VARIABLE x = 1",
    "RESET threads",
    "PRAGMA database_list",
    "PRAGMA enable_profiling",
    "PRAGMA version",
    "CALL pragma_version()",
    "CALL enable_logging()",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "DEALLOCATE p",
    "EXPLAIN SELECT 1",
    "EXPLAIN ANALYZE DELETE FROM shop",
    "PIVOT sale ON nr USING sum(price)",
    "SELECT * FROM read_csv('{root}/shop/data.csv')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('{root}/other/other.duckdb')",
    "SELECT * FROM read_parquet('x.parquet')",
    "SELECT * FROM read_json_auto('x.json')",
    "SELECT * FROM read_duckdb('{root}/other/other.duckdb')",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM sniff_csv('{root}/shop/data.csv')",
    "SELECT * FROM parquet_metadata('x')",
    "SELECT * FROM '{root}/shop/data.csv'",
    'SELECT * FROM "{root}/other/other.duckdb"',
    "SELECT (SELECT count(*) FROM '/etc/passwd.csv')",
    "SELECT * FROM (SELECT * FROM '../data.csv')",
    "SELECT * FROM 'data.csv'",
    "SELECT * FROM 'https://example.com/x.parquet'",
    "SELECT * FROM query('SELECT * FROM duckdb_settings()')",
    "SELECT * FROM query_table('shop')",
    "SELECT * FROM json_execute_serialized_sql('{{}}')",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM DUCKDB_SETTINGS()",
    "SELECT * FROM system.main.duckdb_settings()",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM duckdb_databases()",
    "SELECT * FROM duckdb_databases",
    "SELECT * FROM main.duckdb_databases",
    "SELECT * FROM pragma_database_list",
    "SELECT * FROM duckdb_extensions()",
    "SELECT * FROM duckdb_logs",
    "SELECT * FROM duckdb_temporary_files()",
    "SELECT * FROM pg_catalog.pg_settings",
    "SELECT * FROM pragma_storage_info('shop')",
    "SELECT * FROM which_secret('s3://x', 's3')",
    "SELECT * FROM histogram('shop', id)",
    "SELECT * FROM test_all_types()",
    "SHOW DATABASES",
    "SHOW VARIABLES",
    "SELECT current_setting('memory_limit')",
    "SELECT getvariable('x')",
    "SELECT random()",
    'SELECT "RANDOM"()',
    "SELECT system.main.random()",
    "SELECT 1 ORDER BY random()",
    "SELECT sum(random()) OVER () FROM shop",
    "SELECT [random() FOR x IN [1]]",
    "SELECT * FROM shop WHERE id IN (SELECT (random() * 2)::INTEGER)",
    "SELECT setseed(0.5)",
    "SELECT gen_random_uuid()",
    "SELECT uuidv7()",
    "SELECT nextval('counter')",
    "SELECT txid_current()",
    "SELECT system.main.now()",
    "SELECT main.today()",
    "SELECT sleep_ms(10000)",
    "SELECT pg_sleep(10)",
    "SELECT write_log('x')",
    "SELECT json_serialize_plan('SELECT 1')",
    "SELECT * FROM shop TABLESAMPLE 50%",
    "SELECT * FROM shop USING SAMPLE 1",
]

# Where an expression can stand; what is refused is refused in all of them.
PLACES = """
SELECT 1 LIMIT ({})::INTEGER
SELECT 1 OFFSET ({})::INTEGER
SELECT * REPLACE ({} AS id) FROM shop
SELECT COLUMNS(lambda c: {} > 0) FROM shop
SELECT COLUMNS(*) || {} FROM shop
SELECT id FROM shop GROUP BY GROUPING SETS ((id), ({}))
SELECT id FROM shop GROUP BY id HAVING {} > 0
SELECT id FROM shop QUALIFY {} > 0
SELECT sum(id) OVER w FROM shop WINDOW w AS (PARTITION BY {})
SELECT sum(id) OVER (ORDER BY id ROWS BETWEEN ({})::INTEGER PRECEDING AND CURRENT ROW) FROM shop
SELECT lag(id, 1, {}) OVER () FROM shop
SELECT count(*) FILTER (WHERE {} > 0) FROM shop
SELECT list(id ORDER BY {}) FROM shop
SELECT DISTINCT ON ({}) id FROM shop
SELECT 1 FROM shop JOIN sale ON {} > 0
SELECT 1 FROM shop ASOF JOIN sale ON id >= {}
SELECT * FROM shop, LATERAL (SELECT {})
SELECT * FROM shop POSITIONAL JOIN (SELECT {})
SELECT * FROM range(1, ({})::INTEGER)
SELECT unnest([{}])
SELECT {'a': {}}
SELECT [1, 2][({})::INTEGER]
SELECT list_transform([1], lambda x: {})
SELECT CASE WHEN {} > 0 THEN 1 END
SELECT INTERVAL ({}) DAY
SELECT id BETWEEN {} AND 1 FROM shop
SELECT id IN ({}) FROM shop
SELECT EXISTS (SELECT {})
SELECT try_cast({} AS INTEGER)
VALUES ({})
WITH r AS MATERIALIZED (SELECT {}) FROM r
WITH RECURSIVE r(n) AS (SELECT 1 UNION SELECT {} FROM r) FROM r
SELECT 1 UNION SELECT {}
FROM (PIVOT shop ON id IN (1, 2) USING sum({}))
FROM (UNPIVOT (SELECT {} AS z FROM shop) ON z)
SUMMARIZE SELECT {}
DESCRIBE SELECT {}
SELECT * FROM (SHOW TABLES) WHERE {} > 0
"""

REFUSED = [  # by DuckDB itself
    "SELECT * FROM other.main.secret",
    "SELECT * FROM other.secret",
    "SELECT getenv('HOME')",
    "SELECT * FROM sqlite_scan('x', 'y')",
    "SELECT load_extension('x')",
    "SELECT " + "(" * 5000 + "1" + ")" * 5000,
    "SELECT " + "1+" * 5000 + "1",
    "SELECT " + "[" * 3000 + "]" * 3000,
    "SELECT '" + "x" * 300_000 + "'",
    "SELECT '\0",
    "SELECT repeat('x', 2000000000)",
    "SELECT string_agg(repeat('x', 100000)) FROM range(100000)",
    "SELECT list(i) FROM range(1000000000) r(i)",
    "SELECT unnest(range(100000000))",
    "SELECT count(*) FROM range(1000000000) a, range(1000000000) b",
]

EXHAUSTING = [
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
    "SELECT i FROM range(9223372036854775807) r(i) WHERE i < 0",
    "SELECT a.i FROM range(100000) a(i), range(100000) b(i) ORDER BY 1 DESC LIMIT 5",
]

# Inside of one call of a function, so that only the kernel's CPU limit can stop it.
UNSTOPPABLE = "SELECT levenshtein(repeat('a', 100000), repeat('b', 100000))"
