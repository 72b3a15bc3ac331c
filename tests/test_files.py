"""Writing files: whole or not at all, through links, into pipes and devices, with messages that name what was given."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from rope_dist import files
from rope_dist.cli import main

PLAN = ("plan", "--theta", "10000", "--head-dim", "8", "--original", "64", "--factor", "2")
AS_ROOT = os.geteuid() == 0


def plan_to(path):
    return main([*PLAN, "-o", str(path)])


def left(folder):
    return sorted(p.name for p in folder.iterdir())


class TestLinks:
    def test_the_target_is_written_and_the_link_stays(self, tmp_path):
        (tmp_path / "kept").mkdir()
        target = tmp_path / "kept" / "plan.json"
        target.write_text("old")
        link, second = tmp_path / "link.json", tmp_path / "second.json"
        link.symlink_to("kept/plan.json")
        second.symlink_to(link)
        assert plan_to(second) == 0
        assert link.is_symlink()
        assert second.is_symlink()
        assert target.read_text().startswith("{")
        assert left(tmp_path / "kept") == ["plan.json"]

    def test_a_link_to_nothing_makes_its_target(self, tmp_path):
        link = tmp_path / "link.json"
        link.symlink_to("new.json")
        assert plan_to(link) == 0
        assert link.is_symlink()
        assert (tmp_path / "new.json").read_text().startswith("{")

    def test_a_link_into_a_missing_folder_names_the_link(self, tmp_path, capsys):
        (tmp_path / "link.json").symlink_to("missing/new.json")
        assert plan_to(tmp_path / "link.json") == 2
        assert f"{tmp_path / 'link.json'}: No such file or directory" in capsys.readouterr().err

    def test_a_loop(self, tmp_path, capsys):
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        assert plan_to(tmp_path / "a") == 2
        assert f"{tmp_path / 'a'}: Too many levels of symbolic links" in capsys.readouterr().err
        assert left(tmp_path) == ["a", "b"]

    def test_artefacts_follow_them_too(self, tmp_path):
        (tmp_path / "kept").write_text("old")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "old").write_text("")
        (tmp_path / "file-link").symlink_to("kept")
        (tmp_path / "folder-link").symlink_to("folder")
        with pytest.raises(ValueError, match="exists"), files.new_file(tmp_path / "file-link"):
            pass
        with files.new_file(tmp_path / "file-link", force=True) as temporary:
            temporary.write_text("new")
        with files.new_directory(tmp_path / "folder-link", force=True) as temporary:
            (temporary / "new").write_text("")
        assert (tmp_path / "file-link").is_symlink()
        assert (tmp_path / "folder-link").is_symlink()
        assert (tmp_path / "kept").read_text() == "new"
        assert left(tmp_path / "folder") == ["new"]
        assert left(tmp_path) == ["file-link", "folder", "folder-link", "kept"]


class TestNodes:
    def test_a_pipe_is_written_to(self, tmp_path):
        pipe, read = tmp_path / "pipe", []
        os.mkfifo(pipe)
        reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
        reader.start()
        assert plan_to(pipe) == 0
        reader.join(10)
        assert read[0].startswith(b"{")
        assert stat.S_ISFIFO(pipe.stat().st_mode)
        assert left(tmp_path) == ["pipe"]

    @pytest.mark.skipif(not AS_ROOT, reason="only root makes device nodes")
    def test_a_device_is_written_to(self, tmp_path):
        null = tmp_path / "null"
        try:
            os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
            with open(null, "wb"):
                pass
        except PermissionError:
            pytest.skip("device nodes are not allowed here")
        assert plan_to(null) == 0
        assert stat.S_ISCHR(null.stat().st_mode)
        assert left(tmp_path) == ["null"]

    @pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc/self/fd")
    def test_an_open_file_of_the_process(self, tmp_path):
        """``-o /dev/stdout > out``: a new file in its place would not be the one that the shell has open."""
        out, link = tmp_path / "out", tmp_path / "link"
        out.write_text("")
        inode = out.stat().st_ino
        with open(out, "r+b") as file:
            link.symlink_to(f"/proc/self/fd/{file.fileno()}")
            files.write_bytes(link, b"text")
        assert out.read_bytes() == b"text"
        assert out.stat().st_ino == inode

    def test_an_artefact_is_never_put_over_one(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for new in (files.new_file, files.new_directory):
            with (
                pytest.raises(ValueError, match="left alone"),
                new(tmp_path / "pipe", force=True),
            ):
                pass
        assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


class TestMessages:
    def test_a_directory(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert plan_to(".") == 2
        assert "cannot write '.': it is a directory" in capsys.readouterr().err
        assert left(tmp_path) == []

    def test_a_name_that_ends_as_a_directorys(self, tmp_path, capsys):
        assert plan_to(f"{tmp_path}/new/") == 2
        assert f"{tmp_path}/new: Is a directory" in capsys.readouterr().err
        assert left(tmp_path) == []

    def test_a_missing_folder(self, tmp_path, capsys):
        assert plan_to(tmp_path / "no" / "plan.json") == 2
        assert (
            f"cannot write {tmp_path}/no/plan.json: there is no directory {tmp_path}/no"
            in capsys.readouterr().err
        )

    def test_a_folder_that_takes_no_new_file(self, tmp_path, monkeypatch):
        def closed(**options):
            raise PermissionError(errno.EACCES, "Permission denied", "/some/.temporary")

        (tmp_path / "plan.json").write_text("old")
        monkeypatch.setattr(files.tempfile, "mkstemp", closed)
        with pytest.raises(PermissionError, match=f"Permission denied: '{tmp_path}/plan.json'"):
            files.write_text(tmp_path / "plan.json", "new")
        assert (tmp_path / "plan.json").read_text() == "old"

    def test_the_current_directory_is_not_replaced(self, tmp_path, monkeypatch):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        for path in (".", "..", tmp_path):
            with (
                pytest.raises(ValueError, match="current directory"),
                files.new_directory(path, force=True),
            ):
                pass


class TestWhole:
    @pytest.mark.parametrize("name", ["plan.json", "ä" * 120, "a" * 250])
    def test_names_as_long_as_the_system_takes(self, tmp_path, name):
        files.write_text(tmp_path / name, "text")
        with files.new_file(tmp_path / name, force=True) as temporary:
            temporary.write_text("more")
        assert left(tmp_path) == [name]

    @pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
    def test_what_was_there_keeps_its_mode(self, tmp_path, mode):
        path = tmp_path / "file"
        path.write_text("old")
        path.chmod(mode)
        files.write_text(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == mode
        with files.new_file(path, force=True) as temporary:
            temporary.write_text("newer")
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert path.read_text() == "newer"

    def test_a_new_file_has_the_mode_that_open_gives(self, tmp_path):
        (tmp_path / "opened").write_text("")
        files.write_text(tmp_path / "written", "")
        assert (tmp_path / "written").stat().st_mode == (tmp_path / "opened").stat().st_mode

    @pytest.mark.skipif(not AS_ROOT, reason="only root gives files away")
    def test_the_owner_stays(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("old")
        os.chown(path, 1234, 1234)
        files.write_text(path, "new")
        assert path.stat().st_uid == 1234

    def test_a_failure_leaves_the_old_directory(self, tmp_path, monkeypatch):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("")
        replace = os.replace

        def fails(source, target):
            if os.path.basename(target) == "out" and "new" in os.listdir(source):
                raise OSError(errno.EIO, "Input/output error")
            replace(source, target)

        monkeypatch.setattr(files.os, "replace", fails)
        with (
            pytest.raises(OSError, match=f"Input/output error: '{tmp_path}/out'"),
            files.new_directory(tmp_path / "out", force=True) as temporary,
        ):
            (temporary / "new").write_text("")
        assert left(tmp_path) == ["out"]
        assert left(tmp_path / "out") == ["old"]

    @pytest.mark.parametrize("new", ["new_file", "new_directory"])
    def test_sigterm_leaves_nothing(self, tmp_path, new):
        code = (
            f"import sys, time; from rope_dist import files\n"
            f"with files.{new}(sys.argv[1]): print('ready', flush=True); time.sleep(60)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout.readline() == "ready\n"
            assert len(left(tmp_path)) == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 128 + signal.SIGTERM
        finally:
            process.kill()
            process.stdout.close()
        assert left(tmp_path) == []

    def test_a_handler_of_the_program_stays(self, tmp_path):
        got = []
        before = signal.signal(signal.SIGTERM, lambda *a: got.append(a))
        try:
            with files.new_file(tmp_path / "out"):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
            assert len(got) == 1
        finally:
            signal.signal(signal.SIGTERM, before)
        assert left(tmp_path) == ["out"]
