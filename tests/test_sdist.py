"""The source distribution holds what the repository holds: the tests in it run."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OF_SETUPTOOLS = {"PKG-INFO", "setup.cfg"}


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no checkout to compare with")
def test_it_holds_every_file_of_the_repository(tmp_path):
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    names = [name for name in names if name and os.path.lexists(ROOT / name) and not name.startswith("shared/")]
    for name in names:  # not built here: setuptools writes beside what it packs
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name, follow_symlinks=False)
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, check=True)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {member.name.partition("/")[2] for member in file if member.isfile()}
    # A link to a folder, rto_fast/kernels say, becomes a folder.
    wanted = {name for name in names if (ROOT / name).is_file()}
    linked = tuple(f"{name}/" for name in names if (ROOT / name).is_dir())
    more = {name for name in packed - wanted - OF_SETUPTOOLS if not name.startswith(("rto_fast.egg-info/", *linked))}
    assert wanted <= packed and not more
