"""SAT's configuration files with the released keys and values: a model's, and those of fine-tuning and sampling."""

from __future__ import annotations

from pathlib import Path

KINDS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")

PRESETS = {
    "2b": "cogvideox-2b", "5b": "cogvideox-5b", "5b-i2v": "cogvideox-5b-i2v", "1.5-5b": "cogvideox1.5-5b",
    "1.5-5b-i2v": "cogvideox1.5-5b-i2v",
}  # fmt: skip

COMMAND_LINE = """
    base model_parallel_size force_pretrain device debug log_image output_dir input_dir input_type input_file final_size sdedit
    grid_num_rows force_inference lcm_steps sampling_image_size sampling_num_frames sampling_fps only_save_latents
    only_log_video_latents latent_channels image2video experiment_name train_iters batch_size lr mode seed zero_stage
    checkpoint_activations checkpoint_num_layers checkpoint_skip_layers fp16 bf16 gradient_accumulation_steps profiling epochs
    log_interval summary_dir save_args lr_decay_iters lr_decay_style lr_decay_ratio warmup weight_decay save load force_train
    save_interval no_save_rng no_load_rng resume_dataloader distributed_backend local_rank exit_interval wandb
    wandb_project_name eval_batch_size eval_iters eval_interval strict_eval train_data train_data_weights iterable_dataset
    iterable_dataset_eval batch_from_same_dataset valid_data test_data split num_workers block_size prefetch_factor deepspeed
"""
"""What SAT's command line has for video, which a file may hold under args."""

MODEL = """\
model:
  scale_factor: {scale}
  disable_first_stage_autocast: true
{engine}  log_keys:
    - txt

  denoiser_config:
    target: sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser
    params:
      num_idx: 1000
      quantize_c_noise: False
      weighting_config:
        target: sgm.modules.diffusionmodules.denoiser_weighting.EpsWeighting
      scaling_config:
        target: sgm.modules.diffusionmodules.denoiser_scaling.VideoScaling
      {schedule}

  network_config:
    target: dit_video_concat.DiffusionTransformer
    params:
      time_embed_dim: 512
      elementwise_affine: True
      num_frames: {frames}
      time_compressed_rate: 4
      latent_width: {latents[1]}
      latent_height: {latents[0]}
      num_layers: {layers}
      patch_size: {patch}
      in_channels: {channels}
      out_channels: 16
      hidden_size: {hidden}
      adm_in_channels: 256
      num_attention_heads: {heads}
{network}      transformer_args:
        checkpoint_activations: True
        vocab_size: 1
        max_sequence_length: 64
        layernorm_order: pre
        skip_init: false
        model_parallel_size: 1
        is_decoder: false

      modules:
        pos_embed_config:
          target: dit_video_concat.{positions}
          params:
            text_length: {text}
{position_params}{lora}        patch_embed_config:
          target: dit_video_concat.ImagePatchEmbeddingMixin
          params:
            text_hidden_size: 4096
        adaln_layer_config:
          target: dit_video_concat.AdaLNMixin
          params:
            qk_ln: True
        final_layer_config:
          target: dit_video_concat.FinalLayerMixin

  conditioner_config:
    target: sgm.modules.GeneralConditioner
    params:
      emb_models:
        - is_trainable: false
          input_key: txt
          ucg_rate: 0.1
          target: sgm.modules.encoders.modules.FrozenT5Embedder
          params:
            model_dir: "t5-v1_1-xxl"
            max_length: {text}

  first_stage_config:
    target: vae_modules.autoencoder.VideoAutoencoderInferenceWrapper
    params:
      cp_size: 1
      ckpt_path: "vae/3d-vae.pt"
      ignore_keys: [ 'loss' ]
      loss_config:
        target: torch.nn.Identity
      regularizer_config:
        target: vae_modules.regularizers.DiagonalGaussianRegularizer
      encoder_config:
        target: vae_modules.cp_enc_dec.ContextParallelEncoder3D
        params: {{double_z: true, z_channels: 16, resolution: 256, in_channels: 3, out_ch: 3, ch: 128, ch_mult: [1, 2, 2, 4],
          attn_resolutions: [ ], num_res_blocks: 3, dropout: 0.0, gather_norm: True}}
      decoder_config:
        target: vae_modules.cp_enc_dec.ContextParallelDecoder3D
        params: {{double_z: True, z_channels: 16, resolution: 256, in_channels: 3, out_ch: 3, ch: 128, ch_mult: [1, 2, 2, 4],
          attn_resolutions: [ ], num_res_blocks: 3, dropout: 0.0, gather_norm: {gather}}}

  loss_fn_config:
    target: sgm.modules.diffusionmodules.loss.VideoDiffusionLoss
    params:
{fixed}      offset_noise_level: 0
      sigma_sampler_config:
        target: sgm.modules.diffusionmodules.sigma_sampling.DiscreteSampling
        params:
          uniform_sampling: True
{group}          num_idx: 1000
          {schedule}

  sampler_config:
    target: sgm.modules.diffusionmodules.sampling.VPSDEDPMPP2MSampler
    params:
{fixed}      num_steps: 50
      verbose: True
      {schedule}
      guider_config:
        target: sgm.modules.diffusionmodules.guiders.DynamicCFG
        params:
          scale: 6
          exp: 5
          num_steps: 50
"""

