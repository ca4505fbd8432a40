"""The import rules of CONTRIBUTING.md, checked on the syntax tree of every file of the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "openblip"

# The longest prefix that fits decides.
LAYERS = {
    0: ["config", "captions", "data.samples", "data.sources", "data.sinks", "data.tar",
        "data.caption_files", "data.caption_rows", "data.remote", "data.rows", "data.shards",
        "data.tables", "data.writers"],
    1: ["tokenizer", "images", "augment", "models", "losses", "generation", "generation_batch",
        "kernels"],
    2: ["data", "training", "page", "page_charts", "checkpoint", "convert", "hub", "hub_card",
        "inference",
        "answering", "backend", "batching", "labels", "results", "words",
        "onnx_backend", "onnx_export", "onnx_parts",
        "convert_official", "convert_transformers", "convert_vocabulary", "convert_weights"],
    3: ["evaluation", "search", "explain", "bench", "bench_peer", "bench_chart"],
    4: ["pretrain", "finetune", "capfilt", "quickstart"],
    5: ["cli", "cli_bench", "cli_capfilt", "cli_caption", "cli_evaluate", "cli_explain",
        "cli_export", "cli_hub", "cli_options", "cli_output", "cli_search", "cli_serve",
        "cli_stages", "cli_vqa", "serve", "__main__"],
}  # fmt: skip
LAYER_OF = {prefix: layer for layer, prefixes in LAYERS.items() for prefix in prefixes}
CALL_OTHER_STAGES = {"capfilt.bootstrap", "quickstart"}

TEXT_AND_BYTES_LIBRARIES = {"pydantic", "pydantic_core", "yaml", "pyarrow", "fsspec"}
PROCESSES_AND_CLOCK = {
    "asyncio", "concurrent", "datetime", "multiprocessing", "shutil", "socket", "subprocess",
    "tempfile", "threading", "time", "urllib",
}  # fmt: skip
TORCH_DISTRIBUTED_OWNERS = {
    "torch.distributed": {"training.distributed", "training.parallel"},
    "torch.distributed.checkpoint": {"training.state"},
}
ORACLES = {"transformers", "pycocoevalcap", "webdataset"}
COMPARED_WITH = {("bench_peer", "transformers")}


def package_files() -> dict[str, Path]:
    """Return module name without `openblip.` -> file; a package is named without `__init__`."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((LAYER_OF[prefix] for prefix in prefixes if prefix in LAYER_OF), None)


def stage_of(module: str) -> str:
    """Return what counts as one stage: a file of finetune, all of capfilt, any other whole."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "finetune" else parts[0]


def imported(module: str, is_package: bool, tree: ast.AST, known: set[str]) -> set[str]:
    """Return the absolute names that a file imports, wherever the import stands."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["openblip", *(module.split(".") if module else [])]
                up = node.level - is_package
                base = ".".join([*here[: len(here) - up], *([base] if base else [])])
            for alias in node.names:
                if base == "openblip" and alias.name == "__version__":
                    continue  # the surface owns the version
                full = f"{base}.{alias.name}"
                is_module = full.removeprefix("openblip.") in known
                names.add(full if is_module or base.startswith("torch") else base)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")
    return names


def violations(module: str, is_package: bool, source: str, known: set[str]) -> list[str]:
    """Return one sentence per broken rule in one file of the package."""
    tree = ast.parse(source)
    if is_package:
        return [f"{module}/__init__.py must be empty"] if tree.body else []
    own_layer = layer_of(module)
    if own_layer is None:
        return [f"{module} has no layer; give it one in {Path(__file__).name}"]
    found = []
    for name in sorted(imported(module, is_package, tree, known)):
        top = name.partition(".")[0]
        if top == "openblip":
            other = name.removeprefix("openblip").removeprefix(".")
            if not other:
                found.append(
                    f"{module} imports the package's surface; import the file that owns it"
                )
                continue
            other_layer = layer_of(other)
            if other_layer is None or other_layer > own_layer:
                found.append(f"{module} (layer {own_layer}) imports {other} (layer {other_layer})")
            elif (
                own_layer == other_layer == 4
                and stage_of(module) != stage_of(other)
                and module not in CALL_OTHER_STAGES
            ):
                found.append(f"stage {module} imports another stage, {other}")
            continue
        if top in ORACLES and (module, top) not in COMPARED_WITH:
            found.append(f"{module} imports {top}, which only tests and benchmarks may")
        if top == "importlib":
            found.append(f"{module} imports by string; only the top __init__.py may")
        if own_layer == 0 and top not in sys.stdlib_module_names | TEXT_AND_BYTES_LIBRARIES:
            found.append(f"{module} (layer 0) imports {top}")
        if own_layer == 1 and top in PROCESSES_AND_CLOCK:
            found.append(f"{module} (layer 1) imports {top}")
        owners = [
            who
            for library, who in TORCH_DISTRIBUTED_OWNERS.items()
            if name == library or name.startswith(library + ".")
        ]
        if owners and module not in owners[-1]:
            found.append(f"{module} imports {name}; {' or '.join(sorted(owners[-1]))} may")
    return found


