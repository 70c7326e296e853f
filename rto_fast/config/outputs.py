"""The configuration of what a run shows and leaves: `eval`, `track` and `hub`."""

from dataclasses import dataclass
from typing import Literal

from rto_fast.config.fields import Count, CountOr0, Word


@dataclass
class EvalConfig:
    """Comparison of the SFT, DPO and RTO policies on held-out prompts."""

    function: Word | None = None
    """`module:function` that judges (prompts, responses). Default: the normalised score of the reward model."""
    prompts: Count = 256
    """Prompts to which the policies respond."""
    every: CountOr0 = 0
    """Evaluate the RTO policy every this many iterations too; 0 evaluates it only at the end."""
    show: CountOr0 = 2
    """Responses that are printed and recorded in each evaluation."""
    keep_best: bool = False
    """Keep the RTO policy with the best evaluation so far in `rto_best`. Needs eval.every."""


@dataclass
class TrackConfig:
    """Where metrics go besides the run's folder, which has metrics.jsonl and TensorBoard's event files."""

    service: Literal["wandb", "trackio"] | None = None
    """Weights & Biases, or trackio, which needs no account. You install the package."""
    project: Word = "rto-fast"
    """Name of the project there. The run is named after output_dir."""


@dataclass
class HubConfig:
    """The final model on the Hugging Face Hub."""

    repo: Word | None = None
    """OWNER/NAME to which the model is pushed when the run ends. `python -m rto_fast.push` does it later."""
    private: bool = True
    """Make the repository private if it does not exist yet."""
