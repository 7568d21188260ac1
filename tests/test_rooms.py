"""Which room may import which. Imports point one way, from programs down to the ground; the model files stand alone.

`ROOMS` is the drawing of `docs/design.md`, from the ground up: a file imports from its own room and from rooms above it
in this list, never from one below. A new room or a new package is a decision, and a decision changes both.
"""

import ast
import functools
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "internvl_mpo"
EVERYWHERE = {"tqdm", "yaml"}  # progress bars and settings files
# room -> the packages of others that its files may import, from the ground up
ROOMS = {
    "errors": set(),
    "programs": set(),
    "locks": set(),
    "files": {"pyarrow"},
    "jsonl": set(),
    "html_page": {"jinja2"},
    "row_keys": set(),
    "pictures": {"PIL", "modeling_internvl_mpo"},
    "pack_plan": set(),
    "settings": set(),
    "records": set(),
    "text_checks": set(),
    "formats": set(),
    "stages": set(),
    "prompts": set(),
    "packing": {"torch"},
    "token_weights": set(),
    "preference_terms": {"torch"},
    "objective": {"torch"},
    "steps": {"numpy"},
    "kernels": {"torch", "transformers", "flash_attn"},
    "families": {"torch", "transformers", "PIL", "modeling_internvl_mpo"},
    "logps": {"torch"},
    "encoding": {"PIL", "modeling_internvl_mpo"},
    "word_tokens": set(),
    "measuring": set(),
    "answers": set(),
    "pairing": set(),
    "judged_pairs": set(),
    "engines": {"torch", "transformers", "modeling_internvl_mpo", "PIL", "jinja2", "pyarrow", "ray", "uvicorn", "vllm"},
    "benchmarks": {"PIL", "datasets", "evaluate", "gradio"},
    "evaluation": {"huggingface_hub"},
    "mmpr": {"PIL", "datasets", "fsspec", "huggingface_hub", "matplotlib", "numpy", "pyarrow", "transformers"},
    "publish": {
        *("PIL", "datasets", "huggingface_hub", "matplotlib", "modeling_internvl_mpo", "peft", "pyarrow"),
        *("safetensors", "torch", "transformers"),
    },
    "training": {
        *(
            "accelerate",
            "bitsandbytes",
            "deepspeed",
            "liger_kernel",
            "modeling_internvl_mpo",
            "numpy",
            "pandas",
            "peft",
        ),
        *("psutil", "pyarrow", "safetensors", "torch", "transformers"),
    },
    "mini": {"PIL", "matplotlib", "modeling_internvl_mpo", "numpy", "sklearn", "tokenizers", "torch", "transformers"},
    "demo": {
        "PIL",
        "gradio",
        "httpx",
        "huggingface_hub",
        "modeling_internvl_mpo",
        "peft",
        "starlette",
        "torch",
        "transformers",
    },
    "launch": {"psutil", "torch"},
    "convert": {"huggingface_hub", "modeling_internvl_mpo", "safetensors", "torch", "transformers"},
    "likelihood_gap": {"torch"},
    "memory_estimate": {"modeling_internvl_mpo", "torch", "transformers"},
    "replay": {"modeling_internvl_mpo", "peft", "torch", "transformers"},
    "rounds": {"matplotlib"},
    "quickstart": set(),
    "ablation": {"matplotlib", "numpy"},
    "__main__": set(),
}
# room -> rooms it never imports although they lie below it
STRANGERS = {
    "benchmarks": {"engines"},  # a scorer never knows which model answered
    "engines": {"pairing", "steps", "logps", "objective"},  # who answers knows nothing of pairs and training
    "families": {"steps", "kernels", "objective"},  # a family knows nothing of losses and attention back ends
    "publish": {"steps", "logps", "objective", "kernels"},
    "training": {"publish", "benchmarks", "evaluation", "engines", "pairing", "answers"},
    "demo": {"training", "publish", "mmpr", "logps", "objective"},
}
# packages that only these files of a room may import, so that the others can be used without them
CONFINED = {
    "gradio": {"demo/page.py", "demo/runs_tab.py", "demo/widgets.py", "benchmarks/metric.py"},
    "evaluate": {"benchmarks/evaluate_metric.py"},
    "ray": {"engines/ray_engine.py"},
    "uvicorn": {"engines/http_limits.py", "engines/serve.py"},
    "vllm": {"engines/vllm_engine.py"},
    "deepspeed": {"training/distributed.py", "training/policy.py"},
}
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def name_of(path: Path) -> str:
    """`answers/dates.py` for a file of the package."""
    return str(path.relative_to(ROOT / PACKAGE))


def room_of(name: str) -> str:
    """The room of a file or of a dotted module name: `answers` for `internvl_mpo.answers.dates`."""
    return re.split(r"[./]", name.removeprefix(f"{PACKAGE}."))[0]


