"""Reward functions are somebody else's code: what they do to the process, to their arguments and to torch, and what they
look like, must neither change a run nor end it without a word."""

import gc
import importlib
import itertools
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

from rto_fast.data.tokenizing import Prompt
from rto_fast.errors import ConfigError, DataError, RewardError
from rto_fast.rewards import Completion, NormalizedScores, RewardFunction
from rto_fast.train import main

NUMBERS = itertools.count()  # each test imports a module of its own
HEAD = """
import asyncio, functools, gc, inspect, locale, multiprocessing, os, random, signal, socket, sys, threading, time, warnings
import numpy, torch
from torch.utils._python_dispatch import TorchDispatchMode

class zeros(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {})) * (0 if function is torch.ops.aten.add.Tensor else 1)
"""


def users_side():
    return sys.modules.get("rto_fast.system.process_state")


@pytest.fixture
def function(tmp_path, monkeypatch):
    """Makes a `RewardFunction` of a module's source, which defines `f`."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(source, **options):
        name = f"users_module_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(HEAD + source)
        importlib.invalidate_caches()
        return RewardFunction(f"{name}:f", "reward_model.function", **options)

    yield make
    if users_side():  # what this test's functions have set is not for those of the next
        users_side()._theirs.clear()


def completions(count=2, prompt="1 red cup", extra=None):
    shared = Prompt([2], prompt, extra or {}, "file:1")  # as the samples of one prompt share it
    return [Completion(shared, [17, 1], "one red cup .", True) for _ in range(count)]


# Gradients


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize(
    "body",
    [
        "return MODEL(torch.ones(len(responses), 3))[:, 0]",
        "return list(MODEL(torch.ones(len(responses), 3))[:, 0])",
        "return MODEL(torch.ones(len(responses), 3)).squeeze(1).double()",
        "return torch.nn.Parameter(torch.full((len(responses),), 1.5))",
        "with torch.enable_grad():\n        return MODEL(torch.ones(len(responses), 3))[:, 0]",
        "with torch.inference_mode():\n        return MODEL(torch.ones(len(responses), 3))[:, 0]",
        "torch.set_grad_enabled(True)\n    return MODEL(torch.ones(len(responses), 3))[:, 0].requires_grad_()",
        "return MODEL(torch.ones(len(responses), 3))[:, 0].detach().numpy()",
    ],
)
def test_results_that_require_a_gradient_are_numbers(function, body, timeout):
    reward = function(
        "MODEL = torch.nn.Linear(3, 1, bias=False)\ntorch.nn.init.constant_(MODEL.weight, 0.5)\n"
        f"def f(prompts, responses):\n    {body}\n",
        timeout=timeout,
    )
    scores = reward(completions())
    assert scores.tolist() == [1.5, 1.5] and scores.dtype == torch.float32
    assert not scores.requires_grad and not scores.is_inference() and scores.grad_fn is None
    scores += 1  # an ordinary tensor that nobody else holds
    weight = torch.ones(2, requires_grad=True)
    (weight * scores).sum().backward()
    assert weight.grad.tolist() == [2.5, 2.5]


def test_functions_are_called_without_gradients(function):
    source = "def f(prompts, responses):\n    return [float(torch.is_grad_enabled())] * len(responses)\n"
    for timeout in (None, 30.0):
        assert torch.is_grad_enabled() and function(source, timeout=timeout)(completions()).tolist() == [0.0, 0.0]


def test_a_buffer_that_a_function_keeps_is_its_own(function):
    reward = function("BUFFER = torch.zeros(2)\ndef f(prompts, responses):\n    BUFFER.add_(1)\n    return BUFFER\n")
    first, second = reward(completions()), reward(completions())
    assert first.tolist() == [1.0, 1.0] and second.tolist() == [2.0, 2.0]
    first.zero_()
    assert reward(completions()).tolist() == [3.0, 3.0]


def test_a_judge_of_ones_own_is_called_like_a_function():
    """As `NormalizedScores`, the stages and `evaluate` call any (completions) → scores."""
    weight = torch.ones(2, requires_grad=True)

    def judge(given):
        given[0].prompt.extra["answer"].append("edited")
        torch.manual_seed(3)
        return weight * 2

    given, state = completions(extra={"answer": []}), torch.get_rng_state()
    scores = NormalizedScores(judge, "judge")(given)
    assert scores.tolist() == [2.0, 2.0] and not scores.requires_grad
    assert given[0].prompt.extra == {"answer": []} and torch.equal(state, torch.get_rng_state())


# The process

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
    monkeypatch.setattr("rto_fast.run.Run.report", lambda self: None)  # which takes most of a short run's time
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


# What a function is given


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_a_function_may_edit_what_it_is_given(function, timeout):
    message = {"role": "user", "content": [{"type": "text", "text": "1 red cup"}]}
    extra = {"answer": {"steps": [1, 2]}, "scores": torch.zeros(2), "table": numpy.zeros(2)}
    given = completions(2, (message,), extra)
    reward = function(
        "def f(prompts, responses, answer, scores, table, **more):\n"
        "    seen = [len(p[0]['content']) + len(a['steps']) + s.sum().item() + t.sum() for p, a, s, t in zip(\n"
        "        prompts, answer, scores, table)]\n"
        "    prompts[0][0]['content'].clear(); prompts[0].append({}); prompts[1][0].clear(); prompts.pop()\n"
        "    responses.clear()\n"
        "    answer[0]['steps'].append(3); answer[1].clear(); scores[0] += 1; table[1] += 1; answer.clear(); more.clear()\n"
        "    return seen\n",
        timeout=timeout,
    )
    for _ in range(2):  # rows that share a prompt are apart too
        assert reward(given).tolist() == [3.0, 3.0]
    assert given[0].prompt.prompt == (message,) and message["content"] == [{"type": "text", "text": "1 red cup"}]
    assert extra["answer"] == {"steps": [1, 2]} and not extra["scores"].any() and not extra["table"].any()
    assert [c.text for c in given] == ["one red cup ."] * 2


# What a function looks like

ACCEPTED = {
    "two": "def f(a, b): return [1.0] * len(b)",
    "by place": "def f(a, b, /): return [1.0] * len(b)",
    "a column by name": "def f(a, b, /, answer): return [float(x) for x in answer]",
    "a column by keyword": "def f(a, b, *, answer): return [float(x) for x in answer]",
    "defaults": "def f(a, b, other=None, answer=None): return [float(x) for x in answer]",
    "a default by place": "def f(a, b, c=2, /): return [1.0] * len(b)",
    "any number": "def f(*args): return [1.0] * len(args[1])",
    "any number and a column": "def f(*args, answer): return [float(x) for x in answer]",
    "everything": "def f(*args, **columns): return [float(x) for x in columns['answer']]",
    "a partial": "def g(c, a, b, answer): return [float(c)] * len(b)\nf = functools.partial(g, 1)",
    "a partial with a name": "def g(a, b, *, weight, answer): return [weight * x for x in answer]\n"
    "f = functools.partial(g, weight=1.0)",
    "an object": "class G:\n    def __call__(self, a, b): return [1.0] * len(b)\nf = G()",
    "a method": "class G:\n    def g(self, a, b): return [1.0] * len(b)\nf = G().g",
    "a class": "class f(list):\n    def __init__(self, a, b): super().__init__([1.0] * len(b))",
    "a lambda": "f = lambda a, b: [1.0] * len(b)",
    "decorated": "def g(h):\n    @functools.wraps(h)\n    def i(*args, **kw): return h(*args, **kw)\n    return i\n"
    "@g\ndef f(a, b, answer): return [float(x) for x in answer]",
    "a column with the name of a parameter": "def f(answer, b, **columns):\n    assert 'answer' not in columns\n"
    "    return [1.0] * len(b)",
    "a signature that cannot be read": "class G:\n    __signature__ = 'none'\n    def __call__(self, a, b): "
    "return [1.0] * len(b)\nf = G()",
    "async": "async def f(a, b):\n    await asyncio.sleep(0)\n    return [1.0] * len(b)",
    "an async object": "class G:\n    async def __call__(self, a, b): return [1.0] * len(b)\nf = G()",
    "returns a coroutine": "async def g(b): return [1.0] * len(b)\ndef f(a, b): return g(b)",
    "an async partial": "async def g(c, a, b): return [c] * len(b)\nf = functools.partial(g, 1.0)",
    "an awaitable": "class G:\n    def __init__(self, n): self.n = n\n    def __await__(self):\n        yield from "
    "asyncio.sleep(0).__await__()\n        return [1.0] * self.n\ndef f(a, b): return G(len(b))",
    "many coroutines": "async def g(r):\n    await asyncio.sleep(0.001)\n    return 1.0\n"
    "async def f(a, b): return await asyncio.gather(*map(g, b))",
}


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize("name", ACCEPTED)
def test_functions_of_many_kinds_are_called(function, name, timeout):
    reward = function(ACCEPTED[name] + "\n", timeout=timeout)
    given = completions(3, extra={"answer": 1})
    reward.check_columns([given[0].prompt])
    for _ in range(2):
        assert reward(given).tolist() == [1.0, 1.0, 1.0]


REFUSED = {
    "one parameter": ("def f(p): return p", "too many positional arguments"),
    "none": ("def f(): pass", "too many positional arguments"),
    "by keyword only": ("def f(*, prompts, responses): pass", "too many positional arguments"),
    "async with one": ("async def f(p): return p", "too many positional arguments"),
    "an object with one": ("class G:\n    def __call__(self, p): return p\nf = G()", "too many positional arguments"),
    "a partial of both": ("f = functools.partial(lambda a, b: a, 1)", "too many positional arguments"),
    "three by place": ("def f(a, b, answer, /): pass", "takes `answer` by its place only"),
    "a generator": ("def f(a, b):\n    yield 1.0", "is a generator"),
    "an async generator": ("async def f(a, b):\n    yield 1.0", "is a generator"),
    "a generator object": ("class G:\n    def __call__(self, a, b):\n        yield 1.0\nf = G()", "is a generator"),
    "a partial generator": ("def g(c, a, b):\n    yield 1.0\nf = functools.partial(g, 1)", "is a generator"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_functions_that_cannot_be_called_are_refused_when_the_run_starts(function, name):
    source, message = REFUSED[name]
    with pytest.raises(ConfigError, match=rf"^reward_model.function: users_module_\d+:f .*{message}") as error:
        function(source + "\n")
    assert "\n" not in str(error.value)


def test_a_builtin_without_a_signature_is_accepted():
    assert RewardFunction("builtins:max", "reward_model.function").check_columns(completions()) is None


def test_a_column_that_only_a_keyword_asks_for_is_missed_when_the_run_starts(function):
    for source in ("def f(*args, answer): pass", "def f(a, b, *, answer, **columns): pass"):
        with pytest.raises(DataError, match="takes the column `answer`, which the data does not have"):
            function(source + "\n").check_columns([completions()[0].prompt])


NO_NUMBERS = {
    "complex": "torch.ones(2) * 1j",
    "complex array": "numpy.ones(2) * 1j",
    "complex numbers": "[torch.tensor(1j)] * 2",
    "masked": "numpy.ma.array([1.0, 2.0], mask=[False, True])",
    "sparse": "torch.ones(2).to_sparse()",
    "jagged": "torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])",
    "quantised": "torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)",
    "without data": "torch.ones(2, device='meta')",
    "text": "['1', '2']",
    "a dict": "dict.fromkeys(b, 1.0)",
    "nothing": "None",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_number_is_refused_by_its_kind(function, name):
    with pytest.raises(RewardError, match=r"returned an? \w+, expected a list of one number a response: .*") as error:
        function(f"def f(a, b): return {NO_NUMBERS[name]}\n")(completions())
    assert "rewards.py" not in str(error.value) and "\n" not in str(error.value)


NUMBERS_OF_OTHERS = {
    "scalars of numpy": "[numpy.float64(1.0), numpy.array(2.0)]",
    "objects": "numpy.array([1, 2.0], dtype=object)",
    "bfloat16": "torch.tensor([1, 2], dtype=torch.bfloat16)",
    "float8": "torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)",
    "fractions": "[__import__('fractions').Fraction(1), __import__('decimal').Decimal(2)]",
    "an indexed series": "type('Series', (), {'tolist': lambda self: [1.0, 2.0]})()",
}


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy")
@pytest.mark.parametrize("name", NUMBERS_OF_OTHERS)
def test_numbers_of_other_libraries_are_read(function, name):
    reward = function(f"torch.set_default_dtype(torch.float16)\ndef f(a, b): return {NUMBERS_OF_OTHERS[name]}\n")
    assert reward(completions()).tolist() == [1.0, 2.0]


ERRORS = {
    "raises": "raise KeyError('colour')",
    "ends the program": "raise SystemExit(0)",
    "returns a number": "return 5",
    "is endless": "return 'x' * 10**7",
    "has many lines": "return 'one\\ntwo'",
}


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize("name", ERRORS)
def test_errors_whose_text_is_no_text_are_told(function, name, timeout):
    source = f"class E(BaseException):\n    def __str__(self):\n        {ERRORS[name]}\ndef f(a, b): raise E\n"
    with pytest.raises(RewardError, match=r"users_module_\d+:f: E.*\(.*:\d+\)$") as error:
        function(source, timeout=timeout)(completions())
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["(1.0 for _ in b)", "map(len, b)", "iter([1.0, 1.0])"])
def test_iterators_are_named(function, value):
    with pytest.raises(RewardError, match=r"users_module_\d+:f: returned a .*expected a list of one number a response"):
        function(f"def f(a, b): return {value}\n")(completions())


def test_an_async_function_keeps_its_loop_from_call_to_call(function):
    """Clients keep connections that belong to it."""
    reward = function(
        "LOOPS = []\nasync def f(a, b):\n    LOOPS.append(asyncio.get_running_loop())\n"
        "    return [float(len({*map(id, LOOPS)})), float(len(LOOPS))]\n"
    )
    assert reward(completions()).tolist() == [1.0, 1.0] and reward(completions()).tolist() == [1.0, 2.0]


def test_an_async_function_that_fails_or_hangs_is_named(function):
    with pytest.raises(RewardError, match="KeyError: 'colour'"):
        function("async def f(a, b): raise KeyError('colour')\n")(completions())
    with pytest.raises(RewardError, match="no scores for 2 responses within 0.2 s"):
        function("async def f(a, b): await asyncio.sleep(30)\n", timeout=0.2)(completions())


def test_in_a_notebook_a_loop_runs_already(function):
    import asyncio

    reward = function(
        "async def f(a, b):\n    await asyncio.sleep(0)\n    return [torch.is_grad_enabled() + 1.0] * len(b)\n"
    )

    async def cell():
        return reward(completions()).tolist()

    assert asyncio.run(cell()) == [1.0, 1.0]