def test_the_package_keeps_its_import_layers():
    files = package_files()
    assert files
    found = [
        violation
        for module, path in files.items()
        if module
        for violation in violations(
            module, path.name == "__init__.py", path.read_text(encoding="utf-8"), set(files)
        )
    ]
    assert not found, "\n".join(found)


def test_files_stay_small():
    long = {
        name: count
        for name, path in package_files().items()
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long


def test_files_of_the_page_stay_small():
    files = list((PACKAGE / "serve" / "page").iterdir())
    assert files
    assert not [f.name for f in files if len(f.read_text(encoding="utf-8").splitlines()) > 400]


KNOWN = {"models", "models.text", "models.blip", "training", "training.loop", "pretrain",
         "finetune", "finetune.captioning", "capfilt", "capfilt.filter", "cli"}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("losses", "import openblip.training.loop", "imports training.loop"),
        ("losses", "from openblip.training import loop", "imports training.loop"),
        ("losses", "from openblip import cli", "imports cli"),
        ("models.text", "from ..training.loop import fit", "imports training.loop"),
        ("losses", "def f():\n    from openblip import pretrain", "imports pretrain"),
        ("pretrain", "from openblip.finetune.captioning import run", "another stage"),
        ("finetune.retrieval", "from . import captioning", "another stage"),
        ("captions", "import torch", "layer 0"),
        ("captions", "import numpy as np", "layer 0"),
        ("generation", "import time", "layer 1"),
        ("generation", "from concurrent.futures import Future", "layer 1"),
        ("convert", "from transformers import BlipModel", "only tests"),
        ("cli", "from importlib import import_module", "by string"),
        ("training.loop", "from torch import distributed", "training.parallel may"),
        ("training.loop", "import torch\ntorch.distributed.barrier()", "training.parallel may"),
        ("hub", "import torch.distributed.checkpoint", "training.state may"),
        ("losses", "from openblip import Blip", "package's surface"),
        ("novelty", "", "has no layer"),
    ],
)
def test_a_planted_violation_is_found(module, source, expected):
    found = violations(module, False, source, KNOWN)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pretrain", "from openblip.training.loop import fit\nfrom torch import nn"),
        ("models.blip", "from .text import Med\nfrom openblip.models import text"),
        ("capfilt.shard", "from openblip.capfilt.filter import judge"),
        ("capfilt.bootstrap", "from openblip.finetune import captioning"),
        ("quickstart", "from openblip.pretrain import pretrain"),
        ("cli", "import time\nfrom openblip.quickstart import run"),
        ("training.distributed", "import torch.distributed as dist"),
        ("training.state", "import torch.distributed.checkpoint as dcp"),
        ("config", "import json\nimport yaml\nfrom pydantic import BaseModel"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert violations(module, False, source, KNOWN) == []


def test_code_in_an_init_file_is_found():
    assert violations("models", True, "from openblip.models.text import Med", KNOWN)
    assert violations("models", True, "", KNOWN) == []


def test_importing_the_package_loads_no_torch():
    check = (
        "import sys, openblip; assert openblip.__version__; "
        "assert 'torch' not in sys.modules; assert 'Blip' in dir(openblip); "
        "assert openblip.Blip.__module__ == 'openblip.models.blip'"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=PACKAGE.parent)


def test_an_unknown_public_name_is_an_attribute_error():
    import openblip

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = openblip.nothing
