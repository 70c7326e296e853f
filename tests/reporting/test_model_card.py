"""The model card, and the push of a finished run's model: what leaves the machine, and what never does."""

import functools
import html
import json
import re
import shutil
import socket
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml

from rto_fast.config import dump_config, load_config
from rto_fast.errors import ConfigError
from rto_fast.push import command
from rto_fast.reporting import model_card
from rto_fast.reporting.finish import publish_run, uploaded_files
from rto_fast.reporting.model_card import name_in_card, plain, public, write_model_card
from tests.tiny_models import save_world_model

ATTACK = "a | b `c` **d** __e__ [f](javascript:g) <script>h</script> ~~i~~ \\ &lt; \u202e\n## j"
OPTIONS = ["--sft.model", "gpt2", "--data.preferences", "trl-lib/ultrafeedback_binarized[train]", "--threads", "1"]
MODEL_FILES = [
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "images/rto_kl.png",
    "images/rto_score.png",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_world_model(tmp_path_factory.mktemp("model"))


@functools.cache
def configuration(*options):
    return dump_config(load_config(["--config", "default", *OPTIONS, *options]))


@pytest.fixture(scope="module", autouse=True)
def configurations_are_parsed_once():
    """It takes a third of a second."""
    parsed, parse = {}, model_card.load_config

    def once(arguments):
        text = Path(arguments[1]).read_text()
        parsed[text] = parsed.get(text) or parse(arguments)
        return parsed[text]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_card, "load_config", once)
        yield


@pytest.fixture
def finished(tmp_path, model):
    """Makes the folder of a finished run."""

    def make(*options, name="tiny", policies=("SFT", "DPO", "RTO")):
        folder = tmp_path / name
        shutil.copytree(model, folder / ("dpo" if "--rto.enabled" in options else "rto"))
        (folder / "config.yaml").write_text(configuration(*options))
        records = [{"stage": "dpo", "step": i + 1, "seconds": i, "loss": 0.7 - i / 10, "tokens": 500} for i in range(3)]
        records += [{"stage": "dpo", "step": 3, "seconds": 3, "held_out_accuracy": 0.82}]
        records += [{"stage": "rto", "step": 9, "seconds": 5, "score": 1.25, "kl": 4.5, "length": 30, "tokens": 900}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        values = {"score": 0.603, "standard_error": 0.008, "length": 27.5, "finished": 0.975, "responses": 512}
        results = {policy: values | {"kl": 6.25 if policy == "RTO" else None} for policy in policies}
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "figures").mkdir()
        for figure in ("rto_score", "rto_kl", "stages"):
            (folder / "figures" / f"{figure}.png").write_bytes(b"\x89PNG " + figure.encode())
        return folder

    return make


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class Hub:
    """Records what `HfApi` is asked for; anything else that is called does not exist."""

    def __init__(self, exists_public=False, error=None):
        self.calls, self.exists_public, self.error = [], exists_public, error

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create_repo", repo_id, private, exist_ok))
        if self.error:
            raise self.error
        return f"https://huggingface.co/{repo_id}"

    def model_info(self, repo_id):
        return type("Info", (), {"private": not self.exists_public})

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, delete_patterns, commit_message):
        files = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        uploaded = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns)
        self.calls.append(("upload_folder", repo_id, sorted(uploaded)))


@pytest.fixture
def hub(monkeypatch):
    def use(token="hf_" + "x" * 34, **options):
        stub = Hub(**options)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stub)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
        return stub

    return use


