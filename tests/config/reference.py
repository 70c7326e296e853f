"""docs/configuration.md, made from the fields: `python -m tests.config.reference > docs/configuration.md`."""

from rto_fast.config.help import Entry, entries, sections, summary
from rto_fast.config.load import shipped_configs
from rto_fast.config.run import Config
from rto_fast.system.terminal import say

INTRODUCTION = """# Configuration

This page is made from the fields of `rto_fast/config/`: `python -m tests.config.reference > docs/configuration.md`.

Every key below is a key of a YAML file and an option of the command line:

```bash
python -m rto_fast.train --config own --sft.model DIR --data.preferences pairs.jsonl --rto.kl_coef 0.02
```

- `--config` takes a file or the name of a shipped configuration ({names}). What a file leaves out has the default below.
- Options override the file, and a later one an earlier one. A section can be given as a whole: `--rto '{{lr: 1e-6}}'`.
- Without `--config` a run is the embedded default; if a model or data is given, it is `own`.
- `--print_config` prints the result and exits, `--help GROUP` explains one section, `--help all` every key.
- A run saves its configuration in `config.yaml` of its folder. `--resume FOLDER` reads it; options override it.
- An unknown key, a value of the wrong type and one outside of its range end the command in one line that names the place.
- A key of an older version is read where the present keys can say the same, and refused with what replaces it where not.
"""


def reference() -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION.format(names=", ".join(f"`{name}`" for name in shipped_configs()))]
    parts += ["## The run as a whole\n", _table(entries(Config))]
    for name, part in sections(Config).items():
        parts += [f"## {name}\n", f"{summary(part)}\n", _table(entries(part, f"{name}."))]
    return "\n".join(parts)


def _table(fields: list[Entry]) -> str:
    rows = [
        (f"`{f.key}`", f"`{f.default}`", (f.text + f" ({f.kind})" * bool(f.kind)).replace("|", "\\|")) for f in fields
    ]
    lines = ["| key | default | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    say(reference().rstrip("\n"))
