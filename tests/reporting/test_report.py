"""The report: one safe, self-contained page from any run's folder, whatever is in it, and figures beside it."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from rto_fast.errors import DataError
from rto_fast.reporting import draw, run_files
from rto_fast.reporting.figures import sections
from rto_fast.reporting.markup import visible
from rto_fast.reporting.page import write_report
from rto_fast.reporting.run_files import read_run
from rto_fast.rto.metrics import token_texts

ATTACKS = [
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "' autofocus onfocus='document.title=1",
    "</style></span><svg onload=\"document.title='owned'\">",
    "javascript:document.title='owned' $title ${body} &lt;b&gt;",
    "\u202eesrever \u05e9\u05dc\u05d5\u05dd\u200f \x00\x1b[31m\x7f\x85 \ud800 tab\there\nnew line",
]


def records(count, **curves):
    return [{name: curve(i) for name, curve in curves.items()} | {"step": i + 1} for i in range(count)]


def rto_metrics(count, dense=0.3):
    falling = {"clip_fraction": 0.1, "value_clip_fraction": 0.1, "dpo_clip_fraction": 0.05, "entropy": 1.2}
    times = {
        "seconds_rollout": 0.4,
        "seconds_prefill": 0.1,
        "seconds_decode": 0.2,
        "seconds_score": 0.1,
        "seconds_update": 0.5,
    }
    return [
        {
            "stage": "rto",
            "step": i + 1,
            "seconds": 20.0 + i,
            "score": i / count,
            "reward": i / count + dense,
            "dpo_reward": dense,
            "kl": 0.1 * i,
            "kl_penalty": 0.005 * i,
            "score_reward": i / count,
            "length": 27.0,
            "dpo_score_correlation": 0.2,
            "tokens": 900,
            "tokens_per_second": 900.0,
            "rollout_tokens_per_second": 2250.0,
        }
        | falling
        | times
        for i in range(count)
    ]


def token_record(step, index, tokens, **changes):
    numbers = {"dpo_reward": 0.1, "kl_penalty": 0.02, "score_reward": 0.0, "advantage": -1.5, "value": 0.4}
    columns = {name: [value * math.cos(i) for i in range(len(tokens))] for name, value in numbers.items()}
    record = {"stage": "rto", "step": step, "index": index, "prompt": ATTACKS[0], "count": len(tokens), "score": 0.5}
    return record | {"tokens": tokens} | columns | changes


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def fake_run(folder, policies=("SFT", "DPO", "RTO"), dense=0.3):
    folder.mkdir(parents=True)
    metrics = [{"stage": "sft", "seconds": 0.1 * i, "loss": 3 / (i + 1), "tokens": 9, "step": i + 1} for i in range(90)]
    metrics += [{"stage": "dpo", "seconds": 10.0 + i, "loss": 0.6, "accuracy": 0.7, "step": i + 1} for i in range(3)]
    metrics += [{"stage": "dpo", "seconds": 13.5, "step": 3, "held_out_accuracy": 0.82}]
    write_lines(folder / "metrics.jsonl", metrics + rto_metrics(8, dense))
    evaluation = {"score": 0.5, "standard_error": 0.01, "length": 20.0, "finished": 1.0, "responses": 8}
    results = {name: evaluation | {"score": 0.4 + i / 10} for i, name in enumerate(policies)}
    (folder / "results.json").write_text(json.dumps(results))
    write_lines(
        folder / "samples.jsonl",
        [
            {
                "stage": policy,
                "step": 0,
                "prompt": f"prompt {ATTACKS[i]}",
                "response": f"{policy} {attack}",
                "score": 0.5,
            }
            for policy in policies
            for i, attack in enumerate(ATTACKS)
        ],
    )
    write_lines(folder / "tokens.jsonl", [token_record(step, 0, ATTACKS + [""]) for step in (1, 8)])
    (folder / "config.yaml").write_text(f"seed: 0\nrto:\n  dpo_reward_scale: {dense}\nnote: {json.dumps(ATTACKS[0])}\n")
    return folder


class Page(HTMLParser):
    """What a browser would make of a page, near enough: its elements and its text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.spans, self.style = [], "", [], ""
        self.open = None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open = tag
        if tag == "span":
            self.spans.append([dict(attributes), ""])

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open == "style":
            self.style += data
            return
        self.text += data
        if self.open == "span":
            self.spans[-1][1] += data

    def tags(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


def check_is_safe_and_self_contained(page):
    assert not {"script", "img", "iframe", "object", "embed", "link", "base", "form"} & {t for t, _ in page.elements}
    attributes = [(name, value or "") for _, found in page.elements for name, value in found.items()]
    assert not [name for name, _ in attributes if name.startswith("on")]
    for name, value in attributes:
        if name in ("href", "src", "xlink:href", "action"):
            assert value.startswith("#"), value
    assert not re.search(r"@import|url\((?!#)", page.source)
    assert "default-src 'none'" in page.tags("meta")[1]["content"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run):
    return Page(write_report([run]))


def test_the_page_is_one_file_with_everything_in_it(run, page):
    check_is_safe_and_self_contained(page)
    for title in ("Policies", "Which tokens earned what", "Before and after", "Supervised stages", "Throughput"):
        assert f"<h2>{title}</h2>" in page.source
    pictures = list((run / "figures").glob("*.png"))
    assert len(pictures) == len(page.tags("figure")) == len(page.tags("svg")) > 12
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    names = {p.stem for p in pictures}
    assert {
        "sft_loss",
        "dpo_accuracy",
        "rto_score",
        "rto_kl",
        "rto_entropy",
        "rto_length",
        "rto_clip",
        "seconds",
        "rto_correlation",
        "reward_parts",
        "reward_shares",
        "rto_tokens_per_second",
    } <= names
    ids = [a["id"] for _, a in page.elements if "id" in a]
    targets = {a.get("href", a.get("xlink:href"))[1:] for _, a in page.elements if a.get("href") or a.get("xlink:href")}
    assert targets <= set(ids)
    assert "prefers-color-scheme: dark" in page.style and "currentColor" in page.source
    assert not [p for p in run.iterdir() if p.name.startswith(".")]  # nothing half-written stays


def test_untrusted_text_is_shown_as_it_is_and_does_nothing(page):
    for attack in ATTACKS:
        assert f"RTO {visible(attack)}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u200f\ud800-\udfff]", page.source)


