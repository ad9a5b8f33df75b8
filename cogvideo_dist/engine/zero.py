"""The one place that knows DeepSpeed: its configuration, the scale of the loss, and how to reach its sharded states by name.

Tested with DeepSpeed 0.19. ``_create_state`` and ``_link_state`` touch names of it that are not public; a test per stage
holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_modules,
)
from torch import Tensor, nn

from cogvideo_dist.config.schema import Train
from cogvideo_dist.engine.offload import Shelf
from cogvideo_dist.engine.optim import AdamWithEma, make_optimizer, state_keys
from cogvideo_dist.engine.pieces import Cut, Piece, cut_of
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.parallel.ops import reduce_sum
from cogvideo_dist.parallel.split import joined_whole, split_of

# Its build takes minutes, and a build that is killed leaves a lock on which later starts wait without a word.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

DEEPSPEED: str = deepspeed.__version__

FullState = dict[str, dict[str, Tensor]]
"""Kind (``weights``, ``exp_avg``, ``exp_avg_sq``, ``ema``) -> parameter name -> the whole tensor in float32."""

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def deepspeed_config(train: Train, *, replicas: int, micro_steps: int) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "train_batch_size": micro_steps * replicas,
        "gradient_clipping": train.clip_norm or 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloaded, our optimizer works on the host: no compiled one is needed
        "zero_optimization": {
            "stage": effective_stage(train),
            "stage3_param_persistence_threshold": 0,
            "overlap_comm": train.zero_stage == 3,
            "use_multi_rank_bucket_allreduce": False,  # it sums whole buckets on every rank: three times the reduce's bytes
            **offloaded(train),
        },
        # whether gradients are finite is asked once a step, of their norm (``Engine.pending_norm``)
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": train.precision == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def offloaded(train: Train) -> dict[str, Any]:
    """What ZeRO keeps in the host's memory, page-locked where there is a device to copy to."""
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return ({"offload_optimizer": host} if train.offload.optimizer else {}) | (
        {"offload_param": host} if train.offload.parameters else {}
    )


class Groups:
    """The mesh in the words of DeepSpeed: ``replica`` is its data-parallel group, ``tp`` its model-parallel group. Sequence
    parallelism is not announced: its ranks are replicas whose losses are shares of a sum."""

    def __init__(self, mesh: ParallelMesh) -> None:
        self.mesh = mesh

    def get_data_parallel_group(self) -> Any:
        return self.mesh.replica.group

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.replica.size

    def get_data_parallel_rank(self) -> int:
        return self.mesh.replica.rank

    def get_model_parallel_group(self) -> Any:
        return self.mesh.tp.group

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tp.size

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tp.rank


def effective_stage(train: Train) -> int:
    """Stage 0 keeps no float32 masters apart from the weights, so with 16 bits it runs as stage 1 (the same mathematics)."""
    return max(train.zero_stage, 0 if train.precision == "fp32" else 1)


