"""What users' reward functions change in the process is put back, and is there again at their next call."""

import gc
import json
import locale
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import time
import warnings

import numpy
import pytest
import torch

from rto_fast.errors import ConfigError, RewardError
from rto_fast.train import main
from tests.rewards.users_functions import HEAD, completions

CUDNN, MATMUL = torch.backends.cudnn, torch.backends.cuda.matmul
# {what users' code changes: (how, what it is)}
CHANGES = {
    "gradients": ("torch.set_grad_enabled(False)", torch.is_grad_enabled),
    "gradients, on": ("torch.set_grad_enabled(True)", torch.is_grad_enabled),
    "inference mode": ("global MODE; MODE = torch.inference_mode(); MODE.__enter__()", torch.is_inference_mode_enabled),
    "dtype": ("torch.set_default_dtype(torch.float64)", torch.get_default_dtype),
    "device": ("torch.set_default_device('meta')", lambda: torch.empty(0).device),
    "device context": ("torch.device('meta').__enter__()", lambda: torch.empty(0).device),
    "autocast": (
        "torch.autocast('cpu', torch.bfloat16).__enter__()",
        lambda: (
            torch.is_autocast_enabled("cpu"),
            torch.autocast_increment_nesting(),
            torch.autocast_decrement_nesting(),
        ),
    ),
    "autocast dtype": ("torch.set_autocast_dtype('cpu', torch.float16)", lambda: torch.get_autocast_dtype("cpu")),
    "threads": ("torch.set_num_threads(torch.get_num_threads() + 1)", torch.get_num_threads),
    "denormal numbers": ("torch.set_flush_denormal(True)", lambda: (torch.ones(1).double() * 1e-310).item()),
    "determinism": ("torch.use_deterministic_algorithms(True)", torch.are_deterministic_algorithms_enabled),
    "determinism, warnings": (
        "torch.use_deterministic_algorithms(True, warn_only=True)",
        torch.is_deterministic_algorithms_warn_only_enabled,
    ),
    "memory": (
        "torch.utils.deterministic.fill_uninitialized_memory = False",
        lambda: torch.utils.deterministic.fill_uninitialized_memory,
    ),
    "anomalies": ("torch.set_anomaly_enabled(True)", torch.is_anomaly_enabled),
    "precision": ("torch.set_float32_matmul_precision('medium')", torch.get_float32_matmul_precision),
    "precision by its new name": ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", lambda: MATMUL.fp32_precision),
    "cudnn": ("torch.backends.cudnn.enabled = False", lambda: CUDNN.enabled),
    "cudnn, deterministic": ("torch.backends.cudnn.deterministic = True", lambda: CUDNN.deterministic),
    "cudnn, benchmark": ("torch.backends.cudnn.benchmark = True", lambda: CUDNN.benchmark),
    "cudnn, TF32": ("torch.backends.cudnn.allow_tf32 = False", lambda: CUDNN.allow_tf32),
    "mkldnn": ("torch.backends.mkldnn.enabled = False", lambda: torch.backends.mkldnn.enabled),
    "attention": ("torch.backends.cuda.enable_flash_sdp(False)", torch.backends.cuda.flash_sdp_enabled),
    "seed of torch": ("torch.manual_seed(7)", lambda: torch.get_rng_state().tolist()),
    "random numbers of torch": ("torch.rand(3)", lambda: torch.get_rng_state().tolist()),
    "seed of numpy": ("numpy.random.seed(7)", lambda: numpy.random.get_state()[1].tolist()),
    "random numbers of numpy": ("numpy.random.rand(700)", lambda: str(numpy.random.get_state())),
    "seed of Python": ("random.seed(7)", random.getstate),
    "numpy's errors": ("numpy.seterr(all='raise')", numpy.geterr),
    "folder": ("os.chdir('/')", os.getcwd),
    "a new variable": ("os.environ['USERS_VARIABLE'] = '1'", lambda: dict(os.environ)),
    "a variable less": ("os.environ.pop('PATH', None)", lambda: dict(os.environ)),
    "umask": ("os.umask(0o777)", lambda: umask()),
    "locale": ("locale.setlocale(locale.LC_ALL, 'C.UTF-8')", lambda: locale.setlocale(locale.LC_ALL)),
    "stdout": ("sys.stdout = open(os.devnull, 'w')", lambda: sys.stdout),
    "stderr": ("sys.stderr = None", lambda: sys.stderr),
    "excepthook": ("sys.excepthook = print", lambda: sys.excepthook),
    "warnings": ("warnings.simplefilter('error')", lambda: list(warnings.filters)),
    "no warnings": ("warnings.filters.clear()", lambda: list(warnings.filters)),
    "collector": ("gc.disable()", gc.isenabled),
    "collector's thresholds": ("gc.set_threshold(1)", gc.get_threshold),
    "recursion": ("sys.setrecursionlimit(sys.getrecursionlimit() + 1)", sys.getrecursionlimit),
    "sockets": ("socket.setdefaulttimeout(1.5)", socket.getdefaulttimeout),
    "processes": (
        "multiprocessing.set_start_method('forkserver', force=True)",
        lambda: multiprocessing.get_start_method(allow_none=True),
    ),
    "hooks of all modules": (
        "torch.nn.modules.module.register_module_forward_hook(lambda m, x, y: y * 0)",
        lambda: torch.nn.Identity()(torch.ones(1)).item(),
    ),
    "parametrised modules": (
        "torch.nn.modules.module.register_module_module_registration_hook(print)",
        lambda: len(torch.nn.modules.module._global_module_registration_hooks),
    ),
    "hooks of saved tensors": (
        "torch.autograd.graph.saved_tensors_hooks(lambda x: x * 0, lambda x: x).__enter__()",
        lambda: derivative(),
    ),
    "a dispatch mode": ("zeros().__enter__()", lambda: (torch.ones(1) + 1).item()),
    "arguments": ("sys.argv.append('x')", lambda: list(sys.argv)),
    "the path of imports": ("sys.path.insert(0, '/nowhere')", lambda: list(sys.path)),
    "tracing": ("sys.settrace(lambda *args: None)", sys.gettrace),
    "profiling": ("sys.setprofile(lambda *args: None)", sys.getprofile),
    "digits": ("sys.set_int_max_str_digits(0)", sys.get_int_max_str_digits),
    "time zone": ("os.environ['TZ'] = 'Asia/Tokyo'; time.tzset()", lambda: time.tzname),
    "stdout closed": ("os.close(1)", lambda: os.fstat(1).st_ino),
    "stderr elsewhere": ("os.dup2(os.open('/', os.O_RDONLY), 2)", lambda: os.fstat(2).st_ino),
    "signals": ("signal.signal(signal.SIGINT, signal.SIG_IGN)", lambda: signal.getsignal(signal.SIGINT)),
    "another signal": ("signal.signal(signal.SIGUSR1, print)", lambda: signal.getsignal(signal.SIGUSR1)),
    "masked signals": (
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])",
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    ),
    "wakeup": ("ends = os.pipe(); os.set_blocking(ends[1], False); signal.set_wakeup_fd(ends[1])", lambda: wakeup()),
    "timer": ("signal.setitimer(signal.ITIMER_REAL, 3600)", lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0),
}


