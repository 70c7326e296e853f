"""Reward functions are somebody else's code: what they do to the process, to their arguments and to torch, and what they
look like, must neither change a run nor end it without a word."""

import numpy
import pytest
import torch

from rto_fast.errors import ConfigError, DataError, RewardError
from rto_fast.rewards import NormalizedScores, RewardFunction
from tests.rewards.users_functions import completions

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
