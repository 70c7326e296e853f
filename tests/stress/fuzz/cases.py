"""The kinds of cases. Each has random numbers and a folder of its own."""

import contextlib
import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from rto_fast import plan
from rto_fast.config import dump_config, load_config
from rto_fast.errors import UserError

from . import rewards
from .command import Broken, check_command, one_line, streams
from .harm import ENVIRONMENTS, KEYS, VALUES, damage, document, near_values, output_name

STAGES = ("sft", "reward_model", "dpo")
TINY = [
    "--threads=1",
    "--data.limit=48",
    "--data.held_out=4",
    "--data.cache_dir=null",
    "--eval.prompts=8",
    "--rollout.max_new_tokens=8",
    "--sft.batch_size=40",
    "--dpo.batch_size=4",
    "--rto.iterations=1",
    "--rto.prompts_per_rollout=8",
    "--rto.batch_size=4",
    *(f"--{stage}.max_steps=1" for stage in STAGES),
]
KINDS: dict[str, Callable[["Case"], None]] = {}


class Case:
    """What one case may use: random numbers of its own, and a folder.

    Attributes:
        dice: its random numbers.
        folder: empty, its own, and the working directory of its command.
        stage: what was made once, to be copied (`run`, a finished run; `data`, pairs in every format).
        told: what it did, for whoever reads of its failure.
    """

    def __init__(self, seed: str, folder: Path, stage: Path) -> None:
        self.dice, self.folder, self.stage, self.told = random.Random(seed), folder, stage, ""

    def value(self, key: str = "") -> str:
        """A nasty value, or one at or near the bounds of the field."""
        near = near_values(key)
        return self.dice.choice(near if near and self.dice.random() < 0.5 else VALUES)

    def assignments(self, keys: list[str], most: int) -> dict[str, str]:
        chosen = self.dice.sample(keys, self.dice.randint(1, most))
        return {key: self.value(key) for key in chosen}


def kind(function: Callable[[Case], None]) -> Callable[[Case], None]:
    KINDS[function.__name__] = function
    return function


def run_command(case: Case, module: str, arguments: list[str]) -> None:
    """Runs `python -m MODULE ARGUMENTS` in the case's folder, and checks the rules."""
    name, connect = streams(case.dice, case.folder.parent / "output.txt")
    variables = case.dice.choice([{}, {}, {}, *ENVIRONMENTS])
    case.told += f" in {case.folder}: python -m {module} {arguments!r}, output: {name}, environment: {variables}"
    check_command(case.folder, module, arguments, variables, name, connect)


@kind
def configuration(case: Case) -> None:
    """Random values in random fields: a configuration that can be planned and saved, or one line."""
    arguments = []
    for name in case.dice.choice([(), ("run.yaml",), ("run.yaml", "more.yaml")]):
        text = document(case.dice, case.assignments(KEYS, 3))
        (case.folder / name).write_text(text, encoding="utf-8", newline="")
        arguments += ["--config", name]
        case.told += f"{name}: {text!r}, "
    if not arguments or case.dice.random() < 0.5:
        arguments += [f"--{key}={value}" for key, value in case.assignments(KEYS, 3).items()]
    case.told += repr(arguments)
    try:
        config = load_config(arguments)
    except UserError as error:
        one_line(error)
        return
    (case.folder / "again.yaml").write_text(dump_config(config))
    if dump_config(load_config(["--config", "again.yaml"])) != dump_config(config):
        raise Broken("the saved configuration reads back as another one")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            plan.main([*arguments, "--gpus", "8xH200"])
    except UserError as error:
        one_line(error)


def _run(case: Case) -> Path:
    return Path(shutil.copytree(case.stage / "run", case.folder / "run", symlinks=True))


def _harmed_run(case: Case) -> Path:
    """A copy of the finished run in which one or two files are damaged."""
    run = _run(case)
    for _ in range(case.dice.randint(1, 2)):
        files = [path for path in sorted(run.rglob("*")) if path.is_file() and not path.is_symlink()]
        case.told += f" {damage(case.dice, case.dice.choice(files))};"
    return run


