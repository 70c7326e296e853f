"""Gates: a run on wrong models stops before its first update, or says what is odd, naming the key to change."""

import json

import pytest
import torch
from transformers import GenerationConfig

from rto_fast import stages
from rto_fast.config import load_config
from rto_fast.data.tokenizing import Pair, Prompt
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.errors import ModelError, TrainingError
from rto_fast.models.agreement import Noise
from rto_fast.models.attention import PACKED
from rto_fast.models.model import Model
from rto_fast.models.supplied import supplied_models
from rto_fast.preflight.checks import check_endings
from rto_fast.rollout import NativeEngine, Sampling
from rto_fast.rto import first_update
from rto_fast.rto.experience import Models, load_models
from rto_fast.rto.trainer import RTOTrainer
from rto_fast.training.loader import Loader
from tests.rto.recorded_log import RecordedLog
from tests.sessions import training_session

TOKENIZER = build_tokenizer()
PROMPTS = [Prompt(ids, "1 red cup", {}) for ids in ([2, 13, 29, 30, 3], [2, 9, 25, 33, 3], [2, 10, 3])]
SHORT = [
    "--config",
    "default",
    "--rto.prompts_per_rollout",
    "3",
    "--rto.samples_per_prompt",
    "4",
    "--rto.batch_size",
    "12",
    "--rto.iterations",
    "2",
    "--rto.advantage",
    "reinforce_pp",
    "--rto.lr",
    "1e-3",
]


def packed(model):
    model.set_attn_implementation(PACKED)
    return model


def build(*options, policy=None, reference=None, dtype=torch.float32):
    config = load_config([*SHORT, *options])
    policy, reference = (packed((model or build_model(0)).to(dtype)) for model in (policy, reference))
    scorer = lambda c: torch.arange(float(len(c)))  # noqa: E731
    models = Models(Model(policy.train()), Model(reference), None, None, None, scorer)
    return RTOTrainer(config, models, TOKENIZER, Sampling(12, stop_ids=(1,)), PROMPTS, "cpu", RecordedLog())


def other_sampler(trainer, scale, noise):
    """The trainer's engine, on a model with another head."""
    model = packed(build_model(0))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        model.lm_head.weight.mul_(scale)
        model.lm_head.weight.add_(noise * torch.randn(model.lm_head.weight.shape, generator=generator))
    trainer.engine = NativeEngine(model, TOKENIZER, trainer.config.rollout)


def stops(trainer, error, *words):
    before = {name: p.clone() for name, p in trainer.models.policy.module.named_parameters()}
    with pytest.raises(error) as caught:
        trainer.step()
    for word in words:
        assert word in str(caught.value)
    assert all(torch.equal(before[name], p) for name, p in trainer.models.policy.module.named_parameters())
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("old_logps", ["auto", "sampler", "recompute"])
def test_a_sound_run_passes_and_the_gate_is_for_its_first_iteration(old_logps, dtype, monkeypatch):
    calls, check = [], first_update.check_ratio
    monkeypatch.setattr(first_update, "check_ratio", lambda *a: (calls.append(float(a[-1]["approx_kl"])), check(*a)))
    trainer = build("--rto.old_logps", old_logps, dtype=dtype)
    trainer.step()
    assert trainer.log.findings == []
    trainer.step()
    assert len(calls) == 1 and calls[0] < (1e-9 if dtype == torch.float32 else 2e-3)


def test_a_sampler_of_other_weights_is_no_policy_of_ours():
    trainer = build("--rto.old_logps", "sampler")
    other_sampler(trainer, 1.0, 0.04)
    stops(trainer, TrainingError, "ratio", "is not 1", "sampler", "rto.old_logps: recompute")
    trainer = build("--rto.old_logps", "auto")  # the samples are weighted, and a warning names the difference
    other_sampler(trainer, 1.0, 0.04)
    trainer.step()
    (finding,) = trainer.log.findings
    assert finding.name == "sampler_is_not_the_policy" and "rollout.engine: hf" in finding.remedy


