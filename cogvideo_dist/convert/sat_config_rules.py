"""What is known of SAT's keys that need no computing: class names, values that are built in here, keys without effect.

Read from THUDM/CogVideo (``sat/``, v1.0 and 2025-05) and from SwissArmyTransformer 0.4.12. Patterns are those of ``fnmatch``.
The names of classes are compared as text and are never imported.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from cogvideo_dist.convert.sat_config_keys import Keys, as_number, shown

DENOISER = "model.denoiser_config.params"
NETWORK = "model.network_config.params"
TEXT = "model.conditioner_config.params.emb_models.0"
STAGE1 = "model.first_stage_config.params"
LOSS = "model.loss_fn_config.params"
SIGMA = f"{LOSS}.sigma_sampler_config.params"
SAMPLER = "model.sampler_config.params"
DISCRETIZATIONS = tuple(f"{section}.discretization_config" for section in (SIGMA, DENOISER, SAMPLER))

_SGM, _VAE, _DIT = "sgm.modules.diffusionmodules", "vae_modules", "dit_video_concat"

CLASSES: dict[str, dict[str, str]] = {
    "model.target": {"diffusion_video.SATVideoDiffusionEngine": "launch/train_dit.py takes its place"},
    "model.network_wrapper": {f"{_SGM}.wrappers.OpenAIWrapper": "SAT's default, a wrapper that adds nothing"},
    "model.denoiser_config.target": {f"{_SGM}.denoiser.DiscreteDenoiser": "a thousand timesteps, as here"},
    f"{DENOISER}.weighting_config.target": {
        f"{_SGM}.denoiser_weighting.EpsWeighting": "SAT's video loss never asks it: the squared error of v, as here"
    },
    f"{DENOISER}.scaling_config.target": {
        f"{_SGM}.denoiser_scaling.VideoScaling": "prediction of v, the only one here"
    },
    "*.discretization_config.target": {
        f"{_SGM}.discretizer.ZeroSNRDDPMDiscretization": "the schedule with zero terminal SNR, the only one here"
    },
    "model.network_config.target": {f"{_DIT}.DiffusionTransformer": "the transformer of model.preset"},
    f"{NETWORK}.modules.patch_embed_config.target": {f"{_DIT}.ImagePatchEmbeddingMixin": "part of the transformer"},
    f"{NETWORK}.modules.adaln_layer_config.target": {f"{_DIT}.AdaLNMixin": "part of the transformer"},
    f"{NETWORK}.modules.final_layer_config.target": {f"{_DIT}.FinalLayerMixin": "part of the transformer"},
    "model.conditioner_config.target": {"sgm.modules.GeneralConditioner": "T5 is the only condition, as here"},
    f"{TEXT}.target": {"sgm.modules.encoders.modules.FrozenT5Embedder": "frozen.text is a T5 encoder"},
    "model.first_stage_config.target": {
        f"{_VAE}.autoencoder.VideoAutoencoderInferenceWrapper": "frozen.vae is this autoencoder"
    },
    f"{STAGE1}.loss_config.target": {"torch.nn.Identity": "the autoencoder is frozen, so its loss is not needed"},
    f"{STAGE1}.regularizer_config.target": {
        f"{_VAE}.regularizers.DiagonalGaussianRegularizer": "the posterior is sampled, as here",
        "sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer": "the posterior is sampled, as here",
    },
    f"{STAGE1}.encoder_config.target": {f"{_VAE}.cp_enc_dec.ContextParallelEncoder3D": "part of the autoencoder"},
    f"{STAGE1}.decoder_config.target": {f"{_VAE}.cp_enc_dec.ContextParallelDecoder3D": "part of the autoencoder"},
    "model.loss_fn_config.target": {f"{_SGM}.loss.VideoDiffusionLoss": "the squared error of v, the only loss here"},
    f"{LOSS}.sigma_sampler_config.target": {f"{_SGM}.sigma_sampling.DiscreteSampling": "drawn by diffusion.timesteps"},
}
"""Key -> class -> what stands in its place here. Classes that choose something are in the modules that translate them."""

_SIZES_OF_VAE = "as in the released autoencoder; its sizes lie in frozen.vae's config.json"
_BUILT_IN = "built in here"

BUILT_IN: dict[str, tuple[tuple[Any, ...], str]] = {
    f"{DENOISER}.num_idx": ((1000,), _BUILT_IN),
    f"{DENOISER}.quantize_c_noise": ((False,), "timesteps are whole numbers here"),
    "*.discretization_config.params.linear_start": ((0.00085,), _BUILT_IN),
    "*.discretization_config.params.linear_end": ((0.012,), _BUILT_IN),
    "*.discretization_config.params.num_timesteps": ((1000,), _BUILT_IN),
    "*.discretization_config.params.keep_start": ((False,), _BUILT_IN),
    "*.discretization_config.params.post_shift": ((False,), _BUILT_IN),
    f"{NETWORK}.elementwise_affine": ((True,), _BUILT_IN),
    f"{NETWORK}.input_time": (("adaln",), _BUILT_IN),
    f"{NETWORK}.time_compressed_rate": ((4,), "the autoencoder's, built in here"),
    f"{NETWORK}.use_SwiGLU": ((False,), _BUILT_IN),
    f"{NETWORK}.use_RMSNorm": ((False,), _BUILT_IN),
    f"{NETWORK}.num_classes": ((None,), "there are no classes"),
    f"{NETWORK}.time_interpolation": ((1.0,), _BUILT_IN),
    f"{NETWORK}.transformer_args.layernorm_order": (("pre",), _BUILT_IN),
    f"{NETWORK}.transformer_args.is_decoder": ((False,), _BUILT_IN),
    f"{NETWORK}.transformer_args.hidden_dropout": ((0,), "there is no dropout in the transformer"),
    f"{NETWORK}.transformer_args.attention_dropout": ((0,), "there is no dropout in the transformer"),
    f"{NETWORK}.modules.pos_embed_config.params.theta": ((10000,), _BUILT_IN),
    f"{NETWORK}.modules.pos_embed_config.params.rot_v": ((False,), _BUILT_IN),
    f"{NETWORK}.modules.pos_embed_config.params.time_interpolation": ((1.0,), _BUILT_IN),
    f"{NETWORK}.modules.adaln_layer_config.params.qk_ln": ((True,), _BUILT_IN),
    f"{TEXT}.is_trainable": ((False,), "text encoders are always frozen"),
    f"{TEXT}.input_key": (("txt",), "captions come from the shards"),
    f"{STAGE1}.*coder_config.params.double_z": ((True,), _SIZES_OF_VAE),
    f"{STAGE1}.*coder_config.params.z_channels": ((16,), _SIZES_OF_VAE),
    f"{STAGE1}.*coder_config.params.in_channels": ((3,), _SIZES_OF_VAE),
    f"{STAGE1}.*coder_config.params.out_ch": ((3,), _SIZES_OF_VAE),
    f"{STAGE1}.*coder_config.params.ch": ((128,), _SIZES_OF_VAE),
    f"{STAGE1}.*coder_config.params.ch_mult": (([1, 2, 2, 4],), _SIZES_OF_VAE),
    f"{STAGE1}.*coder_config.params.attn_resolutions": (([],), _SIZES_OF_VAE),
    f"{STAGE1}.*coder_config.params.num_res_blocks": ((3,), _SIZES_OF_VAE),
    f"{STAGE1}.*coder_config.params.dropout": ((0.0,), _SIZES_OF_VAE),
    f"{LOSS}.fixed_frames": ((0,), "every frame is predicted"),
    f"{LOSS}.offset_noise_level": ((0,), "noise has no offset"),
    f"{LOSS}.type": (("l2",), _BUILT_IN),
    f"{LOSS}.min_snr_value": ((None,), "every timestep weighs alike"),
    f"{LOSS}.batch2model_keys": ((None, []), "the model takes no further inputs"),
    f"{SIGMA}.num_idx": ((1000,), _BUILT_IN),
    f"{SAMPLER}.fixed_frames": ((0,), "every frame is sampled"),
    f"{SAMPLER}.guider_config.params.exp": ((5,), "of guidance_kind: dynamic"),
    "args.profiling": ((-1,), "nothing is profiled"),
    "args.latent_channels": ((16,), "the autoencoder's"),
    "model.compile_model": ((False,), "nothing is compiled"),
    "model.use_pd": ((False,), "nothing is distilled"),
    "model.lr_scale": ((None,), "there is no low-resolution condition"),
    "deepspeed.fp16.loss_scale": ((0,), "the loss scale of fp16 is dynamic"),
}
"""Key -> (values that mean what is computed here, why). Any other value has no counterpart."""

_DERIVED = "engine/zero.py derives DeepSpeed's configuration"
_TOP_LEVEL = "DeepSpeed reads it inside fp16 alone, so at the top level it has no effect"
_RNG = "random numbers follow from run.seed, the step and the sample; there is no state to load"
_NOT_READ = "SAT does not read it"

NO_EFFECT: dict[str, str] = {
    "model.disable_first_stage_autocast": "the autoencoder runs in float32",
    "model.log_keys": "captions are logged with every sampled video",
    "model.no_cond_log": _NOT_READ,
    "model.input_key": "clips come from the shards",
    "model.augmentation_dropout": _NOT_READ,
    "model.lora_train": _NOT_READ,
    "model.noised_image_*": "the model has no image condition",
    "model.en_and_decode_n_samples_a_time": "clips of one size are encoded together; frozen.vae_tiling saves memory",
    f"{NETWORK}.adm_in_channels": "SAT reads it for classes alone",
    f"{NETWORK}.parallel_output": "there is no vocabulary",
    f"{NETWORK}.dtype": "train.precision says it, as SAT's own value does",
    f"{NETWORK}.transformer_args.vocab_size": "there is no vocabulary",
    f"{NETWORK}.transformer_args.max_sequence_length": "SAT deletes this table of positions",
    f"{NETWORK}.transformer_args.skip_init": "weights are drawn once from run.seed, or read",
    f"{NETWORK}.transformer_args.use_gpu_initialization": "weights are drawn once from run.seed, or read",
    f"{NETWORK}.transformer_args.checkpoint_num_layers": "recomputation is by layer",
    f"{NETWORK}.modules.pos_embed_config.params.hidden_size": "follows from heads and head_dim",
    f"{NETWORK}.modules.lora_config.params.cross_attention": "there is no cross-attention",
    f"{NETWORK}.modules.lora_config.params.layer_num": "every block has adapters",
    f"{TEXT}.legacy_ucg_value": "a dropped caption is all zeros",
    f"{TEXT}.params.cache_dir": "nothing is downloaded; frozen.text is a folder",
    f"{TEXT}.params.device": "the launcher decides",
    f"{TEXT}.params.freeze": "text encoders are always frozen",
    f"{STAGE1}.ignore_keys": "launch/convert.py lists what it leaves out of a file of SAT",
    f"{STAGE1}.*coder_config.params.resolution": "nothing depends on it without attention",
    f"{STAGE1}.*coder_config.params.gather_norm": "frozen.vae_semantics: whole has the statistics of the whole clip, as SAT "
    "has on one rank; over several ranks they are merged from sums",
    f"{STAGE1}.*coder_config.params.pad_mode": "causal convolutions repeat the first frame",
    f"{SIGMA}.group_num": "strata belong to the clips of a step, not to ranks: any number of GPUs works, none has to divide",
    f"{SIGMA}.do_append_zero": _BUILT_IN,
    f"{SIGMA}.flip": _BUILT_IN,
    f"{SAMPLER}.verbose": "there is a progress bar",
    f"{SAMPLER}.device": "the launcher decides",
    "args.no_load_rng": _RNG,
    "args.no_save_rng": _RNG,
    "args.force_train": "weights are read strictly: one that is missing is an error",
    "args.force_inference": "weights are read strictly: one that is missing is an error",
    "args.force_pretrain": "weights are read strictly: one that is missing is an error",
    "args.only_log_video_latents": "validation.samples_every writes mp4 files; it is 0 until validation.prompts are given",
    "args.log_image": "validation.samples_every writes pictures",
    "args.split": "SAT reads it only where it has no valid_data; data.held_out says how many clips are set aside",
    "args.strict_eval": "all of data.held_out is evaluated",
    "args.resume_dataloader": "a run always goes on with the clip that would have come",
    "args.wandb*": "metrics go to TensorBoard and log.jsonl",
    "args.checkpoint_num_layers": "recomputation is by layer",
    "args.prefetch_factor": "data.memory_gb bounds what is read ahead",
    "args.batch_from_same_dataset": "every source has its share of the draws, to within one clip",
    "args.iterable_dataset*": "shards are read by index",
    "args.block_size": "shards are read by index",
    "args.summary_dir": "TensorBoard files lie in run.dir",
    "args.save_args": "the resolved configuration lies in run.dir",
    "args.distributed_backend": "the device decides",
    "args.local_rank": "the launcher decides",
    "args.device": "the launcher decides",
    "args.deepspeed": "always",
    "args.debug": "it only prints",
    "args.zero_stage": "SAT reads it only where there is no deepspeed section",
    "args.input_type": "launch/sample.py takes --prompt and --prompts-file",
    "args.image2video": "model.preset says it",
    "args.batch_size": "deepspeed.train_micro_batch_size_per_gpu overrides it; launch/sample.py makes one video a prompt",
    "args.gradient_accumulation_steps": "the deepspeed section overrides it, in SAT too",
    "args.only_save_latents": "launch/sample.py writes mp4 files",
    "args.final_size": _NOT_READ,
    "args.grid_num_rows": _NOT_READ,
    "data.params.nshards": "the index lists the shards",
    "data.params.seed": "run.seed",
    "data.params.shuffle_buffer": "data.window: shards whose samples are shuffled together, without a buffer",
    "deepspeed.steps_per_print": "log.every",
    "deepspeed.zero_allow_untested_optimizer": _DERIVED,
    "deepspeed.zero_force_ds_cpu_optimizer": _DERIVED,
    "deepspeed.zero_optimization.*": _DERIVED,
    "deepspeed.loss_scale": _TOP_LEVEL,
    "deepspeed.loss_scale_window": _TOP_LEVEL,
    "deepspeed.hysteresis": _TOP_LEVEL,
    "deepspeed.min_loss_scale": _TOP_LEVEL,
    "deepspeed.initial_scale_power": _TOP_LEVEL,
    "deepspeed.fp16.*": "DeepSpeed's defaults of the dynamic loss scale hold",
    "deepspeed.optimizer.params.bias_correction": "AdamW corrects its moments",
    "deepspeed.optimizer.params.adam_w_mode": "weight decay is decoupled",
    "deepspeed.optimizer.params.set_grad_none": _DERIVED,
    "deepspeed.activation_checkpointing.*": "SAT recomputes by its own checkpoint_activations; here train.recompute",
    "deepspeed.wall_clock_breakdown": "log.jsonl has the times",
    "deepspeed.dump_state": _DERIVED,
    "deepspeed.gradient_predivide_factor": "gradients are sums",
    "deepspeed.prescale_gradients": "gradients are sums",
}
"""Key -> why it may be dropped, whatever its value."""

ADVICE: dict[str, str] = {
    f"{TEXT}.ucg_keys": "only captions are dropped, by diffusion.text_dropout",
    "model.conditioner_config.params.emb_models.[1-9]*": "T5 is the only condition here; remove the others",
    f"{NETWORK}.modules.lora_config.params.qlora": "base weights are not quantised in training; train.zero_stage 3 and "
    "train.offload save memory",
    f"{NETWORK}.modules.lora_config.params.layer_range": "every block has adapters",
    f"{NETWORK}.transformer_args.checkpoint_skip_layers": "train.recompute acts on all layers; all_but_attention is cheaper",
    "args.epochs": "give train.steps: epochs x clips / clips in a step",
    "args.checkpoint_skip_layers": "train.recompute acts on all layers; all_but_attention is cheaper",
    "args.exit_interval": "give train.steps; the same command with more steps goes on",
    "args.test_data": "evaluate a finished run with launch/evaluate.py",
    "args.sdedit": "launch/sample.py --video",
    "args.lcm_steps": "there is no sampler of consistency models",
    "args.input_dir": "launch/sample.py --prompts-file",
    "data.params.meta_names": "data_tools/index_shards.py --score NAME=json:FIELD, then score and top_share of a source",
    "data.params.include_dirs": "list the folders as data.sources, with weights",
    "data.params.txt_key": "data_tools/index_shards.py --caption json:FIELD",
    "data.params.path": "data.shards",
    "deepspeed.scheduler.*": "train.schedule: constant or cosine",
    "deepspeed.train_batch_size": "data.packs_per_step x clips in a pack is the batch",
    "deepspeed.optimizer.params.amsgrad": "AdamW has no such variant here",
    "deepspeed.optimizer.params.use_num_upates": "the average always warms up",
}
"""Key -> what to do about it, for keys that this command reads but cannot translate."""

UNKNOWN_CLASS = "no known class; its name was read as text and nothing was imported. What it does has to be set by hand"
UNKNOWN = "not known here; if your SAT code reads it, set what corresponds by hand"
UNKNOWN_ARGUMENT = "not known here; SAT too ignores a key of args that its command line lacks"
UNREAD_SECTION = "SAT reads the sections args, model, data and deepspeed alone"


def settle_by_rules(keys: Keys) -> None:
    """Account for every key that the translation has left open."""
    for path in keys.open():
        value = keys.leaves[path]
        meaning = (_find(CLASSES, path) or {}).get(value) if isinstance(value, str) else None
        built_in = _find(BUILT_IN, path)
        if meaning is not None:
            keys.drop(path, meaning)
        elif built_in is not None and any(_same(value, own) for own in built_in[0]):
            keys.drop(path, built_in[1])
        elif built_in is not None:
            keys.lack(path, f"only {shown(built_in[0][0])} is computed here")
        elif (why := _find(NO_EFFECT, path)) is not None:
            keys.drop(path, why)
        elif (advice := _find(ADVICE, path)) is not None:
            keys.lack(path, advice)
        else:
            _settle_unknown(keys, path)


def _settle_unknown(keys: Keys, path: str) -> None:
    first, last = path.partition(".")[0], path.rpartition(".")[2]
    if last in ("target", "network_wrapper") or path == "deepspeed.optimizer.type":
        keys.lack(path, UNKNOWN_CLASS)
    elif first not in ("args", "model", "data", "deepspeed"):
        keys.drop(path, UNREAD_SECTION)
    else:
        keys.lack(path, UNKNOWN_ARGUMENT if first == "args" else UNKNOWN)


def _find(table: dict[str, Any], path: str) -> Any:
    return next((value for pattern, value in table.items() if fnmatchcase(path, pattern)), None)


def _same(found: Any, expected: Any) -> bool:
    """Whether they mean the same to SAT's reader, for which 1e-3 and a word None are a number and a word."""
    if isinstance(expected, (bool, type(None), list)):
        return type(found) is type(expected) and bool(found == expected)
    if isinstance(expected, str):
        return bool(found == expected)
    return as_number(found) == expected
