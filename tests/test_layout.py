"""The tree has rooms: folders on floors, imports downwards only, no cycles, and every folder is part of the package."""

import ast
from collections import defaultdict
from pathlib import Path

from setuptools import find_packages

import nanochat

ROOT = Path(nanochat.__file__).parents[1]
FLOORS = (
    "system",
    "files",
    "hardware",
    "runtime",
    "modality",
    "config",
    "model",
    "data",
    "gpt optim",
    "decoding upstream",
    "engine checkpoint_files checkpoint_manager",
    "training",
    "evaluation",
    "audio",
    "adapters data_pipeline",
    "conversion",
)
MOST_AT_THE_TOP = 11  # modules of nanochat/ beside its folders
SCREEN = 70  # lines of a function
LOOP = "base_train"  # the training loop, which other stages share


def modules(package: str) -> dict[str, Path]:
    """name -> file of all modules below a package, named from there."""
    files = (ROOT / package).rglob("*.py")
    return {".".join(f.relative_to(ROOT / package).with_suffix("").parts): f for f in files if f.name != "__init__.py"}


def imports(package: str) -> dict[str, set[str]]:
    """module -> the modules of the same package that it imports, inside functions too."""
    known = modules(package)
    found = defaultdict(set)
    for name, file in known.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            wanted = []
            if isinstance(node, ast.ImportFrom) and node.module:
                wanted = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            parts = (one.removeprefix(f"{package}.") for one in wanted if one.startswith(f"{package}."))
            found[name] |= known.keys() & set(parts)
    return found


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """A chain of imports that ends where it began; [] without one."""
    done: set[str] = set()

    def follow(name: str, chain: list[str]) -> list[str]:
        if name in chain:
            return chain[chain.index(name) :]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if cycle := follow(other, [*chain, name]):
                return cycle
        done.add(name)
        return []

    return next((cycle for name in sorted(graph) if (cycle := follow(name, []))), [])


def test_no_module_imports_itself_by_way_of_others():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert find_cycle(imports("nanochat")) == []
    assert find_cycle(imports("scripts")) == []


def test_imports_go_down_the_floors():
    """Each folder, and each module at the top, has a floor. Red when data/ imports from audio/, for example."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
    graph = imports("nanochat")
    rooms = {name.split(".")[0] for name in modules("nanochat")}
    assert rooms == floor.keys()
    upward = [
        (name, other)
        for name, others in graph.items()
        for other in others
        if floor[other.split(".")[0]] > floor[name.split(".")[0]]
    ]
    assert upward == []


def test_few_modules_are_at_the_top():
    assert sum("." not in name for name in modules("nanochat")) <= MOST_AT_THE_TOP


def test_user_commands_import_no_other_script():
    """But for the training loop; nothing in nanochat/ imports a script. Red with `from scripts.summary import ...`."""
    graph = imports("scripts")
    assert {name: graph[name] - {LOOP} for name in graph if "." not in name and graph[name] - {LOOP}} == {}
    texts = {name: file.read_text(encoding="utf-8") for name, file in modules("nanochat").items()}
    assert [name for name, text in texts.items() if "\nfrom scripts" in text or "\nimport scripts" in text] == []


def test_every_folder_is_part_of_the_package():
    """What is installed without -e has all modules. Red when a folder has no __init__.py."""
    packages = set(find_packages(str(ROOT), include=["nanochat*", "scripts*"]))
    folders = {file.parent for package in ("nanochat", "scripts") for file in (ROOT / package).rglob("*.py")}
    assert packages == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_functions_fit_a_screen():
    """Red when a function of nanochat/ or scripts/ has more than 70 lines."""
    long = [
        f"{package}/{name}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for package in ("nanochat", "scripts")
        for name, file in modules(package).items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= SCREEN
    ]
    assert long == []
