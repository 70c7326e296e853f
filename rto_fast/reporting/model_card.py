"""The model card of a run's final model: README.md in the model's folder, as the Hugging Face Hub reads it, with figures."""

import math
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import yaml

from rto_fast import __version__
from rto_fast.config import Config, dump_config, load_config
from rto_fast.errors import DataError, ModelError, how_to_go_on
from rto_fast.reporting.markup import brief, show, visible
from rto_fast.reporting.metric_names import (
    FINISHED,
    HELD_OUT_ACCURACY,
    KL,
    LENGTH,
    LOSS,
    RESPONSES,
    SCORE,
    STANDARD_ERROR,
    TOKENS,
)
from rto_fast.reporting.public import hub_name, public, working_folder
from rto_fast.reporting.run_files import RunFiles, number, read_run
from rto_fast.system.writing import own_folder, write_own

FIGURES = {
    "held_out_score": "Score on held-out prompts",
    "rto_score": "Score of the rollouts",
    "reward_parts": "Reward of a response, by part",
    "rto_kl": "KL to the reference, nats a response",
    "rto_frontier": "Score against KL",
    "rto_length": "Response length, tokens",
    "dpo_loss": "DPO loss",
    "dpo_accuracy": "Share of pairs that DPO ranks right",
}

CITATIONS = f"""@inproceedings{{zhong2025rto,
  title     = {{{{DPO}} Meets {{PPO}}: Reinforced Token Optimization for {{RLHF}}}},
  author    = {{Zhong, Han and Shan, Zikang and Feng, Guhao and Xiong, Wei and Cheng, Xinle and Zhao, Li and He, Di and Bian, Jiang and Wang, Liwei}},
  booktitle = {{International Conference on Machine Learning}},
  year      = {{2025}},
  note      = {{arXiv 2404.18922}}
}}

@software{{rto_fast,
  title   = {{rto-fast: Reinforced Token Optimization, fast}},
  author  = {{{{The rto-fast maintainers}}}},
  version = {{{__version__}}}
}}"""  # noqa: E501

NAME_LINE = 'name = "{}"  # this repository, or a folder with its files'
# ASCII that means something in Markdown or HTML. An underscore between letters does not.
MARKUP = re.compile(r"""[!"#$&'*+<=>?@\[\\\]^`{|}~]|(?<![^\W_])_|_(?![^\W_])""")


def final_model(run_folder: str | Path) -> tuple[Config, Path]:
    """The configuration of a finished run and the folder of its final model.

    Raises:
        DataError: the folder holds no run, or no finished model.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the output_dir of a run")
    if not (folder / "config.yaml").is_file():
        raise DataError(f"{folder}: no config.yaml in it; give the output_dir of a run")
    config = load_config(["--config", str(folder / "config.yaml")])
    model = folder / ("rto" if config.rto.enabled else "dpo")
    if not (model / "config.json").is_file() or not list(model.glob("model*.safetensors")):
        raise DataError(f"{model}: no finished model there; {how_to_go_on(folder)}")
    return config, model


def write_model_card(run_folder: str | Path) -> Path:
    """Writes the card of a finished run's final model, and the figures that it shows into images/ beside it.

    Returns:
        The path of the card: README.md in RUN/rto, or in RUN/dpo where the RTO stage is off.
    Raises:
        DataError: the folder holds no finished model.
        ModelError: its weights cannot be read.
    """
    text, images = model_card(run_folder)
    _, model = final_model(run_folder)
    for name, drawn in images.items():
        own_folder((model / name).parent)
        write_own(model / name, drawn.read_bytes())
    write_own(model / "README.md", text)
    return model / "README.md"


def model_card(run_folder: str | Path) -> tuple[str, dict[str, Path]]:
    """The text of the card, and {name of an image beside it: the figure's file}. Writes nothing.

    Raises:
        DataError, ModelError: as `write_model_card`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config, model = final_model(run_folder)
    run = read_run(run_folder)
    methods = _methods(config)
    folders = working_folder(run.folder, config.output_dir)
    data_names = [hub_name(source, folders) for source in _sources(config).values() if "/" in source]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=hub_name(_start(config), folders),
        datasets=list(dict.fromkeys(filter(None, data_names))) or None,
        tags=["rto-fast", *methods, "rlhf"],
    )
    figures = {f"images/{name}.png": run.folder / "figures" / f"{name}.png" for name in FIGURES}
    # A link may point at a file that is no figure of this run, which would be uploaded with the model.
    root = run.folder.resolve()
    images = {
        name: path
        for name, path in figures.items()
        if path.is_file() and path.resolve() == root / path.relative_to(run.folder)
    }
    sections = {
        "Use": _use(config),
        "Results": _results(config, run),
        "Training": _training(config, run, folders),
        "Figures": "\n".join(f"![{FIGURES[Path(name).stem]}]({name})" for name in images),
        "Configuration": _configuration(config, folders),
        "Citation": f"```bibtex\n{CITATIONS}\n```",
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    title = config.hub.repo.partition("/")[2] if config.hub.repo else run.name
    card = ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {plain(title)}\n\n{_summary(config, model, folders)}\n\n{body}\n"
    )
    return str(card), images


