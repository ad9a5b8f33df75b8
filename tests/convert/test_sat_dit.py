"""Transformers in checkpoints of SAT, against tables of its names: there and back bit by bit, for every release, cut or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cogvideo_dist.config.adaptation import Adapter
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert.sat_dit import load_dit, save_dit
from cogvideo_dist.convert.sat_dit_config import config_of as detected
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.lora import adapt, merge
from cogvideo_dist.models.presets import RELEASED, DiTConfig, tiny
from tests.convert import sat_writer
from tests.convert.sat_files import PRESETS
from tests.convert.sat_writer import KINDS, PREFIX, Sizes, sizes_of, to_diffusers

QKV, DENSE = "transformer.layers.1.attention.query_key_value", "transformer.layers.1.attention.dense"


def config_of(kind: str) -> DiTConfig:
    """Tiny, with heads that divide over ranks."""
    return replace(tiny(PRESETS[kind]), heads=4)


def weights_of(sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return sat_writer.drawn(sat_writer.shapes_of(sizes), dtype)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def public(model: DiT, folder: Path) -> dict[str, Tensor]:
    """Under the names of diffusers."""
    hf.save_transformer(model, folder)
    return load_file(folder / hf.WEIGHTS)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_bitwise_for_every_release_and_number_of_ranks(kind: str, n: int, tmp_path: Path) -> None:
    sizes = sizes_of(kind)
    weights, unused = weights_of(sizes), sat_writer.unused_of(sizes, torch.bfloat16)
    sat_writer.write(tmp_path / "theirs", weights | unused, n=n)
    found = load_dit(tmp_path / "theirs", config=config_of(kind))
    same(public(found.model, tmp_path / "public"), to_diffusers(weights))
    for ranks in (1, 2, 4):
        save_dit(found.model, tmp_path / f"{ranks}", tp=ranks, iteration=7)
        again, files = sat_writer.read(tmp_path / f"{ranks}", ranks)
        same(again, weights | unused)
        assert files == [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(ranks)]
        assert (tmp_path / f"{ranks}" / "latest").read_text() == "7"
        size = sum((tmp_path / f"{ranks}" / "7" / file).stat().st_size for file in files)
        assert size < ranks * 2 * (
            sum(t.nbytes for t in (weights | unused).values()) / 2 + 60_000
        )  # slices, not wholes


def test_weights_keep_their_dtype_or_get_the_one_that_is_asked_for(tmp_path: Path) -> None:
    sizes = sizes_of("5b")
    weights = weights_of(sizes, torch.float32)
    sat_writer.write(tmp_path / "theirs", weights)
    model = load_dit(tmp_path / "theirs", config=config_of("5b")).model
    save_dit(model, tmp_path / "ours", dtype=torch.float16)
    again, _ = sat_writer.read(tmp_path / "ours", 1)
    assert all(torch.equal(again[name], tensor.half()) for name, tensor in weights.items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_the_release_is_told_from_the_shapes(kind: str, tmp_path: Path) -> None:
    sizes = sizes_of(kind, heads=3)
    sat_writer.write(tmp_path, weights_of(sizes) | sat_writer.unused_of(sizes, torch.bfloat16))
    assert load_dit(tmp_path).model.config == tiny(PRESETS[kind])
    released = RELEASED[PRESETS[kind]]
    real = Sizes(
        kind, released.layers, released.heads, released.head_dim, released.time_embed_dim, released.text_dim,
        released.text_length, released.out_channels, released.sample_grid, released.spatial_interpolation,
    )  # fmt: skip
    shapes = sat_writer.shapes_of(real)
    table = {"mixins.pos_embed.pos_embedding": (1, 17776, 1920)} if kind == "2b" else {}
    assert detected(shapes | table, "shapes") == released
    deeper = sat_writer.shapes_of(replace(real, layers=50)) | table
    assert detected(deeper, "shapes") == replace(released, layers=50)


def test_what_a_fine_tuned_checkpoint_has_beside_is_left_out_and_counted(tmp_path: Path) -> None:
    sizes = sizes_of("5b")
    weights = weights_of(sizes)
    extra = {
        "first_stage_model.encoder.conv_in.conv.weight": torch.zeros(3),
        "conditioner.embedders.0.transformer.shared.weight": torch.zeros(3),
        "conditioner.embedders.0.positions": torch.arange(3),
    }
    unused = sat_writer.unused_of(sizes, torch.bfloat16)
    sat_writer.write(tmp_path, weights | unused, extra=extra, fine_tuned=True, n=2)
    found = load_dit(tmp_path, config=config_of("5b"))
    same(public(found.model, tmp_path / "public"), to_diffusers(weights))
    assert found.prefix == PREFIX and found.left_out == {
        "first_stage_model": 1, "conditioner": 2, f"{PREFIX}transformer.position_embeddings.weight": 1,
    }  # fmt: skip
    assert "no float32 masters" in found.notes[0]


def test_an_iteration_or_a_file_can_be_given_and_of_two_transformers_one_is_chosen(tmp_path: Path) -> None:
    weights = weights_of(sizes_of("5b"))
    folder = sat_writer.write(tmp_path, weights, prefix="", tag="1000-ema", extra={
        f"ema.{name}": -tensor for name, tensor in weights.items()
    })  # fmt: skip
    config = config_of("5b")
    for path in (tmp_path, folder, folder / "mp_rank_00_model_states.pt"):
        with pytest.raises(ValueError, match='2 transformers in it, under the prefixes "" and "ema."; choose'):
            load_dit(path, config=config)
        for prefix, sign in (("", 1), ("ema.", -1)):
            found = load_dit(path, config=config, prefix=prefix)
            assert torch.equal(found.model.head.proj.bias, sign * weights["mixins.final_layer.linear.bias"])
            assert sum(found.left_out.values()) == len(weights)
    with pytest.raises(ValueError, match='no transformer under the prefix "x."; it is under'):
        load_dit(folder, config=config, prefix="x.")


@pytest.mark.parametrize("alpha", [1.0, 8.0])
@pytest.mark.parametrize("n", [1, 2])
def test_adapters_are_merged_as_sat_computes_them(n: int, alpha: float, tmp_path: Path) -> None:
    sizes, r = sizes_of("5b"), 3
    weights = weights_of(sizes, torch.float64)
    adapted = sat_writer.with_lora(weights, sizes, r, torch.float64)
    sat_writer.write(tmp_path, adapted, n=n)
    found = load_dit(tmp_path, config=config_of("5b"), alpha=alpha)
    for linear, parts in ((QKV, 3), (DENSE, 1)):
        updates = [adapted[f"{linear}.matrix_B.{i}"] @ adapted[f"{linear}.matrix_A.{i}"] for i in range(parts)]
        weights[f"{linear}.weight"] = weights[f"{linear}.weight"] + alpha / r * torch.cat(updates)
    mine, expected = public(found.model, tmp_path / "public"), to_diffusers(weights)
    assert mine.keys() == expected.keys()
    for name in expected:
        if "blocks.1" in name:
            torch.testing.assert_close(mine[name], expected[name], rtol=1e-12, atol=1e-12)
    assert len(found.notes) == n - 1 and all("does not sum" in note for note in found.notes)


@pytest.mark.parametrize("n", [1, 2])
def test_adapters_can_be_kept_and_go_back_as_they_were(n: int, tmp_path: Path) -> None:
    sizes, r, config = sizes_of("1.5-5b-i2v"), 4, config_of("1.5-5b-i2v")
    adapted = sat_writer.with_lora(weights_of(sizes, torch.float32), sizes, r, torch.float32)
    sat_writer.write(tmp_path / "theirs", adapted, n=n)
    model = load_dit(tmp_path / "theirs", config=config, adapters="keep").model
    low = model.blocks[1].lora["v"]
    assert low.adapter == Adapter(r, 1.0) and not model.head.proj.weight.requires_grad and low.a.requires_grad
    assert torch.equal(low.a, adapted[f"{QKV}.matrix_A.2"]) and torch.equal(low.b, adapted[f"{QKV}.matrix_B.2"])
    save_dit(model, tmp_path / "ours")
    again, _ = sat_writer.read(tmp_path / "ours", 1)
    same(again, adapted | sat_writer.unused_of(sizes, torch.float32))
    merge(model)
    merged = load_dit(tmp_path / "theirs", config=config).model
    for (name, tensor), other in zip(model.named_parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-6, atol=1e-6, msg=name)


def test_alpha_goes_into_what_sat_reads(tmp_path: Path) -> None:
    config = config_of("5b")
    sat_writer.write(tmp_path / "base", weights_of(sizes_of("5b"), torch.float32))
    model = load_dit(tmp_path / "base", config=config).model
    adapt(model, dict.fromkeys("qkv", Adapter(4, 8.0)) | {"out": Adapter(4, 8.0)})
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    save_dit(model, tmp_path / "ours")
    again, _ = sat_writer.read(tmp_path / "ours", 1)
    assert torch.equal(again[f"{QKV}.matrix_B.1"], 8 * model.blocks[1].lora["k"].b)
    read = load_dit(tmp_path / "ours", config=config).model
    merge(model)
    for (name, tensor), other in zip(model.named_parameters(), read.parameters(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("adapters", "tp", "message"),
    [
        ({"q": Adapter(4, 4.0)}, 1, r"SAT's adapters are on q, k, v and out .* this model's are on q \(rank 4\)"),
        ({**dict.fromkeys("qkv", Adapter(4, 4.0)), "out": Adapter(2, 4.0)}, 1, "of one rank"),
        (
            {**dict.fromkeys("qkv", Adapter(4, 4.0)), "out": Adapter(4, 4.0)},
            2,
            "does not sum the adapter of attention.dense",
        ),
        ({}, 3, "4 heads do not divide over 3"),
        ({}, 0, "4 heads do not divide over 0"),
    ],
)
def test_what_sat_cannot_hold_is_refused(adapters: dict[str, Adapter], tp: int, message: str, tmp_path: Path) -> None:
    sat_writer.write(tmp_path / "base", weights_of(sizes_of("5b")))
    model = load_dit(tmp_path / "base", config=config_of("5b")).model
    adapt(model, adapters)
    with pytest.raises(ValueError, match=message):
        save_dit(model, tmp_path / "out", tp=tp)
    assert not (tmp_path / "out").exists()


def test_an_iteration_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    sat_writer.write(tmp_path / "base", weights_of(sizes_of("5b")))
    model = load_dit(tmp_path / "base", config=config_of("5b")).model
    with pytest.raises(ValueError, match="base/1000 is there already"):
        save_dit(model, tmp_path / "base", iteration=1000)
    save_dit(model, tmp_path / "base", iteration=1001)
    assert (tmp_path / "base" / "latest").read_text() == "1001"
    with pytest.raises(ValueError, match="iteration 0: SAT reads only iterations from 1 on"):
        save_dit(model, tmp_path / "base", iteration=0)


NORM, POSITIONS = "mixins.adaln_layer.query_layernorm_list.0.weight", "mixins.pos_embed.pos_embedding"


def change(folder: Path, rank: int, edit: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / f"mp_rank_{rank:02d}_model_states.pt"
    content = torch.load(file, weights_only=True)
    edit(content["module"])
    torch.save(content, file)


def test_copies_that_have_drifted_apart_are_refused_or_averaged(tmp_path: Path) -> None:
    weights = weights_of(sizes_of("5b"), torch.float32)
    folder = sat_writer.write(tmp_path, weights, n=2)
    change(folder, 1, lambda module: module[PREFIX + NORM].add_(0.5))
    with pytest.raises(
        ValueError, match=rf"1000: {PREFIX}{NORM} should be alike in all 2 ranks .* up to 5.0e-01, .*--average"
    ):
        load_dit(tmp_path, config=config_of("5b"))
    found = load_dit(tmp_path, config=config_of("5b"), average=True).model
    torch.testing.assert_close(found.blocks[0].norm_q.weight, weights[NORM] + 0.25)


Edit = Callable[[dict[str, Tensor]], object]


def put(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Edit:
    return lambda module: module.update({PREFIX + name: torch.zeros(shape, dtype=dtype)})


def drop(name: str) -> Edit:
    return lambda module: module.pop(PREFIX + name)


@pytest.mark.parametrize(
    ("rank", "edit", "message"),
    [
        (
            0,
            drop(NORM),
            "01_model_states.pt holds .*query_layernorm_list.0.weight, which mp_rank_00_model_states.pt lacks",
        ),
        (1, drop(NORM), rf"01_model_states.pt: tensor {PREFIX}{NORM} is missing"),
        (1, put(NORM, 3), r"01_model_states.pt: .* is of shape \(3,\), but of shape \(16,\) in mp_rank_00"),
        (None, drop(NORM), "lacks tensor mixins.adaln_layer.query_layernorm_list.0.weight"),
        (None, put("extra.weight", 3), "has the unknown tensor extra.weight"),
        (None, put(NORM, 3), rf"tensor {NORM} has shape \(3,\), expected \(16,\)"),
        (None, put(NORM, 16, dtype=torch.int32), f"{NORM} is no dense tensor of real"),
        (None, lambda module: module.update({7: torch.zeros(3)}), "holds something under 7, which is no name"),
        (None, drop("mixins.final_layer.linear.weight"), "no transformer in it, as no name ends in"),
        (None, put(f"{QKV}.original.weight", 96, 64), "original.weight and the same without original"),
        (None, put(f"{QKV}.matrix_A.0", 2, 64), "lacks tensor .*matrix_A.1, beside others"),
        (None, put("time_embed.0.matrix_A.0", 2, 64), "an adapter on time_embed.0; SAT's are on"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(rank: int | None, edit: Edit, message: str, tmp_path: Path) -> None:
    folder = sat_writer.write(tmp_path, weights_of(sizes_of("5b")), n=2)
    for each in (0, 1) if rank is None else (rank,):
        change(folder, each, edit)
    with pytest.raises(ValueError, match=message) as refusal:
        load_dit(tmp_path, config=config_of("5b"))
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_adapters_of_other_shapes_or_on_some_blocks_are_named(tmp_path: Path) -> None:
    sizes = sizes_of("5b")
    adapted = sat_writer.with_lora(weights_of(sizes), sizes, 3, torch.bfloat16)
    folder = sat_writer.write(tmp_path, adapted)
    change(folder, 0, lambda module: module.update({f"{PREFIX}{DENSE}.matrix_B.0": torch.zeros(64, 2)}))
    with pytest.raises(ValueError, match=r"dense.matrix_B.0 has shape \(64, 2\), expected \(64, 3\)"):
        load_dit(tmp_path, config=config_of("5b"))
    for name in ("matrix_A.0", "matrix_B.0"):
        change(folder, 0, lambda module, name=name: module.pop(f"{PREFIX}{DENSE}.{name}"))
    with pytest.raises(
        ValueError, match=r"attention.dense has no adapter, .* in some of the 2 layers; have them merged"
    ):
        load_dit(tmp_path, config=config_of("5b"), adapters="keep")
    load_dit(tmp_path, config=config_of("5b"))


def test_another_model_is_refused_by_its_first_differing_shape(tmp_path: Path) -> None:
    sat_writer.write(tmp_path, weights_of(sizes_of("5b")))
    with pytest.raises(
        ValueError, match=r"patch_embed.proj.weight has shape \(64, 4, 2, 2\), expected \(64, 8, 2, 2\), for a"
    ):
        load_dit(tmp_path, config=replace(config_of("5b"), in_channels=8))
    with pytest.raises(ValueError, match=r"has the unknown tensors .* and 13 more, for a .*--preset"):
        load_dit(tmp_path, config=replace(config_of("5b"), layers=1))


def test_fixed_positions_must_be_those_that_are_computed(tmp_path: Path) -> None:
    sizes = sizes_of("2b")
    folder = sat_writer.write(tmp_path, weights_of(sizes) | sat_writer.unused_of(sizes, torch.bfloat16))
    with pytest.raises(
        ValueError, match=r"pos_embedding .* does not hold the sines and cosines of 6 tokens .*--preset"
    ):
        load_dit(tmp_path, config=replace(config_of("2b"), spatial_interpolation=1.0))
    with pytest.raises(ValueError, match=r"pos_embedding \(1, 198, 64\) does not hold"):
        load_dit(tmp_path, config=replace(config_of("2b"), sample_width=8))
    change(folder, 0, lambda module: module.pop(PREFIX + POSITIONS))
    assert load_dit(tmp_path, config=config_of("2b")).model.config.positions == "sincos"


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            1,
            "1000 has the files of 1 model-parallel ranks, but its tensors are cut in 2: expected .*mp_rank_01_model_states.pt",
        ),
        (0, "1000 lacks mp_rank_00_model_states.pt, one rank of 2"),
    ],
)
def test_a_missing_rank_is_named(lost: int, message: str, tmp_path: Path) -> None:
    folder = sat_writer.write(tmp_path, weights_of(sizes_of("5b")), n=2)
    (folder / f"mp_rank_{lost:02d}_model_states.pt").unlink()
    with pytest.raises(ValueError, match=message):
        load_dit(tmp_path, config=config_of("5b"))


@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_rank_is_named(cut: bool, tmp_path: Path) -> None:
    folder = sat_writer.write(tmp_path, weights_of(sizes_of("5b")), n=2)
    file = folder / "mp_rank_01_model_states.pt"
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole[: len(whole) // 2] if cut else whole)
    with pytest.raises(
        ValueError, match=r"mp_rank_01_model_states.pt: damaged, or no file of torch \(.*\); get it again"
    ):
        load_dit(tmp_path, config=config_of("5b"))


@pytest.mark.parametrize("latest", ["../other", "..", ".", "", "/etc", "1000\n../x", "a b", "\xff"])
def test_latest_names_a_folder_beside_it_and_nothing_else(latest: str, tmp_path: Path) -> None:
    sat_writer.write(tmp_path / "real", weights_of(sizes_of("5b")))
    (tmp_path / "real" / "latest").write_bytes(latest.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latest: holds .*, which names no folder beside it; write the iteration"):
        load_dit(tmp_path / "real")


def test_folders_that_hold_no_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds neither latest nor a mp_rank_00_model_states.pt"):
        load_dit(tmp_path)
    (tmp_path / "latest").write_text("1000\n")
    with pytest.raises(
        ValueError, match="latest names 1000, but there is no .*1000; write the iteration that is there"
    ):
        load_dit(tmp_path)
    with pytest.raises(ValueError, match="absent: no such folder"):
        load_dit(tmp_path / "absent")