@pytest.fixture
def push(monkeypatch, capsys):
    """The command, in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["push", *map(str, arguments)])
        code = 0
        try:
            command()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_the_card_is_valid_and_says_what_was_trained_from_what(finished, no_network):
    folder = finished()
    path = write_model_card(folder)
    assert path == folder / "rto" / "README.md"
    card = huggingface_hub.ModelCard.load(path)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.base_model == "gpt2" and card.data.datasets == ["trl-lib/ultrafeedback_binarized"]
    assert card.data.tags == ["rto-fast", "rto", "ppo", "dpo", "rlhf"] and card.data.license is None
    assert "113,088 parameters" in card.text and "[gpt2](https://huggingface.co/gpt2)" in card.text
    assert "| SFT | given: gpt2 |" in card.text
    assert "| 3 | 32 | 1,500 | loss 0.500, share of held-out pairs ranked right 0.820 |" in card.text
    assert "| 9 | 64 | 900 | score 1.250, KL 4.500, length 30 |" in card.text
    assert "| RTO | 0.603 ± 0.008 | 27.5 | 6.250 | 97.5 % | 512 |" in card.text
    assert (
        "Each token earns 0.1·log(π_dpo/π_ref) (clipped to ±0.1) − 0.05·log(π/π_ref), the last one also 1·score."
        in (html.unescape(card.text))
    )
    assert "2404.18922" in card.text and f"torch {torch.__version__.partition('+')[0]}" in card.text


def test_figures_that_matter_lie_beside_the_card(finished):
    path = write_model_card(finished())
    linked = re.findall(r"!\[[^]]+\]\((images/\w+\.png)\)", path.read_text())
    assert linked == ["images/rto_score.png", "images/rto_kl.png"]
    assert all((path.parent / name).read_bytes().startswith(b"\x89PNG") for name in linked)


def test_what_a_link_points_at_is_no_figure_of_the_card(finished, push, hub, tmp_path):
    """It would be copied beside the model and leave the machine."""
    (tmp_path / "secret").write_text("a key")
    folder, stub = finished(), hub()
    (folder / "figures" / "rto_kl.png").unlink()
    (folder / "figures" / "rto_kl.png").symlink_to(tmp_path / "secret")
    code, _, _ = push(folder, "--repo", "me/tiny")
    assert code == 0 and "images/rto_kl.png" not in stub.calls[1][2] and "images/rto_score.png" in stub.calls[1][2]
    assert not (folder / "rto" / "images" / "rto_kl.png").exists()
    (folder / "figures").rename(tmp_path / "pictures")
    (folder / "figures").symlink_to(tmp_path / "pictures")
    assert "](images/" not in write_model_card(folder).read_text()


@pytest.mark.parametrize("name", ["README.md", "images", "images/rto_kl.png"])
def test_the_card_is_not_written_through_a_link(finished, tmp_path, name):
    folder, other = finished(), tmp_path / "other"
    path = folder / "rto" / name
    path.parent.mkdir(exist_ok=True)
    if name == "images":
        other.mkdir()
        (other / "rto_kl.png").write_text("precious")
    else:
        other.write_text("precious")
    path.symlink_to(other)
    write_model_card(folder)
    kept = other / "rto_kl.png" if name == "images" else other
    assert kept.read_text() == "precious" and not path.is_symlink()
    assert (folder / "rto" / "images" / "rto_kl.png").read_bytes().startswith(b"\x89PNG")


def test_a_card_that_somebody_has_blown_up_is_refused(finished, push):
    folder = finished()
    with open(folder / "rto" / "README.md", "wb") as file:
        file.truncate(2**40)
    code, _, err = push(folder, "--repo", "me/tiny", "--dry_run")
    assert code == 2 and "README.md: larger than" in err and err.count("\n") == 1


def test_the_cards_lines_load_the_model(finished, no_network):
    path = write_model_card(finished())
    (code,) = re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
    scope = {}
    exec(code.replace("OWNER/NAME", str(path.parent)), scope)
    assert scope["model"].num_parameters() == 113_088 and len(scope["tokenizer"]) == 49


@pytest.mark.parametrize(
    "options, where, tags",
    [
        (["--rto.dpo_reward_scale", "0"], "rto", ["rto-fast", "ppo", "rlhf"]),
        (["--rto.enabled", "false"], "dpo", ["rto-fast", "dpo", "rlhf"]),
    ],
    ids=["PPO", "DPO"],
)
def test_runs_that_are_not_rto_do_not_say_so(finished, options, where, tags):
    path = write_model_card(finished(*options, policies=["SFT"]))
    card = huggingface_hub.ModelCard.load(path)
    assert path.parent.name == where and card.data.tags == tags
    assert "π_dpo" not in card.text and "kl_coef" in card.text


def test_local_models_and_data_are_no_names_of_the_hub_and_say_only_their_last_part(finished, tmp_path):
    private = tmp_path / "ann" / "secret_project"
    private.mkdir(parents=True)
    data = private / "pairs.jsonl"
    data.touch()
    options = ["--sft.model", str(private), "--data.preferences", f"{data}[train]", "--data.cache_dir", "~/ann/cache"]
    options += ["--output_dir", str(private), "--rollout.vllm", '{"hf_token": "abc", "download_dir": "/dev/ann/x"}']
    path = write_model_card(finished(*options))
    card = huggingface_hub.ModelCard.load(path)
    assert card.data.base_model is None and card.data.datasets is None
    assert "trained from secret_project" in card.text
    assert "pairs.jsonl" in card.text and str(tmp_path) not in card.text and "/ann" not in card.text
    assert "abc" not in card.text and "hf_token: (left out)" in card.text
    (settings,) = re.findall(r"```yaml\n(.*?)```", card.text, re.S)
    assert yaml.safe_load(settings)["rto"]["kl_coef"] == 0.05


@pytest.mark.parametrize(
    "key, value, shown",
    [
        ("path", "C:\\Users\\ann\\model", "model"),
        ("path", "../ann/model/", "model"),
        ("path", "owner/model", "owner/model"),
        ("max_new_tokens", 60, 60),
        ("delimiters", ".!?/\n", ".!?/\n"),
        ("api_key", "abc", "(left out)"),
        ("url", "https://ann:pass@host/x", "(left out)"),
        ("url", "https://host/x", "https://host/x"),
        ("url", "file:///home/ann/x", "x"),
        ("list", ["hf_" + "a" * 30], ["(left out)"]),
        ("preferences", "clients/acme/pairs.jsonl", "pairs.jsonl"),
        ("preferences", "clients/pairs.jsonl[test[:500]]", "pairs.jsonl[test[:500]]"),
        ("preferences", "clients\\acme\\pairs.jsonl", "pairs.jsonl"),
        ("preferences", "client x/pairs", "pairs"),
        ("preferences", "org/name:config[test[:500]]", "org/name:config[test[:500]]"),
        ("preferences", "a/b/c", "c"),
        ("preferences", ".clients/pairs", "pairs"),
        ("preferences", "clients/pairs/", "pairs"),
        ("preferences", "models/acme", "acme"),
        ("preferences", "kunden/\u7532", "\u7532"),
        ("preferences", "\u7532/pairs", "pairs"),
        ("preferences", "clients/a--b", "a--b"),
        ("preferences", "here/pairs", "pairs"),
        ("path", "C:model", "model"),
        ("path", "~ann", "~"),
        ("path", "./model", "model"),
        ("path", "/", "/"),
        ("output_dir", "acme/run", "run"),
        ("function", "acme/reward.py:score", "reward.py:score"),
        ("download_dir", "acme/cache", "cache"),
    ],
)
def test_settings_for_others_eyes(key, value, shown, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()  # a folder with the name of an owner
    monkeypatch.chdir(tmp_path)
    assert public({key: value}) == {key: shown}


def test_relative_paths_are_no_names_of_the_hub(finished, tmp_path, monkeypatch):
    """Neither in the card's header, nor as links, nor in its text; from another working directory too."""
    (tmp_path / "acme" / "model").mkdir(parents=True)
    (tmp_path / "clients").mkdir()
    options = ["--sft.model", "acme/model", "--data.preferences", "clients/pairs", "--data.prompts", "clients/x.jsonl"]
    folder = finished(*options, "--dpo.model", "./acme/model", "--output_dir", "tiny")
    (tmp_path / "elsewhere").mkdir()
    for place in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(place)
        text = write_model_card(folder).read_text()
        card = huggingface_hub.ModelCard(text)
        assert card.data.base_model is None and card.data.datasets is None
        assert "acme" not in text and "clients" not in text and "trained from model by" in text
        assert "| x.jsonl |" in text and "preferences: pairs" in text


