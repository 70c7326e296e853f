"""Prompts and responses against what chat templates render: thoughts, tools, and rows that a template refuses."""

import json
import warnings

import pytest

from rto_fast.config import DataConfig
from rto_fast.data.layouts import Example
from rto_fast.data.run_data import RunData
from rto_fast.data.templates import THOUGHTS
from rto_fast.data.tokenizing import preference_pairs, prompts, sft_sequences, stop_token_ids
from rto_fast.errors import DataError
from tests.chat_templates import TEMPLATES, byte_tokenizer, space_tokenizer
from tests.conversations import (
    CONVERSATIONS,
    REFUSED,
    RESULT,
    SYSTEM,
    THOUGHT,
    TOOLS,
    UNLIMITED,
    assistant,
    call,
    joined,
    load,
    render,
    rendered,
    sft,
    user,
    write,
)


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


@pytest.mark.filterwarnings("ignore:the chat template's generation prompt")
def test_every_thought_of_the_data_opens_where_prompts_end_before_it():
    tokenizer = byte_tokenizer("R1, thoughts kept")
    rest = THOUGHT.removeprefix("<think>\n")
    prompt, chosen, rejected = sides(tokenizer, pair(rest, "5"))
    assert prompt.endswith("<|Assistant|>") and (chosen, rejected) == (THOUGHT + "</s>", "5</s>")
    for thought in ("<think>two</think>4", " <think>\ntwo\n</think>\n\n4"):
        prompt, *answers = sides(tokenizer, pair(thought, THOUGHT))
        assert prompt.endswith("<|Assistant|>") and answers == [thought + "</s>", THOUGHT + "</s>"]
    prompt, chosen, _ = sides(byte_tokenizer("Qwen3"), pair("<think>two</think>4", THOUGHT))
    assert prompt.endswith("assistant\n") and chosen == "<think>\ntwo\n</think>\n\n4<|im_end|>"


def test_a_thought_that_the_answer_repeats_is_missed_all_the_same():
    for answer in ("4", "2+2 is 4"):
        with pytest.raises(DataError, match="x.jsonl:7: the chat template leaves out the response's thought '4'"):
            sides(byte_tokenizer("R1-distill"), pair(f"<think>4</think>{answer}", "5"))
    with pytest.raises(DataError, match="leaves out the response's thought 'a'"):  # as Assistant has one, too
        sides(byte_tokenizer("R1-distill"), pair("<think>\na\n</think>\n\n4", "<think>\na\n</think>\n\n5"))
    _, chosen, _ = sides(byte_tokenizer("Qwen3"), pair("<think>4</think>4", "5"))
    assert chosen == "<think>\n4\n</think>\n\n4<|im_end|>"
    _, chosen, _ = sides(byte_tokenizer("ChatML"), pair("<think>never closed", "5"))
    assert chosen == "<think>never closed<|im_end|>"


