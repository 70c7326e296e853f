"""What single tokens earned: a few responses of the first, the middle and the last iteration, for the run's report."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rto_fast.reporting.metric_names import ADVANTAGE, SCORE, SCORE_REWARD, VALUE
from rto_fast.rto.experience import Experience
from rto_fast.rto.token_rewards import TokenRewards

RESPONSES, TOKENS = 4, 512  # of each recorded iteration, and of each response: the record stays small for any model


def recorded_iterations(iterations: int) -> set[int]:
    """The numbers, from 0, of the first, the middle and the last iteration, which show how the token rewards change."""
    return {0, iterations // 2, iterations - 1}


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token. The texts join to that of the whole, special tokens included.

    A token is decoded together with those before it, as TGI and vLLM stream text: many tokenizers drop the space in front of
    a token that stands alone. A character of several tokens belongs to the last of them.
    """

    def decode(start: int, end: int) -> str:
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


def token_records(
    experience: Experience, rewards: TokenRewards, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Records the first `RESPONSES` responses for `RunLog.tokens`: lists over the first `TOKENS` tokens of each."""
    lengths, mask = experience.lengths, experience.batch.response_mask.split(experience.lengths)
    columns = rewards.parts | {ADVANTAGE: rewards.advantages, VALUE: experience.old_values}
    split = {name: values.split(lengths) for name, values in columns.items()}
    records = []
    for i, ids in enumerate(experience.response_ids[:RESPONSES]):
        numbers = {
            name: [round(number, 5) + 0.0 for number in parts[i][mask[i]][:TOKENS].tolist()]  # + 0.0: no -0.0
            for name, parts in split.items()
        }
        # The score is paid on the last token, which may lie behind the cut.
        score = round(float(split[SCORE_REWARD][i].sum()), 5)
        shown = {"index": i, "prompt": experience.prompts[i].prompt, "count": len(ids), SCORE: score}
        records.append(shown | {"tokens": token_texts(tokenizer, ids[:TOKENS])} | numbers)
    return records
