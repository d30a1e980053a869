"""The `haversack` command as a person or a script sees it: output, exit codes, bad cases."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from scripted_server import TOKEN, Fault, ScriptedCell, busy, file_bytes, forbidden

from cli import main as command_line

REPOSITORY = Path(__file__).resolve().parents[2]


class Said(NamedTuple):
    code: int
    out: str
    err: str


class ThreadedCell:
    """A scripted cell on a loop of its own, for commands that run theirs here."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.cell = ScriptedCell()
        self.run(self.cell.start)

    def run(self, work: Callable[[], object]) -> None:
        async def main() -> None:
            await work()  # type: ignore[misc]

        asyncio.run_coroutine_threadsafe(main(), self._loop).result(20)

    def stop(self) -> None:
        self.run(self.cell.stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def threaded() -> Iterator[ThreadedCell]:
    running = ThreadedCell()
    yield running
    running.stop()


@pytest.fixture
def cell(threaded: ThreadedCell) -> ScriptedCell:
    return threaded.cell


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a token where `haversack up` would have written it."""
    for name in list(os.environ):
        if name.startswith("HAVERSACK_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "admin.token").write_text(TOKEN + "\n")
    return tmp_path


@pytest.fixture
def haversack(
    cell: ScriptedCell,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[..., Said]:
    """Run a command in this process, as its entry point does."""
    monkeypatch.setenv("HAVERSACK_SERVER", cell.url)

    def run(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["haversack", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        return Said(int(ended.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def tree(place: Path) -> Path:
    root = place / "tree"
    (root / "sub").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "small").write_bytes(b"inline")
    (root / "sub" / "large").write_bytes(os.urandom(5_000_000))
    (root / "sub" / "tool").write_bytes(b"#!/bin/sh\n")
    (root / "sub" / "tool").chmod(0o755)
    (root / "link").symlink_to("sub/large")
    return root


def test_put_ls_get_rm_as_a_person_does(haversack: Callable[..., Said], tree: Path) -> None:
    said = haversack("put", "tree")
    assert said.code == 0, said
    assert "put /tree: 3 files (0 unchanged); 1 symlink; blocks: 2 new, 0 dedup" in said.out
    assert "5.0 MB of 5.0 MB sent" in said.out
    said = haversack("ls", "-R")
    assert said.code == 0
    assert re.search(r"^d- +- .* tree/$", said.out, re.M)
    assert re.search(r"^-x +10 B .* tree/sub/tool$", said.out, re.M)
    assert re.search(r"^-- +5\.0 MB .* tree/sub/large$", said.out, re.M)
    assert re.search(r"^l- +- .* tree/link -> sub/large$", said.out, re.M)
    said = haversack("get", "/tree", "back")
    assert said.code == 0, said
    assert Path("back/sub/large").read_bytes() == (tree / "sub/large").read_bytes()
    assert os.access("back/sub/tool", os.X_OK)
    assert Path("back/empty").is_dir()
    said = haversack("rm", "/tree")
    assert said == Said(0, "rm /tree: 7 entries deleted\n", "")
    assert haversack("ls").out == ""


def test_a_second_put_says_that_nothing_was_sent(
    haversack: Callable[..., Said], tree: Path
) -> None:
    haversack("put", "tree")
    said = haversack("put", "tree", "--json")
    report = json.loads(said.out)
    assert report["files_unchanged"] == 3
    assert report["blocks_new"] == 0
    assert report["bytes_moved"] == 0


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (("small",), "/small"),
        (("small", "/"), "/small"),
        (("small", ""), "/small"),
        (("small", "/a/b"), "/a/b"),
        (("small", "a/b/"), "/a/b/small"),
        (("small", "/folder"), "/folder/small"),
        (("sub", "/x"), "/x/tool"),
        (("sub", "/x/"), "/x/sub/tool"),
        (("sub", "/"), "/tool"),
        (("sub",), "/sub/tool"),
        (("sub/",), "/sub/tool"),
        (("sub/.", "/y"), "/y/tool"),
        (("./sub/../sub",), "/sub/tool"),
        (("to-sub",), "/to-sub"),
        (("to-sub/",), "/to-sub/tool"),
    ],
)
def test_where_a_put_goes(
    haversack: Callable[..., Said],
    cell: ScriptedCell,
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    path: str,
) -> None:
    monkeypatch.chdir(tree)
    (tree / "to-sub").symlink_to("sub")
    cell._new_entry("/folder", "folder")
    monkeypatch.setenv("HAVERSACK_TOKEN_FILE", str(tree.parent / "data" / "admin.token"))
    said = haversack("put", *arguments)
    assert said.code == 0, said
    assert path in cell.entries


def test_where_a_get_goes(haversack: Callable[..., Said], tree: Path, place: Path) -> None:
    haversack("put", "tree")
    (place / "here").mkdir()
    haversack("get", "/tree/small", "here")
    haversack("get", "/tree/small", "here/renamed")
    haversack("get", "tree/sub", "here/sub/")
    haversack("get", "/", "everything")
    assert {str(path.relative_to(place / "here")) for path in (place / "here").rglob("*")} == {
        "small", "renamed", "sub", "sub/large", "sub/tool",
    }  # fmt: skip
    assert (place / "everything" / "tree" / "small").read_bytes() == b"inline"


def test_items_that_fail_are_named_and_the_exit_code_is_1(
    haversack: Callable[..., Said], tree: Path, cell: ScriptedCell
) -> None:
    (tree / "SMALL").write_bytes(b"clashes")
    os.close(os.open(os.fsencode(tree) + b"/bad\xff\nname", os.O_CREAT))
    os.mkfifo(tree / "fifo")
    said = haversack("put", "tree")
    assert said.code == 1
    assert "invalid_path: 'small' and 'SMALL' are one name" in said.err
    assert "bad\\udcff\\nname" in said.err
    assert "fifo: a FIFO: left out" in said.err
    assert len(said.err.splitlines()) == 3
    assert "2 failed" in said.out
    assert file_bytes(cell, "/tree/small") == b"clashes", "the first in byte order is kept"


def test_local_files_that_differ_need_overwrite(haversack: Callable[..., Said], tree: Path) -> None:
    haversack("put", "tree")
    Path("back").mkdir()
    Path("back/small").write_bytes(b"edited")
    said = haversack("get", "/tree", "back")
    assert said.code == 1
    assert "path_occupied" in said.err
    assert "--overwrite" in said.err
    assert Path("back/small").read_bytes() == b"edited"
    assert haversack("get", "/tree", "back", "--overwrite").code == 0
    assert Path("back/small").read_bytes() == b"inline"


def test_a_dry_run_sends_and_writes_nothing(
    haversack: Callable[..., Said], tree: Path, cell: ScriptedCell
) -> None:
    said = haversack("put", "tree", "--dry-run")
    assert said.out == ("would transfer 3 files (5.0 MB), 1 symlink, 1 folder; 0 paths refused\n")
    assert cell.entries == {}
    haversack("put", "tree")
    said = haversack("get", "/tree", "back", "-n", "--json")
    assert json.loads(said.out)["files"] == 3
    assert not Path("back").exists()


def test_excluded_names_stay_behind(
    haversack: Callable[..., Said], tree: Path, cell: ScriptedCell
) -> None:
    said = haversack("put", "tree", "--exclude", "su?", "--exclude", "*.pyc")
    assert said.code == 0
    assert set(cell.entries) == {"/tree", "/tree/small", "/tree/link", "/tree/empty"}


def test_names_cannot_write_to_the_terminal(
    haversack: Callable[..., Said], cell: ScriptedCell, place: Path
) -> None:
    (place / "evil\x1b[31m\nname").write_bytes(b"x")
    haversack("put", "evil\x1b[31m\nname")
    said = haversack("ls")
    assert "\x1b" not in said.out
    assert said.out.rstrip().endswith("evil\\x1b[31m\\nname")
    assert json.loads(haversack("ls", "--json").out)[0]["name"] == "evil\x1b[31m\nname"


def test_ls_of_a_file_shows_the_file(haversack: Callable[..., Said], tree: Path) -> None:
    haversack("put", "tree")
    said = haversack("ls", "/tree/sub/tool")
    assert re.fullmatch(r"-x +10 B  .*  tool\n", said.out)
    assert json.loads(haversack("ls", "/tree/sub/tool", "--json").out)[0]["size"] == 10
    assert len(json.loads(haversack("ls", "/tree", "--json").out)) == 4
    assert json.loads(haversack("ls", "/tree/empty", "--json").out) == []


def test_status_as_a_table_and_as_json(haversack: Callable[..., Said]) -> None:
    said = haversack("status")
    assert said.code == 0
    assert re.search(r"node-01 +up +4711 +r1/h1 +1\.1 GB +17 +/data/nodes/node-01", said.out)
    assert re.search(r"node-02 +down +- .* no answer", said.out)
    assert "2 open, 1 sealed; 2 with 2 spare, 1 with 3 spare" in said.out
    assert "123 MB logical, 190 MB stored" in said.out
    assert "spare      2 blocks with -1, 1,000 blocks with 2, 5 blocks with 3" in said.out
    assert "moving     4 slots" in said.out
    assert "given up   1 block" in said.out
    assert re.search(
        r"repair     works on 2 volumes, about .*, 91\.0 MB/s, about 5 min to go", said.out
    )
    assert "job        7: drain of node-02, running, 3 of 12 done, about 3 min to go" in said.out
    assert r"ALARM      [bold]\x1b[2J" in said.out, "what a server says is shown, never obeyed"
    state = json.loads(haversack("status", "--json").out)
    assert [node["id"] for node in state["nodes"]] == ["node-01", "node-02"]


# --------------------------------------------------------------------- exit codes


def test_no_server_is_exit_code_3_within_seconds(
    haversack: Callable[..., Said], threaded: ThreadedCell
) -> None:
    threaded.run(threaded.cell.die)
    started = time.monotonic()
    said = haversack("status")
    assert said.code == 3
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("haversack: server_unreachable: ")
    assert "is the cell up?" in said.err
    assert time.monotonic() - started < 5


def test_refusals_of_the_server_are_exit_code_4(
    haversack: Callable[..., Said], cell: ScriptedCell, place: Path
) -> None:
    assert haversack("ls", "/nowhere").code == 4
    assert haversack("rm", "/nowhere").code == 4
    assert haversack("get", "/nowhere", "x").code == 4
    assert not Path("x").exists()
    cell.script.append(Fault("status", "error", error=forbidden()))
    assert haversack("status").err == "haversack: forbidden: not yours\n"
    (place / "data" / "admin.token").write_text("hvs_wrong")
    said = haversack("status")
    assert said.code == 4
    assert said.err.startswith("haversack: unauthenticated: ")


def test_a_busy_server_is_exit_code_5(haversack: Callable[..., Said], cell: ScriptedCell) -> None:
    cell.script.append(Fault("status", "error", error=busy(), times=99))
    said = haversack("status")
    assert said.code == 5
    assert said.err.startswith("haversack: not_enough_nodes: 5 of 9")


def test_a_lost_answer_to_rm_is_exit_code_5_and_says_what_stands_there(
    haversack: Callable[..., Said], cell: ScriptedCell, tree: Path
) -> None:
    haversack("put", "tree")
    cell.script.append(Fault("delete", "lost"))
    said = haversack("rm", "/tree")
    assert said.code == 5
    assert "unknown_outcome" in said.err
    assert "nothing stands there now" in said.err


def test_local_trouble_is_exit_code_6(haversack: Callable[..., Said], tree: Path) -> None:
    said = haversack("put", "absent")
    assert said.code == 6
    assert said.err == "haversack: local_file_error: No such file or directory: 'absent'\n"


def test_wrong_usage_is_exit_code_2(haversack: Callable[..., Said], place: Path) -> None:
    assert haversack("put").code == 2
    assert haversack("fly").code == 2
    assert haversack("status", "--server", "nonsense").code == 2
    assert haversack("status", "--token-file", "absent").code == 2
    (place / "data" / "admin.token").write_text("two words")
    assert haversack("status").code == 2
    (place / "data" / "admin.token").unlink()
    said = haversack("status")
    assert said.code == 2
    assert "no token in data/admin.token" in said.err


def test_options_stand_before_or_after_the_command(
    haversack: Callable[..., Said], cell: ScriptedCell, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAVERSACK_SERVER", "http://127.0.0.1:1")
    token = place / "elsewhere.token"
    (place / "data" / "admin.token").rename(token)
    assert haversack("--server", cell.url, "--token-file", str(token), "ls").code == 0
    assert haversack("ls", "--server", cell.url, "--token-file", str(token)).code == 0
    assert haversack("--server", "http://127.0.0.1:2", "ls", "--server", cell.url).code == 2
    monkeypatch.setenv("HAVERSACK_TOKEN_FILE", str(token))
    assert haversack("ls", "--server", cell.url).code == 0
    (place / "haversack.toml").write_text(f'server = "{cell.url}"\n')
    monkeypatch.delenv("HAVERSACK_SERVER")
    assert haversack("ls").code == 0


# ----------------------------------------------------------------- as a process


def run_process(cell: ScriptedCell, place: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        (sys.executable, "-m", "cli.main", "--server", cell.url, *arguments),
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_ends_a_put_with_130_and_no_traceback(
    cell: ScriptedCell, place: Path, tree: Path
) -> None:
    cell.script.append(Fault("PUT", "hang", times=99))
    with run_process(cell, place, "put", "tree") as process:
        deadline = time.monotonic() + 20
        while not any(request.startswith("PUT") for request in cell.requests):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert (out, err) == ("", "")


def test_a_reader_that_goes_away_is_no_traceback(
    cell: ScriptedCell, place: Path, tree: Path
) -> None:
    for number in range(3000):
        cell._new_entry(f"/{number:04d}-{'x' * 200}", "folder")
    with run_process(cell, place, "ls") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(20) != 0


def test_status_loads_neither_ray_nor_sql_nor_the_server(cell: ScriptedCell, place: Path) -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['haversack', '--server', '{cell.url}', 'status']\n"
        "from cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "heavy = ('ray', 'sqlalchemy', 'fastapi', 'numpy', 'alembic', 'rocksdict', 'pyeclib')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        (sys.executable, "-c", script),
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "[]\n"
