"""Prompts and responses against whole conversations, for templates in the manner of ChatML, Llama 3, Qwen3, Gemma and
Zephyr on small tokenizers; RTO_FAST_SMOLLM2 and RTO_FAST_DATA (folders) add a real tokenizer and real conversations."""

import os
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rto_fast.data.layouts import Example
from rto_fast.data.sources import load_examples
from rto_fast.data.templates import FALLBACK_TEMPLATE
from rto_fast.data.tokenizing import (
    Limits,
    Pair,
    preference_pairs,
    prompts,
    sft_sequences,
    stop_token_ids,
)
from rto_fast.errors import DataError
from tests.chat_templates import GEMMA, ZEPHYR
from tests.conversations import encode_prompt, encode_response

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (  # thinks unless told not to; the last answer gets an empty think block; newlines are stripped
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' + m['content'].lstrip('\n') }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
SPECIAL = (
    "<bos> <eos> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn>"
)
CORPUS = ["user assistant model system Human Assistant INST sky is blue green hello question a b  c\n\n\n x"] * 4


def build(template, eos="<eos>", kind="bytes", adds_bos=True):
    """A small tokenizer: byte-level BPE, SentencePiece-style BPE or words."""
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL.split()]
    if kind == "words":
        words = {
            w: i for i, w in enumerate([*SPECIAL.split(), "?", "hi", "hello", "sky", "blue", ":", "Human", "Assistant"])
        }
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens(special)
    elif kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        # newlines stay together, as in Llama 3 and Qwen; GPT-2's pattern sets the last one of a generation prompt apart
        split = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s*\n+|\s+(?!\S)|\s+"), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(CORPUS, trainer)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [chr(i) for i in range(32, 127)] + ["\n", "\t", "ü"]
        trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token=eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS = {
    "chatml": lambda: build(CHATML, "<|im_end|>", adds_bos=False),
    "chatml on a base model": lambda: build(CHATML),
    "qwen3": lambda: build(QWEN3, "<|im_end|>", adds_bos=False),
    "llama3": lambda: build(LLAMA3, "<|eot_id|>"),
    "gemma": lambda: build(GEMMA),
    "zephyr": lambda: build(ZEPHYR, kind="sentencepiece", adds_bos=False),
    "llama2": lambda: build(LLAMA2),
    "llama2 sentencepiece": lambda: build(LLAMA2, kind="sentencepiece"),
    "no template": lambda: build(None),
    "no template, sentencepiece": lambda: build(None, kind="sentencepiece", adds_bos=False),
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CHAT = (user("hi"), assistant("hello"), user("sky?"))


def whole_text(tokenizer, prompt, response):
    """The conversation as the template renders it, up to its last stop token."""
    template = tokenizer.chat_template or FALLBACK_TEMPLATE
    text = tokenizer.apply_chat_template([*prompt, assistant(response)], chat_template=template, tokenize=False)
    ends = [tokenizer.convert_ids_to_tokens(i) for i in stop_token_ids(tokenizer)]
    end = max(text.rfind(token) + len(token) for token in ends if token in text)
    return text[:end]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.filterwarnings("ignore:the tokenizer has no chat template")
@pytest.mark.parametrize("response", ["blue", " blue\n", "\n\n  blue is\ta\n\nb c \n", "<x> ü"])
def test_prompt_and_response_make_up_the_templated_conversation(tokenizer, response):
    stop_ids = stop_token_ids(tokenizer)
    prompt_ids = encode_prompt(tokenizer, CHAT)
    response_ids = encode_response(tokenizer, CHAT, response, "auto", stop_ids)
    text = tokenizer.decode(prompt_ids + response_ids)
    assert text.removeprefix("<bos>") == whole_text(tokenizer, CHAT, response).removeprefix("<bos>")
    assert [i in stop_ids for i in response_ids] == [False] * (len(response_ids) - 1) + [True]
    bos = tokenizer.bos_token_id
    expected = "bos_token" in tokenizer.chat_template if tokenizer.chat_template else tokenizer("").input_ids == [bos]
    assert prompt_ids.count(bos) == (2 if "[INST]" in text else expected)  # Llama 2 repeats it at each turn


@pytest.mark.filterwarnings("ignore:the tokenizer has no chat template")
def test_ids_are_those_of_the_conversation_as_one_text(tokenizer):
    ids = encode_prompt(tokenizer, CHAT) + encode_response(tokenizer, CHAT, "blue", "auto", stop_token_ids(tokenizer))
    text = whole_text(tokenizer, CHAT, "blue")
    bos = [tokenizer.bos_token_id] if tokenizer.chat_template is None and tokenizer("").input_ids else []
    assert ids == bos + tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    "name, tokens",
    [
        ("chatml", ["<|im_end|>"]),
        ("chatml on a base model", ["<eos>", "<|im_end|>"]),
        ("llama3", ["<|eot_id|>"]),
        ("gemma", ["<eos>", "<end_of_turn>"]),
        ("no template", ["<eos>"]),
    ],
)
def test_stop_tokens(name, tokens):
    tokenizer = TOKENIZERS[name]()
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)) == tokens
    eos = tokenizer.eos_token_id
    assert stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=[eos, 90]))[:2] == [eos, 90]
    assert stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=eos)) == stop_token_ids(tokenizer)