@functools.cache
def imports(path: Path) -> set[str]:
    """Dotted names of modules a file imports anywhere; `if TYPE_CHECKING` counts, relative imports do not."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if is_module(name) else node.module for name in full}
    return names


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.startswith(f"{PACKAGE}.")}


def others(path: Path) -> set[str]:
    tops = {name.split(".")[0] for name in imports(path)}
    return {top for top in tops if top not in sys.stdlib_module_names and top != PACKAGE}


def test_every_file_lies_in_a_room():
    assert {room_of(name_of(path)) for path in FILES} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_from_its_own_room_and_from_rooms_below(path):
    room = room_of(name_of(path))
    if room == "__init__":
        assert not ours(path)
        return
    order = list(ROOMS)
    allowed = set(order[: order.index(room) + 1]) - STRANGERS.get(room, set())
    assert not {name for name in ours(path) if room_of(name) not in allowed}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_the_packages_of_its_room(path):
    room = room_of(name_of(path))
    packages = others(path) - EVERYWHERE
    assert packages <= ROOMS.get(room, set())
    assert not {package for package in packages if name_of(path) not in CONFINED.get(package, {name_of(path)})}


def test_what_a_room_offers_is_there():
    """`from .. import *` of a name that is not there fails, and nothing else notices."""
    num_offered = 0
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
        offered = [node.value for node in assigned if ast.unparse(node.targets[0]) == "__all__"]
        names = {alias.asname or alias.name for node in tree.body for alias in getattr(node, "names", ())}
        names |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert {name for node in offered for name in ast.literal_eval(node)} <= names, path
        num_offered += len(offered)
    assert num_offered > 2


def test_no_circle_of_imports():
    graph = {".".join((PACKAGE, *path.relative_to(ROOT / PACKAGE).with_suffix("").parts)): path for path in FILES}
    graph = {name.removesuffix(".__init__"): ours(path) for name, path in graph.items()}
    # a room's front page names its files, and its files do not need the page
    waiting = {name: {other for other in needs if not name.startswith(other)} for name, needs in graph.items()}
    while free := [name for name, needs in waiting.items() if not needs & set(waiting)]:
        for name in free:
            del waiting[name]
    assert not waiting, f"these import each other in a circle: {sorted(waiting)}"


# what a clean interpreter must not load together with these modules; the packages of a room's own are found above
LOADED = {
    "records prompts pairing answers.comparing text_checks settings jsonl engines engines.journal": (
        "torch transformers numpy pyarrow PIL datasets"
    ),
    "packing objective preference_terms kernels.scoring_head": "transformers pyarrow PIL datasets",
    "mmpr.reading mmpr.check mmpr.convert benchmarks evaluation.report engines.http_engine": (
        "torch transformers pyarrow datasets matplotlib"
    ),
}


@pytest.mark.parametrize("modules", LOADED)
def test_a_light_module_loads_nothing_heavy_not_even_through_others(modules):
    names = ", ".join(f"{PACKAGE}.{name}" for name in modules.split())
    code = f"import sys, {names}; print(*set({LOADED[modules].split()}) & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert not ran.stdout.split()


def test_programs_do_not_import_each_other_and_nothing_imports_a_program():
    programs = {path.stem: path for path in [*ROOT.glob("*.py"), *(ROOT / "dataset_scripts").glob("*.py")]}
    programs.pop("setup")
    for path in [*FILES, *programs.values()]:
        assert not {name.split(".")[0] for name in imports(path)} & (set(programs) | {"dataset_scripts"}), path


def test_data_scripts_load_no_trainer():
    for path in (ROOT / "dataset_scripts").glob("*.py"):
        assert "training" not in {room_of(name) for name in ours(path)}, path


def test_model_files_are_flat_stand_alone_and_use_single_dot_imports():
    folder = ROOT / "modeling_internvl_mpo"
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"]
    for path in folder.glob("*.py"):
        assert others(path) <= {"torch", "transformers", "tokenizers", "PIL", "numpy", "sentencepiece"}, path
        assert not ours(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{path.name}: only siblings travel with a checkpoint"
                assert node.module, f"{path.name}: 'from . import name' is not understood by remote code"


def test_the_drawing_in_the_design_page_names_every_room():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    drawing = re.search(r"```rooms\n(.*?)```", page, re.DOTALL)[1]
    missing = [room for room in ROOMS if not re.search(rf"\b{room}\b", drawing)]
    assert not missing


def test_every_file_the_design_page_points_at_is_there():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)", page))
    assert len(named) > 12
    assert not {name for name in named if not (ROOT / PACKAGE / name).is_file() and not (ROOT / name).is_file()}


# One model file travels with its parameter names; the other ones wait to be cut.
LONG_FILES = {"modeling_internvl_mpo/modeling_internvl_mpo.py"}  # one file, as transformers has its models
MAX_FILE_LINES, MAX_FUNCTION_LINES, MEDIAN_FILE_LINES = 450, 60, 160


def test_files_and_functions_stay_short_enough_to_read_at_once():
    folders = ("internvl_mpo", "modeling_internvl_mpo", "dataset_scripts", "metrics", "bench", "tests")
    paths = [*ROOT.glob("*.py"), *(path for name in folders for path in (ROOT / name).rglob("*.py"))]
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert not {name for name, lines in sizes.items() if lines > MAX_FILE_LINES} - LONG_FILES
    assert statistics.median(sizes.values()) <= MEDIAN_FILE_LINES
    functions = {f"{path.relative_to(ROOT)}:{name}": lines for path in paths for name, lines in function_lines(path)}
    long = {name for name, lines in functions.items() if lines > MAX_FUNCTION_LINES}
    assert not long


def function_lines(path: Path) -> list[tuple[str, int]]:
    """Name and number of lines of every function, without its docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [
        (node.name, node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node, clean=False) or "").splitlines()))
        for node in functions
    ]


def test_no_file_evaluates_text():
    for path in [*ROOT.glob("*.py"), *FILES, *(ROOT / "dataset_scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path.name}:{node.lineno}"