def test_a_shuffled_head_is_another_model_whatever_is_done_about_a_mismatch():
    trainer = build()
    other_sampler(trainer, -8.0, 0.0)
    stops(trainer, TrainingError, "nats a token from the policy's", "rollout.engine: hf")


def test_a_forward_pass_that_is_not_repeatable_is_found_whatever_the_type():
    for dtype in (torch.float32, torch.bfloat16):
        trainer = build("--rto.old_logps", "recompute", dtype=dtype)
        trainer.models.policy.module.model.norm.register_forward_hook(
            lambda module, inputs, output: output + 0.5 * torch.randn_like(output)
        )
        stops(trainer, TrainingError, "is not 1", "not repeatable")


def test_the_limits_know_clips_dtypes_and_numbers_that_are_none():
    config = load_config([])
    # As measured of a small model in float32, and of SmolLM2-135M in bfloat16.
    exact, rounded = Noise(mean=5e-4, k3=5e-7), Noise(mean=0.0284, k3=0.0014)

    def check(kl, clipped, clip_eps=0.2, sampled=False, noise=exact):
        config.rto.clip_eps = clip_eps
        first_update.check_ratio(config, lambda: noise, sampled, {"approx_kl": kl, "clip_fraction": clipped})

    check(1e-6, 0.0)
    check(3e-3, 0.02, noise=rounded)
    check(3e-3, 0.02, sampled=True)
    check(1e-6, 0.5, clip_eps=0.001)  # so narrow a clip cuts rounding
    for kl, clipped in ((3e-3, 0.0), (1e-6, 0.02), (float("nan"), 0.0), (0.0, float("nan"))):
        with pytest.raises(TrainingError):
            check(kl, clipped)
    with pytest.raises(TrainingError):
        check(0.02, 0.0, sampled=True, noise=rounded)


def test_a_clip_whose_square_is_zero_divides_nothing():
    config = load_config(["--rto.clip_eps_high=1e-320"])
    noise = Noise(mean=0.0, k3=0.0)
    first_update.check_ratio(config, lambda: noise, False, {"approx_kl": 0.0, "clip_fraction": 0.5})


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    near, far = build_model(0), build_model(1)
    with torch.no_grad():
        near.lm_head.weight.add_(
            0.02 * torch.randn(near.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        )
        far.lm_head.weight.mul_(20)
    for name, model in (("sft", build_model(0)), ("near", near), ("far", far)):
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("sft", "near", "far")}


def from_directories(directories, *options):
    config = load_config([*SHORT, "--rto.dpo_reward_scale", "0", *options])
    paths = directories["sft"], directories["near"], None
    loader = Loader(config, {"device": "cpu", "dtype": torch.float32})
    models = load_models(config, *paths, lambda c: torch.arange(float(len(c))), loader)
    return RTOTrainer(config, models, TOKENIZER, Sampling(12, stop_ids=(1,)), PROMPTS, "cpu", RecordedLog())


def test_a_wrong_reference_stops_the_run_and_both_directories_are_named(directories):
    trainer = from_directories(directories, "--rto.ref_model", directories["far"])
    stops(trainer, ModelError, f"starts from {directories['sft']}", directories["far"], "rto.ref_model")
    trainer = from_directories(directories)  # the default, whose weights then turn out to be others
    with torch.no_grad():
        trainer.models.reference.module.lm_head.weight.mul_(1.1)
    stops(trainer, ModelError, f"starts from {directories['sft']}", f"reference is {directories['sft']}", "was changed")


def test_a_reference_that_is_the_start_passes_and_another_is_said(directories):
    trainer = from_directories(directories, "--rto.ref_model", directories["sft"] + "/")
    trainer.step()
    assert trainer.log.findings == []
    trainer = from_directories(directories, "--rto.ref_model", directories["near"])
    trainer.step()
    (finding,) = trainer.log.findings
    assert directories["near"] in finding.what and "rto.ref_model" in finding.remedy
    trainer = from_directories(directories, "--rto.init_from", "dpo")  # whose distance to the reference is its point
    trainer.step()
    assert trainer.log.findings == []