@pytest.mark.parametrize("name", ["a/b](http://x)", "a/<b>", "a/b: c", "a/b'\"", "..", "a/..", "-a/b", "a/b.git"])
def test_what_cannot_be_a_name_of_the_hub_is_not_linked(finished, name):
    text = write_model_card(finished(f"--sft.model={name}")).read_text()
    card = huggingface_hub.ModelCard(text)
    assert card.data.base_model is None and "](http://x" not in text and "huggingface.co/a" not in text
    assert card.data.datasets == ["trl-lib/ultrafeedback_binarized"] and set(card.data.to_dict()) >= {
        "tags",
        "datasets",
    }


def test_what_data_put_there_is_no_markup(finished):
    escaped = plain(ATTACK)
    assert not set(escaped) & set("|`*[]<>~\\\n\u202e") and "__" not in escaped
    assert html.unescape(escaped) == ATTACK.replace("\u202e", "\\u202e").replace("\n", " ")
    assert plain("gold_reward") == "gold_reward"
    folder = finished("--track.project", "```\n</details><script>k", name="x <script> | y", policies=[ATTACK])
    card = huggingface_hub.ModelCard.load(write_model_card(folder))
    title, *_ = card.text.strip().splitlines()
    assert title == "# x &#60;script&#62; &#124; y"
    (row,) = [line for line in card.text.splitlines() if "0.603" in line]
    assert row.count("|") == 6 and "<" not in row and "`" not in row
    before, fence, settings = re.split(r"\n(`{4,})yaml\n", card.text)
    assert "<script>" not in before and settings.index("<script>k") < settings.index(f"\n{fence}\n")


