"""The source distribution holds the whole repository, and the package works on a file system without links."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OF_SETUPTOOLS = {"PKG-INFO", "setup.cfg"}


pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no checkout to copy")


def copy_repository(folder: Path, links: bool = True) -> list[str]:
    """Copies the files, since setuptools writes beside what it packs; without links, as git writes them there."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    names = [name for name in names if name and os.path.lexists(ROOT / name) and not name.startswith("shared/")]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink() and not links:
            (folder / name).write_text(os.readlink(ROOT / name))
        else:
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return names


def build(kind: str, folder: Path) -> Path:
    code = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, check=True)
    (archive,) = (folder / "dist").iterdir()
    return archive


def test_it_holds_every_file_of_the_repository(tmp_path):
    names = copy_repository(tmp_path)
    with tarfile.open(build("sdist", tmp_path)) as file:
        packed = {member.name.partition("/")[2] for member in file if member.isfile()}
    # A link to a folder, rto_fast/kernels say, becomes a folder.
    wanted = {name for name in names if (ROOT / name).is_file()}
    linked = tuple(f"{name}/" for name in names if (ROOT / name).is_dir())
    more = {name for name in packed - wanted - OF_SETUPTOOLS if not name.startswith(("rto_fast.egg-info/", *linked))}
    assert wanted <= packed and not more


@pytest.mark.parametrize("installed", [False, True], ids=["checkout", "wheel"])
def test_a_file_system_without_links(installed, tmp_path):
    """The package finds its own kernels and configurations, and never another package that is called `kernels`."""
    copy_repository(tmp_path / "checkout", links=False)
    site, other = (tmp_path / "site", tmp_path / "site") if installed else (tmp_path / "checkout", tmp_path / "other")
    if installed:
        shutil.unpack_archive(build("wheel", tmp_path / "checkout"), site, "zip")
    (other / "kernels").mkdir(parents=True)
    (other / "kernels" / "__init__.py").write_text("raise SystemExit('another package')")
    code = "import rto_fast.kernels.common as c; from rto_fast.config import load_config as l; " + (
        "print(c.__file__, l(['--config', 'smollm2_135m']).output_dir)"
    )
    path = os.pathsep.join([str(site), str(other)])
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    )
    file = site / ("rto_fast/kernels" if installed else "kernels") / "common.py"
    assert process.stdout.split() == [str(file), "runs/smollm2_135m"]