def test_tokens_join_to_the_response_and_carry_their_numbers(page):
    tokens = [span for span in page.spans if "title" in span[0]]
    assert len(tokens) == 2 * (len(ATTACKS) + 1)
    shown = [visible(token).replace("\n", "\u23ce\n") for token in ATTACKS] + ["\u25af"]
    assert [text for _, text in tokens[: len(shown)]] == shown
    title = tokens[0][0]["title"]
    assert "DPO reward +0.100" in title and "KL penalty +0.020" in title and "advantage \u22121.500" in title
    assert "reward +0.080" in title
    classes = {name for attributes, _ in tokens for name in attributes["class"].split()}
    assert {"dp5", "km5", "am5"} <= classes  # the KL penalty costs: the other sign
    for name in classes:
        assert f".picture .{name}," in page.style
    modes = [a["id"] for a in page.tags("input")]
    assert modes == ["by-d", "by-k", "by-a"] and [a["for"] for a in page.tags("label")] == modes


def test_several_runs_are_compared_in_one_page(run, tmp_path, monkeypatch):
    baseline = fake_run(tmp_path / "ppo <b>$x_1$" / "run", policies=("SFT", "PPO"), dense=0.0)
    page = Page(write_report([run, baseline], tmp_path / "both.html"))
    check_is_safe_and_self_contained(page)
    assert "ppo <b>$x_1$/run" in page.text and (tmp_path / "both_figures" / "rto_kl.png").exists()
    rows = re.findall(r"<tr>.*?</tr>", page.source[: page.source.index("What differs</h2>")])
    assert len(rows) == 1 + 3 + 2
    assert "rto.dpo_reward_scale" in page.text and "note" not in page.text.split("What differs")[2][:200]
    # The SFT samples of both are the same: one column.
    assert "run · SFT, " in page.text and "· PPO" in page.text
    monkeypatch.setattr(draw, "render", lambda panel: ("<svg></svg>", b""))  # drawn before
    before = (run / "report.html").read_bytes()
    assert write_report([run, baseline]) == run / "compare.html"
    assert (run / "report.html").read_bytes() == before


