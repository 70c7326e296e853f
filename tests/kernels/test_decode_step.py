"""The bookkeeping kernels equal plain torch exactly, and plain torch does what a step should do."""

import pytest
import torch

from rto_fast.kernels import decode_reference as reference
from rto_fast.kernels import decode_step as kernel

RESULTS = (
    "rows",
    "generated",
    "active",
    "limits",
    "lengths",
    "input_ids",
    "tokens",
    "logps",
    "sampling_logps",
    "counts",
    "done",
)


def state(slots, samples, device, seed=0, blocks=5, most=9):
    """Slots, some of them idle; each active slot has its own row."""
    g = torch.Generator().manual_seed(seed)
    active = torch.rand(slots, generator=g) < 0.7
    rows = torch.where(active, torch.randperm(samples, generator=g)[:slots], samples)
    shape = samples + 1, most + 1
    found = {
        "lengths": torch.randint(0, blocks * 4 - 1, (slots,), generator=g),
        "active": active,
        "rows": rows,
        "block_tables": torch.randint(0, 1 << 30, (slots, blocks), generator=g, dtype=torch.int32),
        "generated": torch.randint(0, most, (slots,), generator=g),
        "limits": torch.randint(1, most + 1, (slots,), generator=g),
        "input_ids": torch.zeros(slots, dtype=torch.int64),
        "uniforms": torch.rand(*shape, 2, generator=g),
        "tokens": torch.zeros(shape, dtype=torch.int64),
        "logps": torch.zeros(shape),
        "sampling_logps": torch.zeros(shape),
        "counts": torch.zeros(samples + 1, dtype=torch.int64),
        "done": torch.zeros(samples + 1, dtype=torch.bool),
    }
    return {name: tensor.to(device) for name, tensor in found.items()}


@pytest.mark.parametrize("slots", [1, 63, 64, 130])
@pytest.mark.parametrize("page_size, min_new_tokens", [(4, 0), (5, 3)])
def test_begin_step(slots, page_size, min_new_tokens, device):
    s = state(slots, 200, device)
    names = ("lengths", "active", "block_tables", "rows", "generated", "uniforms")
    found, expected = (
        module.begin_step(*(s[name] for name in names), page_size=page_size, min_new_tokens=min_new_tokens)
        for module in (kernel, reference)
    )
    for actual, truth in zip(found, expected):
        assert actual.dtype == truth.dtype and torch.equal(actual, truth)
    where, lengths, uniforms, stop_allowed = expected
    for i in range(slots):  # token by token
        length, generated = s["lengths"][i].item(), s["generated"][i].item()
        page = s["block_tables"][i, length // page_size].item()
        is_active = s["active"][i].item()
        assert where[i] == (page * page_size + length % page_size if is_active else -1)
        assert lengths[i] == (length + 1 if is_active else 0)
        assert torch.equal(uniforms[i], s["uniforms"][s["rows"][i], generated])
        assert stop_allowed[i] == (generated >= min_new_tokens)


@pytest.mark.parametrize("slots", [1, 63, 64, 130])
@pytest.mark.parametrize("stops", [(), (3,), (3, 5, 0)])
@pytest.mark.parametrize("grow", [True, False])
def test_finish_step(slots, stops, grow, device):
    g = torch.Generator().manual_seed(1)
    drawn = (torch.randint(0, 8, (slots,), generator=g), *torch.rand(2, slots, generator=g).log())
    drawn = [x.to(device) for x in drawn]
    before, found, expected = (state(slots, 200, device) for _ in range(3))
    stop_ids = torch.tensor(stops, dtype=torch.int64, device=device)
    for module, s in ((kernel, found), (reference, expected)):
        module.finish_step(drawn, stop_ids, *(s[name] for name in RESULTS), grow=grow)
    for name in RESULTS:
        # Idle slots write to the last row, in any order.
        last = -1 if name in ("tokens", "logps", "sampling_logps", "counts", "done") else None
        assert torch.equal(found[name][:last], expected[name][:last]), name
    for i in range(slots):
        row, generated, is_active = (before[name][i].item() for name in ("rows", "generated", "active"))
        assert found["input_ids"][i] == drawn[0][i]
        assert found["lengths"][i] == before["lengths"][i] + (is_active and grow)
        if is_active:
            done = drawn[0][i].item() in stops or generated + 1 >= before["limits"][i]
            assert (found["active"][i].item(), found["done"][row].item()) == (not done, done)
            assert found["rows"][i] == (200 if done else row)
            assert found["counts"][row] == found["generated"][i] == generated + 1
            for name, values in zip(("tokens", "logps", "sampling_logps"), drawn):
                assert found[name][row, generated] == values[i]
        else:
            assert not found["active"][i] and found["rows"][i] == 200 and found["generated"][i] == generated


def test_slots_are_views(device):
    """A step of the first slots of a larger state leaves the others alone."""
    s = state(130, 200, device)
    before = {name: tensor.clone() for name, tensor in s.items()}
    drawn = torch.ones(70, dtype=torch.int64, device=device), *torch.zeros(2, 70, device=device)
    slots = ("rows", "generated", "active", "limits", "lengths", "input_ids")
    stop_ids = torch.ones(1, dtype=torch.int64, device=device)
    kernel.finish_step(drawn, stop_ids, *(s[n][:70] if n in slots else s[n] for n in RESULTS), grow=True)
    for name in slots:
        assert torch.equal(s[name][70:], before[name][70:])
    assert not s["active"][:70].any() and (s["rows"][:70] == 200).all()
