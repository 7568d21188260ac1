"""What each room may import. Imports point one way: programs -> method -> nothing of ours; the model files stand alone.

The table is read together with `docs/design.md`; a new import that breaks it is either a mistake or a decision, and a
decision changes both.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLAIN = {"tqdm", "yaml"}  # progress bars and settings files may appear anywhere
METHOD = "internvl_mpo."
# module -> third-party packages and modules of ours it may import
ROOMS = {
    "internvl_mpo/errors.py": set(),
    "internvl_mpo/settings.py": {METHOD + "errors"},
    "internvl_mpo/records.py": {METHOD + "errors"},
    "internvl_mpo/prompts.py": {METHOD + "errors"},
    "internvl_mpo/archives.py": {METHOD + "errors", "numpy"},
    "internvl_mpo/mmpr_files.py": {METHOD + "archives", METHOD + "errors", METHOD + "records", "PIL"},
    "internvl_mpo/mmpr.py": {METHOD + name for name in ("errors", "records", "mmpr_files", "mmpr_parquet")},
    "internvl_mpo/mmpr_statistics.py": {METHOD + "records"},
    "internvl_mpo/mmpr_parquet.py": {METHOD + name for name in ("errors", "records", "mmpr", "mmpr_files")}
    | {"pyarrow", "datasets"},
    "internvl_mpo/mmpr_card.py": {METHOD + name for name in ("records", "mmpr_convert", "mmpr_statistics")}
    | {"matplotlib"},
    "internvl_mpo/contamination.py": {METHOD + "benchmarks", METHOD + "errors", "numpy", "PIL"},
    "internvl_mpo/mini_mmpr.py": {METHOD + "digits", METHOD + "errors", METHOD + "settings"},
    "internvl_mpo/math_equality.py": {METHOD + "errors", "math_verify"},
    "internvl_mpo/answer_wording.py": set(),
    "internvl_mpo/answers.py": {METHOD + "answer_wording", METHOD + "math_equality"},
    "internvl_mpo/pairing.py": {METHOD + "answers", METHOD + "prompts", METHOD + "records"},
    "internvl_mpo/preference_terms.py": {"torch"},
    "internvl_mpo/objective.py": {"torch", METHOD + "preference_terms"},
    "internvl_mpo/packing.py": {"torch"},
    "internvl_mpo/steps.py": {METHOD + "packing"},
    "internvl_mpo/packed_attention.py": {"torch", "transformers", "flash_attn", METHOD + "packing"},
    "internvl_mpo/last_layer.py": {"torch"},
    "internvl_mpo/logps.py": {"torch", METHOD + "last_layer", METHOD + "packing", METHOD + "packed_attention"},
    "internvl_mpo/speed.py": {
        *("torch", "liger_kernel", METHOD + "errors", METHOD + "logps", METHOD + "packed_attention"),
    },
    "internvl_mpo/encoding.py": {"torch", "PIL", METHOD + "packing", METHOD + "records"},
    "internvl_mpo/monitor.py": {"torch", "pandas"}
    | {METHOD + name for name in ("mmpr", "packing", "preference_terms", "records")},
    "internvl_mpo/throughput.py": {"torch", "psutil", METHOD + "last_layer", METHOD + "packing"},
    "internvl_mpo/memory_estimate.py": {
        *("torch", "transformers", "modeling_internvl_mpo"),
        *(METHOD + name for name in ("errors", "logps", "packed_attention", "packing", "policy", "settings", "speed")),
    },
    "internvl_mpo/replay.py": {
        *("torch", "transformers", "peft", "modeling_internvl_mpo"),
        *(METHOD + name for name in ("checkpoint", "encoding", "errors", "logps", "objective", "packing", "records")),
        METHOD + "settings",
    },
    "internvl_mpo/preflight.py": {
        *("pyarrow", METHOD + "encoding", METHOD + "errors", METHOD + "mmpr", METHOD + "packing", METHOD + "records"),
        METHOD + "reference_cache",
    },
    "internvl_mpo/checkpoint.py": {METHOD + "errors", METHOD + "records"},
    "internvl_mpo/live_reference.py": {"torch", "safetensors", METHOD + "errors", METHOD + "logps", METHOD + "packing"},
    "internvl_mpo/policy.py": {
        *("torch", "transformers", "safetensors", "peft", "bitsandbytes", "deepspeed"),
        *(METHOD + "errors", "modeling_internvl_mpo"),
    },
    "internvl_mpo/distributed.py": {"torch", "deepspeed", METHOD + "errors", METHOD + "policy"},
    "internvl_mpo/reference_cache.py": {"torch", "pyarrow", METHOD + "errors", METHOD + "records"},
    "internvl_mpo/publish/hub.py": {"huggingface_hub", METHOD + "errors", METHOD + "publish.faults"},
    "internvl_mpo/publish/faults.py": set(),
    "internvl_mpo/publish/clean_load.py": {"torch", "transformers", "safetensors", "peft"},
    "internvl_mpo/publish/clean_rows.py": {"datasets"},
}
# folder -> packages and modules that no file in it may import
FORBIDDEN = {
    "modeling_internvl_mpo": {"internvl_mpo", "peft", "deepspeed", "datasets", "torchvision", "timm", "einops"},
    "internvl_mpo": {"train_mpo", "evaluate_mpo", "app", "dataset_scripts", "torchvision", "trl"},
    "internvl_mpo/benchmarks": {"internvl_mpo.engines", "internvl_mpo.trainer", "torch", "transformers"},
    "internvl_mpo/publish": {"internvl_mpo.trainer", "internvl_mpo.demo", "gradio", "deepspeed"},
    "internvl_mpo/demo": {"internvl_mpo.trainer", "torchvision", "datasets"},
    "dataset_scripts": {"train_mpo", "evaluate_mpo", "app", "internvl_mpo.trainer"},
}


def imports(path: Path) -> set[str]:
    """Dotted names a file imports anywhere, relative ones left out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return names


def within(name: str, allowed: set[str]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in allowed)


@pytest.mark.parametrize("file", ROOMS)
def test_a_room_imports_only_what_the_table_allows(file):
    allowed = ROOMS[file] | PLAIN
    outside = {
        name
        for name in imports(ROOT / file)
        if name.split(".")[0] not in sys.stdlib_module_names and not within(name, allowed)
    }
    assert not outside


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_folder_never_imports_what_depends_on_it(folder):
    found = {
        (path.name, name)
        for path in (ROOT / folder).rglob("*.py")
        for name in imports(path)
        if within(name, FORBIDDEN[folder])
    }
    assert not found


def test_model_files_are_flat_and_use_single_dot_imports():
    folder = ROOT / "modeling_internvl_mpo"
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"]
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{path.name}: only siblings travel with a checkpoint"
                assert node.module, f"{path.name}: 'from . import name' is not understood by remote code"


def test_no_file_evaluates_text():
    for path in [*ROOT.glob("*.py"), *(ROOT / "internvl_mpo").rglob("*.py"), *(ROOT / "dataset_scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path.name}:{node.lineno}"