@kind
def training(case: Case) -> None:
    """A tiny run with nasty values, into a nasty folder."""
    values = case.assignments(KEYS, 2)
    if case.dice.random() < 0.4:
        values["reward_model.function"] = f"tests.stress.fuzz.rewards:{case.dice.choice(rewards.NAMES)}"
        values["reward_model.timeout"] = "2"
    folder = output_name(case.dice, case.folder) if case.dice.random() < 0.3 else "out"
    arguments = [*TINY, f"--output_dir={folder}", *(f"--{key}={value}" for key, value in values.items())]
    run_command(case, "rto_fast.train", arguments)


@kind
def harmed_data(case: Case) -> None:
    """A tiny run, or `rto_fast.data`, on a damaged file, which sometimes has the name of another format."""
    files = sorted((case.stage / "data").iterdir())
    source = case.dice.choice(files)
    path = case.folder / f"\x1b[1m{(source if case.dice.random() < 0.8 else case.dice.choice(files)).name}"
    shutil.copy(source, path)
    case.told = f"{source.name}, {damage(case.dice, path)}"
    if case.dice.random() < 0.7:
        run_command(
            case, "rto_fast.data", [str(path), "--data.cache_dir=null", f"--examples={case.dice.choice([0, 2])}"]
        )
    else:
        run_command(case, "rto_fast.train", [*TINY, "--output_dir=out", f"--data.preferences={path}"])


@kind
def resuming(case: Case) -> None:
    """Resumes a finished or unfinished run with damaged files, and with links in the place of its folders."""
    run = _harmed_run(case)
    if case.dice.random() < 0.5:  # as if it had not finished
        for name in case.dice.sample(["rto", "dpo", "rto_critic", "reward_model"], 2):
            shutil.rmtree(run / name, ignore_errors=True)
    if case.dice.random() < 0.5:
        name = case.dice.choice(["checkpoints", "tensorboard", "rto", "sft"])
        shutil.rmtree(run / name, ignore_errors=True)
        with contextlib.suppress(FileExistsError):
            (run / name).symlink_to(case.folder.parent / "precious")
    run_command(case, "rto_fast.train", ["--resume", "run"])


@kind
def reporting(case: Case) -> None:
    run = _harmed_run(case)
    more = ["--output", output_name(case.dice, case.folder)] if case.dice.random() < 0.6 else []
    run_command(case, "rto_fast.report", [run.name, *more])


@kind
def pushing(case: Case) -> None:
    run = _harmed_run(case)
    repo = case.dice.choice(["me/model", "me", "a/b/c", case.value()])
    run_command(case, "rto_fast.push", [run.name, f"--repo={repo}", "--dry_run"])


@kind
def planning(case: Case) -> None:
    options = {"gpus": "8xH200 cpu 0xH200 -1xH200 8xx 9999999999999xH100 x 1x".split(), "examples": "0 -1 x 10".split()}
    arguments = [f"--{key}={case.dice.choice([*values, case.value()])}" for key, values in options.items()]
    arguments = case.dice.sample(arguments, case.dice.randint(0, 2))
    arguments += [f"--{key}={value}" for key, value in case.assignments(KEYS, 2).items()]
    run_command(case, "rto_fast.plan", arguments)


@kind
def evaluating(case: Case) -> None:
    """A model of a run, damaged or not, with nasty options."""
    run = _harmed_run(case) if case.dice.random() < 0.7 else _run(case)
    keys = (
        "data prompts reward reward_model reference preferences held_out dpo_model dpo_reference columns limit tokenizer "
        "rollout.max_new_tokens rollout.temperature seed show threads micro_batch_tokens max_prompt_tokens"
    ).split()
    given = {
        "model": f"{run.name}/sft",
        "prompts": "embedded:eval_prompts",
        "limit": "4",
        "rollout.max_new_tokens": "4",
    }
    given |= {
        "reward": "rto_fast.data.world:gold_reward",
        "output": output_name(case.dice, case.folder),
        "threads": "1",
    }
    given |= case.assignments(keys, 2)
    run_command(case, "rto_fast.evaluate", [f"--{key}={value}" for key, value in given.items()])