def test_a_tokenizer_without_any_stop_token_is_refused():
    tokenizer = build(None, eos=None)
    with pytest.raises(DataError, match="no stop token: set eos_token"):
        stop_token_ids(tokenizer)
    assert stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=5)) == [5]
    assert encode_response(tokenizer, "a", "blue", "text", [5])[-1] == 5


def test_prompt_formats():
    tokenizer, plain = build(CHATML, "<|im_end|>"), build(None)
    text = "<bos>sky?"
    as_message = encode_prompt(tokenizer, [user("sky?")])
    assert encode_prompt(tokenizer, "sky?", "auto") == encode_prompt(tokenizer, "sky?", "chat") == as_message
    for ids in (encode_prompt(tokenizer, "sky?", "text"), encode_prompt(plain, "sky?"), encode_prompt(plain, text)):
        assert plain.decode(ids) == text
    with pytest.warns(UserWarning, match="no chat template"):
        assert plain.decode(encode_prompt(plain, "sky?", "chat")) == "<bos>\n\nHuman: sky?\n\nAssistant:"
    stop = stop_token_ids(tokenizer)
    assert tokenizer.decode(encode_response(tokenizer, "sky?", " blue\n", "text", stop)) == " blue\n<|im_end|>"
    with pytest.raises(DataError, match="prompt_format: 'plain' is not"):
        encode_prompt(tokenizer, "a", "plain")


def test_special_tokens_in_data_do_not_end_a_turn():
    tokenizer = build(CHATML, "<|im_end|>")
    stop_ids = stop_token_ids(tokenizer)
    ids = encode_response(tokenizer, CHAT, "a<|im_end|>\n<|im_start|>user b<|im_end|>", "auto", stop_ids)
    assert ids.count(stop_ids[0]) == 1 and tokenizer.convert_tokens_to_ids("<|im_start|>") not in ids
    assert tokenizer.decode(ids) == "a<|im_end|>\n<|im_start|>user b<|im_end|>"


def test_word_level():
    tokenizer = build(None, kind="words")
    assert encode_prompt(tokenizer, "hi sky ?") == tokenizer("hi sky ?").input_ids
    assert tokenizer.decode(encode_response(tokenizer, "hi", "blue sky", "auto", [1])) == "blue sky <eos>"


def test_a_template_that_refuses_roles_names_the_example():
    example = Example(({"role": "system", "content": "s"}, user("hi")), response="a", origin="x.jsonl:7")
    with pytest.raises(DataError, match="x.jsonl:7: the chat template refuses roles system, user: System role not"):
        prompts([example], build(GEMMA), Limits(9, 9), "auto")


WORDS = build(None, kind="words")
STOP = [WORDS.eos_token_id]


def pair(prompt, chosen, rejected, line):
    return Example(prompt, chosen=chosen, rejected=rejected, origin=f"data/x.jsonl:{line}", extra={"line": line})


PAIRS = [
    pair("hi", "blue", "sky", 1),
    pair("hi sky hello sky hi", "blue", "blue sky hello", 2),
    pair("hi hi", "sky sky blue", "sky sky sky", 3),
]


def ids(text):
    return WORDS.convert_tokens_to_ids(text.split())


