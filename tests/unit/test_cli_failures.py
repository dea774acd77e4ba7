"""Errors on the command line: one line, the right exit code, no secret, and JSON where it was asked for."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import click as plain_click
import pytest

from dtr import errors
from dtr.cli import group, main
from dtr.cli.failures import describe

NOBODY = "redis://:hunter2@127.0.0.1:1/0"


@pytest.mark.parametrize(
    ("error", "code"),
    [(errors.ConfigError("x"), 3), (errors.InvalidInput("x"), 3), (errors.CoordinatorUnavailable("x"), 4), (errors.StoreRefused("x"), 4),
     (errors.ManifestInvalid("x"), 5), (errors.StateCorrupt("x"), 5), (errors.NoCheckpoint("x"), 1), (plain_click.UsageError("x"), 2),
     (plain_click.BadParameter("x"), 2), (OSError(28, "No space left on device"), 1), (RuntimeError("x"), 1)],
)  # fmt: skip
def test_exit_codes(error, code):
    """2 usage, 3 configuration, 4 unavailable, 5 integrity, 1 anything else."""
    assert describe(error)[0] == code


def test_a_message_is_one_line_without_password():
    """Line breaks go, and so does what stands between ':' and '@' of any URL in the message."""
    _, kind, message = describe(errors.StoreRefused("cannot\nuse  s3://key:s3cr3t@bucket/x and redis://:p@h:1"))
    assert (kind, message) == ("StoreRefused", "cannot use s3://key:***@bucket/x and redis://:***@h:1")


def test_an_error_that_nobody_foresaw_says_where_it_happened():
    """It is a mistake in dtr, and its place is in the line, since there is no traceback."""
    try:
        raise RuntimeError("boom")
    except RuntimeError as exc:
        _, kind, message = describe(exc)
    assert kind == "Internal"
    assert "RuntimeError: boom" in message
    assert "test_cli_failures.py:" in message


def test_an_unreachable_redis_is_exit_4_and_one_line(capsys):
    """Nothing on stdout, one line on stderr, no password, no traceback."""
    assert main(["status", "--url", NOBODY]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("dtr: Redis at redis://:***@127.0.0.1:1/0 cannot be reached")
    assert "hunter2" not in err


@pytest.mark.parametrize("command", ["status", "workers", "barriers", "ring", "events", "ckpt ls", "data ls"])
def test_an_error_is_valid_json_where_json_was_asked_for(command, capsys):
    """Every reading command: one object with message, kind and exit code, and the same line on stderr."""
    assert main([*command.split(), "--json", "--url", NOBODY, "--job", "j"]) == 4
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": err.removeprefix("dtr: ").strip(), "code": "CoordinatorUnavailable", "exit_code": 4}


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["workers", "--bogus"], 2, "No such option '--bogus'"),
        (["wrokers"], 2, "No such command 'wrokers'"),
        (["events", "-n", "-1"], 2, "-1 is not in the range"),
        (["ckpt", "gc", "--grace", "nan"], 2, "'--grace': expected a number of seconds, got nan"),
        (["ckpt", "gc", "--keep-for", "nan"], 2, "'--keep-for': expected a number of seconds, got nan"),
        (["ckpt", "watch", "--every", "nan"], 2, "'--every': expected a number of seconds, got nan"),
        (["workers", "--job", "a b"], 3, "job must be 1 to 63 characters"),
        (["workers", "--url", "http://x"], 3, "unknown scheme 'http'"),
        (["workers", "--url", "redis://h:99999"], 3, "port 1 to 65535"),
    ],
)
def test_wrong_usage_and_configuration_name_what_is_wrong(args, code, says, capsys):
    """2 for what click refuses, 3 for what dtr refuses; the line names it."""
    assert main(args) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value"), [("--grace", "nan"), ("--grace", "inf"), ("--stall-timeout", "inf"), ("--stall-timeout", "nan")]
)
def test_run_refuses_a_time_that_is_none_before_it_becomes_the_launcher(option, value):
    """One line as of any command, not the usage of another program. In a process of its own, which would else be replaced."""
    done = subprocess.run([sys.executable, "-m", "dtr", "run", option, value, "--", "true"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"dtr: Invalid value for '{option}': expected a number of seconds, got {value}. Try `dtr run --help`.\n"


def test_usage_errors_are_json_as_well(capsys):
    """Although the options could not be parsed, --json was among them."""
    assert main(["workers", "--json", "--bogus"]) == 2
    assert json.loads(capsys.readouterr().out)["code"] == "Usage"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("DTR_TTL", "15", "did you mean DTR_TTL_S"),
        ("DTR_TTL_S", "15s", "DTR_TTL_S"),
        ("DTR_TTL_S", "", "DTR_TTL_S is empty: unset it, or give a number from 0.3 to 86400 (a member that has not beaten for"),
        ("DTR_SLOT_POLICY", "", "DTR_SLOT_POLICY is empty: unset it, or give wait, skip or fail (no free slot: "),
        ("DTR_JOB", "", "DTR_JOB is empty: unset it, or give text ('name' or 'tenant/name')"),
    ],
)
def test_a_wrong_environment_is_exit_3(name, value, says, monkeypatch, capsys):
    """The variable is named, whatever the command."""
    monkeypatch.setenv(name, value)
    assert main(["workers"]) == 3
    assert says in capsys.readouterr().err


def test_version(capsys):
    """`dtr --version` is one line with the version of the package."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dtr ")


@pytest.mark.parametrize("name", group.COMMANDS)
def test_the_list_of_commands_agrees_with_the_commands(name):
    """Each entry stands once, loads, bears its name, says the same in its own help, and knows the commands below it."""
    assert inspect.getsource(group).count(f'_entry("{name}",') == 1
    entry = group.COMMANDS[name]
    command = entry.load()
    assert command.name == name
    assert command.short_help == entry.about
    below = tuple(command.commands) if isinstance(command, plain_click.Group) else ()
    assert sorted(below) == sorted(entry.below)


@pytest.mark.parametrize("name", group.COMMANDS)
def test_every_command_has_help(name, capsys):
    """--help is exit 0 and describes the options."""
    assert main([name, "--help"]) == 0
    assert "Options" in capsys.readouterr().out


def test_help_is_fast_because_it_loads_no_command():
    """Neither Redis's library nor numpy nor any command module is imported for `dtr --help`."""
    code = """
import sys
from dtr.cli import main
main(["--help"])
print(sorted({"redis", "numpy", "boto3", "celery", "dtr.config", "dtr.cli.status", "dtr.cli.stack"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("columns", ["20", "80"])
def test_help_fits_the_screen(columns):
    """No line of the help is wider than the terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "dtr", "--help"],
        capture_output=True, text=True, timeout=60, check=True, env={"COLUMNS": columns, "PATH": "/usr/bin:/bin", "NO_COLOR": "1"},
    )  # fmt: skip
    assert max(map(len, done.stdout.splitlines())) <= int(columns)
    assert "\x1b" not in done.stdout
