"""Prompts and responses against what chat templates render: thoughts, tools, stop tokens, and special tokens in data."""

import json
import warnings

import pytest
import torch
from tokenizers import AddedToken

from rto_fast.config import DataConfig
from rto_fast.data import __main__ as data_command
from rto_fast.data.cleaning import prompt_key, without_duplicates
from rto_fast.data.run_data import RunData
from rto_fast.data.sources import DataError, Example, load_examples
from rto_fast.data.special_tokens import SpecialTokens
from rto_fast.data.templates import UNKNOWN
from rto_fast.data.tokenizing import Limits, Prompt, preference_pairs, prompts, sft_sequences, stop_token_ids
from rto_fast.data.world import build_tokenizer
from rto_fast.evaluation import samples
from rto_fast.reporting.markup import conversation
from rto_fast.rewards import Completion, RewardModel, completions_of_pairs
from tests.chat_templates import TEMPLATES, byte_tokenizer, space_tokenizer

UNLIMITED = Limits(10**6, 10**6)
THOUGHT = "<think>\ntwo and two\n</think>\n\n4"


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text} | more


def call(**arguments):
    return {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": arguments}}


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": {}}}]
SYSTEM = {"role": "system", "content": "Be brief."}
RESULT = {"role": "tool", "content": "blue sky", "tool_call_id": "abcdefghi", "name": "weather"}
HISTORY = [user("hi"), assistant("hello"), user("2+2?")]
CONVERSATIONS = {  # name: messages, the last of which is the response, and the tools
    "plain": ([user("sky?"), assistant("blue")], None),
    "turns": ([*HISTORY, assistant("4\n\n it is")], None),
    "space": ([*HISTORY, assistant(" \n 4 \n")], None),
    "system": ([SYSTEM, *HISTORY, assistant("4")], None),
    "thought": ([*HISTORY, assistant(THOUGHT)], None),
    "thoughts before": (
        [user("1+1?"), assistant("<think>\none\n</think>\n\n2"), user("2+2?"), assistant(THOUGHT)],
        None,
    ),
    "empty thought": ([*HISTORY, assistant("<think>\n\n</think>\n\n4")], None),
    "reasoning": ([*HISTORY, assistant("4", reasoning_content="two and two")], None),
    "call": ([user("weather?"), assistant(None, tool_calls=[call(city="Paris")])], TOOLS),
    "text and call": ([user("weather?"), assistant("I look.", tool_calls=[call(city="Paris")])], TOOLS),
    "result": (
        [user("weather?"), assistant(None, tool_calls=[call(city="Zürich")]), RESULT, assistant("It is blue")],
        TOOLS,
    ),
}
NO_CALLS = ("ChatML", "ChatML on a base model", "Llama-2", "Llama-3", "Gemma", "Zephyr", "Phi-3")
REFUSED = {  # of these, prompt and response cannot be what the template renders, or nothing of the response is
    *((name, "call") for name in NO_CALLS),
    *(("R1-distill", kind) for kind in ("thought", "thoughts before", "reasoning")),
    ("R1, thoughts kept", "reasoning"),
    ("Llama-2", "result"),
    ("Gemma", "system"),
    ("Mistral", "system"),
}


def rendered(tokenizer, messages, tools, end):
    """The conversation as the template renders it, up to the token that ends it; in the first form it takes."""
    forms = []
    for change in (
        without_content,
        lambda message: message,
        lambda message: message | {"content": message["content"] or ""},
    ):
        forms += [[change(message) for message in messages], [change(as_text(message)) for message in messages]]
    for form in forms:
        try:
            text = render(tokenizer, form, tools)
        except Exception:
            continue
        return text[: text.rindex(end) + len(end)]
    return None


def without_content(message):
    return {key: value for key, value in message.items() if value is not None}


def render(tokenizer, messages, tools, **options):
    from transformers.utils.chat_template_utils import render_jinja_template

    values = {"conversations": [messages], "tools": tools, "chat_template": tokenizer.chat_template}
    return render_jinja_template(**values, **tokenizer.special_tokens_map, **options)[0][0]


def as_text(message):
    calls = [
        c | {"function": c["function"] | {"arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False)}}
        for c in message.get("tool_calls", [])
    ]
    return message | ({"tool_calls": calls} if calls else {})


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tmp_path, *rows, **options):
    return load_examples(write(tmp_path / "x.jsonl", *rows), **options)


def sft(tokenizer, examples, prompt_format="auto", **options):
    return sft_sequences(examples, tokenizer, UNLIMITED, prompt_format, stop_token_ids(tokenizer), **options)[0]


def joined(tokenizer, sequence):
    return tokenizer.decode(sequence.prompt_ids + sequence.response_ids)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", [byte_tokenizer, space_tokenizer])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_response_are_what_the_template_renders(tmp_path, name, conversation, kind):
    tokenizer, end = kind(name), TEMPLATES[name][2]
    messages, tools = CONVERSATIONS[conversation]
    examples = load(tmp_path, {"messages": messages, "tools": tools})
    if (name, conversation) in REFUSED:
        with pytest.raises(DataError, match=r"x.jsonl:1: (the chat template|empty response)"):
            sft(tokenizer, examples)
        return
    (sequence,) = sft(tokenizer, examples)
    assert joined(tokenizer, sequence) == rendered(tokenizer, messages, tools, end)
    stop_ids = stop_token_ids(tokenizer)
    ids = sequence.response_ids
    assert [i in stop_ids for i in ids] == [False] * (len(ids) - 1) + [True] and ids[
        -1
    ] == tokenizer.convert_tokens_to_ids(end)
    (prompt,) = prompts(examples, tokenizer, UNLIMITED, "auto")[0]
    assert prompt.prompt_ids == sequence.prompt_ids  # rollouts start where training did


# Stop tokens that the data spell out


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
    ],
)
@pytest.mark.parametrize("prompt_format", ["chat", "text"])
@pytest.mark.filterwarnings("ignore:.*renders the same without weight")
def test_stop_tokens_in_the_data_are_one_stop_token(ending, prompt_format):
    tokenizer = byte_tokenizer("ChatML on a base model")
    end = "<|im_end|>" if prompt_format == "chat" else "</s>"
    for response in ("Paris." + ending, assistant("Paris." + ending, weight=1)):
        (sequence,) = sft(tokenizer, [Example("city?", response=response)], prompt_format)
        assert sequence.response_ids == tokenizer("Paris." + end).input_ids