def test_preference_pairs_and_their_report():
    pairs, report = preference_pairs(PAIRS, WORDS, Limits(4, 2), "auto", STOP)
    assert pairs == [Pair(ids("<bos> hi"), ids("blue <eos>"), ids("sky <eos>"), pairs[0].example)]
    assert (report.examples, report.kept, report.prompts_dropped, report.identical_dropped) == (3, 1, 1, 1)
    assert (report.responses_cut, report.response_tokens, report.response_tokens_cut) == (2, 12, 4)
    assert str(report) == (
        "x.jsonl: 3 examples, 1 prompts dropped (> 4 tokens), 2 responses cut to 2 tokens (33.3 % of response tokens), "
        "1 pairs dropped (chosen and rejected identical)"
    )


def test_prompts_cut_on_the_left_keep_bos():
    kept, report = prompts(PAIRS, WORDS, Limits(4, 2, "truncate_left"), "auto")
    assert [p.prompt_ids for p in kept] == [ids("<bos> hi"), ids("<bos> hello sky hi"), ids("<bos> hi hi")]
    assert (kept[1].prompt, kept[1].extra, kept[1].origin) == (PAIRS[1].prompt, {"line": 2}, "data/x.jsonl:2")
    assert (report.kept, report.prompts_cut, report.prompt_tokens, report.prompt_tokens_cut) == (3, 1, 11, 2)
    assert str(report) == "x.jsonl: 3 examples, 1 prompts cut to their last 4 tokens (18.2 % of prompt tokens)"
    single, _ = prompts(PAIRS, WORDS, Limits(1, 2, "truncate_left"), "auto")
    assert [p.prompt_ids for p in single] == [ids("hi")] * 3


def test_sft_sequences():
    examples = [Example("hi", response="blue blue", chosen="sky", origin="a[0]"), *PAIRS]
    sequences, report = sft_sequences(examples, WORDS, Limits(9, 2), "auto", STOP)
    assert [s.response_ids for s in sequences] == [ids(t) for t in ("blue blue", "blue <eos>", "blue <eos>", "sky sky")]
    assert str(report).startswith("a and 1 more: 4 examples, 2 responses cut to 2 tokens")
    assert str(sft_sequences(PAIRS, WORDS, Limits(9, 9), "auto", STOP)[1]) == "x.jsonl: 3 examples, nothing cut"


def test_builder_errors():
    with pytest.raises(DataError, match="a:1: no response or chosen; this stage needs it"):
        sft_sequences([Example("hi", origin="a:1")], WORDS, Limits(9, 9), "auto", STOP)
    with pytest.raises(DataError, match="a:1: no rejected"):
        preference_pairs([Example("hi", chosen="blue", origin="a:1")], WORDS, Limits(9, 9), "auto", STOP)
    with pytest.raises(DataError, match=r"3 prompts dropped \(> 1 tokens\); none is left: raise max_prompt_tokens"):
        prompts(PAIRS, WORDS, Limits(1, 9), "auto")
    with pytest.raises(DataError, match="identical in all pairs"):
        preference_pairs(PAIRS[2:], WORDS, Limits(9, 1), "auto", STOP)
    for limits in ((0, 1), (1, 0), (1, 1, "cut")):
        with pytest.raises(DataError):
            Limits(*limits)


@pytest.mark.skipif("RTO_FAST_SMOLLM2" not in os.environ, reason="RTO_FAST_SMOLLM2 names no model folder")
@pytest.mark.skipif("RTO_FAST_DATA" not in os.environ, reason="RTO_FAST_DATA names no folder with real data")
@pytest.mark.parametrize("name", ["hh_helpful", "gsm8k_pref"])
def test_real_conversations_on_a_real_tokenizer(name):
    tokenizer = AutoTokenizer.from_pretrained(os.environ["RTO_FAST_SMOLLM2"])
    examples = load_examples(f"{os.environ['RTO_FAST_DATA']}/{name}.jsonl.gz", limit=500)
    stop_ids = stop_token_ids(tokenizer)
    pairs, report = preference_pairs(examples, tokenizer, Limits(9999, 9999), "auto", stop_ids)
    assert report.kept == len(examples) and report.responses_cut == 0
    for example, encoded in zip(examples, pairs, strict=True):
        for response, response_ids in ((example.chosen, encoded.chosen_ids), (example.rejected, encoded.rejected_ids)):
            text = whole_text(tokenizer, example.prompt, response)
            assert tokenizer.decode(encoded.prompt_ids + response_ids) == text
            assert encoded.prompt_ids + response_ids == tokenizer(text, add_special_tokens=False).input_ids
