"""Finishes a run: its report, its model card and the upload to the Hugging Face Hub.

At the end of a run an error here is printed and does not end the run.
"""

import glob
from fnmatch import fnmatchcase
from pathlib import Path

from rto_fast.config import Config, check_repo
from rto_fast.errors import HubError, command_line
from rto_fast.reporting.log import RunLog
from rto_fast.system.command_line import error_line
from rto_fast.system.progress import progress
from rto_fast.system.run_lock import refuse_if_in_use
from rto_fast.system.terminal import one_line, say
from rto_fast.system.writing import write_own


def report_run(folder: Path, log: RunLog) -> None:
    """Writes report.html."""
    try:
        from rto_fast.reporting.page import write_report  # matplotlib is needed here and nowhere else

        log.say(f"\nreport: {write_report([folder])}")
    except Exception as error:
        log.say(f"report: not written ({error_line(error, with_type=True)})")


def publish_run(config: Config, folder: Path, log: RunLog) -> None:
    """Writes the final model's card, and pushes the model where `hub.repo` says so."""
    hub = config.hub
    try:
        from rto_fast.reporting.model_card import write_model_card

        log.say(f"model card: {write_model_card(folder)}")
    except Exception as error:
        log.say(f"model card: not written ({error_line(error, with_type=True)})")
    if not hub.repo:
        return
    try:
        log.say(f"pushed: {push(folder, hub.repo, private=hub.private)}")
    except Exception as error:
        again = command_line("rto_fast.push", folder, "--repo", hub.repo)
        log.say(f"push: {error_line(error)}; again with: {again}{'' if hub.private else ' --private false'}")


WEIGHTS = ["model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"]
# Only these files are uploaded: no pickle, no code, no file that somebody put beside the model.
ALLOWED = [
    "README.md",
    "images/*.png",
    *WEIGHTS,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
]
LARGEST_CARD = 2**24  # bytes


def push(run_folder: str | Path, repo: str, *, private: bool = True, dry_run: bool = False) -> str | None:
    """Uploads a finished run's model with its card, which is written if it is missing.

    Args:
        run_folder: the output_dir of a finished run.
        repo: the repository, OWNER/NAME, which is created where it does not exist.
        private: refuse a public repository.
        dry_run: only list what would be uploaded, without the network and without writing anything.
    Returns:
        The repository's address; None after a dry run.
    Raises:
        ConfigError: the repository's name is not valid, or the run is in progress.
        DataError: the run has no finished model.
        ModelError: its weights cannot be read.
        HubError: there is no token or no network, or the Hub refuses.
    """
    check_repo(repo, "--repo")
    from rto_fast.reporting.model_card import count_parameters, final_model, model_card, name_in_card, write_model_card

    refuse_if_in_use(run_folder, by_others=True)  # a run under way may be about to write another model or card
    _, folder = final_model(run_folder)
    count_parameters(folder)  # weights that cannot be read are not pushed
    card = folder / "README.md"
    images: dict[str, Path] = {}
    try:
        if card.is_file():
            if card.stat().st_size > LARGEST_CARD:
                raise HubError(f"{card}: larger than {LARGEST_CARD:,} bytes, which is no model card; delete it")
            text = card.read_text(encoding="utf-8")
        else:
            text, images = model_card(run_folder)
    except UnicodeDecodeError as error:
        raise HubError(f"{card}: not UTF-8: {error}") from error
    text = name_in_card(text, repo)
    if dry_run:
        written = {name: image.stat().st_size for name, image in images.items()}
        _list(folder, written | {"README.md": len(text.encode("utf-8"))}, repo, private)
        return None
    if not card.is_file():
        write_model_card(run_folder)
    write_own(card, text)
    return _upload(folder, uploaded_files(folder), repo, private)


def _list(folder: Path, written: dict[str, int], repo: str, private: bool) -> None:
    """Prints what would be uploaded.

    Args:
        written: {name: bytes} of the files that the push would write first.
    """
    sizes = {name: (folder / name).stat().st_size for name in uploaded_files(folder)} | written
    say(f"would be uploaded to {repo} ({'private' if private else 'public'}):")
    for name in sorted(sizes):
        say(f"  {sizes[name]:>15,} bytes  {one_line(name)}")
    card = folder / "README.md"
    say(f"  {sum(sizes.values()):>15,} bytes in {len(sizes)} files")
    say(f"card: {card}{'' if card.is_file() else ', which the push writes'}")


def uploaded_files(folder: Path) -> list[str]:
    """The names of the files that are uploaded, relative to `folder`; prints those of the others."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    root = folder.resolve()

    def is_allowed(name: str) -> bool:
        # A pattern's * matches slashes, so the depth is compared too. A link may point at any file of this machine.
        fits = any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in ALLOWED)
        return fits and (folder / name).is_file() and (folder / name).resolve() == root / name

    files = [name for name in names if is_allowed(name)]
    if left_out := [name for name in names if name not in files]:
        say("not uploaded, not part of a model: ", one_line(", ".join(left_out)))
    return files


def _upload(folder: Path, files: list[str], repo: str, private: bool) -> str:
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if not token:
        raise HubError(f"{repo}: no token for the Hub; `hf auth login`, or set HF_TOKEN (it must be allowed to write)")
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        is_public = private and not api.model_info(repo).private
        if not is_public:
            with progress(f"uploading {sum((folder / name).stat().st_size for name in files):,} bytes to {repo}"):
                api.upload_folder(
                    repo_id=repo,
                    folder_path=folder,
                    allow_patterns=[glob.escape(name) for name in files],
                    delete_patterns=WEIGHTS,  # of an earlier push, which could be loaded in place of these
                    commit_message="Push from rto-fast",
                )
    except Exception as error:  # errors of the client, of HTTP and of the storage have no common base
        # An HTTP library's error may quote the header with the token.
        reason = " ".join(str(error).replace(token, "…").split())[:300]
        raise HubError(
            f"{repo}: not uploaded ({type(error).__name__}: {reason}); see the name, the token's rights and the network"
        ) from error
    if is_public:
        raise HubError(f"{repo}: exists and is public; give --private false to push there")
    return str(url)
