"""The configuration of a run: dataclasses, a YAML file, command-line overrides.

`load_config(["--config", "run.yaml", "--rto.kl_coef", "0.02"])` gives a validated `Config`. Every field of the sections is
both a YAML key and a command-line option. Rewards, learning rates and batches default to the paper's for Llama-3-8B on
UltraFeedback (arXiv 2404.18922). Without `--config` it is `configs/default.yaml`, the embedded world's, and where a model or
data is given `configs/own.yaml`.
"""

from rto_fast.config.data import DataConfig
from rto_fast.config.load import dump_config, load_config
from rto_fast.config.model import LoraConfig, ModelConfig, RolloutConfig
from rto_fast.config.rto import RTOConfig
from rto_fast.config.run import Config, EvalConfig, HubConfig, TrackConfig, check_repo, check_rollout
from rto_fast.config.stages import (
    STAGES,
    DeepSpeedConfig,
    DPOConfig,
    OptimizerConfig,
    RewardModelConfig,
    SFTConfig,
    Stage,
    SupervisedConfig,
    TrainingConfig,
)

__all__ = [
    "STAGES",
    "Config",
    "DPOConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "EvalConfig",
    "HubConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RTOConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "SFTConfig",
    "Stage",
    "SupervisedConfig",
    "TrackConfig",
    "TrainingConfig",
    "check_repo",
    "check_rollout",
    "dump_config",
    "load_config",
]