def test_runs_that_ended_early_or_went_wrong_are_reported_as_far_as_they_came(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"stage": "sft", "step": 1, "seconds": 0.5, "loss": 4.0}\n'
        '{"stage": "sft", "step": 2, "seconds": null, "loss": null, "grad_norm": NaN}\n'
        '{"stage": "sft", "step": 3, "seconds": 1.5, "loss": Infinity, "note": "text", "skipped": 1}\n'
        '[1]\n{"stage": "../../x", "step": 1, "loss": 1.0}\n{"stage": "../../x", "step": 2, "loss": 1e999}\n'
        '{"stage": "\\u0000<b>\\ud800\\u202e$x_{", "step": 1, "loss": 1, "_\\n</text><script>": 1, "seconds": 2}\n'
        '{"stage": "\\u0000<b>\\ud800\\u202e$x_{", "step": 2, "loss": 1, "_\\n</text><script>": 1, "seconds": 3}\n'
        '{"stage": "rto", "step": 1, "score": 0.5}\n'
        '{"stage": "dpo", "step": 1, "lo'
    )
    (tmp_path / "results.json").write_text('{"SFT": ')
    (tmp_path / "tokens.jsonl").write_text('{"tokens": ["a"]}\n' + json.dumps(token_record("x", 0, ["a"])) + "\n")
    (tmp_path / "samples.jsonl").write_text(
        '{"stage": "SFT", "prompt": [{"role": "user", "content": "hi"}, 3], "response": null, "score": NaN}\n'
    )
    page = Page(write_report([tmp_path]))
    check_is_safe_and_self_contained(page)
    assert "metrics.jsonl: 2 lines could not be read" in page.text and "results.json could not be read" in page.text
    assert "user: hi" in page.text and "<h2>Policies</h2>" not in page.source
    assert {p.parent for p in tmp_path.rglob("*.png")} == {tmp_path / "figures"}


def test_a_supervised_run_alone(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [r | {"stage": "sft"} for r in records(3, loss=float, seconds=float)])
    page = Page(write_report([tmp_path]))
    assert "no results.json" in page.text and "sft: loss" in page.source
    assert [title for title, _ in sections([read_run(tmp_path)])] == ["Supervised stages", "Throughput"]


def test_a_repeated_step_counts_once(tmp_path):
    """A resumed run may have recorded a step twice."""
    write_lines(
        tmp_path / "metrics.jsonl", [r | {"stage": "sft"} for r in records(3, loss=float) + records(4, loss=float)]
    )
    write_lines(tmp_path / "tokens.jsonl", [token_record(1, 0, ["old"]), token_record(1, 0, ["new"])])
    run = read_run(tmp_path)
    assert run.series("sft", "loss") == ([1, 2, 3, 4], [0.0, 1.0, 2.0, 3.0])
    assert [record["tokens"] for record in run.tokens] == [["new"]]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "rto_fast.report", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )


def test_the_command(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [r | {"stage": "sft"} for r in records(3, loss=float)])
    done = command(tmp_path, "--output", tmp_path / "new" / "page.html")
    assert done.returncode == 0 and done.stdout == f"report: {tmp_path / 'new' / 'page.html'}\n" and not done.stderr
    assert (tmp_path / "new" / "page_figures" / "sft_loss.png").exists()


def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"rto_fast: {tmp_path}: no metrics.jsonl in it")


