"""The first messages of an episode: what is asked, over which schema, and how to answer."""

from __future__ import annotations

from rollout.sql.schema import Style
from rollout.types import Message

INSTRUCTIONS = """\
You answer questions about a SQLite database. You get its schema and a question, and you have {turns} to find the SQL \
query whose result answers the question. You can run queries and read what they return before you decide.

In every turn:
1. Think inside <think> and </think>: what the question asks for, what the last observation showed, what to do next.
2. Then do exactly one of these:
   - run one query: <sql>SELECT ...</sql>. Its result comes back inside <observation> and </observation>.
   - give the final query: <solution>SELECT ...</solution>. This ends the task.

Rules:
- Always think first, and think again after each observation.
- The database is read-only. Write SQLite's dialect, one statement at a time.
- Long results are cut. Look at the values that are really stored before you filter on them; use LIMIT.
- If a query fails or its result looks wrong, say why in your next thought and repair it.
- Return the columns that the question asks for, in its order, and no others.
- The solution is run on the database and its rows are compared with the right answer's. Text outside of <solution> is \
not graded. Never write <observation> yourself.

Example:
Question: How many singers come from France?
<think>The table singer has a column country. I should see how France is spelled there.</think>
<sql>SELECT DISTINCT country FROM singer LIMIT 20</sql>
<observation>country
Netherlands
FRANCE
<reminder>You have 4 turns left to complete the task.</reminder></observation>
<think>It is spelled FRANCE. Counting the rows with that country answers the question.</think>
<solution>SELECT count(*) FROM singer WHERE country = 'FRANCE'</solution>"""


def build_messages(schema: str, question: str, evidence: str, style: Style, max_turns: int) -> list[Message]:
    """The prompt as chat messages. `short` has no instructions: for models that were taught the format beforehand."""
    if style == "short":
        parts = [schema, evidence, question]
        return [Message(role="user", content="\n".join(part for part in parts if part))]
    turns = "1 turn" if max_turns == 1 else f"{max_turns} turns"
    knowledge = f"External knowledge: {evidence}\n\n" if evidence else ""
    return [
        Message(role="system", content=INSTRUCTIONS.replace("{turns}", turns)),
        Message(role="user", content=f"Database schema:\n{schema}\n\n{knowledge}Question: {question}"),
    ]
