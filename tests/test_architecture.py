"""The rules of the house, read off the sources: who imports whom, how long things are, and what runs with torch alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "cogvideo_dist"
SOURCES = sorted(
    path for folder in (PACKAGE, "launch", "data_tools", "bench") for path in (ROOT / folder).rglob("*.py")
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MAY_IMPORT = {
    "rng": set(),
    "protocols": {"config", "pack"},
    "config": {"models.presets"},  # the table of released sizes, plain numbers without torch
    "parallel": {"rng", "config"},
    "pack": {"parallel", "rng"},
    "models": {"pack", "parallel", "rng", "config", "protocols"},
    "diffusion": {"rng"},
    "data": {"pack", "config", "rng", "protocols"},
    "evaluation": {"config", "rng"},
    "tasks": {"rng", "protocols", "config", "parallel", "pack", "models", "diffusion", "data", "evaluation"},
    "engine": {"rng", "protocols", "config", "parallel", "evaluation"},
    "convert": {"rng", "config", "parallel", "pack", "models", "diffusion"},
}
"""Package -> what else of ours it may import, itself aside. ``launch`` composes everything."""

BELONGS = {
    "torch.distributed": (
        "cogvideo_dist/parallel/",
        "bench/parallel_block.py",
        "bench/saving.py",
    ),  # which compare with its own
    "deepspeed": ("cogvideo_dist/engine/", "bench/parallel.py"),  # which compares with its Ulysses
    # The demo and verified releases compare with it, benchmarks are against it.
    "diffusers": ("launch/demo.py", "launch/release_proof.py", "launch/release_lora.py", "bench/"),
    "lpips": ("cogvideo_dist/models/perceptual.py",),
}
"""Module -> the only places that import it."""

POSITIONAL = {
    "Adapted.widen": "a layer's operands, as its linear takes them",
    "Block.forward": "a layer's operands, as its neighbours take them",
    "Embedding.forward": "vision, text and where they are",
    "Head.forward": "a layer's operands, as its neighbours take them",
    "left_of": "a collective's two operands and its axis, as all others have theirs",
    "fold_affine": "the operands of a formula, in its order",
    "norm_affine": "the operands of a formula, in its order",
    "normed_heads": "the operands of a formula, in its order",
    "Block.__init__": "the model's three arguments, as its constructor has them",
    "upload": "what, by which file system and to where",
    "write_tensors": "a file, what lies in it and the values",
    "public_sample.look": "as diffusers calls it",
    "SequenceShard.attend": "q, k, v, as everywhere",
    "ring_attend_backward": "the operands of a backward, in the order of every back end's",
    "cut": "of what, from where to where, as a slice",
    "full_shape": "whose, which and its value, as setattr takes them",
    "own_slice": "like full_shape",
    "joined_whole": "like full_shape",
    "unpatchify": "the inverse of patchify, whose arguments are a tensor, a shape and a patch",
    "to_foreign": "what, by which table, into which of its columns",
    "DataError.__init__": "an exception is pickled by its arguments in place",
    "write_mp4": "where, what and how fast, as every writer of videos has it",
    "thumbnails": "like write_mp4",
    "DiT.denoise": "the call of a public pipeline: latents, text and timestep, then the conditions of other variants",
}
"""Functions with more than two parameters by place, and why. In-file helpers (_name) may have four."""

LINES_OF_FILE, LINES_OF_FUNCTION, PARAMETERS, IN_PLACE, IN_PLACE_IN_FILE = 500, 60, 7, 2, 4


FORBIDDEN = ("torch.save", "torch.load", "pickle.load", "pickle.loads", "torch.manual_seed", "eval", "exec")


SAT = ("cogvideo_dist/convert/sat.py", "cogvideo_dist/convert/sat_dit.py")
"""SAT's files are pickles; here alone torch.save writes them."""

TENSORS_ALONE = ("cogvideo_dist/models/perceptual.py", "cogvideo_dist/convert/pickle_reader.py")
"""Classifiers are published as .pth, and so are the heads of LPIPS; SAT's and DeepSpeed's files are opened by a process of
their own. Here alone such files are read, with weights_only=True."""


