"""A second tool beside search: all that one of your own needs is a file like this one."""

import ast
import operator

from search_r1.tools.base import Tool, ToolConfig, ToolFailed, ToolResponse
from search_r1.tools.formats import tagged

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class CalculatorConfig(ToolConfig):
    digits: int = 6
    """Significant digits of a result."""
    plugged_in: bool = True


class Calculator(Tool):
    """Adds, subtracts, multiplies and divides; what it cannot read it gives back."""

    Config = CalculatorConfig
    name = "calculator"
    format = tagged("calculate", "result")
    description = "Calculates the value of an arithmetic expression."
    instruction = "You can calculate by writing <calculate> 2 * (3 + 4) </calculate>."

    def __init__(self, config: CalculatorConfig) -> None:
        super().__init__(config)
        self.config = config
        self.closed = False

    def preflight(self) -> list[str]:
        return [] if self.config.plugged_in else ["agent.tools: the calculator is not plugged in"]

    async def execute(self, argument: str) -> ToolResponse:
        if not self.config.plugged_in:
            raise ToolFailed("no power")
        try:
            value = evaluate(ast.parse(argument, mode="eval").body)
        except (SyntaxError, KeyError, TypeError, ZeroDivisionError):
            return ToolResponse(f"no number: {argument}", error="no_number")
        return ToolResponse(f"{value:.{self.config.digits}g}", facts={"value": value})

    async def close(self) -> None:
        self.closed = True


def evaluate(node: ast.expr) -> float:
    """The number that an expression stands for. Raises KeyError or TypeError for what is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
    raise TypeError(f"no arithmetic: {ast.dump(node)}")