ADAPTERS = """\
        lora_config:
          target: sat.model.finetune.lora2.LoraMixin
          params:
            r: {}
"""

SFT = """\
args:
  checkpoint_activations: True
  model_parallel_size: 1
  experiment_name: lora-disney
  mode: finetune
  load: "{your CogVideoX SAT folder}/transformer"
  no_load_rng: True
  train_iters: 1000
  eval_iters: 1
  eval_interval: 100
  eval_batch_size: 1
  save: ckpts_5b_lora
  save_interval: 500
  log_interval: 20
  train_data: [ "disney" ]
  valid_data: [ "disney" ]
  split: 1,0,0
  num_workers: 8
  force_train: True
  only_log_video_latents: True

data:
  target: data_video.SFTDataset
  params:
    video_size: [ 480, 720 ]
    fps: 8
    max_num_frames: 49
    skip_frms_num: 3.

deepspeed:
  train_micro_batch_size_per_gpu: 2
  gradient_accumulation_steps: 1
  steps_per_print: 50
  gradient_clipping: 0.1
  zero_optimization:
    stage: 2
    cpu_offload: false
    contiguous_gradients: false
    overlap_comm: true
    reduce_scatter: true
    reduce_bucket_size: 1000000000
    allgather_bucket_size: 1000000000
    load_from_fp32_weights: false
  zero_allow_untested_optimizer: true
  bf16:
    enabled: True
  fp16:
    enabled: False
  loss_scale: 0
  loss_scale_window: 400
  hysteresis: 2
  min_loss_scale: 1
  optimizer:
    type: sat.ops.FusedEmaAdam
    params:
      lr: 0.00001
      betas: [ 0.9, 0.95 ]
      eps: 1e-8
      weight_decay: 1e-4
  activation_checkpointing:
    partition_activations: false
    contiguous_memory_optimization: false
  wall_clock_breakdown: false
"""

INFERENCE = """\
args:
  image2video: False
  latent_channels: 16
  mode: inference
  load: "{your CogVideoX SAT folder}/transformer"
  batch_size: 1
  input_type: txt
  input_file: configs/test.txt
  sampling_image_size: [480, 720]
  sampling_num_frames: 13
  sampling_fps: 8
  bf16: True
  output_dir: outputs/
  force_inference: True
"""


def model_file(kind: str, *, lora: int | None = None) -> str:
    """That of a released model; ``lora``: with adapters of this rank."""
    small, new, image = kind == "2b", kind.startswith("1.5"), kind.endswith("i2v")
    engine = f"  latent_input: {str(kind == '1.5-5b').lower()}\n" if new or image else ""
    engine += "  noised_image_input: true\n  noised_image_dropout: 0.05\n" if image else ""
    engine += "  noised_image_all_concat: false\n  augmentation_dropout: 0.15\n" if image and new else ""
    engine += "  not_trainable_prefixes: ['all']\n" if lora else ""
    target = "discretization_config: {target: sgm.modules.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization"
    rotary = "            hidden_size_head: 64\n" + (
        "            learnable_pos_embed: True\n" if image and not new else ""
    )
    waves = "            height_interpolation: 1.875\n            width_interpolation: 1.875\n"
    return MODEL.format(
        scale=1.15258426 if small else 0.7,
        engine=engine,
        schedule=target + ("}" if new else f", params: {{shift_scale: {3.0 if small else 1.0}}}}}"),
        frames=81 if new else 49,
        latents=(300, 300) if new else (60, 90),
        layers=30 if small else 42,
        patch="[2, 2, 2]" if new else 2,
        channels=32 if image else 16,
        hidden=1920 if small else 3072,
        heads=30 if small else 48,
        network="      ofs_embed_dim: 512\n" if new and image else "",
        positions="Basic3DPositionEmbeddingMixin" if small else "Rotary3DPositionEmbeddingMixin",
        text=224 if new else 226,
        position_params=waves if small else rotary,
        lora=ADAPTERS.format(lora) if lora else "",
        gather=new or image,
        fixed="      fixed_frames: 0\n" if image else "",
        group="          group_num: 40\n" if new else "",
    )


def sft_file(kind: str) -> str:
    """That of fine-tuning, set for a model as its comments say."""
    text = SFT
    if kind == "2b":
        text = text.replace("bf16:\n    enabled: True", "bf16:\n    enabled: False")
        text = text.replace("fp16:\n    enabled: False", "fp16:\n    enabled: True")
    if kind.startswith("1.5"):
        text = text.replace("[ 480, 720 ]", "[ 768, 1360 ]").replace("fps: 8", "fps: 16").replace("49", "81")
    return text


def write_files(folder: Path, kind: str, *, lora: int | None = None) -> list[Path]:
    """The two files of a fine-tuning run, as SAT's --base has them."""
    paths = [folder / "model.yaml", folder / "sft.yaml"]
    for path, text in zip(paths, (model_file(kind, lora=lora), sft_file(kind))):
        path.write_text(text, encoding="utf-8")
    return paths