def plain(text: object) -> str:
    """Text on one line that Markdown and HTML show as it is, in a table too: characters of markup become entities."""
    return MARKUP.sub(lambda match: f"&#{ord(match[0])};", brief(text, 120))


def name_in_card(text: str, repo: str) -> str:
    """The card, with the repository's name in the lines that load the model."""
    return re.sub(NAME_LINE.replace("{}", r'[^"\n]*'), NAME_LINE.format(repo), text)


def count_parameters(model: Path) -> int:
    """Counts the parameters of the safetensors files in a folder, from their headers.

    Raises:
        ModelError: a file is damaged, or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in model.glob("model*.safetensors"):
        try:
            with safe_open(path, framework="numpy") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
        except SafetensorError as error:
            raise ModelError(f"{path}: not a safetensors file that can be read: {error}") from error
    return total


def _methods(config: Config) -> list[str]:
    if not config.rto.enabled:
        return ["dpo"]
    return ["rto", "ppo", "dpo"] if config.pays_dense_reward else ["ppo"]


def _start(config: Config) -> str:
    """The model that the final one was trained from."""
    dpo = config.dpo.model if config.rto.enabled and config.rto.init_from == "dpo" else None
    return str(dpo or config.sft.model or config.model.path)


def _sources(config: Config) -> dict[str, str]:
    """{stage: its training data} of the stages that the run trained."""
    own = {"sft": config.data.sft, "rto": config.data.prompts}
    sources = {stage: own.get(stage) or config.data.preferences for stage in config.trained_stages}
    return {stage: source for stage, source in sources.items() if source}


def _link(name: str, folders: Sequence[Path]) -> str:
    """A model's name; a link where it is a name on the Hub."""
    if name == "embedded":
        return "rto-fast's embedded model (random weights)"
    found = hub_name(name, folders)
    return f"[{plain(found)}](https://huggingface.co/{found})" if found else plain(public(name, "path", folders))


def _summary(config: Config, model: Path, folders: Sequence[Path]) -> str:
    what = {
        "rto": "[Reinforced Token Optimization](https://arxiv.org/abs/2404.18922): DPO gives every token a reward, "
        "PPO optimises it",
        "ppo": "PPO",
        "dpo": "DPO",
    }[_methods(config)[0]]
    start = _link(_start(config), folders)
    return (
        f"A language model of {count_parameters(model):,} parameters, trained from {start} by rto-fast with "
        f"{what}.\n\nNo licence is stated here: those of the base model and of the data apply."
    )


