"""Plain transformers on the models that are written: it stops where they were trained to stop, and scores as they do."""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from rto_fast.batch import pack_whole
from rto_fast.config import LoraConfig
from rto_fast.data.tokenizing import stop_token_ids
from rto_fast.data.world import CHAT_TEMPLATE, build_model, build_tokenizer
from rto_fast.models.attention import PACKED
from rto_fast.models.forward import token_scores
from rto_fast.models.loading import load_model
from rto_fast.models.lora import new_adapter
from rto_fast.models.model import Model
from rto_fast.models.tokens import choose_pad
from rto_fast.rewards import RewardModel
from rto_fast.train import main
from rto_fast.training.saving import save_model
from tests.embedded_world import preference_rows
from tests.tiny_models import world_model, world_scorer

END = 49  # <|im_end|>
PLACEMENT = {"device": "cpu", "dtype": torch.float32}
SHORT = [
    "--threads",
    "1",
    "--data.sft",
    "null",
    "--data.eval_prompts",
    "null",
    "--sft.max_steps",
    "1",
    "--dpo.max_steps",
    "1",
    "--sft.lr",
    "1e-3",
    "--reward_model.lr",
    "1e-3",
    "--dpo.batch_size",
    "8",
    "--reward_model.batch_size",
    "4",
    "--rto.prompts_per_rollout",
    "8",
    "--rto.batch_size",
    "4",
    "--rollout.max_new_tokens",
    "8",
    "--eval.prompts",
    "4",
]


