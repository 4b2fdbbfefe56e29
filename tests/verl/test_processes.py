"""Where processes write."""

import os
import subprocess
import sys

from verl.utils.processes import writing_to


def test_what_is_started_in_the_block_writes_to_the_file_as_long_as_it_lives(tmp_path, capfd):
    log = tmp_path / "log"
    say = "import sys; print('out'); sys.stdin.read(); print('later', file=sys.stderr)"
    with log.open("w") as file, writing_to(file):
        child = subprocess.Popen([sys.executable, "-c", say], stdin=subprocess.PIPE, text=True)
        os.write(1, b"inside\n")
    sys.stdout.write("after\n")
    child.communicate()
    assert sorted(log.read_text().splitlines()) == ["inside", "later", "out"]
    assert capfd.readouterr().out.endswith("after\n")


def test_a_failure_inside_gives_stderr_back(tmp_path, capfd):
    with (tmp_path / "log").open("w") as file:
        try:
            with writing_to(file):
                raise RuntimeError
        except RuntimeError:
            sys.stderr.write("told\n")
    assert capfd.readouterr().err == "told\n"