def test_what_is_no_stop_token_at_the_end_stays():
    tokenizer = byte_tokenizer("ChatML")
    for text in ("Paris. \n", "a<|im_end|>\nb", "a</s>"):
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


# Thoughts


def pair(chosen, rejected, prompt="2+2?"):
    return Example(prompt, chosen=chosen, rejected=rejected, origin="x.jsonl:7")


def sides(tokenizer, example, **options):
    (encoded,), _ = preference_pairs([example], tokenizer, UNLIMITED, "auto", stop_token_ids(tokenizer), **options)
    return [tokenizer.decode(ids) for ids in (encoded.prompt_ids, encoded.chosen_ids, encoded.rejected_ids)]


def test_both_sides_of_a_pair_follow_one_prompt():
    prompt, chosen, rejected = sides(byte_tokenizer("Qwen3"), pair(THOUGHT, "5"))
    assert prompt.endswith("assistant\n")
    assert (chosen, rejected) == (THOUGHT + "<|im_end|>", "<think>\n\n</think>\n\n5<|im_end|>")
    with pytest.warns(UserWarning, match="generation prompt opens a thought .'<think>'.*prompts end before it"):
        prompt, chosen, rejected = sides(byte_tokenizer("R1, thoughts kept"), pair(THOUGHT, "5"))
    assert prompt.endswith("<|Assistant|>") and (chosen, rejected) == (THOUGHT + "</s>", "5</s>")


def test_a_thought_that_the_prompt_opened_may_lack_its_first_mark():
    rest = THOUGHT.removeprefix("<think>\n")
    for name in ("Qwen3", "R1, thoughts kept"):
        tokenizer = byte_tokenizer(name)
        assert sides(tokenizer, pair(rest, rest + "!")) == sides(tokenizer, pair(THOUGHT, THOUGHT + "!"))


