"""An agent loop whose policy always searches, whatever it says: random weights never would."""

from typing import Any

from search_r1.agent.actions import ToolCall, Turn
from search_r1.agent.dialects import TagDialect
from search_r1.agent.loop import SearchAgentLoop

QUERY = "Ada Marin"


class AlwaysCalls(TagDialect):
    def parse(self, token_ids: Any) -> Turn:
        return Turn((ToolCall("search", {"query": QUERY}),))


class SearchingLoop(SearchAgentLoop):
    def _dialect(self) -> AlwaysCalls:
        return AlwaysCalls(self.config, self.tokenizer, self.tools, self.words)
