"""Rules of the house that the linter does not know: docstrings that open, output, globals."""

import ast

CHANGING_METHODS = {
    "add",
    "append",
    "clear",
    "discard",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "setdefault",
    "update",
}


def test_every_module_says_first_what_it_is(meshift_sources):
    silent = [s.name for s in meshift_sources if s.text.strip() and not ast.get_docstring(s.tree)]
    assert not silent


def test_only_the_command_line_prints(meshift_sources):
    found = [
        f"{s.name}:{node.lineno}"
        for s in meshift_sources
        if not s.name.startswith("meshift/cli/")
        for node in ast.walk(s.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not found


def test_no_exception_is_swallowed_unseen(meshift_sources):
    """`except:`, and `except Exception` that does not raise again."""
    found = [
        f"{s.name}:{node.lineno}"
        for s in meshift_sources
        for node in ast.walk(s.tree)
        if isinstance(node, ast.ExceptHandler) and _is_blind(node)
    ]
    assert not found


def test_no_function_changes_a_global(meshift_sources):
    found = [f"{s.name}:{line}" for s in meshift_sources for line in changes_of_globals(s.tree)]
    assert not found


def test_the_search_for_changed_globals_finds_them():
    changed = "A = []\ndef f():\n    A.append(1)\ndef g():\n    A[0] = 1\ndef h():\n    global A\n"
    assert sorted(changes_of_globals(ast.parse(changed))) == [3, 5, 7]
    own = "A = []\ndef f(A):\n    A.append(1)\ndef g():\n    A = []\n    A[0] = 1\n"
    assert list(changes_of_globals(ast.parse(own))) == []


def changes_of_globals(tree: ast.Module):
    names = {t.id for node in tree.body for t in _targets(node) if isinstance(t, ast.Name)}
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)):
        given = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}
        stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        outer = names - given - stored
        yield from (node.lineno for node in ast.walk(function) if _changes(node, outer))


def _targets(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def _changes(node: ast.AST, outer: set[str]) -> bool:
    match node:
        case ast.Global():
            return True
        case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
            return name in outer
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)):
            return name in outer and method in CHANGING_METHODS
    return False


def _is_blind(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    caught = {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)}
    raises = any(isinstance(n, ast.Raise) for n in ast.walk(handler))
    return bool(caught & {"Exception", "BaseException"}) and not raises