@pytest.mark.parametrize(
    "name, response, mode, message",
    [
        ("Qwen3", THOUGHT, "off", "the prompt ends without a thought, the response has one: .*set data.thinking to on"),
        (
            "R1, thoughts kept",
            "4",
            "on",
            "the prompt opens a thought, the response has none: .*set data.thinking to off",
        ),
        (
            "R1-distill",
            THOUGHT,
            "auto",
            "leaves out the response's thought 'two and two': behind .* the prompt has '<think>",
        ),
    ],
)
def test_a_response_that_cannot_follow_its_prompt_is_refused_or_counted(tmp_path, name, response, mode, message):
    tokenizer = byte_tokenizer(name)
    fits = {"on": THOUGHT, "off": "4", "auto": THOUGHT}[mode]
    rows = [{"prompt": f"{i}?", "response": fits if i == 3 and mode != "auto" else response} for i in range(4)]

    def demonstrations(**options):
        config = DataConfig(sft=write(tmp_path / "x.jsonl", *rows), thinking=mode, cache_dir=None, **options)
        data = RunData(config, tokenizer, stop_token_ids(tokenizer), said.append)
        return data.sft

    said = []
    with pytest.raises(DataError, match=f"x.jsonl:1: {message}|{message}"):
        demonstrations()
    if mode == "auto":
        with pytest.raises(DataError, match="4 unusable skipped .*none is left"):
            demonstrations(invalid="skip")
    else:
        assert len(demonstrations(invalid="skip")) == 1
        assert "3 unusable skipped (the first: " in said[-1] and "x.jsonl:1: the prompt" in said[-1]


@pytest.mark.filterwarnings("ignore:the chat template's generation prompt")
@pytest.mark.parametrize("name", ["Qwen3", "R1, thoughts kept", "ChatML"])
@pytest.mark.parametrize("chosen", [THOUGHT, "4", None])
def test_prompts_of_rollouts_end_as_those_that_were_trained_on(tmp_path, name, chosen):
    tokenizer = byte_tokenizer(name)
    pairs = [{"prompt": f"{i}+2?", "chosen": chosen or THOUGHT, "rejected": "5"} for i in range(20)]
    alone = [{"prompt": f"{i}-2?"} for i in range(20)]
    config = DataConfig(
        preferences=write(tmp_path / "pairs.jsonl", *pairs) if chosen else None,
        held_out=2,
        cache_dir=None,
        prompts=write(tmp_path / "prompts.jsonl", *alone),
    )
    data = RunData(config, tokenizer, stop_token_ids(tokenizer), lambda text: None)
    ends = {tokenizer.decode(prompt.prompt_ids).partition("?")[2] for prompt in data.prompts + data.eval_prompts}
    if not chosen:  # nothing to agree with: the template's own, without thinking
        assert ends == {
            render(tokenizer, [user("?")], None, add_generation_prompt=True, enable_thinking=False).partition("?")[2]
        }
        return
    assert ends == {tokenizer.decode(pair.prompt_ids).partition("?")[2] for pair in data.pairs + data.held_out_pairs}
    assert ends == {tokenizer.decode(sequence.prompt_ids).partition("?")[2] for sequence in data.sft}


# Tools, and keys of messages


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_calls_and_schemas_come_in_all_the_forms_that_data_sets_store(tmp_path):
    as_json = json.dumps(call(city="Paris")["function"]["arguments"])
    texts = call() | {"function": {"name": "weather", "arguments": as_json}}
    for name in ("Qwen2.5", "Qwen3", "Mistral", "R1-distill"):
        tokenizer, seen = byte_tokenizer(name), set()
        for calls in ([call(city="Paris")], [texts], json.dumps([texts])):
            for tools in (TOOLS, json.dumps(TOOLS), [TOOLS[0]["function"]], [json.dumps(TOOLS[0])]):
                answer = {"role": "assistant", "tool_calls": calls} | ({"content": None} if calls == [texts] else {})
                row = {"prompt": [user("weather?")], "completion": [answer], "tools": tools}
                (sequence,) = sft(tokenizer, load(tmp_path, row))
                seen.add(
                    joined(tokenizer, sequence).replace('{"type": "function", "function": ', "").replace("}}}", "}")
                )
        assert any('"city": "Paris"' in text for text in seen) and len(seen) <= 2, (
            seen
        )  # bare schemas stay bare where taken


