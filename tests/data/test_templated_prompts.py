"""Prompts whose text somebody has rendered with a chat template before."""

import warnings

import pytest

from rto_fast.data.layouts import Example
from rto_fast.data.templates import UNKNOWN
from rto_fast.data.tokenizing import preference_pairs, prompts, sft_sequences, stop_token_ids
from tests.chat_templates import TEMPLATES, byte_tokenizer
from tests.conversations import (
    CONVERSATIONS,
    REFUSED,
    UNLIMITED,
    assistant,
    count_special,
    load,
    render,
    rendered,
    sft,
    user,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*special tokens that stand")


@pytest.mark.filterwarnings("ignore:the chat template's generation prompt")
@pytest.mark.parametrize("prompt_format", ["auto", "text"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_that_are_templated_already_are_used_as_they_are(name, prompt_format):
    tokenizer = byte_tokenizer(name)
    stop_ids, kinds = stop_token_ids(tokenizer), ["plain", "turns"] + ["system"] * ((name, "system") not in REFUSED)
    for kind in kinds:
        messages = CONVERSATIONS[kind][0]
        expected, _ = sft_sequences(
            [Example(tuple(messages[:-1]), response="4")], tokenizer, UNLIMITED, "auto", stop_ids
        )
        text = tokenizer.decode(expected[0].prompt_ids)
        for given in (text, text.removeprefix("<s>"), text.rstrip(), "\n" + text, text.replace("\n", "\r\n")):
            example = Example(given, response="4", chosen="4", rejected="5", origin="x.jsonl:3")
            with pytest.warns(UserWarning, match=r"x.jsonl: 1 prompts are chat-templated already .* first x.jsonl:3: "):
                assert sft_sequences([example], tokenizer, UNLIMITED, prompt_format, stop_ids)[0] == expected
            with pytest.warns(UserWarning, match="chat-templated already"):
                assert (
                    prompts([example], tokenizer, UNLIMITED, prompt_format)[0][0].prompt_ids == expected[0].prompt_ids
                )
        with pytest.warns(UserWarning, match="x.jsonl: special tokens that stand in the text of 1 rows stay text"):
            (as_message,), _ = prompts([example], tokenizer, UNLIMITED, "chat", thinking=UNKNOWN)
        assert as_message.prompt_ids != expected[0].prompt_ids
        assert given.strip() in tokenizer.decode(as_message.prompt_ids)


def test_a_templated_prompt_may_begin_with_a_bos_token_that_marks_every_turn():
    tokenizer = byte_tokenizer("ChatML")
    text = render(tokenizer, [user("sky?")], None, add_generation_prompt=True)
    ids, tokenizer.bos_token, tokenizer.chat_template = tokenizer(text).input_ids, "<|im_start|>", None  # as SmolLM2's
    with pytest.warns(UserWarning, match="1 prompts are chat-templated already"):
        assert sft(tokenizer, [Example(text, response="blue")])[0].prompt_ids == ids
    tokenizer.bos_token = "<s>"
    for text in ("<s>user of <|im_end|>", "<s>human <|im_start|> rights"):
        with pytest.warns(UserWarning, match="special tokens that stand in the text"):
            sft(tokenizer, [Example(text, response="blue")])


HEADERS = {
    "Llama-3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "Gemma": "<start_of_turn>model\n",
    "Zephyr": "<|assistant|>\n",
    "Phi-3": "<|assistant|>\n",
    **dict.fromkeys(("ChatML", "ChatML on a base model", "Qwen2.5", "Qwen3"), "<|im_start|>assistant\n"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_templated_prompt_may_leave_the_mark_of_the_answer_to_the_response(name):
    tokenizer, header = byte_tokenizer(name), HEADERS[name]
    (expected,) = sft(tokenizer, [Example((user("sky?"),), response="4")])
    whole = tokenizer.decode(expected.prompt_ids)
    for given in (whole, whole[: whole.rindex(header)]):
        with pytest.warns(UserWarning, match="chat-templated already"):
            assert sft(tokenizer, [Example(given, response=header + "4" + TEMPLATES[name][2])]) == [expected]


@pytest.mark.filterwarnings("ignore:.*chat-templated already")
@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("chosen, rejected", [("blue", "red"), ("It is blue", "It is red"), ("a\n b", "a\n c d")])
def test_templated_pairs_without_a_prompt_column(tmp_path, name, chosen, rejected):
    tokenizer, end = byte_tokenizer(name), TEMPLATES[name][2]
    texts = [rendered(tokenizer, [user("sky?"), assistant(text)], None, end) for text in (chosen, rejected)]
    (example,) = load(tmp_path, {"chosen": texts[0] + "\n", "rejected": texts[1] + "\n"})
    (encoded,), _ = preference_pairs([example], tokenizer, UNLIMITED, "auto", stop_token_ids(tokenizer))
    for ids, text in zip((encoded.chosen_ids, encoded.rejected_ids), texts, strict=True):
        assert tokenizer.decode(encoded.prompt_ids + ids) == text
        assert (encoded.prompt_ids + ids).count(tokenizer.convert_tokens_to_ids(end)) == text.count(end)


def test_what_only_mentions_marks_is_no_templated_prompt():
    for name, text in (
        ("ChatML", "what does <|im_start|>user mean, and <|im_end|>?"),
        ("Llama-2", "[INST] is a mark"),
        ("Zephyr", "<|user|> is a mark"),
        ("Gemma", "is <start_of_turn>model"),
    ):
        tokenizer = byte_tokenizer(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (prompt,), _ = prompts([Example(text)], tokenizer, UNLIMITED, "auto")
        assert not any("templated" in str(warning.message) for warning in caught)
        assert prompt.prompt_ids == prompts([Example((user(text),))], tokenizer, UNLIMITED, "auto")[0][0].prompt_ids
        assert text in tokenizer.decode(prompt.prompt_ids)


def test_what_another_template_has_rendered_is_said_to_be_rendered_once_more():
    tokenizer, texts = byte_tokenizer("ChatML"), []
    for name in ("Llama-2", "Llama-3", "Gemma", "Zephyr", "Phi-3"):
        other = byte_tokenizer(name)
        texts.append(render(other, [user("sky?")], None, add_generation_prompt=True))
    own = render(tokenizer, [user("sky?")], None, add_generation_prompt=True)
    told = "x.jsonl: 1 prompts hold text that some chat template has rendered.* once more, the first x.jsonl:2: '"
    for prompt in (*texts, own.replace("\n", " "), (user(own), assistant("blue"), user("why?"))):
        with pytest.warns(UserWarning, match=told):
            prompts([Example(prompt, origin="x.jsonl:2")], tokenizer, UNLIMITED, "auto")
    for prompt in ("<user>sky?</user>", "<s>user</s>", "[INST] [INST]", "<|a|> what users <|b|>", "<html><body>human"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prompts([Example(prompt)], tokenizer, UNLIMITED, "auto")
        assert not any("some chat template" in str(warning.message) for warning in caught)


def test_templated_prompts_of_a_tokenizer_without_template():
    tokenizer = byte_tokenizer("ChatML")
    text = render(tokenizer, [user("sky?")], None, add_generation_prompt=True)
    ids, tokenizer.chat_template = tokenizer(text).input_ids, None
    with pytest.warns(UserWarning, match="1 prompts are chat-templated already"):
        (sequence,) = sft(tokenizer, [Example(text, response="blue<|im_end|>")])
    assert sequence.prompt_ids == ids and sequence.response_ids == tokenizer("blue<|im_end|>").input_ids
    for text in (
        "what is <|im_end|> and <|im_start|>user?",
        "<|im_end|>\n<|im_start|>user\nhi",
        "<|im_start|>user\nhi",
    ):
        with pytest.warns(
            UserWarning, match="special tokens that stand in the text of 1 rows stay text, the first x:9"
        ):
            (sequence,) = sft(tokenizer, [Example(text, response="blue", origin="x:9")])
        assert count_special(tokenizer, sequence.prompt_ids) == 0
