import pytest
import torch

from rto_fast.batch import ALIGNMENT, IGNORE_INDEX, micro_batches, pack, pack_whole, segment_sum, to_device


def test_index_t_is_a_state_and_the_action_taken_there():
    batch = pack([[5, 6], [7]], [[8, 9], [1]])
    assert batch.input_ids.tolist() == [5, 6, 8, 7]
    assert batch.labels.tolist() == [IGNORE_INDEX, 8, 9, 1]
    assert batch.position_ids.tolist() == [0, 1, 2, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 4] and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 3 and batch.num_tokens == 4 and batch.num_sequences == 2
    assert batch.response_mask.tolist() == [False, True, True, True]
    assert batch.last.tolist() == [2, 3]


def test_loss_on_prompt_labels_every_token_but_the_first():
    batch = pack([[5, 6], [7]], [[8, 9], [1]], loss_on_prompt=True)
    assert batch.labels.tolist() == [6, 8, 9, 1]


def test_without_a_prompt_the_first_response_token_is_given():
    assert pack([[]], [[8, 9, 1]]).labels.tolist() == [9, 1]


def test_pack_whole_keeps_every_token():
    batch = pack_whole([[5, 6, 7], [8]])
    assert batch.input_ids.tolist() == [5, 6, 7, 8] and not batch.response_mask.any()


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="at least one position"):
        pack([[5]], [[]])


def test_segment_sum_and_its_gradient():
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 1, 1, 6], dtype=torch.int32)
    sums = segment_sum(values, cu_seqlens)
    torch.testing.assert_close(sums, torch.stack([values[0], values[:0].sum(), values[1:].sum()]))
    sums.backward(torch.tensor([2.0, 3.0, -1.0], dtype=torch.float64))
    assert values.grad.tolist() == [2, -1, -1, -1, -1, -1]


@pytest.mark.parametrize(
    "lengths, budget, expected",
    [
        ([3, 3, 3], 6, [[0, 1], [2]]),
        ([9, 1], 6, [[0], [1]]),  # longer than the budget: alone
        ([6, 6], 6, [[0], [1]]),
        ([], 6, []),
    ],
)
def test_micro_batches_keep_the_order_and_the_budget(lengths, budget, expected):
    assert micro_batches(lengths, budget) == expected


@pytest.mark.parametrize("loss_on_prompt", [False, True])
def test_rows_are_the_positions_with_a_label(loss_on_prompt):
    prompts, responses = [[], [5], [5, 6, 7], [9]], [[8, 9], [1], [2, 3], [4, 5, 6]]
    batch = pack(prompts, responses, loss_on_prompt=loss_on_prompt)
    assert batch.rows.dtype == torch.int64 and torch.equal(batch.rows, batch.response_mask.nonzero().squeeze(-1))
    assert len(pack_whole(prompts[1:]).rows) == 0


def test_tensors_share_one_copy_and_begin_where_kernels_load_vectors():
    batch = pack([[5, 6]], [[8]])
    tensors = [batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens, batch.rows]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(tensor.storage_offset() * tensor.itemsize % ALIGNMENT == 0 for tensor in tensors)


def test_any_tensors_move_in_one_copy():
    tensors = [torch.arange(3), torch.tensor(True), torch.rand(2, 5), torch.zeros(0), torch.tensor([1, 2]).int()]
    for moved, tensor in zip(to_device(tensors, "cpu"), tensors, strict=True):
        assert torch.equal(moved, tensor) and moved.dtype == tensor.dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_packing_does_not_wait_for_a_gpu():
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = pack([[5, 6]], [[8, 9]], "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert batch.labels.tolist() == [IGNORE_INDEX, 8, 9] and batch.rows.tolist() == [1, 2]