def umask():
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def wakeup():
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    return descriptor


def derivative():
    """Of x² at 1."""
    x = torch.ones(1, requires_grad=True)
    (x * x).backward()
    return x.grad.item()


def changing(how, when):
    at_import, at_call = ("change()", "pass") if when == "import" else ("", "change()")
    return (
        f"def change():\n    {how}\n{at_import}\n"
        f"def f(prompts, responses):\n    {at_call}\n    return [1.0] * len(responses)\n"
    )


@pytest.mark.parametrize("when", ["import", "call", "call in a thread"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_users_code_changes_is_put_back(function, name, when):
    how, probe = CHANGES[name]
    if when == "call in a thread" and name in ("signals", "another signal", "wakeup"):
        pytest.skip("a thread cannot set signal handlers")
    before = probe()
    reward = function(changing(how, when), timeout=30.0 if when == "call in a thread" else None)
    for _ in range(2):
        assert reward(completions()).tolist() == [1.0, 1.0]
    assert probe() == before


def test_every_setting_is_among_them():
    """Each setting that is kept apart is changed by one of the cases above."""
    from rto_fast.system.process_state import SETTINGS, users_settings

    changed = {"torch.cuda.set_device"}  # needs two GPUs
    for how, _ in CHANGES.values():
        with users_settings():
            before = {setting.name: setting.read() for setting in SETTINGS}
            exec(f"{HEAD}\ndef change():\n    {how}\nchange()", {})
            changed |= {setting.name for setting in SETTINGS if setting.read() != before[setting.name]}
        sys.modules["rto_fast.system.process_state"]._theirs.clear()
    assert changed == {setting.name for setting in SETTINGS}


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_a_function_that_fails_puts_it_back_too(function, timeout):
    folder, state = os.getcwd(), torch.get_rng_state()
    how = "os.chdir('/'); torch.manual_seed(7); torch.set_default_dtype(torch.float64); raise KeyError('x')"
    with pytest.raises(RewardError, match="KeyError: 'x'"):
        function(changing(how, "call"), timeout=timeout)(completions())
    with pytest.raises(ConfigError, match="KeyError: 'x'"):
        function(changing(how, "import"), timeout=timeout)
    assert os.getcwd() == folder and torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_a_function_that_hangs_leaves_the_process_as_it_was(function):
    folder = os.getcwd()
    reward = function(
        changing("os.chdir('/'); torch.set_default_dtype(torch.float64); time.sleep(20)", "call"), timeout=0.3
    )
    with pytest.raises(RewardError, match="within 0.3 s"):
        reward(completions())
    assert os.getcwd() == folder and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_users_code_finds_what_it_has_set(function, tmp_path, timeout):
    """As it would in a process of its own: the environment and folder set on import, and random numbers that go on."""
    (tmp_path / "users.txt").write_text("0.25")
    reward = function(
        f"os.environ['USERS_KEY'] = '2'\nos.chdir({str(tmp_path)!r})\ntorch.manual_seed(5)\nrandom.seed(5)\n"
        "numpy.random.seed(5)\ntorch.set_default_dtype(torch.float64)\n"
        "def f(prompts, responses):\n"
        "    assert torch.get_default_dtype() == torch.float64\n"
        "    fixed = float(os.environ['USERS_KEY']) + float(open('users.txt').read())\n"
        "    return [fixed, torch.rand(1).item(), random.random(), numpy.random.rand()]\n",
        timeout=timeout,
    )
    torch.rand(3)
    random.random()
    numpy.random.rand()
    found = [reward(completions(4)).tolist() for _ in range(3)]
    random.seed(5)
    numpy.random.seed(5)
    generator = torch.Generator().manual_seed(5)
    for scores in found:
        numbers = [
            2.25,
            torch.rand(1, generator=generator, dtype=torch.float64).item(),
            random.random(),
            numpy.random.rand(),
        ]
        assert scores == pytest.approx(numbers, rel=1e-6)
    assert "USERS_KEY" not in os.environ


def test_the_variables_that_a_run_sets_reach_users_code(function, monkeypatch):
    reward = function(
        "os.environ['USERS_KEY'] = '2'\ndef f(prompts, responses):\n"
        "    return [float(os.environ['USERS_KEY']), float(os.environ.get('OURS', 0))]\n"
    )
    assert reward(completions()).tolist() == [2.0, 0.0]
    monkeypatch.setenv("OURS", "3")
    assert reward(completions()).tolist() == [2.0, 3.0]


def test_a_thread_has_its_callers_settings(function):
    reward = function(
        "def f(prompts, responses):\n    return [torch.get_num_threads(), torch.is_autocast_enabled('cpu')]\n",
        timeout=30.0,
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with torch.autocast("cpu"):
            assert reward(completions()).tolist() == [threads + 1, 1.0]
    finally:
        torch.set_num_threads(threads)


HARMFUL = [
    how
    for name, (how, _) in CHANGES.items()
    # These break what the function itself computes.
    if name
    not in ("inference mode", "device", "device context", "warnings", "stdout", "a dispatch mode", "stdout closed")
]


def test_a_run_is_the_same_whatever_its_reward_does(tmp_path, monkeypatch):
    """SFT and RTO, bit for bit: weights and metrics, with a module that changes everything on import and in each
    call, and returns results that require a gradient."""
    harm = "\n".join(f"    {line}" for line in HARMFUL)
    (tmp_path / "harmless.py").write_text(
        f"{HEAD}\ndef f(prompts, responses):\n    return torch.tensor([len(r) / 10 for r in responses])\n"
    )
    (tmp_path / "harmful.py").write_text(
        f"{HEAD}\ndef change():\n{harm}\ntorch.set_grad_enabled(False)\nchange()\n"
        "WEIGHT = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))\n"
        "def f(prompts, responses):\n    change()\n    torch.set_grad_enabled(True)\n"
        "    scores = torch.tensor([[len(r) / 10, 0] for r in responses]) * WEIGHT\n"
        "    prompts.clear(); responses.clear()\n    return scores[:, 0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "rto_fast.reporting.finish.report_run", lambda *_: None
    )  # which takes most of a short run's time
    results = []
    for module in ("harmless", "harmful"):
        options = {
            "output_dir": module,
            "reward_model.function": f"{module}:f",
            "eval.function": f"{module}:f",
            "threads": 1,
            "sft.max_steps": 2,
            "rto.dpo_reward_scale": 0,
            "rto.advantage": "reinforce_pp",
            "rto.iterations": 2,
            "rto.prompts_per_rollout": 8,
            "rto.batch_size": 4,
            "data.limit": 64,
            "eval.prompts": 4,
            "eval.every": 1,
            "rollout.max_new_tokens": 8,
        }
        main([word for name, value in options.items() for word in (f"--{name}", str(value))])
        metrics = [json.loads(line) for line in (tmp_path / module / "metrics.jsonl").read_text().splitlines()]
        timed = re.compile("second|time")
        metrics = [{name: value for name, value in row.items() if not timed.search(name)} for row in metrics]
        weights = [(tmp_path / module / stage / "model.safetensors").read_bytes() for stage in ("sft", "rto")]
        results.append((metrics, weights))
    assert len(results[0][0]) > 6 and results[0] == results[1]
