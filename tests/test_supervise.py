"""The supervisor's promise: every stop signal reaches the child once, and the exit code is the program's own."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sa3dist import supervise
from sa3dist.supervise import Supervisor

# What an agent does with a failed worker: the program's status is written, the agent ends with 1.
AGENT = """
import pathlib, sys
directory, code = (word.partition("=")[2] for word in sys.argv[2:])
pathlib.Path(directory, "status.json").write_text('{"exit_code": %s}' % code)
sys.exit(1)
"""
# Counts the signals it gets and ends with 1, a while after as many as it is told to wait for.
LISTENER = """
import pathlib, signal, sys, time
directory = pathlib.Path(sys.argv[2].partition("=")[2])
seen = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))
(directory / "ready").touch()
while len(seen) < int(sys.argv[3] if len(sys.argv) > 3 else 1):
    time.sleep(0.01)
time.sleep(0.5)
(directory / "seen").write_text(" ".join(seen))
sys.exit(1)
"""


@pytest.fixture(autouse=True)
def _own_handlers(monkeypatch):
    monkeypatch.setattr(supervise, "STATUS_SECONDS", 0.3)
    numbers = (*supervise.FORWARDED, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def command(script, directory, *more):
    return [sys.executable, "-c", script, "sa3dist.train", f"output_dir={directory}", *more]


def when_ready(directory, action):
    def wait():
        while not (directory / "ready").exists():
            time.sleep(0.01)
        action()

    threading.Thread(target=wait).start()


@pytest.mark.parametrize("code", [2, 70, 75, 1])
def test_the_code_in_the_status_wins_over_the_agents(tmp_path, code):
    assert Supervisor(command(AGENT, tmp_path, f"code={code}")).run() == code


def test_an_agent_that_outlives_the_run_is_ended_with_all_it_started(tmp_path, monkeypatch):
    kill = supervise.kill_descendants
    monkeypatch.setattr(supervise, "LINGER_SECONDS", 0.5)
    # As on a busy machine: the agent has time to see its rank end, and to end with a code of its own.
    monkeypatch.setattr(supervise, "kill_descendants", lambda pid: (kill(pid), time.sleep(0.5)))
    # As torchrun starts ranks. The number is this process's own: others on this machine may run the same test.
    sleep = f"import subprocess; subprocess.run(['sleep', '61.{os.getpid()}'], start_new_session=True)"
    lingering = AGENT.replace("sys.exit(1)", sleep)
    began = time.monotonic()
    assert Supervisor(command(lingering, tmp_path, "code=70")).run() == 70
    assert time.monotonic() - began < 30
    assert f"sleep 61.{os.getpid()}" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_success_needs_no_status(tmp_path):
    assert Supervisor(command("", tmp_path)).run() == 0


@pytest.mark.parametrize(("script", "code"), [("raise SystemExit(1)", 1), ("import os; os.kill(os.getpid(), 9)", 70)])
def test_the_status_of_an_earlier_run_is_not_believed(tmp_path, script, code):
    (tmp_path / "status.json").write_text('{"exit_code": 75}')
    assert Supervisor(command(script, tmp_path)).run() == code


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_and_its_repeats_reach_the_child_once(tmp_path, sent):
    def send():
        for _ in range(4):
            os.kill(os.getpid(), sent)
            time.sleep(0.02)

    when_ready(tmp_path, send)
    assert Supervisor(command(LISTENER, tmp_path)).run() == 75
    assert (tmp_path / "seen").read_text() == sent.name


def test_a_later_repeat_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "SAME_REQUEST_SECONDS", 0.1)

    def send():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.25)
        os.kill(os.getpid(), signal.SIGTERM)

    when_ready(tmp_path, send)
    Supervisor(command(LISTENER, tmp_path, "2")).run()
    assert (tmp_path / "seen").read_text() == "SIGTERM SIGTERM"


def test_a_closed_terminal_asks_to_stop(tmp_path):
    # As it is where nothing above has chosen otherwise; these tests themselves may run under nohup.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    when_ready(tmp_path, lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert Supervisor(command(LISTENER, tmp_path)).run() == 75
    assert (tmp_path / "seen").read_text() == "SIGTERM"


def test_a_run_under_nohup_survives_a_closed_terminal(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Supervisor(command("", tmp_path)).run()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_an_agent_that_dies_of_the_signal_counts_as_interrupted(tmp_path):
    script = f"import pathlib, time; pathlib.Path({str(tmp_path)!r}, 'ready').touch(); time.sleep(60)"
    (tmp_path / "status.json").write_text('{"exit_code": 0, "state": "done"}')
    when_ready(tmp_path, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert Supervisor(command(script, tmp_path)).run() == 75
    # Nobody else could: the ranks had not started.
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("interrupted", 75)


def test_a_signal_before_the_start_starts_nothing(tmp_path, monkeypatch):
    def slow(path):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(supervise, "identity_of", slow)
    supervisor = Supervisor(command("", tmp_path))
    assert (supervisor.run(), supervisor.child) == (75, None)


def test_a_signal_while_the_command_is_being_started_reaches_it(tmp_path, monkeypatch):
    start = subprocess.Popen

    def slow(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return start(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", slow)
    assert Supervisor(command("import time; time.sleep(60)", tmp_path)).run() == 75


def test_a_filesystem_that_fails_for_a_moment_does_not_leave_the_run_alone(tmp_path, monkeypatch):
    found, asked = supervise.identity_of, []

    def failing(path):
        asked.append(path)
        if len(asked) == 2:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        if len(asked) > 2:
            (tmp_path / "asked again").touch()
        return found(path)

    monkeypatch.setattr(supervise, "identity_of", failing)
    waiting = (
        f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path)!r}, 'asked again').exists(): time.sleep(0.01)\n"
    )
    assert Supervisor(command(waiting + AGENT, tmp_path, "code=75")).run() == 75
    assert len(asked) > 2


@pytest.mark.parametrize("agents", [1, 2])
def test_a_directory_that_is_a_file_is_the_users_mistake_whatever_the_agent_makes_of_it(tmp_path, agents):
    (tmp_path / "taken").write_text("")
    assert Supervisor(command(f"raise SystemExit({agents})", tmp_path / "taken")).run() == 2


def test_the_status_is_looked_for_where_the_program_writes_it(tmp_path):
    (tmp_path / "run.yaml").write_text(f"output_dir: {tmp_path}/of-file\nname: of-name\n")
    start = ["torchrun", "-m", "sa3dist.train", "--print-config", str(tmp_path / "run.yaml")]
    assert supervise.status_path(start) == tmp_path / "of-file/status.json"
    assert supervise.status_path([*start, f"output_dir={tmp_path}/later"]) == tmp_path / "later/status.json"
    absent = ["sa3dist.train", str(tmp_path / "absent.yaml"), f"output_dir={tmp_path}/known"]
    assert supervise.status_path(absent) == tmp_path / "known/status.json"


@pytest.mark.parametrize("argv", [[], ["true"], ["--slurm-requeue"]])
def test_another_program_is_refused(argv, capsys):
    assert supervise.main(argv) == 2
    assert "no sa3dist.train in the command" in capsys.readouterr().err


def test_a_launcher_that_does_not_exist_is_named(tmp_path, capsys):
    assert supervise.main(["/nowhere/torchrun", "sa3dist.train", f"output_dir={tmp_path}"]) == 70
    assert "/nowhere/torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False), ("", False)])
def test_an_interrupted_slurm_job_is_queued_again_unless_slurm_ends_it(tmp_path, monkeypatch, state, requeued):
    for name, line in (("squeue", f"echo {state}"), ("scontrol", f'echo "$@" > {tmp_path}/called')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert supervise.main(["--slurm-requeue", *command(AGENT, tmp_path, "code=75")]) == 75
    called = tmp_path / "called"
    assert (called.read_text().split() if called.exists() else None) == (["requeue", "17"] if requeued else None)