def test_mistakes_are_named(run, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        write_report([tmp_path / "absent"])
    with pytest.raises(DataError, match="compared with itself"):
        write_report([run, run / ".." / "run"])
    with pytest.raises(DataError, match="is a folder"):
        write_report([run], tmp_path)
    with pytest.raises(DataError, match="cannot be written"):
        write_report([run], run / "config.yaml" / "report.html")
    (tmp_path / "metrics.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no record of a training step"):
        write_report([tmp_path])


def test_token_texts_join_to_the_text_with_split_characters():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_ = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=bytes_, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    text = "née 🙂, \u05e9"
    ids = tokenizer(text).input_ids
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text and texts[:4] == ["n", "", "é", "e"]
    assert "".join(token_texts(tokenizer, ids[:2])) == "n\ufffd"  # cut within a character


SHORT = [
    "--sft.max_steps",
    "2",
    "--reward_model.max_steps",
    "2",
    "--dpo.max_steps",
    "2",
    "--rto.iterations",
    "3",
    "--rto.prompts_per_rollout",
    "4",
    "--rto.batch_size",
    "4",
    "--data.limit",
    "64",
    "--eval.prompts",
    "4",
    "--rollout.max_new_tokens",
    "8",
    "--threads",
    "1",
]


def test_a_run_ends_with_its_report_and_records_what_tokens_earned(tmp_path, capsys):
    from rto_fast.train import main

    main([*SHORT, "--output_dir", str(tmp_path / "out")])
    assert f"report: {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out
    found = read_run(tmp_path / "out")
    assert [record["step"] for record in found.tokens] == [1] * 4 + [2] * 4 + [3] * 4
    for step in (1, 2, 3):  # these are all responses of the rollout, so that the metrics are theirs
        of_step = [record for record in found.tokens if record["step"] == step]
        metrics = found.stages["rto"][step]
        for name in ("dpo_reward", "kl_penalty", "score_reward"):
            mean = sum(sum(record[name]) for record in of_step) / len(of_step)
            assert mean == pytest.approx(metrics[name], abs=1e-3), name
        assert all(record["score_reward"][-1] == pytest.approx(record["score"], abs=1e-4) for record in of_step)
        assert sum(record["count"] for record in of_step) == metrics["tokens"]
    assert any(record["dpo_reward"][0] for record in found.tokens)
    check_is_safe_and_self_contained(Page(tmp_path / "out" / "report.html"))


def test_a_report_that_fails_costs_a_line_and_not_the_run(run, monkeypatch, capsys):
    from rto_fast.reporting import page
    from rto_fast.reporting.finish import report_run
    from rto_fast.reporting.log import RunLog

    monkeypatch.setattr(page, "write_report", lambda folders: 1 / 0)
    report_run(run, RunLog(run))
    assert capsys.readouterr().out == "report: not written (ZeroDivisionError: division by zero)\n"


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_no_script_runs_in_a_real_browser(page, tmp_path):
    # The escaping must hold without the content security policy behind it.
    bare = re.sub(r"<meta http-equiv[^>]*>", "", page.source)
    assert "Content-Security-Policy" not in bare
    sources = {
        "as written": page.source,
        "escaping alone": bare,
        "policy alone": page.source.replace("</body>", ATTACKS[0] + "</body>"),
        "neither": bare.replace("</body>", ATTACKS[0] + "</body>"),  # does this browser run scripts at all?
    }
    titles = {}
    for name, source in sources.items():
        (tmp_path / "page.html").write_text(source, encoding="utf-8")
        done = subprocess.run(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--dump-dom",
                f"file://{tmp_path / 'page.html'}",
            ],
            capture_output=True,
            text=True,
            timeout=100,
        )
        titles[name] = re.search("<title>(.*?)</title>", done.stdout, re.S)[1]
    assert titles.pop("neither") == "owned"
    assert set(titles.values()) == {"run · rto-fast"}


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "results.json", "config.yaml"])
def test_a_file_that_somebody_has_blown_up_takes_no_memory_and_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(run_files, "LARGEST", 2**20)
    folder = fake_run(tmp_path / "run")
    if not (folder / name).exists():
        (folder / name).touch()
    with open(folder / name, "r+b") as file:
        file.truncate(2**40)
    run = read_run(folder)
    assert any(note.startswith(f"{name}: of 1,099,511,627,776 bytes the first ") for note in run.notes)
