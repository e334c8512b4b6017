"""Read from the sources which errors are raised on purpose: code, HTTP status, message.

The calls of error classes are followed through the small functions that stand between them and the place
that knows the code, so far as codes and messages are written out there.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("merging", "service", "workers")
GAP = "…"
_BASES = {"MergeError": 500, "InputError": 422, "MergeFailure": 500, "Cancelled": 500}
_PROBLEMS = ("problem", "document")  # (status, code, detail, ...)
_KIND_FIRST = ("Missing",)  # the Hub's own kind comes before the code
_DEPTH = 3
_MOST = 12

Env = dict[str, list[str]]


@dataclass
class Module:
    """One source file and what its names mean."""

    name: str
    tree: ast.Module
    functions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = field(default_factory=dict)
    owner: dict[ast.AST, ast.FunctionDef | ast.AsyncFunctionDef | None] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Raised:
    """One place that raises."""

    code: str
    status: int
    message: str
    module: str


class Sources:
    """The packages, parsed."""

    def __init__(self) -> None:
        paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
        self.modules = {name: _parse(name, path) for path in paths for name in (_dotted(path),)}
        self.calls: dict[str, list[tuple[Module, ast.Call]]] = {}
        for module in self.modules.values():
            for node in module.owner:
                if isinstance(node, ast.Call):
                    self.calls.setdefault(_called(node), []).append((module, node))
        self.known: dict[tuple[ast.AST, frozenset[str]], list[Env]] = {}
        self.statuses = self._error_classes()

    def raised(self) -> list[Raised]:
        """Every deliberate error, sorted; several messages of a code are several rows."""
        found: set[Raised] = set()
        for module in self.modules.values():
            for node in ast.walk(module.tree):
                if isinstance(node, ast.Call):
                    found.update(self._at(module, node))
                elif isinstance(node, ast.ClassDef) and node.name in self.statuses:
                    found.update(self._fixed(module, node))
        return sorted(found, key=lambda item: (item.code, item.module, item.message))

    def _at(self, module: Module, call: ast.Call) -> Iterator[Raised]:
        name = _called(call)
        position, status = 0, self.statuses.get(name)
        if name in _PROBLEMS and call.args and isinstance(call.args[0], ast.Constant):
            status = call.args[0].value if isinstance(call.args[0].value, int) else None
            position = 1
        elif name in _KIND_FIRST:
            position = 1
        if status is None or len(call.args) < position + 2:
            return
        function = module.owner.get(call)
        texts = call.args[position : position + 2]
        wanted = _names(*texts) if _names(texts[0]) else frozenset()
        for env in self._environments(module, function, wanted, _DEPTH):
            codes = self._texts(module, function, call.args[position], env)
            messages = self._texts(module, function, call.args[position + 1], env)
            for code, message in itertools.product(codes, messages):
                if GAP not in code:
                    yield Raised(code, status, message, module.name)

    def _fixed(self, module: Module, kind: ast.ClassDef) -> Iterator[Raised]:
        """An error class that knows its own code."""
        for node in ast.walk(kind):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__" and node.args:
                for code in self._texts(module, None, node.args[0], {}):
                    message = self._texts(module, None, node.args[1], {})[0] if len(node.args) > 1 else GAP
                    if GAP not in code:
                        yield Raised(code, self.statuses[kind.name], message, module.name)

    def _environments(
        self,
        module: Module,
        function: ast.FunctionDef | ast.AsyncFunctionDef | None,
        wanted: frozenset[str],
        depth: int,
    ) -> list[Env]:
        """What the wanted parameters of a function are, at each place that calls it."""
        if function is None or depth == 0:
            return [{}]
        arguments = function.args
        names = [item.arg for item in (*arguments.posonlyargs, *arguments.args)]
        names = names[1:] if names[:1] in (["self"], ["cls"]) else names
        wanted &= {*names, *(item.arg for item in arguments.kwonlyargs)}
        if not wanted:
            return [{}]
        if (function, wanted) in self.known:
            return self.known[function, wanted]
        self.known[function, wanted] = [{}]  # for what calls itself
        found: list[Env] = [{}]
        for other, node in self.calls.get(function.name, []):
            if not self._means(other, node, module, function):
                continue
            caller = other.owner.get(node)
            given = [*zip(names, node.args, strict=False)]
            given += [(item.arg, item.value) for item in node.keywords if item.arg]
            strings = [(name, value) for name, value in given if name in wanted and _textual(value)]
            free = _names(*(value for _, value in strings))
            for env in self._environments(other, caller, free, depth - 1) if strings else []:
                bound = {name: self._texts(other, caller, value, env) for name, value in strings}
                if any(texts != [GAP] for texts in bound.values()) and bound not in found:
                    found.append(bound)
        self.known[function, wanted] = found
        return found

    def _means(
        self, other: Module, call: ast.Call, module: Module, function: ast.FunctionDef | ast.AsyncFunctionDef
    ) -> bool:
        name = _called(call)
        if name != function.name:
            return False
        if other is module:
            return True
        if isinstance(call.func, ast.Attribute):
            return name not in other.functions and not name.startswith("_") and name in _methods(module)
        return other.imports.get(name) == module.name

    def _texts(
        self,
        module: Module,
        function: ast.FunctionDef | ast.AsyncFunctionDef | None,
        node: ast.expr,
        env: Env,
    ) -> list[str]:
        """What a string expression can be; unknown parts are gaps."""
        if isinstance(node, ast.Constant):
            return [str(node.value)] if isinstance(node.value, str) else [GAP]
        if isinstance(node, ast.IfExp):
            return [
                text for part in (node.body, node.orelse) for text in self._texts(module, function, part, env)
            ]
        if isinstance(node, ast.JoinedStr):
            parts = [
                (env.get(_plain(part)) or [GAP])
                if isinstance(part, ast.FormattedValue)
                else self._texts(module, function, part, env)
                for part in node.values
            ]
            return ["".join(texts) for texts in itertools.islice(itertools.product(*parts), _MOST)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = (self._texts(module, function, part, env) for part in (node.left, node.right))
            return [first + second for first, second in itertools.product(left, right)]
        if isinstance(node, ast.Name):
            return env.get(node.id) or self._assigned(module, function, node.id, env) or [GAP]
        return [GAP]

    def _assigned(
        self,
        module: Module,
        function: ast.FunctionDef | ast.AsyncFunctionDef | None,
        name: str,
        env: Env,
    ) -> list[str]:
        """The strings that a function, or a module, gives to a name."""
        for scope in (function, module.tree):
            if scope is None:
                continue
            nodes = ast.walk(scope) if scope is function else module.tree.body
            found: list[str] = []
            for node in nodes:
                for value in _bound(node, name):
                    if _textual(value) and not isinstance(value, ast.Name):
                        found += self._texts(module, function, value, env)
            if found:
                return list(dict.fromkeys(found))[:_MOST]
        return []

    def _error_classes(self) -> dict[str, int]:
        statuses = dict(_BASES)
        nodes = [
            node
            for module in self.modules.values()
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ClassDef)
        ]
        for _ in range(_DEPTH):
            for node in nodes:
                if node.name in _BASES:
                    continue
                bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in statuses]
                if bases:
                    own = [value for item in node.body for value in _bound(item, "status")]
                    fixed = [value.value for value in own if isinstance(value, ast.Constant)]
                    statuses[node.name] = int(str(fixed[0])) if fixed else statuses[bases[0]]
        return statuses


def _bound(node: ast.AST, name: str) -> Iterator[ast.expr]:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Name) and target.id == name:
                yield node.value
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        if isinstance(node.target, ast.Name) and node.target.id == name:
            yield node.value
    elif isinstance(node, ast.For) and isinstance(node.target, ast.Tuple):
        places = [i for i, item in enumerate(node.target.elts) if ast.unparse(item) == name]
        for row in node.iter.elts if isinstance(node.iter, ast.Tuple) else ():
            if places and isinstance(row, ast.Tuple):
                yield row.elts[places[0]]


def _textual(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    return isinstance(node, ast.JoinedStr | ast.IfExp | ast.Name | ast.BinOp)


def _names(*nodes: ast.expr) -> frozenset[str]:
    return frozenset(part.id for node in nodes for part in ast.walk(node) if isinstance(part, ast.Name))


def _plain(part: ast.FormattedValue) -> str:
    return part.value.id if isinstance(part.value, ast.Name) and part.conversion == -1 else ""


def _called(call: ast.Call) -> str:
    if isinstance(call.func, ast.Name):
        return call.func.id
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def _methods(module: Module) -> set[str]:
    kinds = [node for node in module.tree.body if isinstance(node, ast.ClassDef)]
    return {item.name for kind in kinds for item in kind.body if isinstance(item, ast.FunctionDef)}


def _parse(name: str, path: Path) -> Module:
    module = Module(name, ast.parse(path.read_text(encoding="utf-8")))

    def visit(node: ast.AST, owner: ast.FunctionDef | ast.AsyncFunctionDef | None) -> None:
        for child in ast.iter_child_nodes(node):
            module.owner[child] = owner
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                module.functions[child.name] = child
                visit(child, child)
            else:
                visit(child, owner)
            if isinstance(child, ast.ImportFrom) and child.module:
                for alias in child.names:
                    module.imports[alias.asname or alias.name] = child.module

    visit(module.tree, None)
    return module


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)
