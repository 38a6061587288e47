"""The import table: floors, which import downward only; who may import torch, torch.fx and private torch names."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "partita"

# Longest matching prefix decides. A module may import lower floors, and its own floor where SIDEWAYS lists it.
FLOOR = {
    "errors": 0, "units": 0, "uncollected": 0,
    "graph": 1, "cluster": 1, "plan": 1, "program": 1, "trace": 1,
    "strict_yaml": 1, "plan_file": 1, "plan_text": 1, "cluster_file": 1, "cluster_presets": 1,
    "united": 1, "device_names": 1,
    "sharding": 2, "schedules": 2, "cost": 2,
    "check": 3, "check_tensor": 3, "assign": 3, "lockstep": 3, "phases": 3, "divide": 3, "manual": 3, "lower": 3,
    "compilable": 3, "inbox": 3, "simulate": 3, "apart": 3, "predict": 3, "group_costs": 3,
    "planners": 4,
    "torch_compat": 5, "models": 5, "capture": 5, "measure": 5, "runtime": 5, "checkpoint": 5,
    "ranks": 6, "launch": 6, "report": 6, "api": 6, "automatic": 6, "factory": 6, "doctor": 6, "adapters": 6,
    "compiling": 6, "cli": 6, "cli_plan": 6, "cli_options": 6, "__main__": 6,
    "": 7,
    "demo": 8,
}  # fmt: skip

# (importer, imported) on one floor, besides a package's own modules.
SIDEWAYS = {
    ("cost", "sharding"),
    ("units", "errors"),
    ("united", "cluster"),
    ("cluster_file", "cluster"), ("cluster_file", "cluster_presets"), ("cluster_file", "strict_yaml"),
    ("plan_file", "plan"), ("plan_file", "strict_yaml"), ("plan_file", "device_names"),
    ("plan_text", "plan"), ("plan_text", "device_names"),
    ("lower", "compilable"),
    ("lower", "assign"), ("lower", "lockstep"), ("lower", "phases"), ("lower", "divide"), ("lockstep", "assign"),
    ("divide", "assign"), ("divide", "lockstep"), ("divide", "phases"), ("group_costs", "divide"),
    ("simulate", "inbox"), ("apart", "simulate"), ("predict", "apart"), ("predict", "divide"),
    ("predict", "group_costs"),
    ("manual", "assign"), ("check", "assign"), ("check", "check_tensor"), ("predict", "lower"), ("predict", "simulate"),
    ("capture", "torch_compat"), ("runtime", "torch_compat"), ("measure", "torch_compat"),
    ("runtime", "capture"), ("measure", "capture"), ("measure", "runtime"), ("checkpoint", "runtime"),
    ("api", "ranks"), ("api", "automatic"), ("api", "compiling"), ("automatic", "compiling"),
    ("cli", "launch"), ("cli", "factory"), ("cli", "doctor"), ("cli", "api"), ("cli", "report"),
    ("cli", "cli_plan"), ("cli", "cli_options"), ("cli_plan", "cli_options"), ("cli_plan", "factory"),
    ("cli_plan", "api"), ("__main__", "cli"),
    ("adapters", "api"),
}  # fmt: skip

# Methods of a noun that hand over to a verb of their own or a higher floor, by an import inside the function.
LATE = {
    ("plan", "plan_file"), ("plan", "plan_text"),
    ("cluster", "cluster_file"), ("cluster", "measure.detect"),
}  # fmt: skip

TORCH_FREE_UP_TO = 4


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


def family(name: str) -> str:
    """The entry of the table a module stands under: ``runtime.local`` -> ``runtime``."""
    while name and name not in FLOOR:
        name = name.rpartition(".")[0]
    return name


def imports(tree: ast.Module, known: set[str]) -> list[tuple[str, bool, int]]:
    """(absolute dotted name, inside a function?, line) of every import; partita's own down to the module."""
    found = []

    def visit(node: ast.AST, late: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.Import):
                found.extend((alias.name, late, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"relative import in line {child.lineno}; write it in full"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    inner = whole.removeprefix("partita.")
                    is_module = whole.startswith("partita.") and inner in known
                    found.append((whole if is_module else str(child.module), late, child.lineno))
            visit(child, inside)

    visit(tree, False)
    return found


def own(name: str) -> str | None:
    """``partita.plan`` -> ``plan``; None for other packages."""
    if name == "partita":
        return ""
    return name.removeprefix("partita.") if name.startswith("partita.") else None


def broken_rules(trees: dict[str, ast.Module]) -> list[str]:
    broken = []
    known = set(trees)
    for name, tree in trees.items():
        here = family(name)
        if here == "" and name != "":
            broken.append(f"{name}: not in the table of floors")
            continue
        for imported, late, line in imports(tree, known):
            target = own(imported)
            if target is None:
                continue
            there = family(target)
            if there == here or (name == "" and target == "__version__"):
                continue
            if late and (name, target) in LATE:
                continue
            if FLOOR[there] > FLOOR[here]:
                broken.append(f"{name}:{line}: floor {FLOOR[here]} imports {target or 'partita'}, floor {FLOOR[there]}")
            elif FLOOR[there] == FLOOR[here] and (here, there) not in SIDEWAYS:
                broken.append(f"{name}:{line}: imports {target} of its own floor, which SIDEWAYS does not list")
    return broken


def test_imports_point_downward_only() -> None:
    assert broken_rules(modules()) == []


def test_the_table_lists_nothing_that_is_not_there() -> None:
    trees = modules()
    used = {
        (family(name), family(target))
        for name, tree in trees.items()
        for imported, _, _ in imports(tree, set(trees))
        if (target := own(imported)) is not None
    }
    assert SIDEWAYS - used == set()
    assert set(FLOOR) - {family(name) for name in trees} == set()


def test_an_upward_import_is_caught() -> None:
    trees = {
        "errors": ast.parse("from partita.plan import Plan"), "plan": ast.parse(""), "odd": ast.parse(""),
        "trace": ast.parse("import partita.plan"), "graph": ast.parse("def f():\n from partita import api"),
        "api": ast.parse("from partita.graph import Graph"),
    }  # fmt: skip
    assert [line.partition(":")[0] for line in broken_rules(trees)] == ["errors", "odd", "trace", "graph"]


def test_floors_zero_to_four_import_no_torch() -> None:
    for name, tree in modules().items():
        if FLOOR[family(name)] <= TORCH_FREE_UP_TO:
            bad = [f"{name}:{line} {what}" for what, _, line in imports(tree, set()) if what.split(".")[0] == "torch"]
            assert bad == []


def test_only_capture_imports_fx_and_export() -> None:
    for name, tree in modules().items():
        if family(name) not in ("capture", "torch_compat"):
            for what, _, line in imports(tree, set()):
                assert not what.startswith(("torch.fx", "torch.export")), f"{name}:{line} imports {what}"


def private_names(tree: ast.Module) -> list[str]:
    """``torch._x`` and ``from torch.y import _z``, in imports and in attribute chains that start at ``torch``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("torch.") and "._" in a.name]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            whole = [f"{node.module}.{a.name}" for a in node.names]
            found += [w for w in whole if any(p.startswith("_") and not p.startswith("__") for p in w.split("."))]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id == "torch":
                found.append(f"{ast.unparse(node)}")
    return found


def test_private_torch_names_stand_in_torch_compat_only() -> None:
    bad = {name: private_names(tree) for name, tree in modules().items() if name != "torch_compat"}
    assert {name: found for name, found in bad.items() if found} == {}


def test_a_private_name_is_caught() -> None:
    source = "import torch._dynamo\nfrom torch.fx import _x\nimport torch\ntorch.ops.aten._foo\ntorch.nn.Module"
    assert private_names(ast.parse(source)) == ["torch._dynamo", "torch.fx._x", "torch.ops.aten._foo"]


def test_every_module_says_what_it_is() -> None:
    silent = [name for name, tree in modules().items() if not ast.get_docstring(tree)]
    assert silent == []
