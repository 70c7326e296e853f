"""Models' embeddings become ours, whatever their class, and stay what they compute."""

import copy

import pytest
import torch

from rto_fast.kernels import layer_reference
from rto_fast.models.embedding import OpEmbedding, use_op_embeddings
from rto_fast.models.loading import load_model
from tests.tiny_models import tiny

IDS = torch.tensor([[5, 9, 5, 30]])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "opt"])
def test_embeddings_of_all_classes_run_our_op_and_compute_the_same(name, monkeypatch):
    model = tiny(name)
    model.get_input_embeddings().padding_idx = 9
    plain, calls = copy.deepcopy(model), []
    use_op_embeddings(model)
    use_op_embeddings(model)  # changes nothing more

    def counted(*args, op=layer_reference.embedding):
        calls.append(args[2])
        return op(*args)

    monkeypatch.setattr(layer_reference, "embedding", counted)
    found, expected = model(IDS).logits, plain(IDS).logits
    assert torch.equal(found, expected) and 9 in calls
    assert model.state_dict().keys() == plain.state_dict().keys()
    found.sum().backward(), expected.sum().backward()
    ours, theirs = (m.get_input_embeddings().weight.grad for m in (model, plain))
    assert torch.equal(ours, theirs)
    again = copy.deepcopy(model)
    assert isinstance(again.get_input_embeddings(), OpEmbedding) and torch.equal(again(IDS).logits, expected)


def test_a_loaded_model_has_ours(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = load_model("causal_lm", str(tmp_path), device="cpu", dtype=torch.float32, trainable=True)
    assert isinstance(model.get_input_embeddings(), OpEmbedding)
