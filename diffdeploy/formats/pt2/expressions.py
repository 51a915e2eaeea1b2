"""Strings of an exported program that torch evaluates or executes: each must be arithmetic over sizes.

`torch.export.load` passes ``expr_str`` to sympy, which evaluates it as Python, and writes guards, names and operators
into the source of the module that it builds.
"""

import ast
import re

__all__ = ["is_expression", "is_guard", "is_name"]

_LONGEST = 10_000
# Functions of sympy and torch that torch may print in an expression for a size, besides symbols and numbers.
_FUNCTIONS = frozenset(
    {
        *("Add", "Mul", "Integer", "Rational", "Float", "Mod", "Min", "Max", "Abs"),
        *("FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "FloatTrueDiv", "PythonMod", "ModularIndexing"),
        *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Piecewise", "floor", "ceiling", "ToFloat"),
        *("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "TruncToInt"),
    }
)
_SYMBOL = re.compile(r"[a-z]{1,4}[0-9]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.UAdd)
_LOGIC = (ast.And, ast.Or, ast.Not, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
# A power tower of numbers would take forever to evaluate.
_LARGEST_POWER = 64
# Maximum precision in bits that sympy is told to use; torch prints 53.
_MOST_BITS = 4096
# Maximum number of arguments of all Min and Max calls: sympy compares each with every other one, which takes 0.6 s for
# 32 and 9 s for 120.
_MOST_COMPARED = 32
_NUMBER = re.compile(r"-?[0-9]{1,40}(\.[0-9]{0,40})?(e[+-]?[0-9]{1,3})?")


def is_name(text: object) -> bool:
    """True for a name, possibly with dots, such as the names of weights and nodes."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def is_expression(text: object) -> bool:
    """True for arithmetic over symbols for sizes, as sympy or torch prints it."""
    tree = _parsed(text)
    return tree is not None and _is_soon_compared(tree) and _is_arithmetic(tree)


def is_guard(text: object) -> bool:
    """True for a comparison between sizes of the graph's inputs, ``L['tensors'][0].size()[1]``."""
    tree = _parsed(text)
    return tree is not None and _is_soon_compared(tree) and _is_arithmetic(tree, sizes=True)


def _parsed(text: object) -> ast.expr | None:
    if not isinstance(text, str) or len(text) > _LONGEST:
        return None
    try:
        return ast.parse(text, mode="eval").body
    # An expression that is nested too deeply is not a size, either.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_arithmetic(node: ast.expr, *, sizes: bool = False) -> bool:
    match node:
        case ast.Constant(value=value):
            return isinstance(value, int | float)
        case ast.Name(id=name):
            return _SYMBOL.fullmatch(name) is not None
        case ast.BinOp(left=left, op=operator, right=right):
            parts, known = [left, right], isinstance(operator, _ARITHMETIC)
            if isinstance(operator, ast.Pow):
                return _is_power(left, right, sizes=sizes)
        case ast.UnaryOp(op=operator, operand=operand):
            parts, known = [operand], isinstance(operator, _ARITHMETIC + _LOGIC)
        case ast.BoolOp(values=values):
            parts, known = values, True
        case ast.Compare(left=left, ops=operators, comparators=others):
            parts, known = [left, *others], all(isinstance(each, _LOGIC) for each in operators)
        case ast.Call():
            return _is_call(node, sizes=sizes)
        case ast.Subscript():
            return sizes and _is_size(node)
        case _:
            return False
    return known and all(_is_arithmetic(part, sizes=sizes) for part in parts)


def _number(node: ast.Constant) -> float:
    return float(node.value) if isinstance(node.value, int | float) else float("inf")


def _is_call(node: ast.Call, *, sizes: bool) -> bool:
    match node:
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=assumptions):
            # Assumptions of sympy, such as positive=True.
            plain = all(isinstance(each.value, ast.Constant) and each.arg is not None for each in assumptions)
            return plain and _SYMBOL.fullmatch(name) is not None
        case ast.Call(
            func=ast.Name(id="Float"),
            args=[ast.Constant(value=str(number))],
            # Any other value of the keyword would be evaluated, too.
            keywords=[ast.keyword(arg="precision" | "dps", value=ast.Constant(value=int(bits)))],
        ):
            return bits <= _MOST_BITS and _NUMBER.fullmatch(number) is not None
        case ast.Call(func=ast.Name(id="Pow"), args=[base, power], keywords=[]):
            return _is_power(base, power, sizes=sizes)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            known = name in _FUNCTIONS or (sizes and name in ("min", "max"))
            return known and all(_is_arithmetic(each, sizes=sizes) for each in arguments)
    return False


def _is_power(base: ast.expr, power: ast.expr, *, sizes: bool) -> bool:
    """True for a small power of an expression without powers, since powers of powers grow without limit."""
    match power:
        case ast.Call(func=ast.Name(id="Integer"), args=[ast.Constant() as number], keywords=[]):
            pass
        case ast.Constant() as number:
            pass
        case _:
            return False
    nested = any(isinstance(each, ast.Pow) or _is_called(each, "Pow") for each in ast.walk(base))
    return not nested and abs(_number(number)) <= _LARGEST_POWER and _is_arithmetic(base, sizes=sizes)


def _is_soon_compared(tree: ast.expr) -> bool:
    calls = [each for each in ast.walk(tree) if _is_called(each, "Min", "Max", "min", "max")]
    return sum(len(call.args) for call in calls if isinstance(call, ast.Call)) <= _MOST_COMPARED


def _is_called(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def _is_size(node: ast.Subscript) -> bool:
    """True for ``L['tensors'][0].size()[1]``, with any numbers and any name of the inputs."""
    match node:
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(value=tensor, attr="size"), args=[], keywords=[]),
            slice=ast.Constant(value=int()),
        ):
            while isinstance(tensor, ast.Subscript) and isinstance(tensor.slice, ast.Constant):
                tensor = tensor.value
            return isinstance(tensor, ast.Name) and tensor.id == "L"
    return False
