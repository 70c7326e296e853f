"""Training on DeepSpeed ZeRO: optimizer states (1), gradients (2) and weights (3) in pieces, one a rank.

DeepSpeed does three things that surprise. It divides gradients by the number of ranks; ours add up, for their denominators
are global. It clips at 1.0 by default. It compiles its own optimizers for minutes, so it is given torch's AdamW.
"""

import functools
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from rto_fast.batch import pack_whole
from rto_fast.config import Config, DeepSpeedConfig, OptimizerConfig, TrainingConfig
from rto_fast.errors import TrainingError
from rto_fast.models.forward import forward_hidden
from rto_fast.models.head import use_op_linear
from rto_fast.models.liger import use_liger
from rto_fast.models.model import EngineModule, Model
from rto_fast.models.placement import lay_side_by_side, projection_groups
from rto_fast.system import deepspeed_import
from rto_fast.training import ranks
from rto_fast.training.optimizer import MOMENTS, Optimizer, ScheduledOptimizer, not_finite, parameter_groups

BUCKET = 200_000_000  # elements that are reduced at once; each ZeRO-3 engine holds a buffer of this size


def engine_config(
    settings: DeepSpeedConfig, stage: int, dtype: torch.dtype, elements: int = 0, max_grad_norm: float = 0.0
) -> dict[str, Any]:
    """Makes DeepSpeed's configuration.

    Args:
        settings: of the run.
        stage: of ZeRO.
        dtype: of the weights.
        elements: the number of weights that are trained; 0 if the model is only evaluated.
        max_grad_norm: see `optimizer.max_grad_norm`.
    """
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(BUCKET, max(elements, 1))}
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if settings.offloads_optimizer and elements:
        zero["offload_optimizer"] = host
    if settings.offloads_parameters:
        zero["offload_param"] = host
    is_bf16 = dtype == torch.bfloat16
    return {
        "train_micro_batch_size_per_gpu": 1,  # only for DeepSpeed's bookkeeping: batches are packed by tokens
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step ends where `step` is called, whatever the number of backwards
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # As without DeepSpeed: gradients of bfloat16 weights are added up in float32, and a step with inf or NaN is skipped.
        "bf16": {"enabled": is_bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 2**31,
    }


def _initialize(model: Model, config: dict, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Gives the model its DeepSpeed engine."""
    deepspeed_import.reveal()
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU it would be compiled first, for a minute
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)  # DeepSpeed's own calls
    model.engine, *_ = deepspeed.initialize(model=EngineModule(model), optimizer=optimizer, config=config)


def _forget(module: torch.nn.Module) -> None:
    """Removes a module from the list and the cache in which DeepSpeed's ZeRO-3 keeps every module with its weights."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, PartitionedParameterCoordinator

    own = set(module.modules())
    FWD_MODULE_STACK[:] = [known for known in FWD_MODULE_STACK if known not in own]
    method = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for cell in method.__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):  # the cached function is under another decorator
            cell.cell_contents.cache_clear()


def release(model: Model | None) -> None:
    """Takes DeepSpeed off a model that is used no more: its engine keeps weights, gradients and moments alive."""
    if model is None or model.engine is None:
        return
    model.engine.destroy()
    if model.is_zero3:
        _forget(model.engine.module)
    model.engine = None


def _prepare_zero3(model: Model) -> None:
    """Fits a model for ZeRO-3, which gathers weights only around the forward passes of transformers' own modules."""
    use_op_linear(model.module)
    use_liger(model.module)  # our decoder does not run these passes


def place_frozen(model: Model, settings: DeepSpeedConfig, device: torch.device | str) -> None:
    """Puts a model that is only evaluated where `settings.frozen` says. All ranks call it.

    Args:
        settings: `resident` is on `device`; `offloaded` is in the CPU's memory until the model is needed; `sharded` is in
            pieces on all ranks.
    """
    if settings.frozen == "offloaded":
        model.offload(device)
    elif settings.frozen == "sharded" and ranks.world_size() > 1:
        _prepare_zero3(model)
        _initialize(model, engine_config(settings, 3, model.module.dtype))
    else:
        model.module.to(device)
        lay_side_by_side(projection_groups(model.module))  # it moves each weight on its own


class ZeroOptimizer(ScheduledOptimizer):
    """AdamW in a DeepSpeed engine, through which the model's forward passes go from then on."""

    def __init__(
        self,
        model: Model,
        stage: TrainingConfig,
        settings: OptimizerConfig,
        total_steps: int,
        deepspeed: DeepSpeedConfig,
        lr: float | None = None,
    ):
        super().__init__(stage, settings, total_steps, lr)
        level = deepspeed.stage_for(ranks.world_size())
        if level == 3:
            _prepare_zero3(model)
        self.model, self.named, self.is_zero3 = model, model.trainable(), level == 3
        groups = parameter_groups([p for _, p in self.named], settings.weight_decay)
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=settings.adam_betas, eps=1e-8, fused=True)
        elements = sum(getattr(p, "ds_numel", p.numel()) for _, p in self.named)
        config = engine_config(deepspeed, level, model.module.dtype, elements, settings.max_grad_norm)
        _initialize(model, config, self.adam)
        self.engine = model.engine

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss * ranks.world_size())

    def zero_grad(self) -> None:
        raise TrainingError(
            "out of memory: lower model.micro_batch_tokens (with DeepSpeed a step cannot be begun anew)"
        )

    def _update(self, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.engine.step()  # which waits for the device itself, to see whether the gradient is finite
        norm = torch.tensor(float(self.engine.get_global_grad_norm()))
        return norm, not_finite(norm)

    def release(self) -> None:
        release(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Returns the same state from any number of ranks and any ZeRO stage as `Optimizer` does, but with functions in the
        place of tensors: every rank has to call them, which gathers the tensor."""
        import deepspeed.utils as ds

        state = self._counts()
        state["weights"] = {name: functools.partial(ds.safe_get_full_fp32_param, p) for name, p in self.named}
        moments = MOMENTS if self.steps > self.skipped else ()
        if moments:
            self._link_moments()
        for key in moments:
            state[key] = {name: functools.partial(ds.safe_get_full_optimizer_state, p, key) for name, p in self.named}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        import deepspeed
        import deepspeed.utils as ds

        self._load_counts(state)
        moments = MOMENTS if MOMENTS[0] in state else ()
        if moments:
            self._make_moments()
        for name, parameter in self.named:
            value = state["weights"][name].to(self.engine.device)
            ds.safe_set_full_fp32_param(parameter, value)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.is_zero3):
                parameter.copy_(value)
            for key in moments:
                ds.safe_set_full_optimizer_state(parameter, state[key][name].to(self.engine.device), key)
        for values in self.adam.state.values():
            values["step"].fill_(self.steps - self.skipped)

    @torch.enable_grad()
    def _make_moments(self) -> None:
        """Makes AdamW create its state, in a step with gradients of 0 and a learning rate of 0."""
        hidden = self.model.forward(forward_hidden, pack_whole([[0, 1]], self.engine.device))
        self.engine.backward(0.0 * hidden.sum())
        self._update(0.0)
        self._link_moments()

    def _link_moments(self) -> None:
        """Tells DeepSpeed's accessors where the moments are. With ZeRO 1 and 2 they look after the first step of the first
        parameter group, when the other group has none yet."""
        if not self.is_zero3:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()


def build_optimizer(
    model: Model, stage: TrainingConfig, total_steps: int, config: Config, lr: float | None = None
) -> ScheduledOptimizer:
    """Builds a `ZeroOptimizer` where DeepSpeed is asked for or there is more than one rank, else an `Optimizer`.

    Args:
        stage: the stage's section of the configuration.
        total_steps: the length of the schedule.
        lr: the peak learning rate; default: the stage's.
    """
    if config.deepspeed.stage_for(ranks.world_size()):
        return ZeroOptimizer(model, stage, config.optimizer, total_steps, config.deepspeed, lr)
    return Optimizer(model, stage, config.optimizer, total_steps, lr)
