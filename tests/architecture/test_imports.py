"""What importing costs and what must never be imported. The layers themselves are import-linter's contracts."""

import ast
import subprocess
import sys

import pytest
from source_trees import ROOT

TALKING = ("meshift/parallel/", "meshift/realloc/execute.py", "meshift/runtime/")
TORCH_FREE = (
    "meshift",
    "meshift.errors",
    "meshift.config.runs",
    "meshift.config.loading",
    "meshift.graph.calls",
    "meshift.layout.boxes",
    "meshift.realloc.plan",
    "meshift.realloc.rounds",
    "meshift.planner.memory",
    "meshift.planner.moving",
    "meshift.planner.cost",
    "meshift.planner.profile",
    "meshift.planner.rates",
    "meshift.planner.steps",
    "meshift.planner.search",
    "meshift.planner.prove",
    "meshift.planner.evaluate",
    "meshift.planner.strategies",
    "meshift.planner.written",
    "meshift.planner.explain",
    "meshift.report.plan_page",
    "meshift.models.config",
    "meshift.models.shards",
    "meshift.models.hf.families",
    "meshift.generation.params",
    "meshift.runtime.observer",
    "meshift.runtime.run_folder",
    "meshift.cli.main",
)
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("torch", "save")}
# Calls that only make a value, so that a module may hold it: constructors, and these.
MAKERS = {
    *("frozenset", "tuple", "dict", "float", "fromkeys", "maketrans", "partial", "uint64"),
    *("field", "compile", "getLogger"),
    *("_one", "_held_out"),  # shorthands for a Chart, in report/catalogue.py
    "_gpu",  # for a Hardware, in planner/hardware.py
}


def imported_modules(tree: ast.Module):
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom(module=str(module)):
                yield node.lineno, module


@pytest.mark.parametrize("module", TORCH_FREE)
def test_module_does_not_bring_torch_to_a_machine_that_only_plans(module):
    heavy = "[m for m in ('torch', 'transformers', 'ray') if m in sys.modules]"
    code = f"import sys, {module}; found = {heavy}; sys.exit(f'{{found}} were imported' if found else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_pickled_since_a_pickle_can_run_code(all_sources):
    found = [
        f"{s.name}:{line} {module}"
        for s in all_sources
        for line, module in imported_modules(s.tree)
        if module.split(".")[0] in PICKLES
    ]
    assert not found


def test_torch_load_and_torch_save_are_not_used_since_they_pickle(all_sources):
    found = [
        f"{s.name}:{node.lineno}"
        for s in all_sources
        for node in ast.walk(s.tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in FORBIDDEN_ATTRIBUTES
    ]
    found += [
        f"{s.name}:{node.lineno}"
        for s in all_sources
        for node in ast.walk(s.tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (node.module, alias.name) in FORBIDDEN_ATTRIBUTES
    ]
    assert not found


def test_processes_talk_to_each_other_in_few_places(meshift_sources):
    found = {
        s.name
        for s in meshift_sources
        for _, module in imported_modules(s.tree)
        if module.startswith("torch.distributed")
    }
    assert "meshift/realloc/execute.py" in found
    assert not [name for name in found if not name.startswith(TALKING)]


def test_one_file_knows_ray(meshift_sources):
    found = {
        s.name
        for s in meshift_sources
        for _, module in imported_modules(s.tree)
        if module == "ray" or module.startswith("ray.")
    }
    assert found == {"meshift/runtime/launch/ray_gang.py"}


def test_no_collective_pickles_what_it_sends(all_sources):
    found = [
        f"{s.name}:{node.lineno} {node.attr}"
        for s in all_sources
        for node in ast.walk(s.tree)
        if isinstance(node, ast.Attribute) and node.attr.endswith(("_object", "_object_list"))
    ]
    assert not found


def test_package_files_are_empty_so_that_importing_one_module_imports_one_module(meshift_sources):
    packages = [s for s in meshift_sources if s.path.name == "__init__.py" and s.name != "meshift/__init__.py"]
    assert packages
    assert not [s.name for s in packages if s.text.strip()]


def test_nothing_happens_at_import_but_definitions(meshift_sources):
    found = [
        f"{s.name}:{node.lineno}"
        for s in meshift_sources
        for node in s.tree.body
        if not _defines(node) and not _is_guarded(node)
    ]
    assert not found


def _defines(node: ast.stmt) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return True
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.Assign(value=value) | ast.AnnAssign(value=value):
            calls = [c for c in ast.walk(value) if isinstance(c, ast.Call)] if value is not None else []
            return all(_makes_a_value(call) for call in calls)
    return False


def _makes_a_value(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name[:1].isupper() or name in MAKERS


def _is_guarded(node: ast.stmt) -> bool:
    """`if TYPE_CHECKING:` and `if __name__ == "__main__":`."""
    return isinstance(node, ast.If) and any(
        isinstance(n, ast.Name) and n.id in ("TYPE_CHECKING", "__name__") for n in ast.walk(node.test)
    )
