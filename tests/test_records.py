"""Records that several processes write: no measurement is lost."""

import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from rope_dist.evaluation import Record
from rope_dist.files import folder_lock

STOCK = SimpleNamespace(plan=None, fingerprint="")
MODEL = {"name": "tiny"}


def what(record):
    return [m["what"]["n"] for m in record]


def in_file(path):
    return [m["what"]["n"] for m in json.loads(path.read_text())["measurements"]]


def put(record, n, value=0.0):
    record.put({"n": n}, {"nll": value}, STOCK)


WRITER = f"""
import sys
from types import SimpleNamespace
from rope_dist.evaluation import Record
record = Record(sys.argv[1], "perplexity", {MODEL})
print("ready", flush=True)
sys.stdin.readline()
for n in range(int(sys.argv[2]), int(sys.argv[2]) + 40):
    record.put({{"n": n}}, {{"nll": 0.0}}, SimpleNamespace(plan=None, fingerprint=""))
"""


def test_two_processes(tmp_path):
    """Both have read the file before either writes, and then write at the same time."""
    path = tmp_path / "record.json"
    put(Record(path, "perplexity", MODEL), -1)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(first)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in (0, 40)
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            writer.stdin.write("go\n")
            writer.stdin.flush()
        assert [writer.wait(120) for writer in writers] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert sorted(in_file(path)) == list(range(-1, 80))
    assert os.listdir(tmp_path) == ["record.json"]


class TestOneAfterTheOther:
    @pytest.fixture
    def path(self, tmp_path):
        put(Record(tmp_path / "record.json", "perplexity", MODEL), 0, 1.0)
        return tmp_path / "record.json"

    def test_both_have_all_measurements(self, path):
        first, second = (Record(path, "perplexity", MODEL) for _ in range(2))
        put(first, 1)
        put(second, 2)
        assert in_file(path) == what(second) == [0, 1, 2]
        put(first, 3)
        assert in_file(path) == what(first) == [0, 1, 2, 3]

    def test_of_one_key_the_last_result_stays(self, path):
        first, second = (Record(path, "perplexity", MODEL) for _ in range(2))
        put(first, 0, 2.0)
        put(second, 1)
        assert second.get({"n": 0}) == {"nll": 2.0}
        put(second, 0, 3.0)
        assert in_file(path) == [1, 0]
        assert Record(path, "perplexity", MODEL).get({"n": 0}) == {"nll": 3.0}

    def test_plans_and_machines(self, path):
        first, second = (Record(path, "perplexity", MODEL) for _ in range(2))
        data = json.loads(path.read_text())
        path.write_text(json.dumps({**data, "machines": [*data["machines"], {"system": "another"}]}))
        for record, name in ((first, "a"), (second, "b")):
            plan = SimpleNamespace(to_dict=lambda name=name: {"of": name})
            plan.with_source = lambda source, plan=plan: plan
            record.put({"n": name}, {}, SimpleNamespace(plan=plan, fingerprint=name))
        written = json.loads(path.read_text())
        assert written["plans"] == {"a": {"of": "a"}, "b": {"of": "b"}}
        assert written["machines"] == [*data["machines"], {"system": "another"}]

    def test_restart_discards_what_was_there_only(self, path):
        first, second = (Record(path, "perplexity", MODEL, restart=True) for _ in range(2))
        assert len(first) == 0
        put(first, 1)
        assert in_file(path) == [1]
        put(second, 2)
        assert in_file(path) == [1, 2]

    def test_another_file_in_its_place_is_left_alone(self, path):
        record = Record(path, "perplexity", MODEL)
        other = path.read_text().replace("tiny", "large")
        path.write_text(other)
        with pytest.raises(ValueError, match=r"record\.json was measured with name 'large', not 'tiny'"):
            put(record, 1)
        assert path.read_text() == other

    def test_a_file_that_has_gone_is_written_again(self, path):
        record = Record(path, "perplexity", MODEL)
        path.unlink()
        put(record, 1)
        assert in_file(path) == [0, 1]

    @pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
    def test_writing_waits_for_the_lock(self, path):
        record = Record(path, "perplexity", MODEL)
        writing = threading.Thread(target=put, args=(record, 1))
        with folder_lock(path):
            writing.start()
            writing.join(0.5)
            assert writing.is_alive()
            assert in_file(path) == [0]
        writing.join(30)
        assert in_file(path) == [0, 1]


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        put(Record(tmp_path / "nowhere" / "record.json", "perplexity", MODEL), 1)
