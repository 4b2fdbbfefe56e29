"""The only copy of every text that a policy is trained on, besides questions and passages.

Those that the original Search-R1 has are its own, byte for byte: its published checkpoints depend
on them.
"""

from collections.abc import Sequence

from verl.utils.wording import counted

SEARCH_PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first "
    "every time you get new information. After reasoning, if you find you lack some knowledge, "
    "you can call a search engine by <search> query </search> and it will return the top "
    "searched results between <information> and </information>. You can search as many times "
    "as your want. If you find no further external knowledge needed, you can directly provide "
    "the answer inside <answer> and </answer>, without detailed illustrations. For example, "
    "<answer> Beijing </answer>. Question: {question}\n"
)
R1_PROMPT = (
    "Answer the given question. You should first have a reasoning process in mind and then "
    "provides the answer. Show your reasoning in <think> </think> tags and return the final "
    "answer in <answer> </answer> tags, for example <answer> Beijing </answer>. Question: "
    "{question}\n"
)
FAST_PROMPT = (
    "Answer the given question. If you find you lack some knowledge, you can call a search "
    "engine by <search> query </search> and it will return the top searched results between "
    "<information> and </information>. You can search as many times as your want. If you find "
    "no further external knowledge needed, you can directly provide the answer inside <answer> "
    "and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>. "
    "Question: {question}\n"
)
"""Without forced thinking before every action (Search-R1++, 2602.19526)."""
TOOLS_PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every "
    "time you get new information. If you find you lack some knowledge, call the tools, as often "
    "as you want. When you know the answer, put it, in a few words, inside <answer> and </answer>, "
    "without detailed illustrations. For example, <answer> Beijing </answer>. Question: "
    "{question}\n"
)
"""For tools that the prompt shows already, by their schemas or instructions."""
RAG_PROMPT = (
    "Answer the given question with the help of the context, which may or may not be useful. "
    "You should first have a reasoning process in mind and then provides the answer. Show your "
    "reasoning in <think> </think> tags and return the final answer in <answer> </answer> "
    "tags, for example <answer> Beijing </answer>. Question: {question}\n"
    "Context: {context}\n"
)
"""One retrieval with the question, before the model writes anything."""
SHORT_PROMPT = "Question: {question}\n"
"""For the closed world, whose small model learns the protocol from traces: fewer tokens to
compute."""
SHORT_RAG_PROMPT = "Question: {question}\n\n\n<information>{context}</information>\n\n"
"""The same with the passages of one retrieval, in the form that this model was trained on."""
DIRECT_PROMPT = (
    "Answer the given question with a few words, without explanation. Put the answer inside "
    "<answer> and </answer>, for example <answer> Beijing </answer>. Question: {question}\n"
)
COT_PROMPT = (
    "Answer the given question. Think step by step, then put the final answer, in a few words, "
    "inside <answer> and </answer>, for example <answer> Beijing </answer>. Question: "
    "{question}\n"
)
REACT_PROMPT = (
    "Answer the given question by interleaving thoughts, actions and observations. A thought "
    "reasons about what is known and what is missing. An action is written as Action: "
    "Search[query]; the passages that a search engine finds follow as an observation. For "
    "example:\n"
    "Thought: I need to find which country the town is in.\n"
    "Action: Search[town country]\n"
    "Search as often as needed. When you know the answer, write it in a few words inside "
    "<answer> and </answer>, for example <answer> Beijing </answer>.\n"
    "Question: {question}\n"
)
"""Thought, action, observation (ReAct, 2210.03629), without its examples."""
SEARCH_O1_PROMPT = (
    "You are a reasoning assistant that can search the web to answer the question accurately. "
    "To search, write <|begin_search_query|> your query <|end_search_query|>. What was found "
    "is analysed, and the helpful part is given to you as <|begin_search_result|> ... "
    "<|end_search_result|>. You can search again as often as necessary. When you have all that "
    "you need, put the final answer, in a few words, inside <answer> and </answer>, for "
    "example <answer> Beijing </answer>.\n"
    "Think step by step. Question: {question}\n"
)
"""Reasoning that asks for searches (Search-o1, 2501.05366)."""
REASON_IN_DOCUMENTS_PROMPT = (
    "Read the passages below and extract what helps to go on with the reasoning. Reply with "
    "that information alone, in a few sentences, or with: No helpful information found.\n\n"
    "Reasoning so far:\n"
    "{reasoning}\n\n"
    "Search query: {query}\n\n"
    "Passages:\n"
    "{context}\n"
)
"""The second prompt of Search-o1: passages become a short finding before the reasoning sees
them."""
SHORT_CONDENSE_PROMPT = "{context}\nQuery: {query}\nFacts:"
"""The same for the closed world, whose small model learns from traces what is meant."""
IRCOT_PROMPT = (
    "Answer the question by reasoning one sentence at a time, with the help of the passages, "
    "which may or may not be useful.\n\n"
    "Passages:\n"
    "{context}\n\n"
    "Question: {question}\n"
    "Reasoning so far: {reasoning}\n"
    "Write only the next sentence of the reasoning. Once the answer is known, put it, in a few "
    "words, inside <answer> and </answer>, for example <answer> Beijing </answer>.\n"
)
"""One sentence of a chain of thought, which is the next query (IRCoT, 2212.10509)."""
SELF_RAG_NEED_PROMPT = (
    "A question is to be answered. Judge whether passages of a search engine are needed for it, or "
    "whether you know the answer for certain. Put yes, if passages are needed, or no inside "
    "<verdict> and </verdict>.\n"
    "Question: {question}\n"
)
"""The first prompt of Self-RAG (2310.11511): whether to retrieve."""
SELF_RAG_RELEVANCE_PROMPT = (
    "Judge whether the passage holds something that helps to answer the question. Put yes or no "
    "inside <verdict> and </verdict>.\n"
    "Question: {question}\n"
    "Passage: {context}\n"
)
"""The second: whether a passage is relevant."""
SELF_RAG_SUPPORT_PROMPT = (
    "Judge whether the passage supports the answer to the question. Put full, if all of the answer "
    "follows from the passage, partial, if a part of it does, or none inside <verdict> and "
    "</verdict>.\n"
    "Question: {question}\n"
    "Answer: {answer}\n"
    "Passage: {context}\n"
)
"""The third: whether an answer is supported."""
VERDICT_END = "</verdict>"