class Engine:
    """A model under DeepSpeed ZeRO whose gradients are sums."""

    def __init__(self, model: nn.Module, train: Train, *, mesh: ParallelMesh, micro_steps: int) -> None:
        self.mesh, self.train, self.micro_steps, self.model = mesh, train, micro_steps, model
        self.stage = effective_stage(train)
        for name, parameter in model.named_parameters():
            # Or DeepSpeed would count whole parameters once per tp rank in the gradient norm.
            setattr(parameter, "tensor_model_parallel", split_of(model, name) is not None)  # noqa: B010 (no field of it)
        units = {type(module) for module in model.modules() if getattr(module, "zero_unit", False)}
        if self.stage == 3 and units:
            set_z3_leaf_modules(model, list(units))
            for module in model.modules():
                if type(module) in units:
                    module.register_forward_pre_hook(_from_a_gradient)
        self._ds, *_ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(model, train),
            mpu=Groups(mesh) if mesh.tp.size > 1 else None,
            config=deepspeed_config(train, replicas=mesh.replica.size, micro_steps=micro_steps),
        )
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.grad_norm: Tensor | float | None = None
        self.updates = self.overflows = 0  # made so far; steps in a row that overflowed at fp16's least loss scale
        self._sound: Tensor | None = None  # 1, or NaN once a loss of this step is not finite
        self._norm: Tensor | None = None
        self._known: dict[str, Any] = {}  # by ``pending_norm``, for DeepSpeed's step
        if self.scaler:
            self._ds.optimizer.loss_scaler.raise_error_at_min_scale = False  # whoever counts ``overflows`` ends the run
        self.shelf = Shelf(self.device) if train.offload.activations else None

    @property
    def device(self) -> torch.device:
        return torch.device(self._ds.device)

    @property
    def forward(self) -> nn.Module:
        """The model to call: DeepSpeed's wrapper around it."""
        return self._ds

    @property
    def scaler(self) -> dict[str, float]:
        """The dynamic loss scale of fp16 and its counters; empty in other precisions."""
        if self.train.precision != "fp16":
            return {}
        return {name: getattr(self._ds.optimizer.loss_scaler, name) for name in SCALER}

    @scaler.setter
    def scaler(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            setattr(self._ds.optimizer.loss_scaler, name, value)

    @property
    def scale_is_least(self) -> bool:
        """Whether fp16's loss scale can become no smaller."""
        return (
            bool(self.scaler) and self._ds.optimizer.loss_scaler.cur_scale <= self._ds.optimizer.loss_scaler.min_scale
        )

    def keeping(self) -> AbstractContextManager[object]:
        """The forward runs within: where ``train.offload.activations`` says so, what it keeps goes to the host."""
        return self.shelf.keeping() if self.shelf else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this rank's share of the step's loss.

        DeepSpeed averages over replicas and micro-steps; our loss is a share of a sum, so that mean is undone here, and
        only here. A share that is not finite makes its gradients NaN, so that their norm, a sum over all ranks, tells them all.
        """
        sound = loss.detach() * 0 + 1
        self._sound = sound if self._sound is None else self._sound * sound
        self._ds.backward(loss * sound * (self.mesh.replica.size * self.micro_steps))

    @property
    def at_boundary(self) -> bool:
        """Whether this micro-step is the last one of a step."""
        return bool(self._ds.is_gradient_accumulation_boundary())

    @property
    def loss_is_finite(self) -> bool:
        """Of this rank's shares of the step's loss, so far."""
        return self._sound is None or bool(self._sound.isfinite())

    def pending_norm(self) -> Tensor:
        """Of the gradients that the last micro-step's ``step`` is about to use, before clipping and under fp16 scaled: on all
        ranks not finite where one element on one of them is not. Stays on the device. Collective."""
        outer = self._ds.optimizer
        if self.stage == 0:
            self._norm = self._gradient_norm()
            return self._norm
        if self.stage == 3:
            groups = outer._get_norm_groups()
            self._known = {"_get_norm_groups": groups}
            return combine_grad_norm_groups(groups)
        if isinstance(outer, BF16_Optimizer):
            grads, _ = outer.get_grads_for_norm()
            norm = get_global_norm_of_tensors(input_tensors=grads, mpu=outer.mpu, norm_type=outer.norm_type)
            return combine_grad_norm_groups([norm])  # which makes infinite what the other one made -1
        outer._wait_for_offload_copies()
        norm = outer.scaled_global_norm()
        self._known = {"scaled_global_norm": norm}
        return norm

    def step(self, learning_rate: float) -> None:
        """End a micro-step; at the last one of a step clip by the global norm and update."""
        for group in self._ds.optimizer.param_groups:
            group["lr"] = learning_rate
        last, least = self.at_boundary, self.scale_is_least
        if self.stage == 0 and last:
            # Stage 0 clips without keeping the norm; gradients are reduced already.
            self.grad_norm = self._gradient_norm() if self._norm is None else self._norm
        with _answering(self._ds.optimizer, self._known):
            self._ds.step()
        if self.stage > 0:
            self.grad_norm = self._ds.get_global_grad_norm()
        if last:
            updated = self._ds.was_step_applied()
            self.updates += updated
            self.overflows = self.overflows + 1 if least and not updated else 0
            self._forget_step()

    def discard(self) -> None:
        """End the last micro-step without an update: weights, moments, averages, their counts and the loss scale stay as they
        are to the bit."""
        scaler, self._inner.refuses = self.scaler, True
        try:
            self._ds.step()
        finally:
            self._inner.refuses = False
        self.scaler = scaler
        self._forget_step()

    def _forget_step(self) -> None:
        self._sound = self._norm = None
        self._known = {}

    def _gradient_norm(self) -> Tensor:
        """Of the whole parameters' gradients: what tp ranks hold alike counts once."""
        mine = [
            p.grad
            for name, p in self.names.items()
            if p.grad is not None and (self.mesh.tp.rank == 0 or split_of(self.model, name))
        ]
        return reduce_sum(torch.nn.utils.get_total_norm(mine).square(), self.mesh.tp).sqrt()

    def full_state(self, *, step: int) -> FullState:
        """Master weights and, after a ``step`` above 0, optimizer states by name, whole, on the CPU of the first rank (others
        get empty tensors' names). Collective: every rank calls it."""
        keys = state_keys(self.train) if step else ()
        state: FullState = {kind: {} for kind in ("weights", *keys)}
        with self._reachable() if keys else nullcontext():
            for name, parameter in self.names.items():
                for kind in state:
                    own = self._read(parameter, kind).detach().reshape(self._shape(parameter))
                    tensor = joined_whole(self.model, name, own)
                    if self.mesh.is_first:
                        state[kind][name] = tensor.float().cpu().clone()
        return state

    def cuts(self) -> dict[str, Cut]:
        """Every trained parameter: its whole shape and how tp slices it."""
        return {name: cut_of(self.model, name, own=tuple(self._shape(p))) for name, p in self.names.items()}

    def held(self) -> dict[str, Piece]:
        """What this rank's optimizer works on of every parameter, as elements of its tp slice."""
        found = {}
        for name, cut in self.cuts().items():
            first, last = self._run(self.names[name])
            found[name] = replace(cut.slice(self.mesh.tp.rank, self.mesh.tp.size), start=first, stop=last)
        return found

    def owned(self) -> dict[str, Piece]:
        """What of that this rank writes into checkpoints: what several hold alike is dealt to them."""
        replica, tp, found = self.mesh.replica, self.mesh.tp, {}
        for number, (name, piece) in enumerate(self.held().items()):
            if self.stage == 0:  # every replica holds all
                share = -(-piece.count // replica.size)
                first = min(piece.count, replica.rank * share)
                piece = replace(piece, start=first, stop=min(piece.count, first + share))
            if piece.parts == 1 and number % tp.size != tp.rank:
                piece = replace(piece, stop=piece.start)
            found[name] = piece
        return found

    def copy(self, into: Mapping[str, Tensor]) -> None:
        """What this rank owns of each kind of state, parameter after parameter, to the host's memory ``into[kind]``."""
        held, owned = self.held(), {name: piece for name, piece in self.owned().items() if piece.count}
        with self._reachable() if into.keys() - {"weights"} else nullcontext():
            for kind, values in into.items():
                own = []
                for name, piece in owned.items():
                    first = piece.start - held[name].start
                    own.append(self._fragment(self.names[name], kind)[first : first + piece.count])
                _copy(own, values)

    def restore(self, read: Callable[[str, str, Piece], Tensor], *, kinds: Sequence[str], step: int) -> None:
        """Set the master weights, the working copy and, of ``kinds``, the optimizer states, as they were after ``step``
        updates.

        ``read(kind, name, piece)`` gives the elements of a piece, float32 [piece.count].
        """
        self._inner.state.clear()  # of an attempt at a newer checkpoint, which had updates
        self.updates = step
        if step > 0:
            self._create_state(step)
        held = self.held()
        with torch.no_grad(), self._reachable() if step > 0 else nullcontext():
            for name, parameter in self.names.items():
                piece = held[name]
                slice_ = replace(piece, start=0, stop=self._shape(parameter).numel())
                weights = read("weights", name, slice_)
                self._set_working(parameter, weights.view(self._shape(parameter)))
                if self.stage > 0 and piece.count:
                    self._set_fragment(parameter, "weights", weights[piece.start : piece.stop])
                for kind in kinds:
                    if kind != "weights" and piece.count:
                        self._set_fragment(parameter, kind, read(kind, name, piece))
        self._forget_gathered()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the model works with its EMA weights. Collective."""
        if self.train.ema_decay is None or not self.updates:  # the average begins as the weights
            yield
            return
        self._link_state()
        kept = {name: self.working(p).clone() for name, p in self.names.items()}
        for p in self.names.values():
            self._set_working(p, self._read_everywhere(p, "ema"))
        self._forget_gathered()
        try:
            yield
        finally:
            for name, p in self.names.items():
                self._set_working(p, kept[name])
            self._forget_gathered()

    def _forget_gathered(self) -> None:
        """Stage 3 keeps gathered what it expects to need soon, so the next forward would compute with the weights of before."""
        if self.stage == 3:
            self._ds.empty_partition_cache()

    def _shape(self, parameter: Any) -> torch.Size:
        return parameter.ds_shape if self.stage == 3 else parameter.shape

    def _read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if self.stage == 0:
            return parameter if kind == "weights" else self._inner.state[parameter][kind].to(self.device)
        if kind == "weights":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def _read_everywhere(self, parameter: nn.Parameter, kind: str) -> Tensor:
        return self._read(parameter, kind).reshape(self._shape(parameter))

    def _run(self, parameter: Any) -> tuple[int, int]:
        """First and last element, of its own slice, that this rank's optimizer works on."""
        if self.stage == 0:
            return 0, parameter.numel()
        if self.stage == 3:
            size, first = parameter.ds_tensor.numel(), self.mesh.replica.rank * parameter.ds_tensor.numel()
            return min(first, parameter.ds_numel), min(first + size, parameter.ds_numel)
        mapping = parameter._hp_mapping
        if mapping is None:  # others have all of it
            return 0, 0
        address = mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def _fragment(self, parameter: Any, kind: str) -> Tensor:
        """This rank's run of elements of a state of a parameter, flat."""
        if self.stage == 0:
            return (parameter if kind == "weights" else self._inner.state[parameter][kind]).detach().view(-1)
        if self.stage == 3:
            first, last = self._run(parameter)
            if kind == "weights":
                return safe_get_local_fp32_param(parameter).detach()[: last - first]
            return safe_get_local_optimizer_state(parameter, kind).detach()[: last - first]
        return parameter._hp_mapping.get_hp_fragment(None if kind == "weights" else kind).detach()

    def _set_fragment(self, parameter: Any, kind: str, values: Tensor) -> None:
        if self.stage != 3:
            self._fragment(parameter, kind).copy_(values)
            return
        values = torch.nn.functional.pad(values, (0, parameter.ds_tensor.numel() - values.numel())).to(self.device)
        if kind == "weights":
            safe_set_local_fp32_param(parameter, values)
        else:
            safe_set_local_optimizer_state(parameter, values, kind)

    def _local(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's slice of a whole tensor under stage 3: ceil(numel / ranks) elements, zero padded."""
        size = parameter.ds_tensor.numel()
        flat = value.flatten()[self.mesh.replica.rank * size :][:size]
        return torch.nn.functional.pad(flat, (0, size - flat.numel()))

    def working(self, parameter: Any) -> Tensor:
        """What forward computes with: the parameter or, under stage 3, this rank's part of it."""
        return (parameter.ds_tensor if self.stage == 3 else parameter).detach()

    def _set_working(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Replace what forward computes with: the whole tensor (or, as saved by ``working``, stage 3's slice)."""
        target = self.working(parameter)
        if self.stage == 3 and value.shape != target.shape:
            value = self._local(parameter, value)
        target.copy_(value)

    @property
    def _inner(self) -> AdamWithEma:
        """Our optimizer, in what DeepSpeed made of it."""
        return self._ds.optimizer if self.stage == 0 else self._ds.optimizer.optimizer

    def _create_state(self, step: int) -> None:
        """Make the optimizer states that DeepSpeed would make at its first step, so that they can be set."""
        for group, tensors in self._updated():
            for tensor in tensors:
                self._inner.begin(tensor, self._inner.param_groups[group], step=step)

    def _updated(self) -> Iterator[tuple[int, list[Tensor]]]:
        """The tensors that our optimizer works on, with their parameter group: whole parameters or flat parts of many."""
        outer = self._ds.optimizer
        if self.stage == 0:
            yield from ((index, group["params"]) for index, group in enumerate(outer.param_groups))
        elif self.stage == 3:
            yield from ((outer.sub_group_to_group_id[i], [t]) for i, t in enumerate(outer.fp32_partitioned_groups_flat))
        elif isinstance(outer, BF16_Optimizer):  # what DeepSpeed makes of stage 1 with bf16
            yield from ((index, [tensor]) for index, tensor in enumerate(outer.fp32_groups_flat_partition))
        else:
            yield from ((index, [tensor]) for index, tensor in enumerate(outer.single_partition_of_fp32_groups))

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        """Within, parameters find all their optimizer states, as float32 tensors."""
        with self._inner.whole():
            self._link_state()
            yield
        self._link_state()  # or parameters would hold what was made for the purpose

    def _link_state(self) -> None:
        """Let parameters find their optimizer states under stages 1 and 2.

        DeepSpeed does it once, after the first update of the first parameter group, when the others have no state yet.
        """
        if self.stage in (1, 2):
            self._ds.optimizer._hp_optimizer_states_linked = False
            self._ds.optimizer._lazy_init_hp_params_optimizer_state()


@contextmanager
def _answering(owner: Any, answers: Mapping[str, Any]) -> Iterator[None]:
    """Within, these methods of ``owner`` have been answered already. A step would compute its norm a second time."""
    for name, answer in answers.items():
        setattr(owner, name, lambda answer=answer: answer)
    try:
        yield
    finally:
        for name in answers:
            delattr(owner, name)


def _copy(tensors: list[Tensor], into: Tensor) -> None:
    """One behind the other; from a device without waiting for it."""
    if all(tensor.device == into.device for tensor in tensors):
        torch.cat(tensors, out=into)  # in one piece of parallel work: threads need not meet after each
        return
    for tensor, target in zip(tensors, into.split([tensor.numel() for tensor in tensors])):
        target.copy_(tensor, non_blocking=True)


def _from_a_gradient(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Stage 3 lets a module's parameters go once the gradients of its inputs are there, which is at once where none wants any:
    in front of the first layer with adapters, say. So one input does."""
    if not torch.is_grad_enabled() or any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        return None
    first, *rest = arguments
    return (first.detach().requires_grad_(), *rest)
