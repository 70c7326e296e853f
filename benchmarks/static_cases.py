"""What `benchmarks.static` compiles: calls that launch every kernel in every form that matters, and what is expected."""

import torch

# Accesses of 128 bits a kernel must at least have, where it streams rows, and whether it must use the tensor cores.
EXPECTED = {
    "rto_whiten_kernel": {"wide_loads": 1, "wide_stores": 1},
    "ppo_policy_fwd_kernel": {"wide_loads": 3, "wide_stores": 1},
    "ppo_value_fwd_kernel": {"wide_loads": 3, "wide_stores": 1},
}


def tokens(count, dtype=torch.float32, grad=False):
    return torch.zeros(count, dtype=dtype, requires_grad=grad)


def cu_seqlens(count, sequences):
    return torch.linspace(0, count, sequences + 1).int()


def rto_advantages(count, sequences, dtype=torch.float32, **options):
    def call(module):
        mask = torch.ones(count, dtype=torch.bool)
        delimiters = mask if options.get("granularity") == "sentence" else None
        module.rto_advantages(
            *(tokens(count, dtype) for _ in range(4)), tokens(sequences), cu_seqlens(count, sequences), mask,
            delimiter_mask=delimiters, **options,
        )  # fmt: skip

    return "advantages", call


def gae(count, sequences, dtype=torch.float32, masked=False):
    def call(module):
        mask = torch.ones(count, dtype=torch.bool) if masked else None
        bootstrap = tokens(sequences) if masked else None
        bounds = cu_seqlens(count, sequences)
        module.gae(tokens(count), tokens(count, dtype), bounds, mask=mask, bootstrap_values=bootstrap)

    return "advantages", call


def ppo_loss(name, dtype, count=8192, **options):
    def call(module):
        mask = torch.ones(count, dtype=torch.bool)
        loss, _ = getattr(module, name)(*(tokens(count, dtype, grad=not i) for i in range(3)), mask, **options)
        loss.backward()

    return "ppo_losses", call


# label -> (module of rto_fast.kernels, a call of it on CPU tensors: the launches are recorded, nothing runs)
CASES = {
    "gae fp32 short": gae(1000, 10),
    "gae bf16 long masked bootstrap": gae(32768, 2, torch.bfloat16, masked=True),
    "rto fp32 mean length 100": rto_advantages(1000, 10),
    "rto fp32 mean length 1000": rto_advantages(8000, 8),
    "rto fp32 mean length 16k": rto_advantages(32768, 2),
    "rto bf16 sequence": rto_advantages(8000, 8, torch.bfloat16, granularity="sequence"),
    "rto bf16 sentence shaping bootstrap": rto_advantages(
        32768, 2, torch.bfloat16, granularity="sentence", shaping=True, bootstrap_values=tokens(2)
    ),
    "policy fp32": ppo_loss("ppo_policy_loss", torch.float32),
    "policy bf16 weights dual_clip num_items": ppo_loss(
        "ppo_policy_loss", torch.bfloat16, weights=tokens(8192), dual_clip=3.0, num_items=8192.0
    ),
    "values fp32": ppo_loss("ppo_value_loss", torch.float32),
    "values bf16 weights": ppo_loss("ppo_value_loss", torch.bfloat16, weights=tokens(8192)),
}