def chatml_tokenizer(pad=None):
    """EOS is <eos>, a turn of the template ends with <|im_end|>, as of Qwen2.5's base model."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(
        [AddedToken("<|im_end|>", special=True), AddedToken("<file>", special=True)], special_tokens=True
    )
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>", "<|im_end|>")
    tokenizer.pad_token = pad or "<pad>"
    return tokenizer


def chatml_model(**settings):
    return world_model(vocab_size=51, **settings)


@pytest.fixture(scope="module", params=["whole", "lora"])
def run(request, tmp_path_factory):
    """All stages, from a base that pads with what ends a turn (as SmolLM2-Instruct does) and stops at <eos> alone."""
    if request.param == "lora":
        pytest.importorskip("peft", reason="LoRA needs PEFT (the lora extra)")
    folder = tmp_path_factory.mktemp("saved")
    chatml_model(pad_token_id=END).save_pretrained(folder / "base")
    chatml_tokenizer("<|im_end|>").save_pretrained(folder / "base")
    # Sampling settings without do_sample: they are widespread, and transformers refuses to write them.
    settings = {"eos_token_id": 1, "temperature": 0.6, "repetition_penalty": 1.1}
    (folder / "base" / "generation_config.json").write_text(json.dumps(settings))
    rows = "".join(json.dumps(row) + "\n" for row in preference_rows(40, seed=3))
    (folder / "pairs.jsonl").write_text(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rto_fast.reporting.finish.report_run", lambda *_: None)
        main(
            [
                *SHORT,
                "--model.path",
                str(folder / "base"),
                "--data.preferences",
                str(folder / "pairs.jsonl"),
                "--rto.iterations",
                "2",
                "--eval.every",
                "1",
                "--eval.keep_best",
                "true",
                "--eval.function",
                "null",
                "--lora.rank",
                "2" if request.param == "lora" else "0",
                "--output_dir",
                str(folder / "out"),
            ]
        )
    return folder / "out"


@pytest.mark.parametrize("name", ["sft", "dpo", "rto", "rto_best"])
def test_transformers_stops_at_every_token_that_ends_a_response(run, name):
    model, tokenizer = (c.from_pretrained(run / name) for c in (AutoModelForCausalLM, AutoTokenizer))
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [1, END]
    assert stop_token_ids(tokenizer, model.generation_config) == [1, END]
    assert (model.generation_config.temperature, model.generation_config.repetition_penalty) == (0.6, 1.1)

    for stop in (1, END):

        def third(input_ids, scores, stop=stop):  # another token until then
            wanted = stop if input_ids.shape[1] == 5 + 2 else 13
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([wanted]), 0.0)

        prompt = torch.tensor([[2, 13, 29, 30, 3]])
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), logits_processor=[third], max_new_tokens=9)
        assert ids[0, 5:].tolist() == [13, 13, stop]
    if (run / name / "adapter").is_dir():
        assert GenerationConfig.from_pretrained(run / name / "adapter").eos_token_id == [1, END]


def padded(tokenizer, sequences, side):
    tokenizer.padding_side = side
    return tokenizer.pad({"input_ids": sequences}, return_tensors="pt")


@torch.no_grad()
def assert_alike(folder, sequences):
    """Scores of plain transformers, alone and in padded batches, are those that we train on: of the last token."""
    model, tokenizer = (c.from_pretrained(folder) for c in (AutoModelForSequenceClassification, AutoTokenizer))
    batch = pack_whole(sequences)
    ours = token_scores(load_model("scorer", folder, trainable=False, **PLACEMENT), batch)[batch.last]
    assert ours.std() > 1e-3  # else any token's score would do
    assert model.config.pad_token_id == tokenizer.pad_token_id < model.get_input_embeddings().weight.shape[0]
    alone = torch.cat([model(torch.tensor([ids])).logits[:, 0] for ids in sequences])
    torch.testing.assert_close(alone, ours, atol=1e-5, rtol=1e-5)
    right, left = (padded(tokenizer, sequences, side) for side in ("right", "left"))
    torch.testing.assert_close(model(right.input_ids).logits[:, 0], ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(**right).logits[:, 0], ours, atol=1e-5, rtol=1e-5)
    # To the left, padding needs a mask: without one any model attends to it. Learned positions move with it.
    positions = (left.attention_mask.cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(model(**left, position_ids=positions).logits[:, 0], ours, atol=1e-5, rtol=1e-5)
    return model, tokenizer


@pytest.mark.parametrize("name", ["reward_model", "rto_critic"])
def test_transformers_scores_what_was_trained(run, name):
    sequences = [[2, 13, 29, 30, 3, 17, END], [2, 10, 3, 18, 25, 9, 22, END], [2, 13, 3, END]]
    _, tokenizer = assert_alike(run / name, sequences)
    assert tokenizer.pad_token == "<pad>" and tokenizer.get_vocab() == chatml_tokenizer().get_vocab()


def words_tokenizer(*special):
    """Words, and special tokens of these roles."""
    words = {f"w{i}": i for i in range(60)} | {"<eos>": 60}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    tokenizer.add_special_tokens({role: "<eos>" for role in special})
    return tokenizer


@pytest.mark.parametrize(
    "special, template, stop_ids, size, pad",
    [
        (["<a>", "<my_pad>", "<b>"], None, [60], 99, "<my_pad>"),
        (["<a>", "<my_pad>", "<b>"], "<my_pad> {{ x }} <a>", [60], 99, "<b>"),  # the others are in use
        (["<a>", "<b>"], None, [60, 61], 99, "<b>"),  # nor one that stops
        (["<a>", "<b>"], None, [60], 61, "<|pad|>"),  # nor one that the model does not know
        ([], None, [60], 61, "<|pad|>"),
    ],
)
def test_the_padding_token_is_one_that_is_not_used(special, template, stop_ids, size, pad):
    for role in ((), ("pad_token",)):
        tokenizer = words_tokenizer(*role)
        tokenizer.add_tokens([AddedToken(token, special=True) for token in special], special_tokens=True)
        tokenizer.chat_template = template
        chosen = choose_pad(tokenizer, stop_ids, size)
        assert chosen.pad_token == pad and chosen.pad_token_id not in stop_ids
        assert tokenizer.pad_token == ("<eos>" if role else None)  # ours is as it was
        assert tokenizer("w3 w9").input_ids == chosen("w3 w9").input_ids
        own = words_tokenizer()
        own.add_special_tokens({"pad_token": "w5"})
        assert choose_pad(own, stop_ids, size).pad_token == "w5"  # one that it has is kept
    llama = words_tokenizer()
    llama.add_special_tokens({"unk_token": "<unk>", "bos_token": "<s>"})  # in its template, but never at the end
    llama.chat_template = "<s>{{ x }}"
    assert choose_pad(llama, [60], 99).pad_token == "<unk>"


SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=8,
    max_position_embeddings=32,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=32,
    eos_token_id=60,
    bos_token_id=60,
    tie_word_embeddings=True,
)
WORDS = [[3, 9, 4, 60], [7, 60], [5, 4, 3, 8, 2, 60]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "lora"])
@pytest.mark.parametrize("special", [(), ("pad_token", "bos_token", "unk_token")], ids=["no pad token", "pad is eos"])
def test_a_vocabulary_without_a_token_to_spare_gets_one(architecture, special, tmp_path):
    """As GPT-2's, whose only special token is <|endoftext|>."""
    tokenizer = words_tokenizer(*special)
    torch.manual_seed(0)
    settings = SIZES | {"initializer_range": 0.3, "pad_token_id": tokenizer.pad_token_id, "num_labels": 1}
    config = AutoConfig.for_model("llama" if architecture == "lora" else architecture, **settings)
    if architecture == "lora":
        pytest.importorskip("peft", reason="LoRA needs PEFT (the lora extra)")
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
        base = load_model("causal_lm", tmp_path / "base", trainable=False, **PLACEMENT)
        model = new_adapter(base, "a", LoraConfig(rank=2), 0, scorer=True)
        model.score.weight.data.normal_()
    else:
        model = AutoModelForSequenceClassification.from_config(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(Model(model), tokenizer, tmp_path / "rm")
    saved, with_pad = assert_alike(tmp_path / "rm", WORDS)
    assert saved.config.vocab_size == len(with_pad) == 62 and with_pad.pad_token_id == 61
    assert model.config.vocab_size == 61  # ours is as it was
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    # It still reads the policy's tokens as they are, scores them, and can be written again.
    assert RewardModel(saved, with_pad, tokenizer, prompt_format="text", max_tokens=99).same_tokens
    save_model(Model(load_model("scorer", tmp_path / "rm", trainable=True, **PLACEMENT)), tokenizer, tmp_path / "again")
    assert assert_alike(tmp_path / "again", WORDS)[0].config.vocab_size == 62


@pytest.mark.parametrize("rank", [0, 2])
def test_a_reward_model_with_a_new_token_scores_and_becomes_a_critic(rank, tmp_path, monkeypatch):
    if rank:
        pytest.importorskip("peft", reason="LoRA needs PEFT (the lora extra)")
    monkeypatch.setattr("rto_fast.reporting.finish.report_run", lambda *_: None)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.pad_token = tokenizer.unk_token = None
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["added_tokens"] = [token for token in core["added_tokens"] if token["content"] == "<eos>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token="<eos>")
    model = build_model(0)
    model.config.pad_token_id = None
    save_model(Model(model), tokenizer, tmp_path / "sft")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(40, seed=3)))
    options = [
        *SHORT,
        "--sft.model",
        str(tmp_path / "sft"),
        "--data.preferences",
        str(tmp_path / "pairs.jsonl"),
        "--rto.dpo_reward_scale",
        "0",
        "--rto.iterations",
        "1",
        "--eval.function",
        "null",
        "--lora.rank",
        str(rank),
    ]
    main([*options, "--output_dir", str(tmp_path / "first")])
    for name in ("reward_model", "rto_critic"):
        assert AutoConfig.from_pretrained(tmp_path / "first" / name).vocab_size == 50
    supplied = ["--reward_model.model", str(tmp_path / "first" / "reward_model")]
    for more in ([], ["--rto.critic", str(tmp_path / "first" / "rto_critic")]):
        main([*options, *supplied, *more, "--output_dir", str(tmp_path / f"second{len(more)}")])
        assert_alike(tmp_path / f"second{len(more)}" / "rto_critic", [[13, 29, 1], [10, 17, 18, 1], [9, 9, 1]])


@pytest.mark.parametrize("pad", [None, 0, END])
def test_a_supplied_reward_model_is_read_as_its_own_forward_pass_reads_it(pad):
    """Also one that was trained elsewhere to pass over the token that ends a turn."""
    model = world_scorer(vocab_size=51, pad_token_id=pad)
    sequences = [[2, 13, 29, 3, 17, END], [2, 10, 3, 0, END, END], [2, 10, 3, 17, 0], [END, END]]
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([ids])).logits[:, 0] for ids in sequences])
    model.set_attn_implementation(PACKED)
    rewards = RewardModel(Model(model), chatml_tokenizer(), chatml_tokenizer(), prompt_format="auto", max_tokens=9)
    rewards._ids = lambda ids: ids
    torch.testing.assert_close(rewards(sequences), expected, atol=1e-5, rtol=1e-5)
