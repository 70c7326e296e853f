"""Settings as a published model card shows them: paths are cut to their last part, and secrets are left out."""

import re
from collections.abc import Sequence
from pathlib import Path

from rto_fast.data.files import SUFFIXES
from rto_fast.data.run_data import split_of_source

SECRET_KEY = re.compile(r"(^|[_-])(token|secret|password|passwd|credentials?|(api_?)?key)$", re.IGNORECASE)
SECRET = re.compile(r"\bhf_\w{16,}|\bsk-\w{16,}|//[^/@\s]+@")
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
TEXTS = {"delimiters", "project"}  # settings that are neither names on the Hub nor paths
NAMES = {"path", "tokenizer", "model", "ref_model", "critic", "preferences", "sft", "prompts", "eval_prompts", "repo"}
RESERVED = {"models", "datasets", "spaces", "api", "docs", "blog"}  # the Hub's own pages, which no user can be named


def hub_name(text: str, folders: Sequence[Path] = ()) -> str | None:
    """The name of a model or a data set on the Hugging Face Hub, without its configuration and split; None where `text` may
    be a path.

    Args:
        text: a setting.
        folders: folders in which relative paths may begin, beside the working directory.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name, colon, configuration = split_of_source(text)[0].partition(":")
    if colon and not ("/" in name and re.fullmatch(r"[\w.-]+", configuration)):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    first = name.partition("/")[0]
    is_known_owner = first.lower() not in RESERVED or "/" not in name
    if name == "embedded" or name.lower().endswith(SUFFIXES) or not is_known_owner or not name.isascii():
        return None
    return None if any(_exists(folder / first) for folder in (Path.cwd(), *folders)) else name


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder that may not be looked into
        return True


def working_folder(run: Path, output_dir: str) -> list[Path]:
    """The working directory of a run, as its setting `output_dir` implies it; empty where that is not relative."""
    parts = Path(output_dir).parts
    parents = run.resolve().parents
    is_known = (
        parts and not Path(output_dir).is_absolute() and not {"..", "~"} & set(parts) and len(parts) <= len(parents)
    )
    return [parents[len(parts) - 1]] if is_known else []


def public(value: object, key: str = "", folders: Sequence[Path] = ()) -> object:
    """A setting, or a tree of settings, as it may be published.

    Args:
        value: the setting.
        key: its name.
        folders: as in `hub_name`.
    """
    if isinstance(value, dict):
        return {name: public(item, str(name), folders) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(item, key, folders) for item in value]
    if not isinstance(value, str):
        return value
    if SECRET_KEY.search(key) or SECRET.search(value):
        return "(left out)"
    is_address = ADDRESS.match(value) and not value.lower().startswith("file:")
    if key in TEXTS or is_address or (key in NAMES and hub_name(value, folders)):
        return value
    return last_part(value)


def last_part(path: str) -> str:
    """What stands behind the last separator of a path, on Windows too. The name of a home folder becomes ~."""
    name, split = split_of_source(path, "")
    name = re.sub(r"^[A-Za-z]:(?=.)", "", name.rstrip("\\/")) or name
    name = re.split(r"[\\/]", name)[-1] or name
    return ("~" if name.startswith("~") else name) + (f"[{split}]" if split else "")
