"""What `benchmarks.static` compiles: calls that launch every kernel in every form that matters, and what is expected."""

import torch

# Accesses of 128 bits a kernel must at least have, where it streams rows, and whether it must use the tensor cores.
EXPECTED = {
    "ppo_policy_fwd_kernel": {"wide_loads": 3, "wide_stores": 1},
    "ppo_value_fwd_kernel": {"wide_loads": 3, "wide_stores": 1},
}


def tokens(count, dtype=torch.float32, grad=False):
    return torch.zeros(count, dtype=dtype, requires_grad=grad)


def ppo_loss(name, dtype, count=8192, **options):
    def call(module):
        mask = torch.ones(count, dtype=torch.bool)
        loss, _ = getattr(module, name)(*(tokens(count, dtype, grad=not i) for i in range(3)), mask, **options)
        loss.backward()

    return "ppo_losses", call


# label -> (module of rto_fast.kernels, a call of it on CPU tensors: the launches are recorded, nothing runs)
CASES = {
    "policy fp32": ppo_loss("ppo_policy_loss", torch.float32),
    "policy bf16 weights dual_clip num_items": ppo_loss(
        "ppo_policy_loss", torch.bfloat16, weights=tokens(8192), dual_clip=3.0, num_items=8192.0
    ),
    "values fp32": ppo_loss("ppo_value_loss", torch.float32),
    "values bf16 weights": ppo_loss("ppo_value_loss", torch.bfloat16, weights=tokens(8192)),
}
