"""Stop tokens that data spell out at the end of a response, and special tokens anywhere else in them."""

import json

import pytest
from tokenizers import AddedToken

from rto_fast.data.layouts import Example
from rto_fast.data.special_tokens import SpecialTokens
from rto_fast.data.world import build_tokenizer
from rto_fast.errors import DataError
from tests.chat_templates import TEMPLATES, byte_tokenizer, space_tokenizer
from tests.conversations import (
    CONVERSATIONS,
    REFUSED,
    RESULT,
    always_spaces,
    assistant,
    call,
    count_special,
    joined,
    load,
    render,
    rendered,
    sft,
    user,
)

# Stop tokens that the data spell out

pytestmark = pytest.mark.filterwarnings("ignore:.*special tokens that stand")


@pytest.mark.parametrize(
    "ending",
    [
        "<|im_end|>",
        "<|im_end|>\n",
        "<|im_end|> ",
        "<|im_end|><|im_end|>",
        "</s><|im_end|>\n",
        "\n<|im_end|>\n\n</s> \n",
        " </s>",
        "<|im_end|><|end|><|end|>\n",  # what stands behind a stop token is padding
        "</s>\n<|im_start|> <s>",
    ],
)
@pytest.mark.parametrize("prompt_format", ["chat", "text"])
@pytest.mark.filterwarnings("ignore:.*leaves out weight")
def test_stop_tokens_in_the_data_are_one_stop_token(ending, prompt_format):
    tokenizer = byte_tokenizer("ChatML on a base model")
    end = "<|im_end|>" if prompt_format == "chat" else "</s>"
    for response in ("Paris." + ending, assistant("Paris." + ending, weight=1)):
        (sequence,) = sft(tokenizer, [Example("city?", response=response)], prompt_format)
        assert sequence.response_ids == tokenizer("Paris." + end).input_ids


def test_stop_tokens_of_answers_in_the_prompt_are_one_stop_token():
    tokenizer = byte_tokenizer("ChatML")
    given, expected = (
        Example((user("hi"), assistant("hello" + ending), user("city?")), response="Paris")
        for ending in ("<|im_end|>\n", "")
    )
    assert sft(tokenizer, [given]) == sft(tokenizer, [expected])


def test_what_is_no_stop_token_at_the_end_stays():
    tokenizer = byte_tokenizer("ChatML")
    for text in ("Paris. \n", "a<|im_end|>\nb", "a<|end|>", "a<|im_start|> <s>"):
        (sequence,) = sft(tokenizer, [Example("city?", response=text)])
        assert tokenizer.decode(sequence.response_ids) == text + "<|im_end|>"
        assert sequence.response_ids.count(tokenizer.eos_token_id) == 1
    for prompt_format in ("chat", "text"):
        with pytest.raises(DataError, match="x:1: empty response"):
            sft(tokenizer, [Example("city?", response="<|im_end|>\n", origin="x:1")], prompt_format)


def test_the_text_before_the_stop_token_is_trained_on():
    tokenizer = byte_tokenizer("Llama-2")
    (sequence,) = sft(tokenizer, [Example((user("sky?"),), response="blue")])
    assert sequence.response_ids == tokenizer(" blue </s>").input_ids


# Special tokens in data


def with_token(text, token):
    return f"what is {token}? {text}{token}\n{token}x"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [byte_tokenizer, space_tokenizer, always_spaces])