def test_a_card_needs_a_finished_model(finished, push, tmp_path):
    folder = finished()
    (folder / "rto" / "model.safetensors").unlink()
    code, _, err = push(folder, "--repo", "me/tiny", "--dry_run")
    assert code == 2 and "no finished model there; go on with" in err and err.count("\n") == 1
    (folder / "config.yaml").unlink()
    for place, message in ((folder, "no config.yaml in it"), (tmp_path / "gone", "no such folder")):
        code, _, err = push(place, "--repo", "me/tiny", "--dry_run")
        assert code == 2 and message in err and err.count("\n") == 1


def test_a_dry_run_lists_what_the_push_uploads_and_uses_no_network(finished, push, hub, no_network):
    folder = finished()
    write_model_card(folder)
    code, out, _ = push(folder, "--repo", "me/tiny", "--dry_run")
    sizes = re.findall(r"^ +([\d,]+) bytes  (\S+)$", out, re.M)
    listed = {name: int(size.replace(",", "")) for size, name in sizes}
    assert code == 0 and sorted(listed) == MODEL_FILES and "me/tiny (private)" in out
    assert f"card: {folder / 'rto' / 'README.md'}" in out and f"{sum(listed.values()):,} bytes in 9 files" in out
    stub = hub()
    code, out, _ = push(folder, "--repo", "me/tiny")
    assert code == 0 and out == "pushed: https://huggingface.co/me/tiny\n"
    assert all((folder / "rto" / name).stat().st_size == size for name, size in listed.items())
    assert stub.calls == [("create_repo", "me/tiny", True, True), ("upload_folder", "me/tiny", MODEL_FILES)]
    assert 'name = "me/tiny"' in (folder / "rto" / "README.md").read_text()


def test_nothing_else_is_uploaded(finished, push, hub, tmp_path):
    folder = finished()
    model = folder / "rto"
    (tmp_path / "secret.json").write_text("{}")
    strangers = "pytorch_model.bin optimizer.pt x.pkl model.py .env notes.json images/a.svg sub/config.json".split()
    for name in strangers:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"\x80\x04")
    (model / "vocab.json").symlink_to(tmp_path / "secret.json")
    (model / "images").mkdir(exist_ok=True)
    stub = hub()
    code, out, _ = push(folder, "--repo", "me/tiny", "--private", "false")
    assert code == 0 and stub.calls[0] == ("create_repo", "me/tiny", False, True) and stub.calls[1][2] == MODEL_FILES
    files = {path.relative_to(model).as_posix() for path in model.rglob("*") if not path.is_dir()}
    assert files - set(uploaded_files(model)) == {*strangers, "vocab.json"} and all(name in out for name in strangers)


def test_a_pickle_with_a_better_name_is_refused(finished, push, hub):
    folder, stub = finished(), hub()
    (folder / "rto" / "model-00001-of-00001.safetensors").write_bytes(b"\x80\x04\x95" + b"." * 40)
    code, _, err = push(folder, "--repo", "me/tiny")
    assert code == 2 and "not a safetensors file" in err and not stub.calls


