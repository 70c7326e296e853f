"""What is written: through links, into pipes and devices, refused elsewhere, with the permissions that the umask gives."""

import ast
import errno
import json
import os
import socket
import stat
import threading
import types
from pathlib import Path

import pytest

from rto_fast import evaluate, report
from rto_fast.data.cache import CachingTokenizer
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.errors import UserError
from rto_fast.evaluation.output import check_output, write_json
from rto_fast.models.model import Model
from rto_fast.reporting import draw
from rto_fast.reporting.page import write_report
from rto_fast.training.saving import save_model
from rto_fast.training.state_files import save_state, write_text

ROOT = Path(report.__file__).parent.parent


def a_report(path):
    run = Path("the run").absolute()
    run.mkdir(exist_ok=True)
    lines = [json.dumps({"stage": "sft", "step": i + 1, "seconds": 1.0, "loss": 1.0}) + "\n" for i in range(3)]
    (run / "metrics.jsonl").write_text("".join(lines))
    write_report([run], path)


WRITERS = {
    "report": (a_report, "<!doctype html>"),
    "evaluation": (lambda path: write_json({"kl": 1.0}, path), "{\n"),
}


@pytest.fixture(autouse=True)
def inside(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(draw, "render", lambda panel: ("<svg></svg>", b"a picture"))


@pytest.fixture(params=WRITERS)
def writer(request):
    return WRITERS[request.param]


def left_over(folder):
    return [path.name for path in Path(folder).iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("there", [True, False], ids=["whole", "dangling"])
def test_a_link_stays_one_and_what_it_points_at_is_written(writer, there):
    write, begins = writer
    Path("far").mkdir()
    if there:
        Path("far/target").write_text("before")
    Path("far/second").symlink_to("target")
    Path("first").symlink_to("far/second")
    write("first")
    assert Path("first").is_symlink() and Path("far/second").is_symlink() and not Path("far/target").is_symlink()
    assert Path("far/target").read_text().lower().startswith(begins)
    assert not left_over(".") and not left_over("far")


def test_a_pipe_is_written_into(writer):
    write, begins = writer
    os.mkfifo("pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append(Path("pipe").read_text()), daemon=True)
    reader.start()
    write("pipe")
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    reader.join(10)
    assert read[0].lower().startswith(begins) and not left_over(".") and not Path("pipe_figures").exists()


def test_a_device_stays_one(writer):
    try:
        os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        Path("null").write_text("")
    except OSError as error:
        pytest.skip(f"no device can be made here: {error}")
    writer[0]("null")
    assert stat.S_ISCHR(os.stat("null").st_mode) and not Path("null_figures").exists()


@pytest.mark.parametrize("kind", ["folder", "socket", "link to a folder", "link to itself"])
def test_what_is_no_file_is_refused_by_name_and_stays(writer, kind):
    if kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind("thing")
    elif kind == "link to itself":
        Path("thing").symlink_to("thing")
    else:
        Path("a folder").mkdir()
        Path("thing").symlink_to("a folder") if "link" in kind else Path("thing").mkdir()
    before = os.lstat("thing")
    reason = {"socket": "is a socket", "link to itself": "Too many levels of symbolic links"}.get(kind, "is a folder")
    with pytest.raises(UserError, match=f"thing.*{reason}") as refusal:
        writer[0]("thing")
    assert "\n" not in str(refusal.value) and os.lstat("thing").st_ino == before.st_ino and not left_over(".")


@pytest.mark.parametrize("name", ["thing", "thing/file", "x" * 300])
def test_what_cannot_be_written_is_refused_before_the_work(name):
    Path("thing").symlink_to("thing")
    with pytest.raises(UserError, match=f"--output: {name} cannot be written"):
        check_output(name)


def test_an_open_file_of_the_process_is_written_where_it_is(writer):
    write, begins = writer
    with open("log", "w+") as file:
        file.write("first\n")
        file.flush()
        write(f"/dev/fd/{file.fileno()}")
        file.write("last\n")
        file.flush()
    content = Path("log").read_text()
    assert content.startswith("first\n") and content.endswith("last\n") and begins in content.lower()
    ours, theirs = socket.socketpair()
    Path("link").symlink_to(f"/proc/self/fd/{ours.fileno()}")
    read = []
    reader = threading.Thread(target=lambda: read.append(theirs.makefile().read()), daemon=True)
    reader.start()
    write("link")
    ours.close()
    reader.join(10)
    assert read[0].lower().startswith(begins)


@pytest.mark.parametrize("name", ["-", "link"])  # not /dev/stdout by its name: a fault of the code would replace it
def test_a_report_to_stdout_is_all_that_is_there(name, capfd):
    a_report("page.html")
    Path("link").symlink_to("/dev/stdout")
    report.main(["the run", "--output", name])
    out, err = capfd.readouterr()
    assert out.lower().startswith("<!doctype html>") and out.rstrip().endswith("</html>")
    assert err.startswith("report: ") and err.count("\n") == 1 and not Path("link_figures").exists()


@pytest.mark.parametrize("name", ["-", "link"])
def test_an_evaluation_to_stdout_is_all_that_is_there(name, capfd, monkeypatch):
    def measure(inputs):
        inputs.say("policy: responds to 4 prompts")
        return {"rewards": {}, "kl": {key: {"value": 1.0, "low": 0.5, "high": 2.0, "count": 4} for key in ("k1", "k3")}}

    def opened(options, say):
        return types.SimpleNamespace(say=say)

    monkeypatch.setattr("rto_fast.evaluation.measure.open_evaluation", opened)
    monkeypatch.setattr("rto_fast.preflight.checks.check_before_evaluation", lambda inputs: None)
    monkeypatch.setattr("rto_fast.evaluation.measure.measure", measure)
    Path("link").symlink_to("/dev/stdout")
    evaluate.main(["--model", "m", "--data", "embedded:eval_prompts", "--output", name])
    out, err = capfd.readouterr()
    assert (
        json.loads(out)["kl"]["k1"]["value"] == 1.0 and "responds to 4 prompts" in err and "KL to the reference" in err
    )


def test_a_link_that_somebody_put_beside_is_not_followed(writer):
    Path("victim").write_text("precious")
    for name in (".out.part", f".out.{os.getpid()}.part"):
        Path(name).symlink_to("victim")
    writer[0]("out")
    assert Path("victim").read_text() == "precious" and not Path("out").is_symlink()


OWN = ["report.html", "figures", "config.yaml"]


def write_own_files(run):
    """What the report and the run write into a run's folder."""
    lines = [json.dumps({"stage": "sft", "step": i + 1, "seconds": 1.0, "loss": 1.0}) + "\n" for i in range(3)]
    (run / "metrics.jsonl").write_text("".join(lines))
    write_report([run])
    write_text(run / "config.yaml", "all of it")


@pytest.mark.parametrize("name", [*OWN, "a figure"])
@pytest.mark.parametrize("there", [True, False], ids=["whole", "dangling"])
def test_in_a_runs_folder_a_link_is_replaced_and_what_it_points_at_stays(name, there):
    run, other = Path("run").absolute(), Path("other").absolute()
    run.mkdir()
    write_own_files(run)
    names = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    name = name if name in names else next(n for n in sorted(names) if n.startswith("figures/"))
    if (run / name).is_dir():
        (run / name).rename("old figures")
        (run / name).symlink_to(other)
        if there:
            other.mkdir()
            for path in Path("old figures").iterdir():
                (other / path.name).write_text("precious")
    else:
        (run / name).unlink()
        (run / name).symlink_to(other)
        if there:
            other.write_text("precious")
    write_own_files(run)
    left = [*other.iterdir()] if other.is_dir() else [other]
    assert all(path.read_text() == "precious" for path in left) if there else not other.exists()
    assert not (run / name).is_symlink() and not left_over(run)
    assert names == {path.relative_to(run).as_posix() for path in run.rglob("*")}


@pytest.mark.parametrize("name", ["report.html", "config.yaml"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_in_a_runs_folder_what_is_no_file_is_refused_and_nothing_waits(name, make, limited):
    run = Path("run").absolute()
    run.mkdir()
    make(run / name)
    with limited(20), pytest.raises(UserError, match=f"{name}.* and no file of the run"):
        write_own_files(run)
    assert not (run / name).is_file() and not left_over(run)


def test_a_file_that_is_a_mount_is_written_in_its_place(writer, monkeypatch):
    write, begins = writer

    rename = os.replace

    def replace(new, old):
        if Path(old).name == "out":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(new, old)

    Path("out").write_text("before")
    inode = os.stat("out").st_ino
    monkeypatch.setattr(os, "replace", replace)
    write("out")
    assert os.stat("out").st_ino == inode and Path("out").read_text().lower().startswith(begins)
    assert not left_over(".")


def as_nobody(function, *arguments):
    """Whether `function` returns, in a process whom permissions hold."""
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            function(*arguments)
            os._exit(0)
        except UserError as error:
            os._exit(1 if "\n" not in str(error) else 3)
        except BaseException:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_read_only_folder_and_a_read_only_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("closed")
    for parent in (folder, *folder.parents):
        if not parent.stat().st_mode & 0o001:  # pytest's, which are their owner's alone
            parent.chmod(parent.stat().st_mode | 0o111)
    (folder / "mine").write_text("before")
    (folder / "mine").chmod(0o666)
    folder.chmod(0o555)
    assert as_nobody(write_json, {"a": 1}, folder / "mine") == 0
    assert json.loads((folder / "mine").read_text()) == {"a": 1}
    assert as_nobody(write_json, {"a": 1}, folder / "new") == 1
    assert as_nobody(check_output, folder / "new") == 1 and as_nobody(check_output, folder / "mine") == 0
    folder.chmod(0o777)
    (folder / "protected").write_text("before")
    (folder / "protected").chmod(0o444)
    assert as_nobody(write_json, {"a": 1}, folder / "protected") == 1
    assert (folder / "protected").read_text() == "before" and not left_over(folder)


def modes(folder):
    return {oct(stat.S_IMODE(path.stat().st_mode)) for path in [folder, *folder.rglob("*")] if path.is_dir()}, {
        oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o002])
def test_what_is_new_has_the_permissions_that_the_umask_gives(umask):
    before = os.umask(umask)
    try:
        folder = Path("new")
        folder.mkdir()
        for name, (write, _) in WRITERS.items():
            write(folder / f"{name}.html")
        save_model(Model(build_model(0)), build_tokenizer(), folder / "model")
        save_state(folder / "state", {"tensor": build_model(0).lm_head.weight})
        CachingTokenizer(build_tokenizer(), folder / "cache")(["red cup"] * 64)
        assert list((folder / "cache").iterdir())
    finally:
        os.umask(before)
    assert modes(folder) == ({oct(0o777 & ~umask)}, {oct(0o666 & ~umask)})


def test_what_is_replaced_keeps_the_permissions_that_somebody_gave_it(writer):
    write, begins = writer
    Path("out").write_text("before")
    Path("out").chmod(0o640)
    write("out")
    assert Path("out").read_text().lower().startswith(begins) and stat.S_IMODE(os.stat("out").st_mode) == 0o640


def test_a_folder_of_a_model_that_is_replaced_keeps_its_permissions():
    save_model(Model(build_model(0)), build_tokenizer(), "model")
    Path("model").chmod(0o750)
    save_model(Model(build_model(0)), build_tokenizer(), "model")
    assert modes(Path("model")) == ({"0o750"}, {"0o640"}) and not left_over(".")


# Who else may write, and what: the parts of a folder that is written aside, logs, which grow, what the system reads, and
# folders that are removed again.
OTHERS = {
    "rto_fast/training/state_files.py": {"write_text", "write_bytes", "replace"},
    "rto_fast/system/run_lock.py": {"open", "write_bytes", "replace"},  # a lock is taken by creating it
    "rto_fast/reporting/log.py": {"open"},
    "rto_fast/rollout/vllm.py": {"TemporaryDirectory"},
    "benchmarks/peak_memory.py": {"write_text", "TemporaryDirectory"},
    "benchmarks/iteration.py": {"TemporaryDirectory"},
    "benchmarks/trl_iteration.py": {"TemporaryDirectory", "write_text"},
    "benchmarks/gpu.py": {"mkdtemp"},
    "benchmarks/gpu_parts.py": {"open", "TemporaryDirectory"},
    "benchmarks/static.py": {"NamedTemporaryFile"},
    "benchmarks/timing.py": {"write_text"},
}
WRITING = {"write_text", "write_bytes", "mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryDirectory", "savefig"}


def writes(call):
    """The name of a call that writes a file, or None."""
    name = getattr(call.func, "attr", "open" if getattr(call.func, "id", "") == "open" else "")
    owner = getattr(getattr(call.func, "value", None), "id", "")
    values = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    if name == "open" and any(isinstance(v, ast.Constant) and set(str(v.value)) & set("wax+") for v in values):
        return name
    return name if name in WRITING or (name in ("replace", "rename") and owner == "os") else None


def test_nobody_else_writes_files():
    found = {}
    for path in [*ROOT.glob("rto_fast/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        if names := {writes(call) for call in calls} - {None}:
            found[path.relative_to(ROOT).as_posix()] = names
    assert found.pop("rto_fast/system/writing.py") == {"open", "replace"}
    found["benchmarks/roofline.py"].remove("savefig")  # into memory
    assert {name: names for name, names in found.items() if names} == OTHERS
