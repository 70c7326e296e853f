"""What single tokens earned: a few responses of the first, the middle and the last iteration, for the run's report."""

import torch

RESPONSES, TOKENS = 4, 512  # of each recorded iteration, and of each response: the record stays small for any model


def recorded_iterations(iterations):
    """Numbers, from 0: the start, the half-way point and the end show how the token rewards' meaning moves."""
    return {0, iterations // 2, iterations - 1}


def reward_parts(result, kl_coef, scores, score_scale, score_clip, batch):
    """The token rewards taken apart, {name: [T] float32}: reward = dpo_reward − kl_penalty + score_reward.

    Args:
        result: `RTOAdvantages`. scores: [N], as paid. score_clip: 0 turns it off.
    """
    paid = score_scale * (scores.clamp(-score_clip, score_clip) if score_clip else scores)
    score_reward = torch.zeros_like(result.token_rewards).index_copy(0, batch.last, paid.to(result.token_rewards.dtype))
    kl_penalty = kl_coef * result.kl
    # What remains is the dense reward as it was paid: scaled, clipped, moved to sentence ends, less its shaping.
    return {
        "dpo_reward": result.token_rewards + kl_penalty - score_reward,
        "kl_penalty": kl_penalty,
        "score_reward": score_reward,
    }


def token_texts(tokenizer, ids):
    """The text of each token, such that they join to that of the whole, special tokens included.

    Tokens are decoded behind those before them (as TGI and vLLM stream text): many tokenizers drop the space in front of
    a token that stands alone. A character of several tokens belongs to the last of them.
    """

    def decode(start, end):
        return tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts, start, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, whole = decode(start, read), decode(start, end)
        if whole.endswith("\ufffd") and end < len(ids) and end - read < 4:  # UTF-8 has at most four bytes a character
            texts.append("")
            continue
        texts.append(whole[len(before) :])
        start, read = read, end
    return texts


def token_records(experience, prompts, tokenizer):
    """Records of the first `RESPONSES` responses, for `RunLog.tokens`: lists over a response's first `TOKENS` tokens.

    Args:
        experience: `Experience` with `reward_parts`. prompts: its `Prompt`s.
    """
    lengths, mask = experience.lengths, experience.batch.response_mask.split(experience.lengths)
    columns = experience.reward_parts | {"advantage": experience.advantages, "value": experience.old_values}
    columns = {name: values.split(lengths) for name, values in columns.items()}
    records = []
    for i, ids in enumerate(experience.response_ids[:RESPONSES]):
        numbers = {
            name: [round(number, 5) + 0.0 for number in parts[i][mask[i]][:TOKENS].tolist()]  # + 0.0: no -0.0
            for name, parts in columns.items()
        }
        # The score is paid on the last token, which may lie behind the cut.
        score = round(float(columns["score_reward"][i].sum()), 5)
        shown = {"index": i, "prompt": prompts[i].prompt, "count": len(ids), "score": score}
        records.append(shown | {"tokens": token_texts(tokenizer, ids[:TOKENS])} | numbers)
    return records