def excused(path: Path, call: ast.AST) -> bool:
    """transformers draws from the global generator, so the demo's text encoder seeds it; benchmarks seed foreign models."""
    if name_of(path) in TENSORS_ALONE and isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load":
        return any(keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in call.keywords)
    if name_of(path) in SAT:
        return isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.save"
    return name_of(path) == "data_tools/make_demo_text.py" or name_of(path).startswith("bench/")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module or module.name, line) of every import, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(
    tree: ast.AST, owner: str = "", bases: tuple[str, ...] = ()
) -> Iterator[tuple[str, Function, tuple[str, ...]]]:
    """(qualified name, definition, names of the class's bases)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{node.name}.", tuple(ast.unparse(base) for base in node.bases))
        elif isinstance(node, Function):
            yield f"{owner}{node.name}", node, bases
            yield from functions(node, f"{owner}{node.name}.")
        else:
            yield from functions(node, owner, bases)


def test_no_import_points_upward() -> None:
    wrong = []
    for path in (ROOT / PACKAGE).rglob("*.py"):
        own = path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for module, line in imports(parsed(path)):
            if within(module, "launch") or within(module, "data_tools") or within(module, "tests"):
                wrong.append(f"{name_of(path)}:{line}: {module}")
            if within(module, PACKAGE):
                inner = module.removeprefix(f"{PACKAGE}.")
                if not any(within(inner, allowed) for allowed in MAY_IMPORT[own] | {own}):
                    wrong.append(f"{name_of(path)}:{line}: {own} imports {inner}")
    assert not wrong


def test_each_foreign_machine_has_one_door() -> None:
    wrong = [
        f"{name_of(path)}:{line}: {module}"
        for path in SOURCES
        for module, line in imports(parsed(path))
        for machine, places in BELONGS.items()
        if within(module, machine) and not name_of(path).startswith(places)
    ]
    assert not wrong


def test_torch_distributed_is_not_reached_through_torch() -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in SOURCES
        if not name_of(path).startswith(BELONGS["torch.distributed"])
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
    ]
    assert not wrong


def test_the_environment_is_read_in_launch_alone() -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in SOURCES
        if not name_of(path).startswith(("launch/", "bench/"))  # benchmarks start processes with threads of their own
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv")
    ]
    assert not wrong


def test_no_global_no_pickle_no_bare_except_no_print_in_the_library() -> None:
    wrong = []
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            named = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            bare = isinstance(node, ast.ExceptHandler) and node.type is None
            library = name_of(path).startswith(PACKAGE) and (named == "print" or isinstance(node, ast.Assert))
            if isinstance(node, ast.Global) or bare or library or (named in FORBIDDEN and not excused(path, node)):
                wrong.append(f"{name_of(path)}:{node.lineno}: {ast.unparse(node).splitlines()[0]}")
    assert not wrong


def test_files_and_functions_are_short() -> None:
    wrong = []
    for path in SOURCES + TESTS:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LINES_OF_FILE:
            wrong.append(f"{name_of(path)}: {lines} lines")
        for name, node, _ in functions(parsed(path)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LINES_OF_FUNCTION:
                wrong.append(f"{name_of(path)}:{node.lineno}: {name} has {length} lines")
    assert not wrong


def test_functions_take_few_parameters_and_name_them() -> None:
    wrong = []
    for path in (path for path in SOURCES if not name_of(path).startswith("bench/")):
        for name, node, bases in functions(parsed(path)):
            if any(base.endswith("Function") for base in bases) and node.name in ("forward", "backward"):
                continue  # autograd hands its arguments over by place
            place = [arg.arg for arg in node.args.posonlyargs + node.args.args if arg.arg not in ("self", "cls")]
            count = len(place) + len(node.args.kwonlyargs)
            if count > PARAMETERS:
                wrong.append(f"{name_of(path)}:{node.lineno}: {name} takes {count} parameters")
            private = any(part.startswith("_") and part != "__init__" for part in name.split("."))
            if len(place) > (IN_PLACE_IN_FILE if private else IN_PLACE) and name not in POSITIONAL:
                wrong.append(f"{name_of(path)}:{node.lineno}: {name} takes {len(place)} parameters by place")
    assert not wrong


def test_everything_is_annotated_and_nothing_is_left_to_do() -> None:
    wrong = []
    for path in SOURCES + TESTS:
        tree = parsed(path)
        if len(tree.body) > 2 and "annotations" not in {module.split(".")[-1] for module, _ in imports(tree)}:
            wrong.append(f"{name_of(path)}: lacks from __future__ import annotations")
        for name, node, _ in functions(tree):
            if path in TESTS and "." in name:
                continue
            unnamed = [arg.arg for arg in node.args.args + node.args.kwonlyargs if arg.annotation is None]
            if node.returns is None or set(unnamed) - {"self", "cls", "ctx"}:
                wrong.append(f"{name_of(path)}:{node.lineno}: {name} is not annotated")
        for mark in ("TO" + "DO", "FIX" + "ME", "XX" + "X"):
            if mark in path.read_text(encoding="utf-8"):
                wrong.append(f"{name_of(path)}: {mark}")
    assert not wrong


def test_every_folder_of_modules_is_a_package() -> None:
    """setup.py finds packages by their __init__.py; an installation lacks a folder without one."""
    folders = {path.parent for top in (PACKAGE, "launch", "data_tools") for path in (ROOT / top).rglob("*.py")}
    assert not [name_of(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()]


def test_models_and_samplers_need_torch_alone() -> None:
    blocked = ("deepspeed", "webdataset", "transformers", "lpips", "diffusers", "pydantic", "av", "PIL", "yaml", "tqdm",
               "safetensors", "sentencepiece", "tensorboard", "skimage", "torchvision")  # fmt: skip
    names = ("dit", "vae", "presets", "init", "text", "critic", "perceptual", "adversarial")
    models = ", ".join(f"cogvideo_dist.models.{name}" for name in names)
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import {models}, cogvideo_dist.diffusion.samplers"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