TEMPLATES = {
    "search": SEARCH_PROMPT,
    "fast": FAST_PROMPT,
    "tools": TOOLS_PROMPT,
    "r1": R1_PROMPT,
    "rag": RAG_PROMPT,
    "short": SHORT_PROMPT,
    "short_rag": SHORT_RAG_PROMPT,
    "direct": DIRECT_PROMPT,
    "cot": COT_PROMPT,
    "react": REACT_PROMPT,
    "search_o1": SEARCH_O1_PROMPT,
    "ircot": IRCOT_PROMPT,
}
WITH_CONTEXT = frozenset(name for name, text in TEMPLATES.items() if "{context}" in text)
"""Templates that need the passages of a search."""

INVALID_ACTION = (
    "\n"
    "My previous action is invalid. If I want to search, I should put the query between "
    "<search> and </search>. If I want to give the final answer, I should put the answer "
    "between <answer> and </answer>. Let me try again.\n"
)
INVALID_MESSAGE = (
    "Your previous action is invalid. If you want to search, you should put the query between "
    "<search> and </search>. If you want to give the final answer, you should put the answer "
    "between <answer> and </answer>. Please try again."
)
"""The user's message to a chat model that ended its turn without an action. The original has no
such message: it drops the token that ends the turn, and the model goes on after the sentence
above."""

FOLD_ACTION = (
    "\n"
    "My context is nearly full. I should sum up everything that I have found so far and still need "
    "inside <summary> and </summary>.\n"
)
FOLD_MESSAGE = (
    "Your context is nearly full: all but the question and your summary will be left out of it. "
    "Sum up everything that you have found so far and still need inside <summary> and </summary>."
)
"""Said by the user where tools are called natively."""
FOLDED = "{content}\n\nWhat you have found so far: {summary}"
"""The question of a conversation whose context was folded."""
LEFT_OUT = "(left out)"
"""In the place of a result that the context no longer holds."""

NATIVE_INVALID_MESSAGE = (
    "Your previous turn neither called a tool nor gave the answer. Call a tool, or put the final "
    "answer inside <answer> and </answer>."
)
"""Said to a policy that calls tools as its chat template writes calls."""

SEARCH_O1_INVALID_ACTION = (
    "\n"
    "I should search with <|begin_search_query|> query <|end_search_query|>, or give the "
    "answer inside <answer> and </answer>.\n"
)
SEARCH_O1_INVALID_MESSAGE = (
    "Search with <|begin_search_query|> query <|end_search_query|>, or give the answer inside "
    "<answer> and </answer>."
)
REACT_INVALID_ACTION = (
    "\n"
    "Observation: no valid action. Write Action: Search[query], or the answer inside <answer> "
    "and </answer>.\n"
)
REACT_INVALID_MESSAGE = (
    "Observation: no valid action. Write Action: Search[query], or the answer inside <answer> "
    "and </answer>."
)

BUDGET = "You have {left} in all, and what follows each of them says how many are left."
"""Stands before the prompt where the policy is told how many calls it has."""
REMAINING = "({left} left)"
"""Stands behind every result then."""
SEARCHES = ("search", "searches")
CALLS = ("tool call", "tool calls")
CALLING_TURNS = ("turn with tool calls", "turns with tool calls")
"""What is counted, for one and for many; a turn in a native format may hold several calls."""

ANSWER_END = "</answer>"
SUMMARY_END = "</summary>"


def build_prompt(question: str, template: str, context: str = "", reasoning: str = "") -> str:
    """The prompt of a question, which is given a question mark if it lacks one.

    Raises KeyError for an unknown template.
    """
    return TEMPLATES[template].format(
        question=with_mark(question), context=context, reasoning=reasoning
    )


def budget(calls: int, unit: tuple[str, str]) -> str:
    """How many calls there are in all, before the first.

    >>> budget(4, SEARCHES)
    'You have 4 searches in all, and what follows each of them says how many are left.'
    """
    return BUDGET.format(left=counted(calls, *unit))


def remaining(calls: int, unit: tuple[str, str]) -> str:
    """How many calls are left.

    >>> remaining(1, SEARCHES)
    '(1 search left)'
    """
    return REMAINING.format(left=counted(calls, *unit))


def with_mark(question: str) -> str:
    """The question with a question mark, as in the original."""
    question = question.strip()
    return question if question.endswith("?") else question + "?"


def named_title(title: str, document: str) -> str:
    """The title of a passage with the name by which its document can be opened.

    >>> named_title('"Rome"', "7")
    '"Rome", Document: 7'
    """
    return f"{title}, Document: {document}" if document else title


def format_passages(passages: Sequence[tuple[str, str]]) -> str:
    """`Doc 1(Title: "T") text\\nDoc 2...` of (title with its quotes, text) pairs.

    >>> format_passages([('"Rome"', "A city."), ('"Nile"', "A river.")])
    'Doc 1(Title: "Rome") A city.\\nDoc 2(Title: "Nile") A river.'
    """
    return "".join(
        f"Doc {i}(Title: {title}) {text}\n" for i, (title, text) in enumerate(passages, 1)
    ).strip()
