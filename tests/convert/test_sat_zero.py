"""Folders that DeepSpeed itself writes of a SAT model in training: its float32 masters are found, whatever stage and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert.sat_dit import load_dit
from cogvideo_dist.engine.zero import Groups
from cogvideo_dist.parallel.mesh import Layout, ParallelMesh, build_mesh
from tests.convert import sat_writer
from tests.convert.sat_writer import PREFIX, Sizes, sizes_of, to_diffusers
from tests.convert.test_sat_dit import config_of, public, same
from tests.ranks import run_ranks


class Leaf(nn.Module):
    """A parameter or two, read in their own module's forward as stage 3 wants it."""

    def forward(self) -> Tensor:
        return torch.stack(
            [(p.float() * torch.linspace(-1, 1, p.numel()).view(p.shape)).sum() for p in self.parameters()]
        ).sum()


class Tree(nn.Module):
    """Modules in modules that hold tensors under the names of a state."""

    def __init__(self, state: dict[str, Tensor], trained: tuple[str, ...]) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, Leaf())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(tensor.clone(), requires_grad=name.startswith(trained)))

    def forward(self) -> Tensor:
        leaves = [module for module in self.modules() if isinstance(module, Leaf) and module._parameters]
        return torch.stack([leaf() for leaf in leaves]).sum()


EXTRA = {"first_stage_model.encoder.conv_in.conv.weight": (3, 5), "conditioner.embedders.0.positions": (7,)}


def state_of(sizes: Sizes, lora: bool) -> dict[str, Tensor]:
    weights = sat_writer.drawn(sat_writer.shapes_of(sizes), torch.float32)
    if lora:
        weights = sat_writer.with_lora(weights, sizes, 3, torch.float32)
    weights |= sat_writer.unused_of(sizes, torch.float32)
    return {PREFIX + name: tensor for name, tensor in weights.items()} | sat_writer.drawn(EXTRA, torch.float32)


def trained_of(state: dict[str, Tensor], lora: bool) -> tuple[str, ...]:
    """As SAT has it: all of the transformer but its fixed positions, or adapters alone."""
    fixed = ("pos_embedding", "position_embeddings.weight")
    names = [name for name in state if name.startswith(PREFIX) and not name.endswith(fixed)]
    return tuple(name for name in names if not lora or ".matrix_" in name)


