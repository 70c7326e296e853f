"""Figures of the source that the tests hold: who imports whom, and what the text names.

python -m tests.house
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("rto_fast", "kernels")
FOLDERS = (*PACKAGES, "benchmarks", "tests")
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
NO_MODULES = {"rto_fast.spell"}  # how terminal.py writes what a terminal's encoding lacks


def source_files(*folders):
    """The .py files of the given folders; the links rto_fast/kernels and rto_fast/configs are not followed."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if not any(part.is_symlink() for part in path.parents)]


def module_of(path):
    """The name that a file of the package is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("rto_fast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    """The folder of a module; each module that lies in rto_fast/ itself is a room of its own."""
    path = MODULES[module]
    return str(path.relative_to(ROOT) if path.parent == ROOT / "rto_fast" else path.parent.relative_to(ROOT))


MODULES = {module_of(path): path for path in source_files(*PACKAGES)}


def imports_of(module):
    """The package's modules that a module imports: at its top, in functions and for type checkers alike."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
    return found & MODULES.keys() - {module}


def circles(graph):
    """The sets of nodes that reach each other, for {node: the nodes it points to}."""

    def reach(start):
        seen, new = set(), {start}
        while new:
            seen |= new
            new = {target for node in new for target in graph.get(node, ())} - seen
        return seen

    reached = {node: reach(node) for node in graph}
    mutual = {frozenset(other for other in reached[node] if node in reached.get(other, ())) for node in graph}
    return sorted(sorted(circle) for circle in mutual if len(circle) > 1)


def file_imports():
    return {module: imports_of(module) for module in MODULES}


def room_imports():
    graph = {}
    for module, targets in file_imports().items():
        rooms = {room_of(target) for target in targets} - {room_of(module)}
        graph.setdefault(room_of(module), set()).update(rooms)
    return graph


def untyped_functions():
    """`file:line name` of each function without all its types; Triton's kernels have none."""
    found = []
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            arguments += [more for more in (node.args.vararg, node.args.kwarg) if more]
            arguments = [argument for argument in arguments if argument.arg not in ("self", "cls")]
            returns = node.returns is not None or (node.name == "__init__" and bool(arguments))
            if not returns or not all(argument.annotation for argument in arguments):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    return found


def missing_names(text):
    """Documents, files and modules of ours that a text names and that do not exist."""
    documents = {"/" + str(path.relative_to(ROOT)) for path in DOCUMENTS}
    named = re.findall(r"\b[\w/-]+\.md\b", text)
    missing = [name for name in named if not any(document.endswith(f"/{name}") for document in documents)]
    files = re.findall(r"(?<![\w/])(?:configs|docs|tests|rto_fast|kernels|benchmarks)/[\w/]+\.\w+\b", text)
    missing += [name for name in files if not (ROOT / name).exists() and "NAME" not in name]
    folders = {module.rpartition(".")[0] for module in MODULES}
    for name in set(re.findall(r"(?<!ops\.)\brto_fast(?:\.[a-z]\w*)+(?!-)\b", text)) - NO_MODULES - folders:
        module, attribute = name, ""
        while module not in MODULES:
            module, _, attribute = module.rpartition(".")
        if attribute and not re.search(rf"\b{attribute}\b", MODULES[module].read_text()):
            missing.append(name)
    return missing


def main():
    print("circles between files", circles(file_imports()))
    print("circles between folders", circles(room_imports()))
    print("functions without all types", len(untyped_functions()))
    for path in [*source_files(*FOLDERS), *DOCUMENTS]:
        for name in missing_names(path.read_text()):
            print(f"{path.relative_to(ROOT)} names {name}, which does not exist")


if __name__ == "__main__":
    main()