def test_preference_accuracy_is_judged_by_its_interval():
    def finding(right, wrong, ties=0, supplied=True):
        change = torch.tensor([[1.0, 0.0]] * right + [[0.0, 1.0]] * wrong + [[0.0, 0.0]] * ties)
        return stages.preference_finding(change, supplied)

    assert finding(45, 19) is finding(39, 25) is finding(3, 5) is None  # real models; too few to say
    assert finding(20, 44).name == "dense_reward_is_inverted" and "wrong way" in finding(20, 44).what
    assert "dpo.ref_model" in finding(20, 44).remedy and "dpo.lr" in finding(20, 44, supplied=False).remedy
    assert finding(33, 31).name == "dense_reward_is_noise"
    assert finding(0, 0, ties=64).name == "dense_reward_is_noise"  # a DPO model that is its reference


def recorded(folder):
    path = folder / "warnings.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pairs(count, better=17, worse=25):
    return [Pair(PROMPTS[i % 3].prompt_ids, [better, 1], [worse, 1], None) for i in range(count)]


@pytest.mark.parametrize("sign", [1, -1], ids=["right", "inverted"])
def test_a_supplied_dpo_model_is_measured_on_a_few_held_out_pairs(sign, tmp_path, monkeypatch):
    reference, model = packed(build_model(0)), build_model(0)
    model(input_ids=torch.tensor([PROMPTS[0].prompt_ids])).logits[0, -1, [17, 25]].diff().backward()
    with torch.no_grad():  # a step that makes one word likelier than the other
        packed(model).lm_head.weight.sub_(sign * 0.1 * model.lm_head.weight.grad)
    measured, pair_logps = [], stages.pair_logps
    monkeypatch.setattr(first_update, "pair_logps", lambda m, p, n: (measured.append(len(p)), pair_logps(m, p, n))[1])
    config = load_config(["--config", "default", "--dpo.model", "somewhere"])
    session = training_session(config, tmp_path, TOKENIZER, held_out_pairs=pairs(100))
    first_update.check_dpo_model(session, Models(None, Model(reference), Model(model), None, None, None))
    assert measured == [64, 64]
    assert [w["name"] for w in recorded(tmp_path)] == ([] if sign > 0 else ["dense_reward_is_inverted"])


def test_the_dpo_stage_says_when_it_learned_the_wrong_way(directories, tmp_path, capsys):
    data = {"pairs": pairs(64), "held_out_pairs": pairs(64, better=25, worse=17)}
    session = training_session(load_config(["--dpo.lr", "1e-3"]), tmp_path, TOKENIZER, **data)
    stages.train_dpo(session, directories["sft"])
    (found,) = recorded(tmp_path)
    assert (found["stage"], found["step"], found["name"]) == ("dpo", 2, "dense_reward_is_inverted")
    assert "warning: dpo, step 2: the dense reward points the wrong way" in capsys.readouterr().out


def test_models_that_end_a_response_otherwise_are_named(tmp_path):
    folders = {}
    for name, eos in (("same", "<eos>"), ("other", "<pad>")):
        tokenizer = build_tokenizer()
        tokenizer.eos_token = eos
        tokenizer.chat_template = None
        tokenizer.save_pretrained(tmp_path / name)
        folders[name] = str(tmp_path / name)
    options = [
        "--config",
        "default",
        "--dpo.model",
        folders["other"],
        "--rto.ref_model",
        folders["same"],
        "--dpo.ref_model",
        folders["other"],
        "--rto.critic",
        str(tmp_path / "none"),
        "--reward_model.model",
        folders["other"],
    ]
    config, found = load_config(options), []
    supplied = supplied_models(config, folders["same"])[1:]
    check_endings(config, supplied, TOKENIZER, [1], found.append)
    assert [finding.name.split()[0] for finding in found] == ["dpo.model", "dpo.ref_model", "reward_model.model"]
    assert "'<pad>' (0)" in found[0].what and "'<eos>' (1)" in found[0].what
    GenerationConfig(eos_token_id=[0, 1]).save_pretrained(folders["other"])  # knows both
    found.clear()
    check_endings(config, supplied, TOKENIZER, [1], found.append)
    assert found == []
