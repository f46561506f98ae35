"""The value of a number that a model wrote in LaTeX or as a Python expression, without running what it wrote.

In: a short text such as ``\\frac{3}{4}``, ``1,200`` or ``2^{10}``. Out: an int, a float, or None.
Always: `latex_value` gives what ``eval(str(latex2sympy(text)))`` gives (latex2sympy2 1.9.1) wherever that is a real
number, and `python_value` what ``eval(text)`` gives. Names, calls and everything symbolic have no value: there they
raise `NameError`, so that even ``\\sqrt{4}`` and ``\\pi`` are None. Length, depth and size of a power are bounded.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction

Number = int | float

_LONGEST_TEXT = 2_000
_DEEPEST = 40
_MOST_BITS = 100_000
"""Of a power; about 30,000 digits."""

_BLANK = re.compile(r"\\displaystyle|\\q?quad|\\,|[~$]")
_TOKEN = re.compile(
    r"[ \t\r\n]*(?:(?P<number>[0-9]*(?:,[0-9]{3})*\.[0-9]+|[0-9]+(?:,[0-9]{3})*)(?P<percent>\\%)?"
    r"|(?P<sign>\\frac|\\binom|\\times|\\cdot|\\div|\\over|\\left|\\right|\\leq|\\geq|\\lt|\\gt|\\[{}]|<=|>=|"
    r"[-+*/:^(){}\[\]<>=,;._&'a-z])|(?P<end>\Z))"
)
_TIMES, _OVER = {"*", "\\times", "\\cdot"}, {"/", ":", "\\div", "\\over"}
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
_COMPARE: dict[str, Callable[[Number, Number], bool]] = {
    **dict.fromkeys(("<", "\\lt"), operator.lt),
    **dict.fromkeys((">", "\\gt"), operator.gt),
    **dict.fromkeys(("<=", "\\leq"), operator.le),
    **dict.fromkeys((">=", "\\geq"), operator.ge),
}
# latex2sympy ends where one of these can't belong to the expression, and leaves the rest unread.
_ENDS = {"", ")", "]", "}", "\\}", ".", "_", "&", "\\right"}
_ASSIGNMENT = re.compile(r"[ \t\r\n]*[a-df-z][ \t\r\n]*=(?!=)")
_PERMUTATION = re.compile(r"\([a-zA-Z0-9+\-*/\\ ]+?\)_\{[a-zA-Z0-9+\-*/\\ ]+?\}")


class _NoValue(Exception):
    """The text has no value as a number."""


def latex_value(text: str, names: Mapping[str, Number] | None = None) -> Number | None:
    """The value of a LaTeX expression of numbers and of `names`, which are single letters, or None.

    A comparison has the value 1 or 0, and ``x = 3`` the value 3, as latex2sympy has it.
    """
    if len(text) > _LONGEST_TEXT or _PERMUTATION.search(text):
        return None
    try:
        return _Latex(text, names or {}).value()
    except (_NoValue, ArithmeticError, ValueError):
        return None


def python_value(text: str) -> Number | None:
    """The value of a Python expression of literals and arithmetic, or None."""
    if len(text) > _LONGEST_TEXT:
        return None
    try:
        return _evaluated(ast.parse(text, mode="eval").body, 0)
    except (_NoValue, SyntaxError, ArithmeticError, ValueError, RecursionError, MemoryError):
        return None


class _Latex:
    """A parser by recursive descent that evaluates as it goes."""

    def __init__(self, text: str, names: Mapping[str, Number]) -> None:
        self._names = names
        self._text = _BLANK.sub(" ", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
        self._text = self._text.replace("\\dbinom", "\\binom").replace("\\tbinom", "\\binom")
        assigned = _ASSIGNMENT.match(self._text)
        self._at = assigned.end() if assigned else 0
        self._depth = 0
        self._token = self._number = ""
        self._percent = False
        self._literal = False
        """Whether the value last read was a number as such, possibly with a sign."""
        self._next()

    def value(self) -> Number:
        found = self._sum()
        while self._token in _COMPARE:
            compare = _COMPARE[self._token]
            self._next()
            found = int(compare(found, self._sum()))
        if self._token not in _ENDS or self._number:
            raise _NoValue
        return found

    def _next(self) -> None:
        found = _TOKEN.match(self._text, self._at)
        if not found:
            raise _NoValue
        self._at = found.end()
        self._number, self._percent, self._token = found["number"] or "", bool(found["percent"]), found["sign"] or ""

    def _take(self, token: str) -> None:
        if self._number or self._token != token:
            raise _NoValue
        self._next()

    def _sum(self) -> Number:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _NoValue
        found = self._product()
        while self._token in ("+", "-"):
            plus = self._token == "+"
            self._next()
            term = self._product()
            found = found + term if plus else found - term
            self._literal = False
        self._depth -= 1
        return found

    def _product(self) -> Number:
        found = self._signed()
        while self._token in _TIMES or self._token in _OVER:
            times = self._token in _TIMES
            self._next()
            factor = self._signed()
            found = found * factor if times else found / factor
            self._literal = False
        return found

    def _signed(self) -> Number:
        negative = False
        while self._token in ("+", "-"):
            negative ^= self._token == "-"
            self._next()
        found = self._power()
        while self._starts_factor():
            found = found * self._power()
            self._literal = False
        return -found if negative else found

    def _starts_factor(self) -> bool:
        opens = self._token in ("(", "[", "{", "\\{", "\\left", "\\frac", "\\binom")
        return bool(self._number) or opens or self._token in self._names

    def _power(self) -> Number:
        found = self._factor()
        while self._token == "^":
            self._next()
            if self._number:
                exponent = self._literal_number()
            else:
                self._take("{")
                exponent = self._sum()
                self._take("}")
            # SymPy writes these as sqrt(), which has no value there.
            if self._literal and abs(exponent) == 0.5:
                raise _NoValue
            found = power(found, exponent)
            self._literal = False
        while self._token == "'":
            self._next()
        return found

    def _factor(self) -> Number:
        if self._number:
            return self._literal_number()
        if self._token in self._names:
            named = self._names[self._token]
            self._next()
            self._literal = False
            return named
        if self._token in ("\\frac", "\\binom"):
            name = self._token
            self._next()
            upper, lower = self._braced(), self._braced()
            self._literal = False
            return upper / lower if name == "\\frac" else _binomial(upper, lower)
        left = self._token == "\\left"
        if left:
            self._next()
        closing = _CLOSING.get(self._token)
        if closing is None:
            raise _NoValue
        self._next()
        found = self._sum()
        if left:
            self._take("\\right")
        self._take(closing)
        return found

    def _braced(self) -> Number:
        self._take("{")
        found = self._sum()
        self._take("}")
        return found

    def _literal_number(self) -> Number:
        digits = self._number.replace(",", "")
        whole = digits.isdecimal() and not self._percent
        exact = int(digits) if whole else Fraction(digits) / (100 if self._percent else 1)
        self._next()
        self._literal = True
        return exact.numerator if exact.denominator == 1 else exact.numerator / exact.denominator


def power(base: Number, exponent: Number) -> Number:
    """``base ** exponent``. Raises for one that is no real number or too long to be worked out."""
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and exponent > 0 and int(base).bit_length() * exponent > _MOST_BITS:
        raise _NoValue
    found = base**exponent
    if isinstance(found, complex):
        raise _NoValue
    return found


def _binomial(n: Number, k: Number) -> int:
    if not (isinstance(n, int) and isinstance(k, int) and 0 <= n <= 1_000 and k >= 0):
        raise _NoValue
    return math.comb(n, k)


_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: power,
}


def _evaluated(node: ast.expr, depth: int) -> Number:
    if depth > _DEEPEST:
        raise _NoValue
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        operand = _evaluated(node.operand, depth + 1)
        return -operand if isinstance(node.op, ast.USub) else +operand
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_evaluated(node.left, depth + 1), _evaluated(node.right, depth + 1))
    raise _NoValue
