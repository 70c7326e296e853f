"""The embedded task "transcribe the list", which has a gold reward and in which mistakes are local.

A prompt lists 5 to 8 items, `3 red cup , 1 blue box`. The right response spells them out, `three red cups , one blue box .
thanks`. The gold reward checks each item's number, colour, noun and plural. So a response can hold several small, local
mistakes, of which one score for the whole response tells little and a reward for each token tells much.

Demonstrations come from a careless writer (wrong words, fillers, skipped, repeated and invented items). Preference pairs are
two such responses, labelled by Bradley-Terry sampling from the gold reward. `tests/embedded_world.py` writes them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EMBEDDED = Path(__file__).parent / "embedded"
Item = tuple[int, str, str]  # number 1 to 8, colour, noun in the singular

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
COLOURS = ("red", "blue", "green", "white", "black", "gold")
SINGULARS = ("cup", "plate", "lamp", "chair", "book", "box", "hat", "bell")
PLURALS = tuple(noun + ("es" if noun == "box" else "s") for noun in SINGULARS)
FILLERS = ("um", "like", "whatever")
SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>", "<unk>")
DIGITS = tuple(str(n) for n in range(1, 9))
VOCABULARY = SPECIAL + (",", ".", "thanks") + DIGITS + NUMBERS + COLOURS + SINGULARS + PLURALS + FILLERS
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] }}{{ '<eos>' if m['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _item_score(written: Sequence[str], item: Item) -> float:
    """Share of the four checks that a written item passes: number, colour, noun, plural."""
    if len(written) != 3:
        return 0.0
    number, colour, noun = written
    plural = noun in PLURALS
    singular = SINGULARS[PLURALS.index(noun)] if plural else noun
    checks = (
        number == NUMBERS[item[0] - 1],
        colour == item[1],
        singular == item[2],
        noun in PLURALS + SINGULARS and plural == (item[0] > 1),
    )
    return sum(checks) / 4


def score_response(items: Sequence[Item], response: str, finished: bool = True) -> float:
    """The gold reward in [0, 1]: nine tenths for the items, less penalties for fillers and a wrong number of items, halved
    if the response never ended; and one tenth for exactly one closing word."""
    words = response.split()
    thanks = 0
    while words and words[-1] == "thanks":
        words.pop()
        thanks += 1
    fillers = sum(word in FILLERS for word in words)
    written: list[list[str]] = [[]]
    for word in words:
        if word in (",", "."):
            written.append([])
        elif word not in FILLERS:
            written[-1].append(word)
    if not written[-1]:
        written.pop()
    score = sum(_item_score(w, item) for w, item in zip(written, items)) / len(items)
    score -= 0.25 * fillers / len(items) + 0.15 * abs(len(written) - len(items))
    return max(score, 0.0) * 0.9 * (1.0 if finished else 0.5) + 0.1 * (thanks == 1)


def gold_reward(
    prompts: Sequence[str], responses: Sequence[str], finished: Sequence[bool] | None = None
) -> list[float]:
    """The gold reward of each response, as a function for `reward_model.function` or `eval.function`."""
    finished = [True] * len(prompts) if finished is None else finished
    scores = []
    for prompt, response, ended in zip(prompts, responses, finished, strict=True):
        try:
            items = [(int(number), colour, noun) for number, colour, noun in (i.split() for i in prompt.split(" , "))]
        except (AttributeError, ValueError):
            raise ValueError(f"gold_reward: not a prompt of the embedded world: {str(prompt)[:80]!r}") from None
        scores.append(score_response(items, response, ended))
    return scores


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """A word-level Hugging Face tokenizer with the words of `VOCABULARY`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def model_config() -> "LlamaConfig":
    """The configuration of a Llama with two layers and 10^5 parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rope_theta=1000.0,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.06,
    )


def build_model(seed: int) -> "LlamaForCausalLM":
    """The model of `model_config` with random weights."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(model_config())
