"""Messages that hold more than text: how data store them, and everything that meets them after the tokenizer."""

import json
import warnings

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from rto_fast.data import __main__ as data_command
from rto_fast.data.messages import message_text
from rto_fast.data.run_data import prompt_key, without_duplicates
from rto_fast.data.sources import load_examples
from rto_fast.data.tokenizing import Prompt, preference_pairs, stop_token_ids
from rto_fast.errors import DataError
from rto_fast.evaluation.policies import samples
from rto_fast.reporting.markup import conversation
from rto_fast.rewards import Completion, RewardModel, completions_of_pairs
from tests.chat_templates import byte_tokenizer
from tests.conversations import (
    CONVERSATIONS,
    RESULT,
    THOUGHT,
    TOOLS,
    UNLIMITED,
    assistant,
    call,
    load,
    rendered,
    sft,
    user,
)


@pytest.mark.filterwarnings("ignore:.*leaves out id")
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
    assert (
        '"city": "Paris"' in shown
        and "which city?" in shown
        and "tools     ← tools   (1 in the first example)" in shown
    )
    assert '"city": "Paris"' in conversation(json.loads(json.dumps(calling)))
    tokenizer = byte_tokenizer("Qwen3")
    pairs, _ = preference_pairs(examples, tokenizer, UNLIMITED, "auto", stop_token_ids(tokenizer))
    judged = completions_of_pairs(pairs[:1], stop_token_ids(tokenizer), tokenizer)
    assert [c.prompt.prompt for c in judged] == [examples[0].prompt] * 2 and judged[0].prompt.tools == tuple(TOOLS)
    assert '"city": "Paris"' in judged[0].text
    json.dumps(samples(judged, torch.zeros(2), 2))


@pytest.mark.filterwarnings("ignore:.*leaves out")
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


def test_columnar_files_fill_every_key_of_every_message(tmp_path):
    rows = [
        {
            "messages": [
                user("weather?"),
                {"role": "assistant", "tool_calls": json.dumps([call(city="Paris")])},
                RESULT,
                assistant("blue"),
            ],
            "tools": json.dumps(TOOLS),
            "when": None,
        },
        {"messages": [user("hi"), assistant("4")]},
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    first, second = load_examples(tmp_path / "x.parquet")
    calling = {"role": "assistant", "content": None, "tool_calls": [call(city="Paris")]}
    assert (
        first.prompt == (user("weather?"), calling, RESULT) and first.response == "blue" and first.tools == tuple(TOOLS)
    )
    assert (second.prompt, second.response, second.tools) == ((user("hi"),), "4", None)


def test_calls_in_columnar_files_do_not_get_each_others_arguments(tmp_path):
    calls = [call(city="Paris"), call(place={"x": 1}), call()]
    calls[2]["function"]["arguments"] = {"places": [{"x": 1}, {"y": 2}]}
    rows = [{"messages": [user("sky?"), assistant(None, tool_calls=[c])], "note": None} for c in calls]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    datasets.Dataset.from_parquet(str(tmp_path / "x.parquet"), cache_dir=str(tmp_path / "c")).save_to_disk(
        tmp_path / "d"
    )
    for source in (tmp_path / "x.parquet", tmp_path / "d"):
        examples = load_examples(source)
        assert [example.response["tool_calls"] for example in examples] == [[c] for c in calls]
        assert examples[0].extra == {"note": None}
    (example,) = load(tmp_path, {"messages": [user("sky?"), assistant(None, tool_calls=[call(city=None)])]})
    assert example.response["tool_calls"] == [call(city=None)]  # a null in JSON is meant


def test_the_repeated_prompt_of_whole_conversations_is_found_whatever_else_its_messages_hold(tmp_path):
    prompt = [user("weather?"), assistant(None, tool_calls=[call()]), RESULT]
    chosen = [message | {"id": i} for i, message in enumerate([*prompt, assistant("blue")])]
    rejected = [message | {"id": 9} for message in [*prompt, assistant("red")]]
    for row in ({"chosen": chosen, "rejected": rejected}, {"prompt": prompt, "chosen": chosen, "rejected": rejected}):
        (example,) = load(tmp_path, row)
        assert [message["role"] for message in example.prompt] == ["user", "assistant", "tool"]
        assert (example.chosen, example.rejected) == (assistant("blue", id=3), assistant("red", id=9))
    (example,) = load(tmp_path, {"prompt": "sky?", "completion": [user("sky?") | {"id": 1}, assistant("blue")]})
    assert example.response == "blue"


def test_a_tool_may_return_any_value(tmp_path):
    results = [RESULT | {"content": {"sky": ["blue", 3]}}, RESULT | {"content": None}, RESULT | {"content": [1.5]}]
    calling = assistant(None, tool_calls=[call(city="Paris")])
    examples = load(tmp_path, *({"messages": [user("sky?"), calling, result, assistant("4")]} for result in results))
    for example, result, text in zip(examples, results, ('{"sky": ["blue", 3]}', "", "[1.5]"), strict=True):
        assert example.prompt[-1] == result and message_text(result) == text
        for name, shown in (("Qwen2.5", f"<tool_response>\n{text}\n</tool_response>"), ("ChatML", f"tool\n{text}<|im")):
            tokenizer = byte_tokenizer(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # ChatML leaves out the call
                (sequence,) = sft(tokenizer, [example])
            assert shown in tokenizer.decode(sequence.prompt_ids)


BAD_MESSAGES = {
    "no content": ([user("a"), {"role": "assistant"}], "a message needs text under 'role' and 'content'"),
    "null content": ([user("a"), assistant(None)], "a message needs text under 'role' and 'content'"),
    "no calls": ([user("a"), assistant(None, tool_calls=[])], "a message needs text under 'role' and 'content'"),
    "calls": (
        [user("a"), assistant("b", tool_calls="weather()")],
        "tool_calls must be a list of dicts, or JSON text of one",
    ),
    "one call": ([user("a"), assistant("b", tool_calls=call())], "tool_calls must be a list of dicts"),
    "function call": ([user("a"), assistant("b", function_call=[1])], "function_call must be a dict"),
    "thought alone": ([user("a"), assistant("", reasoning_content="b")], "empty response: messages is ''"),
    "surrogate": (
        [user("a"), assistant(None, tool_calls=[call(city="\ud800")])],
        "response holds half of a surrogate pair",
    ),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_messages_that_cannot_be_read(tmp_path, name):
    messages, error = BAD_MESSAGES[name]
    with pytest.raises(DataError, match=f"x.jsonl:1: .*{error}"):
        load(tmp_path, {"messages": messages})


def test_a_tools_column_is_schemas_or_another_column(tmp_path):
    row = {"messages": [user("a"), assistant("b")]}
    for tools in ("hammer, saw", ["hammer"], "[1]", [], None, ""):
        (example,) = load(tmp_path, row | {"tools": tools})
        assert example.tools is None and example.extra["tools"] == tools
    for tools in (str(TOOLS), [str(TOOLS[0])], json.dumps(TOOLS[0])):
        assert load(tmp_path, row | {"tools": tools})[0].tools == tuple(TOOLS)
    for tools in ('[{"name": "weather"', "[{'name': 'weather'", [TOOLS[0], "saw"]):
        with pytest.raises(
            DataError, match="x.jsonl:1: tools must be a list of function schemas .dicts., or JSON text of one"
        ):
            load(tmp_path, row | {"tools": tools})
    (example,) = load(tmp_path, row | {"functions": TOOLS}, columns={"tools": "functions"})
    assert example.tools == tuple(TOOLS) and example.extra == {}
