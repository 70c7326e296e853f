"""The configuration of the RTO stage: `rto`, and all that `compat: paper_code` changes."""

from dataclasses import dataclass
from typing import Annotated, Literal

from rto_fast.config.fields import Coefficient, Count, LearningRate, Location, Positive, Range, Share, SignedCoefficient
from rto_fast.config.stages import BATCH_SIZE, LEARNING_RATE, TrainingConfig


@dataclass
class RTOConfig(TrainingConfig):
    """Stage 4: Reinforced Token Optimization."""

    stage = "rto"
    lr: LearningRate = LEARNING_RATE["rto"]
    """Peak learning rate of the policy (AdamW)."""
    batch_size: Count = BATCH_SIZE["rto"]
    """Responses in one optimizer step."""
    epochs: Count = 1
    """Passes over the prompts. The last rollout takes what is left and may be smaller."""
    enabled: bool = True
    """Run the stage; false stops after DPO."""
    init_from: Literal["sft", "dpo"] = "sft"
    """The model from which the policy starts."""
    ref_model: Location | None = None
    """The reference of the KL penalty. Default: the SFT model."""
    critic: Location | None = None
    """An HF sequence classification model from which the critic starts. Default: the reward model if it has the policy's
    vocabulary, else the SFT model."""
    critic_lr: LearningRate = LEARNING_RATE["critic"]
    """Peak learning rate of the critic (AdamW)."""
    iterations: Count | None = None
    """Number of rollouts, for which the prompts are used as often as needed. Default: as many as `epochs` passes over the
    prompts take."""
    prompts_per_rollout: Count = 1024
    """Prompts in one rollout."""
    samples_per_prompt: Count = 1
    """Responses that are sampled for each prompt."""
    ppo_epochs: Count = 1
    """Passes over each rollout."""
    dpo_reward_scale: SignedCoefficient = 0.05
    """β1, the scale of the dense reward log(π_dpo/π_ref). 0 is plain PPO."""
    dpo_reward_clip: Coefficient = 0.05
    """The scaled dense reward is clipped to ± this; 0 does not clip."""
    kl_coef: Coefficient = 0.01
    """β2, the scale of the penalty log(π/π_ref)."""
    kl_target: Positive | None = None
    """Adapt kl_coef so that the KL of a response stays near this, in nats (arXiv 1909.08593). Default: kl_coef is fixed."""
    score_scale: SignedCoefficient = 1.0
    """β3, the scale of the sentence score. 0 does without a reward model."""
    score_clip: Coefficient = 10.0
    """The normalised sentence score is clipped to ± this; 0 does not clip."""
    normalize_scores: bool = True
    """Use (score − mean)/std, with the statistics of the reward model; those of a function are measured on the held-out
    responses."""
    granularity: Literal["token", "sentence", "sequence"] = "token"
    """Where the dense reward is paid: at each token (RTO), at the ends of sentences (Semi-RTO), or at the end of the
    response (DDPO)."""
    delimiters: str = ".!?\n"
    """The characters that end a sentence, for granularity: sentence."""
    shaping: bool = False
    """Subtract the sum of the dense reward at the end, which leaves PPO's optimum unchanged (RS-PPO)."""
    advantage: Literal["gae", "reinforce_pp"] = "gae"
    """gae is generalised advantage estimation with a critic. reinforce_pp has no critic and takes the whitened, discounted
    sum of the rewards to come (RTO(RPP))."""
    gamma: Share = 1.0
    """Discount per token."""
    gae_lambda: Share = 0.95
    """λ of generalised advantage estimation."""
    whiten: bool = True
    """Scale the advantages of a rollout to mean 0 and variance 1."""
    old_logps: Literal["auto", "sampler", "recompute"] = "auto"
    """Log-probs of the policy that sampled. auto takes the engine's where they are exact, and elsewhere unless they are so
    far from those of a forward pass that PPO's clip would notice; then it takes the latter and gives the loss importance
    weights. sampler always takes the engine's. recompute always takes those of a forward pass."""
    importance_cap: Positive = 2.0
    """The largest importance weight (truncated importance sampling)."""
    clip_eps: Annotated[float, Range(0, 1, below=True)] = 0.2
    """PPO's probability ratio is clipped at 1 − clip_eps."""
    clip_eps_high: Coefficient | None = None
    """The ratio is clipped at 1 + clip_eps_high. Default: clip_eps."""
    dual_clip: Annotated[float, Range(1, 1e6, above=True)] | None = None
    """Bounds the loss of negative advantages at this many times |advantage|, a number above 1. Default: no bound."""
    value_clip_eps: Positive | None = 0.2
    """The loss is clipped where the value moves further than this from its old one; null does not clip."""
    entropy_coef: Coefficient = 0.0
    """Scale of the entropy bonus."""
    loss_normalization: Literal["token", "sequence"] = "token"
    """token: the mean over all tokens of a batch; sequence: the mean over responses of their token means, as in the paper's
    code."""
    truncation: Literal["penalty", "bootstrap", "score"] = "penalty"
    """The reward of a response that is cut at max_new_tokens. penalty: its score, but at most 0, minus truncation_penalty;
    bootstrap: no score, and the critic's value of what would have followed; score: the score of the cut text."""
    truncation_penalty: Coefficient = 1.0
    """The penalty of truncation: penalty, in units of the (normalised) score."""
    compat: Literal["none", "paper_code"] = "none"
    """paper_code repeats what the authors' code does differently. The loss is a mean over sequences; a truncated response
    gets an end-of-sequence token and is scored as finished; dpo.ref_model is ignored; a dpo_reward_scale that is not
    positive leaves the dense reward unscaled."""

    # What `compat: paper_code` changes. The algorithm asks these properties; nothing else reads `compat`.

    @property
    def is_paper_code(self) -> bool:
        return self.compat == "paper_code"

    @property
    def loss_per_sequence(self) -> bool:
        """The loss is a mean over responses of their token means, not over tokens."""
        return self.loss_normalization == "sequence" or self.is_paper_code

    @property
    def ends_truncated_responses(self) -> bool:
        """A truncated response gets an end-of-sequence token in place of its last one and is scored as finished."""
        return self.is_paper_code

    @property
    def ignores_dpo_reference(self) -> bool:
        """The dense reward is taken against the KL penalty's reference, whatever the DPO model was trained against."""
        return self.is_paper_code

    @property
    def dense_reward_scale(self) -> float:
        """β1 as it is used: the authors' code leaves the dense reward unscaled where dpo_reward_scale is not positive."""
        return 1.0 if self.is_paper_code and self.dpo_reward_scale <= 0 else self.dpo_reward_scale
