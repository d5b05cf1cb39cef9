"""How entry points end: exit codes, messages, and output that nobody reads any more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixlab import errors

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def unread(*command, together=False):
    """(exit code, stderr) of a command whose stdout (with stderr, if `together`) is a pipe that nobody reads."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdin=subprocess.PIPE,  # held until the reader is gone
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if together else subprocess.PIPE,
    )
    process.stdout.close()
    _, stderr = process.communicate("")
    return process.returncode, stderr


def program(body):
    return [
        "-c",
        f"import sys; from mixlab import errors\ndef main(_):\n    sys.stdin.read(); {body}\nsys.exit(errors.run(main))",
    ]


@pytest.mark.parametrize("body", ["print('x' * 1_000_000)", "print('x')", "print('x'); sys.exit(0)"])
@pytest.mark.parametrize("together", [False, True])
def test_nobody_reads_the_output(body, together):
    code, stderr = unread(*program(body), together=together)
    assert code == errors.EXIT_NO_READER and not stderr


def test_nobody_reads_the_message_of_an_error():
    assert unread(*program("raise errors.UserError('no')"), together=True)[0] == errors.EXIT_NO_READER


def test_a_reader_that_stops_early():
    """The first lines are read, as `| head -3` does, and then no more."""
    body = "[print(i) for i in range(100_000)]"
    process = subprocess.Popen(
        [sys.executable, *program(body)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert [process.stdout.readline() for _ in range(3)] == [b"0\n", b"1\n", b"2\n"]
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == errors.EXIT_NO_READER


@pytest.mark.parametrize("tool", ["report", "prepare_corpus"])
def test_nobody_reads_the_help_of_a_tool(tool):
    assert unread(f"tools/{tool}.py", "--help") == (errors.EXIT_NO_READER, "")


def test_another_broken_pipe_is_no_reason_to_be_quiet():
    done = subprocess.run(
        [sys.executable, *program("raise BrokenPipeError('a worker has gone')")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "BrokenPipeError: a worker has gone" in done.stderr


def test_exit_codes(capsys):
    def mistaken(_):
        raise errors.UserError("key: wrong; put it right")

    assert errors.run(lambda _: None, []) == 0 and errors.run(lambda _: 75, []) == 75
    assert errors.run(mistaken, []) == errors.EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: key: wrong; put it right\n"

    def unlucky(_):
        raise errors.LostError("s3://texts: the bucket does not answer")

    assert errors.run(unlucky, []) == errors.EXIT_AGAIN
    assert "the bucket does not answer; start again to go on" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device on which no write succeeds")
def test_a_full_disk_is_told_wherever_it_shows(capsys):
    def main(_):
        with open("/dev/full", "w") as file:
            file.write("metrics")

    assert errors.run(main, []) == errors.EXIT_USER_ERROR
    assert "No space left on device; free some" in capsys.readouterr().err


def test_other_failures_of_the_system_keep_their_traceback():
    def main(_):
        raise PermissionError(13, "Permission denied")

    with pytest.raises(PermissionError):
        errors.run(main, [])