@pytest.mark.parametrize("has_card", [False, True])
def test_a_dry_run_changes_nothing_in_the_run(finished, push, hub, no_network, has_card):
    folder = finished()
    if has_card:
        write_model_card(folder)

    def tree():
        paths = [folder, *folder.rglob("*")]
        return {p: (p.stat().st_mtime_ns, p.stat().st_mode, p.is_file() and p.read_bytes()) for p in paths}

    before = tree()
    code, out, _ = push(folder, "--repo", "me/another_name", "--dry_run")
    assert code == 0 and tree() == before
    listed = dict(re.findall(r"^ +([\d,]+) bytes  (\S+)$", out, re.M))
    stub = hub()
    assert push(folder, "--repo", "me/another_name")[0] == 0
    sizes = {f"{(folder / 'rto' / name).stat().st_size:,}": name for name in stub.calls[1][2]}
    assert listed == sizes and sorted(listed.values()) == MODEL_FILES


def test_a_card_that_was_edited_is_kept_but_for_the_repositorys_name(finished, push, hub):
    folder, _ = finished("--hub.repo", "me/first"), hub()
    path = write_model_card(folder)
    assert path.read_text().count("me/first") == 2  # the lines that load it, and the configuration
    edited = path.read_text().replace("# first", "# mine")
    path.write_text(edited)
    assert push(folder, "--repo", "me/second")[0] == 0
    assert path.read_text() == name_in_card(edited, "me/second") == edited.replace('"me/first"', '"me/second"')


@pytest.mark.parametrize("repo", ["tiny", "me/tiny/x", "me/ti ny", "me/..", "me/tiny.git", "https://hf.co/me/tiny"])
def test_bad_names_of_repositories(tmp_path, push, repo):
    code, _, err = push(tmp_path, "--repo", repo)
    assert code == 2 and "--repo: expected OWNER/NAME" in err and err.count("\n") == 1


def test_a_configuration_with_a_bad_name_is_refused_before_the_run():
    with pytest.raises(ConfigError, match="hub.repo: expected OWNER/NAME .* got 'tiny'"):
        load_config(["--hub.repo", "tiny"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"token": None}, "no token for the Hub; `hf auth login`, or set HF_TOKEN"),
        ({"error": ConnectionError("[Errno -2] Name or service\nnot known")}, "ConnectionError: .* service not known"),
        ({"error": ValueError("Illegal header value b'Bearer hf_" + "x" * 34)}, "ValueError: Illegal .* b'Bearer …"),
        ({"exists_public": True}, "exists and is public; give --private false"),
    ],
    ids=["no token", "no network", "an error that repeats the token", "public"],
)
def test_a_push_that_fails_is_one_line(finished, push, hub, options, message):
    stub = hub(**options)
    code, out, err = push(finished(), "--repo", "me/tiny")
    assert code == 2 and re.search(f"^rto_fast: me/tiny: .*{message}", err) and err.count("\n") == 1
    assert "x" * 34 not in out + err and not any(call[0] == "upload_folder" for call in stub.calls)


@pytest.fixture
def ended():
    """What `publish_run` says of a run that has ended in `folder`."""

    def publish(folder):
        said = []
        config = model_card.load_config(["--config", str(folder / "config.yaml")])
        publish_run(config, folder, type("Log", (), {"say": staticmethod(said.append)}))
        return said

    return publish


def test_a_run_writes_its_card_and_pushes_when_asked(finished, hub, ended):
    stub, folder = hub(), finished(name="plain")
    assert ended(folder) == [f"model card: {folder / 'rto' / 'README.md'}"] and not stub.calls
    folder = finished("--hub.repo", "me/tiny", "--hub.private", "false", name="pushed")
    assert ended(folder)[1:] == ["pushed: https://huggingface.co/me/tiny"]
    assert stub.calls[0] == ("create_repo", "me/tiny", False, True)


def test_a_failure_costs_a_run_one_line(finished, hub, ended, monkeypatch):
    hub(token=None)
    folder = finished("--hub.repo", "me/tiny", name="a run")
    (line,) = ended(folder)[1:]
    assert line.startswith("push: me/tiny: no token") and "\n" not in line
    assert line.endswith(f"again with: python -m rto_fast.push '{folder}' --repo me/tiny")
    shutil.rmtree(folder / "rto")
    assert [line.partition(" (")[0] for line in ended(folder)][0] == "model card: not written"
