"""Every text that a policy is trained on besides questions and passages. The only copy.

The sentences are those of the original Search-R1, byte for byte: its published checkpoints depend on them.
"""

from collections.abc import Sequence

SEARCH_PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new "
    "information. After reasoning, if you find you lack some knowledge, you can call a search engine by <search> query "
    "</search> and it will return the top searched results between <information> and </information>. You can search as "
    "many times as your want. If you find no further external knowledge needed, you can directly provide the answer "
    "inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>. "
    "Question: {question}\n"
)
R1_PROMPT = (
    "Answer the given question. You should first have a reasoning process in mind and then provides the answer. Show "
    "your reasoning in <think> </think> tags and return the final answer in <answer> </answer> tags, for example "
    "<answer> Beijing </answer>. Question: {question}\n"
)
FAST_PROMPT = (
    "Answer the given question. If you find you lack some knowledge, you can call a search engine by <search> query "
    "</search> and it will return the top searched results between <information> and </information>. You can search as "
    "many times as your want. If you find no further external knowledge needed, you can directly provide the answer "
    "inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>. "
    "Question: {question}\n"
)
"""Without forced thinking before every action (Search-R1++, 2602.19526)."""
RAG_PROMPT = (
    "Answer the given question with the help of the context, which may or may not be useful. You should first have a "
    "reasoning process in mind and then provides the answer. Show your reasoning in <think> </think> tags and return "
    "the final answer in <answer> </answer> tags, for example <answer> Beijing </answer>. Question: {question}\n"
    "Context: {context}\n"
)
"""One retrieval with the question, before the model writes anything."""
SHORT_PROMPT = "Question: {question}\n"
"""For the closed world, whose small model learns the protocol from traces: fewer tokens to compute."""

TEMPLATES = {
    "search": SEARCH_PROMPT,
    "fast": FAST_PROMPT,
    "r1": R1_PROMPT,
    "rag": RAG_PROMPT,
    "short": SHORT_PROMPT,
}

INVALID_ACTION = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. If I "
    "want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)

SEARCH_END, ANSWER_END = "</search>", "</answer>"
INFORMATION_START, INFORMATION_END = "<information>", "</information>"
OBSERVATION_HEAD, OBSERVATION_TAIL = f"\n\n{INFORMATION_START}", f"{INFORMATION_END}\n\n"


def build_prompt(question: str, template: str, context: str = "") -> str:
    """The prompt of a question, which gets its question mark. Raises KeyError for an unknown template."""
    return TEMPLATES[template].format(question=with_mark(question), context=context)


def with_mark(question: str) -> str:
    """The question with a question mark, as the original asks it."""
    question = question.strip()
    return question if question.endswith("?") else question + "?"


def format_passages(passages: Sequence[tuple[str, str]]) -> str:
    """`Doc 1(Title: "T") text\\nDoc 2...` of (title with its quotes, text) pairs.

    >>> format_passages([('"Rome"', "A city."), ('"Nile"', "A river.")])
    'Doc 1(Title: "Rome") A city.\\nDoc 2(Title: "Nile") A river.'
    """
    return "".join(f"Doc {i}(Title: {title}) {text}\n" for i, (title, text) in enumerate(passages, 1)).strip()