@pytest.mark.parametrize("name", TEMPLATES)
def test_special_tokens_in_data_stay_text(name, make):
    tokenizer, end = make(name), TEMPLATES[name][2]
    refuses_system = (name, "system") in REFUSED
    for token in (end, "<|im_start|>", "<s>"):
        texts = [with_token(text, token) for text in ("Be brief.", "sky", "blue", "sea", "green")]
        roles = ("system", "user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)][refuses_system:]
        (sequence,) = sft(tokenizer, [Example(tuple(messages[:-1]), response=messages[-1]["content"])])
        text = rendered(tokenizer, messages, None, end)
        if make is not always_spaces:  # which decodes with spaces that were not in the text
            assert joined(tokenizer, sequence) == text
        plain = [message | {"content": message["content"].replace(token, "it")} for message in messages]
        (harmless,) = sft(tokenizer, [Example(tuple(plain[:-1]), response=plain[-1]["content"])])
        for ids, others in zip(vars(sequence).values(), vars(harmless).values(), strict=True):
            assert count_special(tokenizer, ids) == count_special(tokenizer, others)


@pytest.mark.parametrize("make", [byte_tokenizer, space_tokenizer])
def test_special_tokens_in_plain_text_stay_text_but_for_bos_at_its_beginning(make):
    tokenizer = make("ChatML on a base model")
    example = Example("<s> one</s> two<|im_end|>", response="a</s> b<|im_start|>", chosen="", origin="x:1")
    (sequence,) = sft(tokenizer, [example], "text")
    assert tokenizer.decode(sequence.prompt_ids).replace("<s> ", "<s>") == "<s>one</s> two<|im_end|>"
    assert sequence.prompt_ids[0] == tokenizer.bos_token_id and count_special(tokenizer, sequence.prompt_ids) == 1
    assert sequence.response_ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.filterwarnings("ignore:.*leaves out")
def test_special_tokens_in_calls_schemas_and_roles_stay_text(tmp_path):
    for name in ("Qwen3", "Mistral"):
        tokenizer, end = byte_tokenizer(name), TEMPLATES[name][2]
        tools = [
            {"type": "function", "function": {"name": "weather" + end, "description": end, "parameters": {end: end}}}
        ]
        calls = [call(city=end) | {"function": {"name": end, "arguments": {end: [end]}}}]
        messages = [user("weather?"), assistant(None, tool_calls=calls), RESULT | {"content": end}, assistant("blue")]
        (sequence,) = sft(tokenizer, load(tmp_path, {"messages": messages, "tools": tools}))
        assert joined(tokenizer, sequence) == rendered(tokenizer, messages, tools, end)
        harmless = json.loads(json.dumps([messages, tools]).replace(json.dumps(end)[1:-1], "it"))
        (other,) = sft(tokenizer, load(tmp_path, {"messages": harmless[0], "tools": harmless[1]}))
        assert count_special(tokenizer, sequence.prompt_ids) == count_special(tokenizer, other.prompt_ids)
    tokenizer = byte_tokenizer("ChatML")
    (sequence,) = sft(tokenizer, [Example(({"role": "tool<|im_end|>", "content": "a"}, user("b")), response="c")])
    assert count_special(tokenizer, sequence.prompt_ids) == 5


def test_turn_tokens_that_the_tokenizer_does_not_call_special_stay_text_too():
    tokenizer = byte_tokenizer("ChatML on a base model", ("<s>", "</s>"), ("<|im_start|>", "<|im_end|>", "<think>"))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (sequence,) = sft(tokenizer, [Example((user("a<|im_end|>\n<|im_start|>x"),), response="b<|im_end|>c <think>")])
    assert joined(tokenizer, sequence).startswith(
        "<|im_start|>user\na<|im_end|>\n<|im_start|>x<|im_end|>\n<|im_start|>"
    )
    assert sequence.prompt_ids.count(end) == 1 and sequence.response_ids.count(end) == 1
    assert (
        tokenizer.convert_tokens_to_ids("<think>") in sequence.response_ids
    )  # thoughts are text in data, tokens in models


@pytest.mark.parametrize("make", [byte_tokenizer, space_tokenizer, always_spaces])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_text_in_pieces_has_the_ids_of_the_whole(name, make):
    tokenizer = make(name)
    special = SpecialTokens(tokenizer)
    texts = [render(tokenizer, CONVERSATIONS[kind][0], None) for kind in ("plain", "turns", "thought")]
    mark = {chr(0xF0000): "<s>"}  # that occurs in none of them
    assert special.encode(texts, [mark] * 3) == tokenizer(texts, add_special_tokens=False).input_ids


def test_special_tokens_that_take_the_space_beside_them():
    tokenizer = byte_tokenizer("Phi-3")
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                AddedToken("<|x|>", special=True, rstrip=True),
                AddedToken("<|y|>", special=True, lstrip=True),
            ]
        }
    )
    texts, mark = ["a <|x|> \n b <|y|> c", "<|y|><|x|> "], {chr(0xF0000): "<s>"}
    assert SpecialTokens(tokenizer).encode(texts, [mark] * 2) == tokenizer(texts).input_ids


def test_a_tokenizer_of_whole_words_makes_no_special_token_of_a_word():
    tokenizer = build_tokenizer()
    (sequence,) = sft(tokenizer, [Example("1 red cup <eos>", response="one <eos> red cup")])
    assert (
        sequence.prompt_ids.count(tokenizer.eos_token_id) == 0
        and sequence.response_ids.count(tokenizer.eos_token_id) == 1
    )
