"""Mutants of a Python file: small changes of behaviour, found on its syntax tree, applied to its text.

A mutant never touches strings (messages, docstrings, keys), type annotations, `__repr__`, what is raised or printed,
imports, or the `if __name__ == "__main__"` at the end. The rest of the text, comments too, stays as it is.
"""

import ast
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

NEGATED = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
BOUNDARY = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
COMMUTATIVE = ("min", "max", "gcd", "transpose", "swapaxes")  # the order of their arguments means nothing
# Calls whose only effect is a line for a reader.
PRINTERS = ("print", "say", "logger.info", "logger.warning", "progress.update")


@dataclass(frozen=True)
class Mutant:
    """Bytes start to end of `file` become `new`. id: of file, function and change; moving the code keeps it."""

    id: str
    file: str  # from the root of the repository
    line: int
    function: str
    kind: str
    start: int
    end: int
    old: str
    new: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.end :]

    def diff(self, source: bytes) -> list[str]:
        """The lines that change, as "- ..." and "+ ..."."""
        first, last = source.rfind(b"\n", 0, self.start) + 1, source.find(b"\n", self.end)
        last = len(source) if last < 0 else last
        before = source[first:last].decode().splitlines()
        after = (source[first : self.start] + self.new.encode() + source[self.end : last]).decode().splitlines()
        return [f"- {line.strip()}" for line in before] + [f"+ {line.strip()}" for line in after]


def mutants(file: str, source: bytes) -> list[Mutant]:
    """All mutants of one file, in the order of its text."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found, seen = [], Counter()
    for kind, node, new, function in _Finder().run(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        what = f"{file} {function} {kind} {ast.unparse(node)} -> {new}"
        seen[what] += 1
        name = hashlib.sha256(f"{what} {seen[what]}".encode()).hexdigest()[:10]
        found.append(Mutant(name, file, node.lineno, function, kind, start, end, source[start:end].decode(), new))
    return sorted(found, key=lambda mutant: (mutant.start, mutant.end, mutant.kind, mutant.new))


def draw(files: dict[str, bytes], number: int, seed: int) -> list[Mutant]:
    """`number` mutants of all files, by a hash of seed and id: a change of the code leaves most of the draw alone."""
    every = [mutant for file, source in sorted(files.items()) for mutant in mutants(file, source)]
    return sorted(every, key=lambda mutant: hashlib.sha256(f"{seed} {mutant.id}".encode()).digest())[:number]


def _is_text(node: ast.AST) -> bool:
    """A message, or part of one: it has a blank, is empty, or is put together from values."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and (" " in node.value or not node.value)
    return isinstance(node, ast.JoinedStr)


def _makes_string(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return _makes_string(node.left) or _makes_string(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_main_guard(node: ast.If) -> bool:
    return "__name__" in {name.id for name in ast.walk(node.test) if isinstance(name, ast.Name)}


class _Finder(ast.NodeVisitor):
    """Collects (kind, node, replacement text, function) of every change."""

    def __init__(self):
        self.found: list[tuple[str, ast.AST, str, str]] = []
        self.names: list[str] = []

    def run(self, tree: ast.Module) -> Iterator[tuple[str, ast.AST, str, str]]:
        self.visit(tree)
        return iter(self.found)

    def add(self, kind: str, node: ast.AST, new: str) -> None:
        self.found.append((kind, node, new, ".".join(self.names) or "module"))

    def visit_all(self, nodes: Iterable[ast.AST | None]) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    # -- what is never changed ------------------------------------------------------------------------------------

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_arguments(self, node: ast.arguments) -> None:
        self.visit_all([*node.defaults, *node.kw_defaults])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name not in ("__repr__", "__str__"):
            self.visit(node.args)
            self.names.append(node.name)
            self.visit_all(node.body)
            self.names.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names.append(node.name)
        self.visit_all(node.body)
        self.names.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit_all([node.value])

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add("statement removed", node, "pass")

    def visit_Assert(self, node: ast.Assert) -> None:
        self.visit(node.test)

    # -- statements -----------------------------------------------------------------------------------------------

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            if ast.unparse(node.value.func) in PRINTERS:
                return
            self.add("statement removed", node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        # A plain name without its value would be a NameError, which any test finds.
        if all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets):
            self.add("statement removed", node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add("statement removed", node, "pass")
        if type(node.op) in ARITHMETIC and not _makes_string(node.value):
            changed = ast.AugAssign(node.target, ARITHMETIC[type(node.op)](), node.value)
            self.add("arithmetic", node, ast.unparse(changed))
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.add("return None", node, "return None")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if not _is_main_guard(node):
            self.negate(node.test)
            self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def negate(self, test: ast.expr) -> None:
        """A condition that is no comparison, `and`, `or` or `not`, for which there are changes of their own."""
        if not isinstance(test, (ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Constant)):
            self.add("condition negated", test, f"(not ({ast.unparse(test)}))")

    # -- expressions ----------------------------------------------------------------------------------------------

    def visit_IfExp(self, node: ast.IfExp) -> None:
        if _is_text(node.body) or _is_text(node.orelse):
            return
        self.negate(node.test)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for table, kind in ((NEGATED, "comparison negated"), (BOUNDARY, "boundary")):
            for number, operator in enumerate(node.ops):
                if type(operator) in table:
                    ops = [*node.ops]
                    ops[number] = table[type(operator)]()
                    self.add(kind, node, f"({ast.unparse(ast.Compare(node.left, ops, node.comparators))})")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        if not any(_is_text(value) for value in node.values):
            other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            self.add("and / or", node, f"({ast.unparse(ast.BoolOp(other, node.values))})")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.Not, ast.USub)):
            self.add("not" if isinstance(node.op, ast.Not) else "sign", node, f"({ast.unparse(node.operand)})")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if _makes_string(node):
            return
        if type(node.op) in ARITHMETIC:
            changed = ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
            self.add("arithmetic", node, f"({ast.unparse(changed)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.add("constant", node, str(not value))
        elif isinstance(value, int):
            self.add("constant", node, str(value + 1))
        elif isinstance(value, float):
            self.add("constant", node, repr(value * 2 if value else 1.0))

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) in PRINTERS:
            return
        unfit = any(isinstance(arg, ast.Starred) or _makes_string(arg) for arg in node.args[:2])
        if len(node.args) > 1 and not unfit and ast.unparse(node.func).rpartition(".")[2] not in COMMUTATIVE:
            swapped = ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
            if ast.unparse(swapped) != ast.unparse(node):
                self.add("arguments swapped", node, ast.unparse(swapped))
        self.generic_visit(node)