@pytest.mark.parametrize(
    "name, response, mode, message",
    [
        (
            "R1, thoughts kept",
            "<think>two</think>4",
            "on",
            "the prompt opens a thought, the response begins its own otherwise: .*set data.thinking to off",
        ),
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
        "x.jsonl: the chat template (or data.prompt_format) leaves out name (5 rows), tool_call_id (2 rows), "
        "tool_calls (2 rows), tools (2 rows), weight (2 rows)"
    ]
    config = DataConfig(sft=write(tmp_path / "x.jsonl", *rows), cache_dir=None, deduplicate=False)
    data = RunData(config, tokenizer, stop_token_ids(tokenizer), lambda text: None)
    with pytest.warns(UserWarning) as caught:
        assert data.sft and data._build(sft_sequences, data.sft_examples, "again", data.stop_ids)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*special tokens that stand")
        marked = [user("weather?"), assistant(None, tool_calls=[call(city="<|im_end|>")])]
        sft(byte_tokenizer("Qwen3"), load(tmp_path, {"messages": marked}))
        empty = assistant("4", reasoning_content="", tool_calls=[], audio={})
        sft(tokenizer, load(tmp_path, {"messages": [user("hi") | {"name": ""}, empty]}))
        sft(
            byte_tokenizer("Mistral"),
            load(tmp_path, {"messages": [user("weather?"), assistant(None, tool_calls=[call()])]}),
        )


def test_messages_whose_role_the_template_does_not_know_are_said_to_be_left_out(tmp_path):
    told = {"role": "developer", "content": "Be brief."}
    rows = [{"messages": [told, user("sky?"), assistant("blue")]}] * 2 + [{"messages": [user("hi"), assistant("4")]}]
    with pytest.warns(UserWarning, match=r"x.jsonl: .* leaves out messages of role developer \(2 rows\)$"):
        sft(byte_tokenizer("Qwen3"), load(tmp_path, *rows))
    thoughts = [user("1?"), assistant(THOUGHT), user("2?"), assistant("4")]  # R1-distill rewrites them
    for name, messages in (
        ("ChatML", rows[0]["messages"]),
        ("R1-distill", thoughts),
        ("Llama-3", [user(" a "), *thoughts[1:]]),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sft(byte_tokenizer(name), load(tmp_path, {"messages": messages}))
        assert not any("leaves out" in str(warning.message) for warning in caught)


@pytest.mark.filterwarnings("ignore:the chat template's generation prompt")
def test_an_empty_text_beside_calls_is_no_text(tmp_path):
    for name in ("R1-distill", "Qwen3", "Qwen2.5", "Mistral"):
        sequences = [
            sft(
                byte_tokenizer(name),
                load(tmp_path, {"messages": [user("weather?"), assistant(text, tool_calls=[call()])]}),
            )
            for text in ("", None)
        ]
        assert sequences[0] == sequences[1]


def test_plain_text_has_no_place_for_calls_and_schemas():
    tokenizer = byte_tokenizer("Mistral")
    example = Example("weather?", response=assistant("I look", tool_calls=[call()]), tools=tuple(TOOLS), origin="x:1")
    with pytest.warns(
        UserWarning,
        match=r"x: the chat template .or data.prompt_format. leaves out tool_calls \(1 rows\), tools \(1 rows\)",
    ):
        (sequence,) = sft(tokenizer, [example], "text")
    assert tokenizer.decode(sequence.response_ids) == "I look</s>"
    with pytest.raises(
        DataError, match="x:1: empty response: nothing but stop tokens, or tool calls, which plain text"
    ):
        sft(tokenizer, [Example("weather?", response=assistant(None, tool_calls=[call()]), origin="x:1")], "text")


def test_a_form_of_the_message_is_found_that_keeps_its_calls():
    tokenizer = byte_tokenizer("ChatML")
    turn = (
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is none %}{{ m.tool_calls[0].function.name }}{% endif %}"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}" + turn + "{{ m.content or '' }}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    turns = (user("a"), assistant(None, tool_calls=[call()]))
    (sequence,) = sft(tokenizer, [Example(turns[:1], response=turns[1])])
    assert tokenizer.decode(sequence.response_ids) == "weather<|im_end|>"
    (sequence,) = sft(tokenizer, [Example((*turns, user("b")), response="c")])
    assert "assistant\nweather<|im_end|>" in tokenizer.decode(sequence.prompt_ids)


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
    with pytest.raises(DataError, match="the prompt has '<think>.*, the conversation 'b<.im_end.>c</s>'"):
        sft(byte_tokenizer("R1, thoughts kept"), [Example("a", response="b<|im_end|>c")], thinking=THOUGHTS)
    if name == "its own error":
        kept, _ = prompts(examples, tokenizer, UNLIMITED, "auto", invalid="skip")
        assert [prompt.origin[-2:] for prompt in kept] == [":1", ":4"]


def test_rows_held_out_that_a_template_refuses_end_no_run(tmp_path):
    tokenizer = byte_tokenizer("Gemma")
    rows = [{"prompt": [user(f"{i}?")], "chosen": "4", "rejected": "5"} for i in range(12)]
    source = write(tmp_path / "x.jsonl", *rows)
    (held_out,) = RunData(DataConfig(preferences=source), tokenizer, [], print).held_out_examples
    rows[int(held_out.origin.rpartition(":")[2]) - 1]["prompt"].insert(0, SYSTEM)
    said, options = [], {"preferences": write(tmp_path / "x.jsonl", *rows), "cache_dir": None}
    data = RunData(DataConfig(**options, invalid="skip"), tokenizer, stop_token_ids(tokenizer), said.append)
    assert (len(data.pairs), len(data.prompts), data.held_out_pairs, data.eval_prompts) == (11, 11, [], [])
    for what in ("held-out preferences", "evaluation prompts"):
        assert any(f"{what}: none (x.jsonl: 1 examples, 1 unusable skipped (the first: " in line for line in said)
    data = RunData(DataConfig(**options), tokenizer, stop_token_ids(tokenizer), said.append)
    for name in ("held_out_pairs", "eval_prompts"):
        with pytest.raises(DataError, match="x.jsonl:.*the chat template refuses roles system, user"):
            getattr(data, name)
