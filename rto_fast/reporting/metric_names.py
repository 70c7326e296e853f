"""Names of the metrics in metrics.jsonl, so that one search finds who writes a number and who reads it.

The keys of these records are also what TensorBoard and the other trackers show, as stage/name.
"""

# Every stage that trains.
TOKENS = "tokens"  # of the step's batch; of RTO's responses
TOKENS_PER_SECOND = "tokens_per_second"
SECONDS = "seconds"  # wall-clock time since the run began
LR = "lr"
GRAD_NORM = "grad_norm"  # before clipping
SKIPPED = "skipped"  # 1 where the optimizer step was skipped because a gradient was not finite
IMBALANCE = "imbalance"  # tokens of the busiest rank divided by the mean over ranks
CRITIC_LR = "critic_lr"  # `update` writes these three
CRITIC_GRAD_NORM = "critic_grad_norm"
CRITIC_SKIPPED = "critic_skipped"

# Supervised stages: SFT, reward model, DPO.
LOSS = "loss"
ACCURACY = "accuracy"  # share of the batch's pairs that are ranked as labelled
MARGIN = "margin"  # mean of DPO's implicit reward of chosen less rejected
HELD_OUT_ACCURACY = "held_out_accuracy"
TRAINING_ACCURACY = "training_accuracy"  # after the stage, over its training pairs, where none are held out
SCORE_STD = "score_std"  # standard deviation of the reward model's scores, by which they are normalised

# Rollouts, and the evaluations that sample.
SCORE = "score"  # mean over responses
LENGTH = "length"  # mean tokens of a response
KL = "kl"  # to the reference, nats a response
STANDARD_ERROR = "standard_error"  # of the score
FINISHED = "finished"  # share of responses that ended with a stop token
RESPONSES = "responses"
TRUNCATED = "truncated"  # share of responses that were cut at rollout.max_new_tokens

# What a response is paid: reward = dpo_reward − kl_penalty + score_reward, means over responses.
REWARD = "reward"
DPO_REWARD = "dpo_reward"
KL_PENALTY = "kl_penalty"
SCORE_REWARD = "score_reward"
DPO_REWARD_SHARE = "dpo_reward_share"  # from `reward_shares`: shares of the three sizes |part|, which add up to 1
KL_PENALTY_SHARE = "kl_penalty_share"
SCORE_REWARD_SHARE = "score_reward_share"
KL_COEF = "kl_coef"
DPO_CLIP_FRACTION = "dpo_clip_fraction"  # share of tokens whose DPO reward was clipped
DPO_SCORE_CORRELATION = "dpo_score_correlation"  # over responses

# A token's record in tokens.jsonl holds the three parts of the reward and these.
ADVANTAGE = "advantage"
VALUE = "value"

# The PPO update, means over its optimizer steps.
POLICY_LOSS = "policy_loss"
VALUE_LOSS = "value_loss"
ENTROPY = "entropy"  # nats a token
APPROX_KL = "approx_kl"  # of the policy to the one that sampled, nats a token
FIRST_STEP_KL = "first_step_kl"  # the same before the weights move: 0 where the sampler's log-probs are exact
CLIP_FRACTION = "clip_fraction"  # share of tokens
VALUE_CLIP_FRACTION = "value_clip_fraction"
ADVANTAGE_STD = "advantage_std"
EXPLAINED_VARIANCE = "explained_variance"  # share of the returns' variance that the critic explains
MICRO_BATCH_TOKENS = "micro_batch_tokens"  # the most that one may have
PLANNED_TOKENS = "planned_tokens"  # the same as the run began, before memory ran out

# How far a sampler's log-probs are from training's, unless they are exact; formulas: rto_fast/models/agreement.py.
MISMATCH_MEAN = "mismatch_mean"
MISMATCH_MAX = "mismatch_max"
MISMATCH_K3 = "mismatch_k3"
MISMATCH_BIAS = "mismatch_bias"
IMPORTANCE_WEIGHT = "importance_weight"  # mean

# Seconds of an RTO iteration by phase, from `speed_metrics`. Prefill, decode and sync are parts of the rollout, which some
# engines report.
ROLLOUT_TOKENS_PER_SECOND = "rollout_tokens_per_second"
ROLLOUT_IMBALANCE = "rollout_imbalance"
SECONDS_ROLLOUT = "seconds_rollout"
SECONDS_PREFILL = "seconds_prefill"
SECONDS_DECODE = "seconds_decode"
SECONDS_SYNC = "seconds_sync"  # handing the weights to the engine
SECONDS_SCORE = "seconds_score"
SECONDS_UPDATE = "seconds_update"