def test_what_the_template_does_not_render_is_said_once_with_the_count(tmp_path):
    tokenizer = byte_tokenizer("ChatML")
    rows = [
        {
            "messages": [
                user("weather?"),
                assistant("I look", tool_calls=[call()]),
                RESULT,
                assistant("blue", weight=1),
            ],
            "tools": TOOLS,
        }
    ] * 2 + [{"messages": [user("hi") | {"name": "Ann"}, assistant("4")]}] * 3
    with pytest.warns(UserWarning) as caught:
        sft(tokenizer, load(tmp_path, *rows))
    assert [str(w.message) for w in caught] == [
        "x.jsonl: the chat template renders the same without name (5 rows), tool_call_id (2 rows), tool_calls (2 rows), "
        "tools (2 rows), weight (2 rows)"
    ]
    config = DataConfig(sft=write(tmp_path / "x.jsonl", *rows), cache_dir=None, deduplicate=False)
    data = RunData(config, tokenizer, stop_token_ids(tokenizer), lambda text: None)
    with pytest.warns(UserWarning) as caught:
        assert data.sft and data._build(sft_sequences, data.sft_examples, "again", data.stop_ids)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sft(
            byte_tokenizer("Mistral"),
            load(tmp_path, {"messages": [user("weather?"), assistant(None, tool_calls=[call()])]}),
        )


# Rows that a template refuses

REFUSING = {
    "its own error": ("Gemma", {"messages": [SYSTEM, user("hi"), assistant("4")]}, "System role not supported"),
    "turns": ("Llama-2", {"messages": [user("a"), user("b"), assistant("4")]}, "roles must alternate"),
    "an attribute": (
        "Mistral",
        {"messages": [user("a"), assistant("b"), {"role": "tool", "content": "c"}, assistant("d")]},
        "UndefinedError: 'dict object' has no attribute 'tool_call_id'",
    ),
    "an id": ("Mistral", {"messages": [user("a"), assistant(None, tool_calls=[call() | {"id": "7"}])]}, "ids have 9"),
}


@pytest.mark.parametrize("name", REFUSING)
def test_a_template_that_refuses_a_row_refuses_that_row(tmp_path, name):
    template, row, message = REFUSING[name]
    tokenizer = byte_tokenizer(template)
    good = {"messages": [user("hi"), assistant("4")]}
    with pytest.raises(DataError, match=f"x.jsonl:2: the chat template refuses roles .*: {message}") as caught:
        sft(tokenizer, load(tmp_path, good, row, good))
    assert "\n" not in str(caught.value)
    examples = load(tmp_path, good, row, row, good)
    sequences, report = sft_sequences(examples, tokenizer, UNLIMITED, "auto", stop_token_ids(tokenizer), invalid="skip")
    assert len(sequences) == 2 == report.unusable and "4 examples, 2 unusable skipped (the first: " in str(report)
    assert f"x.jsonl:2: the chat template refuses roles {', '.join(m['role'] for m in row['messages'])}: " in str(
        report
    )
    if name == "its own error":
        kept, _ = prompts(examples, tokenizer, UNLIMITED, "auto", invalid="skip")
        assert [prompt.origin[-2:] for prompt in kept] == [":1", ":4"]


# Special tokens in data


def always_spaces(name):
    return space_tokenizer(name, scheme="always")


def with_token(text, token):
    return f"what is {token}? {text}{token}\n{token}x"


def count_special(tokenizer, ids):
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sum(i in special for i in ids)


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


@pytest.mark.filterwarnings("ignore:.*renders the same without")
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


# Prompts that are chat-templated already


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
        for given in (text, text.removeprefix("<s>"), text.rstrip(), "\n" + text):
            example = Example(given, response="4", chosen="4", rejected="5", origin="x.jsonl:3")
            with pytest.warns(UserWarning, match=r"x.jsonl: 1 prompts are chat-templated already .* first x.jsonl:3: "):
                assert sft_sequences([example], tokenizer, UNLIMITED, prompt_format, stop_ids)[0] == expected
            with pytest.warns(UserWarning, match="chat-templated already"):
                assert (
                    prompts([example], tokenizer, UNLIMITED, prompt_format)[0][0].prompt_ids == expected[0].prompt_ids
                )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (as_message,), _ = prompts([example], tokenizer, UNLIMITED, "chat", thinking=UNKNOWN)
        assert as_message.prompt_ids != expected[0].prompt_ids
        assert given.strip() in tokenizer.decode(as_message.prompt_ids)


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
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (prompt,), _ = prompts([Example(text)], tokenizer, UNLIMITED, "auto")
        assert prompt.prompt_ids == prompts([Example((user(text),))], tokenizer, UNLIMITED, "auto")[0][0].prompt_ids
        assert text in tokenizer.decode(prompt.prompt_ids)