def _use(config: Config) -> str:
    name = NAME_LINE.format(config.hub.repo or "OWNER/NAME")
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer
{name}
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
```"""


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown. Columns without content are left out."""
    used = [i for i in range(len(header)) if any(row[i] not in ("", "–") for row in rows)]
    lines = [[header[i] for i in used], ["---"] * len(used)] + [[plain(row[i]) for i in used] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _results(config: Config, run: RunFiles) -> str:
    if not run.results:
        return ""
    rows = []
    for policy, values in run.results.items():
        finished = number(values.get(FINISHED))
        rows.append(
            [
                policy,
                f"{show(values.get(SCORE))} ± {show(values.get(STANDARD_ERROR))}",
                show(values.get(LENGTH)),
                show(values.get(KL)),
                f"{100 * finished:.1f} %" if finished == finished else "–",
                show(values.get(RESPONSES)),
            ]
        )
    judge = config.eval.function or "the reward model's normalised score"
    header = ["policy", "score ± standard error", "length, tokens", "KL, nats a response", "finished", "responses"]
    return f"Judged on the same held-out prompts by {plain(public(judge))}.\n\n{_table(header, rows)}"


def _training(config: Config, run: RunFiles, folders: Sequence[Path]) -> str:
    """The table of stages: the model and the data each started from, how long it trained, and its last metrics."""
    rto, reward, sources = config.rto, config.reward_model, _sources(config)
    base = "embedded (random weights)" if config.model.path == "embedded" else config.model.path
    stages = [  # key, name, the model it starts from, what was given in its place, whether the run uses it
        ("sft", "SFT", base, config.sft.model, True),
        ("reward_model", "reward model", "SFT", reward.model or reward.function, config.needs_reward_model),
        ("dpo", "DPO", "SFT", config.dpo.model, config.needs_dpo_model),
        ("rto", _methods(config)[0].upper(), rto.init_from.upper(), None, rto.enabled),
    ]
    rows: list[list[object]] = []
    for key, name, start, given, used in stages:
        if used and given:
            kind = "function" if given == reward.function else "model"
            rows.append([name, f"given: {public(given, kind, folders)}", "", "", "", "", ""])
        elif used:
            batch = (
                rto.prompts_per_rollout * rto.samples_per_prompt if key == "rto" else getattr(config, key).batch_size
            )
            tokens = sum(value for value in run.series(key, TOKENS)[1] if value == value)
            steps = max(run.stages.get(key, {}), default=None)
            start, source = public(start, "path", folders), public(sources[key], "preferences", folders)
            rows.append([name, start, source, show(steps), show(batch), show(tokens), _ended(run, key)])
    header = ["stage", "starts from", "data", "steps", "batch", "tokens", "ended with"]
    notes = [f"A step of {rows[-1][0]} is a rollout; its tokens are the responses'. {_reward(config)}"]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return "\n\n".join([_table(header, rows), *(notes * rto.enabled), f"rto-fast {__version__}, {packages}."])


def _ended(run: RunFiles, stage: str) -> str:
    """The last metrics of a stage."""
    metrics = {SCORE: "score", KL: "KL", LENGTH: "length"} if stage == "rto" else {LOSS: "loss"}
    parts = []
    for metric, label in (metrics | {HELD_OUT_ACCURACY: "share of held-out pairs ranked right"}).items():
        values = [value for value in run.series(stage, metric)[1] if value == value]
        parts += [f"{label} {show(values[-1])}"] if values else []
    return ", ".join(parts)


def _reward(config: Config) -> str:
    """The formula of the token rewards with this run's scales; empty where other settings change it."""
    rto = config.rto
    if rto.granularity != "token" or rto.shaping or rto.kl_target or rto.compat != "none":
        return ""
    clip = f" (clipped to ±{rto.dpo_reward_clip:g})" if rto.dpo_reward_clip else ""
    dense = f"{rto.dpo_reward_scale:g}·log(π_dpo/π_ref){clip} " if config.pays_dense_reward else ""
    score = f", the last one also {rto.score_scale:g}·score" if rto.score_scale else ""
    return f"Each token earns {dense}− {rto.kl_coef:g}·log(π/π_ref){score}."


def _configuration(config: Config, folders: Sequence[Path]) -> str:
    settings = public(yaml.safe_load(dump_config(config)), "", folders)
    text = visible(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)).strip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"<details>\n<summary>config.yaml</summary>\n\n{fence}yaml\n{text}\n{fence}\n\n</details>"