def train_and_save(
    mesh: ParallelMesh, folder: str, stage: int, precision: str, lora: bool, tp: int = 1
) -> dict[str, Tensor]:
    """Two steps of AdamW with weight decay on some parameters, and DeepSpeed's own checkpoint; the masters of this rank's
    parameters, by DeepSpeed's own word for them."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    mesh = build_mesh(Layout(dp=mesh.world.size // tp, tp=tp), rank=mesh.world.rank)
    state = state_of(sizes_of("2b"), lora)
    own = {name: sat_writer.part_of(name, whole, mesh.tp.rank, tp) for name, whole in state.items()}
    model = Tree(own, trained_of(state, lora))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for name, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([group for group in groups if group["params"]], lr=0.01),
        mpu=Groups(mesh) if tp > 1 else None,
        config={
            "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": precision == "bf16"},
            "zero_optimization": {
                "stage": stage, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 0, "sub_group_size": 10_000,
                "stage3_prefetch_bucket_size": 0,
            },
        },
    )  # fmt: skip
    for _ in range(2):
        engine.backward(engine() * (1 + mesh.replica.rank))
        engine.step()
    engine.save_checkpoint(folder, tag="1000")
    masters = {name: safe_get_full_fp32_param(p) for name, p in model.named_parameters() if p.requires_grad}
    return {name: tensor.clone() for name, tensor in masters.items() if tensor is not None}


def expected_of(masters: dict[str, Tensor], lora: bool, half: torch.dtype) -> dict[str, Tensor]:
    """The whole state: masters where there are some, else what 16 bits keep of it."""
    state = {name: tensor.to(half).float() for name, tensor in state_of(sizes_of("2b"), lora).items()}
    found = {name.removeprefix(PREFIX): t for name, t in (state | masters).items() if name.startswith(PREFIX)}
    return {name: tensor for name, tensor in found.items() if not name.endswith("pos_embedding")}


@pytest.mark.parametrize(
    ("stage", "world", "precision", "lora"),
    [
        (1, 2, "bf16", False),
        (2, 2, "bf16", False),
        (3, 2, "bf16", False),
        pytest.param(2, 3, "fp32", False, marks=pytest.mark.long),
        pytest.param(1, 3, "fp32", False, marks=pytest.mark.long),
        pytest.param(3, 3, "fp32", False, marks=pytest.mark.long),
        (2, 2, "bf16", True),
        (3, 2, "bf16", True),
    ],
)
def test_masters_are_put_together(stage: int, world: int, precision: str, lora: bool, tmp_path: Path) -> None:
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    masters = run_ranks(train_and_save, world, str(tmp_path), stage, precision, lora)[0]
    state = state_of(sizes_of("2b"), lora)
    assert masters.keys() == set(trained_of(state, lora))
    assert all(not torch.equal(tensor, state[name]) for name, tensor in masters.items())
    found = load_dit(tmp_path, config=config_of("2b"), adapters="keep")
    expected = expected_of(masters, lora, half)
    assert {p.dtype for p in found.model.parameters()} == {torch.float32} and found.notes == []
    base = {name: t for name, t in expected.items() if ".matrix_" not in name}
    factors = {name: t for name, t in expected.items() if ".matrix_" in name}
    for name, parameter in found.model.named_parameters():
        if ".lora." in name:
            _, layer, _, target, kind = name.split(".")
            linear, part = ("dense", 0) if target == "out" else ("query_key_value", "qkv".index(target))
            theirs = f"transformer.layers.{layer}.attention.{linear}.matrix_{kind.upper()}.{part}"
            assert torch.equal(parameter, factors.pop(theirs)), name
    assert not factors
    if not lora:
        same(public(found.model, tmp_path / "public"), to_diffusers(base))
    else:
        weight = base["transformer.layers.1.attention.query_key_value.original.weight"]
        assert torch.equal(found.model.blocks[1].qkv.weight, weight)


@pytest.mark.parametrize("stage", [2, pytest.param(1, marks=pytest.mark.long)])
def test_masters_of_several_model_parallel_ranks_are_put_together(stage: int, tmp_path: Path) -> None:
    ranks = run_ranks(train_and_save, 4, str(tmp_path), stage, "bf16", False, 2)  # row-major over (dp, tp)
    masters = {name: sat_writer.whole_of(name, [ranks[0][name], ranks[1][name]]) for name in ranks[0]}
    found = load_dit(tmp_path, config=config_of("2b"))
    same(public(found.model, tmp_path / "public"), to_diffusers(expected_of(masters, False, torch.bfloat16)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    found = {}
    for stage in (2, 3):
        found[stage] = tmp_path_factory.mktemp(f"stage{stage}")
        run_ranks(train_and_save, 2, str(found[stage]), stage, "bf16", False)
    return found


def copied(folder: Path, to: Path) -> Path:
    (to / "1000").mkdir(parents=True)
    for file in (folder / "1000").iterdir():
        (to / "1000" / file.name).write_bytes(file.read_bytes())
    (to / "latest").write_text("1000")
    return to / "1000"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_or_damaged_part_is_named(stage: int, folders: dict[int, Path], tmp_path: Path) -> None:
    kinds = ("optim", "model") if stage == 3 else ("optim",)
    for number, kind in ((number, kind) for number in (0, 1) for kind in kinds):
        folder = copied(folders[stage], tmp_path / f"{number}{kind}")
        (file,) = folder.glob(f"*zero_pp_rank_{number}_mp_rank_00_{kind}_states.pt")
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match=rf"1000 lacks .*zero_pp_rank_{number}_mp_rank_00_{kind}_states.pt"):
            load_dit(folder.parent, config=config_of("2b"))
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{file.name}: damaged, or no file of torch"):
            load_dit(folder.parent, config=config_of("2b"))


def test_without_masters_the_modules_weights_are_taken_and_that_is_said(
    folders: dict[int, Path], tmp_path: Path
) -> None:
    folder = copied(folders[2], tmp_path / "stage2")
    whole = load_dit(folder, config=config_of("2b"))
    for file in folder.glob("*optim_states.pt"):
        file.unlink()
    found = load_dit(folder, config=config_of("2b"))
    assert "has no float32 masters" in found.notes[0]
    for (name, tensor), master in zip(found.model.named_parameters(), whole.model.parameters(), strict=True):
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, master.bfloat16()), name
    folder = copied(folders[3], tmp_path / "stage3")
    for file in folder.glob("*optim_states.pt"):
        file.unlink()
    with pytest.raises(
        ValueError, match=r"stage 3 keeps no weights in .*; the \*_optim_states.pt with them are missing"
    ):
        load_dit(folder, config=config_of("2b"))


def changed(file: Path, edit: Any) -> None:
    """A file of DeepSpeed with something else in it."""
    content = torch.load(file, weights_only=False)
    edit(content)
    torch.save(content, file)


@pytest.mark.parametrize(
    ("stage", "edit", "message"),
    [
        (2, lambda c: c.pop("optimizer_state_dict"), 'no dictionary "optimizer_state_dict"'),
        (2, lambda c: c["optimizer_state_dict"].pop("zero_stage"), "says neither its ZeRO stage"),
        (2, lambda c: c["optimizer_state_dict"].update(partition_count=4), "lacks .*zero_pp_rank_2.* divided over 4 files"),
        (2, lambda c: c["optimizer_state_dict"].update(single_partition_of_fp32_groups=3), "no list of flat tensors"),
        (2, lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"].pop(), "different numbers of groups"),
        (
            2,
            lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"].__setitem__(0, torch.zeros(5)),
            "group 0 has .* elements in all files, but its parameters have",
        ),
        (3, lambda c: c["optimizer_state_dict"].update(fp32_flat_groups=[torch.zeros(5)] * 99), "different numbers of groups"),
    ],
)  # fmt: skip
def test_files_that_do_not_belong_together_are_refused(
    stage: int, edit: Any, message: str, folders: dict[int, Path], tmp_path: Path
) -> None:
    folder = copied(folders[stage], tmp_path)
    (file,) = folder.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt")
    changed(file, edit)
    with pytest.raises(ValueError, match=message) as refusal:
        load_dit(tmp_path, config=config_of("2b"))
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_parameters_that_the_model_file_does_not_describe_are_refused(folders: dict[int, Path], tmp_path: Path) -> None:
    for stage, name, key, message in (
        (2, "mp_rank_00_model_states.pt", "param_shapes", "param_shapes does not say which parameters"),
        (
            3,
            "*zero_pp_rank_1_mp_rank_00_model_states.pt",
            "frozen_param_fragments",
            "frozen_param_fragments lacks .* in one",
        ),
    ):
        folder = copied(folders[stage], tmp_path / f"{stage}")
        (file,) = folder.glob(name)
        changed(file, lambda content, key=key: content.pop(key))
        with pytest.raises(ValueError, match=message):
            load_dit(folder, config=config_of("2b"))


def test_a_zero_folder_becomes_a_folder_of_diffusers(folders: dict[int, Path], tmp_path: Path) -> None:
    model = load_dit(folders[3], config=config_of("2b")).model
    hf.save_transformer(model, tmp_path / "public")
    assert hf.load_transformer(tmp_path / "public").config == model.config