def test_templated_prompts_of_a_tokenizer_without_template():
    tokenizer = byte_tokenizer("ChatML")
    text = render(tokenizer, [user("sky?")], None, add_generation_prompt=True)
    ids, tokenizer.chat_template = tokenizer(text).input_ids, None
    with pytest.warns(UserWarning, match="1 prompts are chat-templated already"):
        (sequence,) = sft(tokenizer, [Example(text, response="blue<|im_end|>")])
    assert sequence.prompt_ids == ids and sequence.response_ids == tokenizer("blue<|im_end|>").input_ids
    (sequence,) = sft(tokenizer, [Example("what is <|im_end|> and <|im_start|>?", response="blue")])
    assert count_special(tokenizer, sequence.prompt_ids) == 0


# What else meets such examples


@pytest.mark.filterwarnings("ignore:.*renders the same without id")
def test_messages_with_more_than_text_are_shown_compared_and_scored(tmp_path, capsys):
    row = {
        "prompt": [user("weather?") | {"id": 1}],
        "tools": json.dumps(TOOLS),
        "chosen": [assistant(None, tool_calls=[call(city="Paris")])],
        "rejected": [assistant("no idea", reasoning_content="which city?")],
    }
    other = json.loads(json.dumps(row).replace("weather?", "Weather  ?").replace('"id": 1', '"id": 2'))
    same = json.loads(json.dumps(row).replace('"id": 1', '"id": 3'))
    examples = load(tmp_path, row, other, same)
    assert examples[0].tools == tuple(TOOLS) and examples[0].extra == {"tools": json.dumps(TOOLS)}
    assert without_duplicates(examples) == examples[:2]
    assert prompt_key(examples[0].prompt) == prompt_key(same["prompt"]) == prompt_key("weather?")
    calling = (*examples[0].prompt, examples[0].chosen, RESULT)
    assert prompt_key(calling) != prompt_key((*examples[0].prompt, RESULT))
    data_command.main([str(tmp_path / "x.jsonl")])
    shown = capsys.readouterr().out
    assert '"city": "Paris"' in shown and "which city?" in shown and "tools     ← tools   (1 in the first)" in shown
    assert '"city": "Paris"' in conversation(json.loads(json.dumps(calling)))
    tokenizer = byte_tokenizer("Qwen3")
    pairs, _ = preference_pairs(examples, tokenizer, UNLIMITED, "auto", stop_token_ids(tokenizer))
    judged = completions_of_pairs(pairs[:1], stop_token_ids(tokenizer), tokenizer)
    assert [c.prompt.prompt for c in judged] == [examples[0].prompt] * 2 and judged[0].prompt.tools == tuple(TOOLS)
    assert '"city": "Paris"' in judged[0].text
    json.dumps(samples(judged, torch.zeros(2), 2))


@pytest.mark.filterwarnings("ignore:.*renders the same without")
def test_a_reward_model_with_another_template_is_shown_tools_and_thoughts(tmp_path):
    policy, judge = byte_tokenizer("Qwen3"), byte_tokenizer("Mistral")
    (example,) = load(tmp_path, {"messages": CONVERSATIONS["result"][0], "tools": TOOLS})
    scorer = RewardModel(None, judge, policy, prompt_format="auto", max_tokens=100)

    def shown(prompt, text, finished=True, tools=example.tools):
        return judge.decode(scorer._ids(Completion(Prompt([1], prompt, {}, "", tools), [2], text, finished)))

    text = rendered(judge, CONVERSATIONS["result"][0], TOOLS, "</s>")
    assert (
        shown(example.prompt, "It is blue") == text
        and shown(example.prompt, "It is blue", False) == text[: -len("</s>")]
    )
    for name in ("R1-distill", "Qwen3", "Llama-2"):  # whatever a policy may sample is scored
        judge = byte_tokenizer(name)
        scorer = RewardModel(None, judge, byte_tokenizer("ChatML"), prompt_format="auto", max_tokens=100)
        for sampled in ("", "<think>\n\n</think>\n\n", "a</think>b", THOUGHT, "<think>\n", "<|im_end|> </s>"):
            assert "2+2?" in shown("2+2?", sampled, tools=None)
    assert shown("2+2?", "4", False) == "<s>[INST] 2+2? [/INST] 4"  # neither the stop token nor the space before it
