"""The header of every script says what its body does: parsed and compared, so that it cannot drift."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from dtr.errors import BY_CODE
from dtr.state.scripts import Script, catalogue, parse_header

SCRIPTS = list(catalogue())
WRITE_COMMANDS = {
    "DEL", "EXPIRE", "HDEL", "HINCRBY", "HSET", "HSETNX", "PERSIST", "PEXPIRE", "PEXPIREAT", "RENAME", "RPUSH", "SADD", "SET",
    "SETBIT", "SREM", "UNLINK", "XADD", "XTRIM", "ZADD", "ZREM", "ZREMRANGEBYSCORE",
}  # fmt: skip
READ_COMMANDS = {
    "BITCOUNT", "BITPOS", "EXISTS", "GET", "GETBIT", "HEXISTS", "HGET", "HGETALL", "HKEYS", "HLEN", "HMGET", "SCARD",
    "SISMEMBER", "SMEMBERS", "STRLEN", "TIME", "TTL", "XREVRANGE", "ZCARD", "ZRANGE", "ZSCORE",
}  # fmt: skip
CALL = re.compile(r"redis\.call\('(\w+)'(?:,\s*([\w\[\]]+))?")


def code_of(script: Script) -> str:
    """The script with what it includes, without comments."""
    return re.sub(r"--[^\n]*", "", script.text)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
class TestHeader:
    def test_says_what_it_is_for(self, script: Script) -> None:
        """Every section is there, and the name is NOUN_VERB."""
        header = script.header
        assert header.about and header.returns and header.idempotent
        assert header.keys, "a script without KEYS belongs to no slot"
        assert re.fullmatch(r"[a-z]+(_[a-z]+)+", script.name)

    def test_binds_keys_and_arguments_by_their_documented_names(self, script: Script) -> None:
        """Each of KEYS and ARGV is bound to a local of its documented name, in that place, before any call."""
        body = re.sub(r"--[^\n]*", "", script.body)
        before = body.split("redis.call", 1)[0]
        bound: dict[tuple[str, int], str] = {}
        for names, values in re.findall(r"local ([\w, ]+?) = ((?:[^\n]*?(?:KEYS|ARGV)\[\d+\][^\n]*))", before):
            places = [(kind, int(n)) for kind, n in re.findall(r"(KEYS|ARGV)\[(\d+)\]", values)]
            for name, place in zip([n.strip() for n in names.split(",")], places, strict=True):
                bound[place] = name
        documented = {("KEYS", p.position): p.name for p in script.header.keys if not p.rest}
        documented |= {("ARGV", p.position): p.name for p in script.header.args if not p.rest}
        assert bound == documented

    def test_uses_no_argument_beyond_the_documented_ones(self, script: Script) -> None:
        """The highest index in the body is documented, and one that stands for the rest is read as such."""
        body = re.sub(r"--[^\n]*", "", script.body)
        for kind, parameters in (("KEYS", script.header.keys), ("ARGV", script.header.args)):
            used = [int(n) for n in re.findall(rf"{kind}\[(\d+)\]", body)]
            assert max(used, default=0) <= len(parameters)
            rest = [p for p in parameters if p.rest]
            assert bool(rest) == bool(re.search(rf"#{kind}|unpack\({kind}|{kind}\[[a-z]", body))

    def test_every_bound_name_is_used(self, script: Script) -> None:
        """No documented key or argument is left unread."""
        body = re.sub(r"--[^\n]*", "", script.body)
        for parameter in (*script.header.keys, *script.header.args):
            if not parameter.rest:
                assert len(re.findall(rf"\b{parameter.name}\b", body)) >= 2, parameter.name

    def test_writes_what_it_says(self, script: Script) -> None:
        """The keys that write commands touch, in the body and in what it includes, are those under WRITES."""
        written = set()
        for command, target in CALL.findall(code_of(script)):
            assert command in WRITE_COMMANDS | READ_COMMANDS, f"{command}: add it to the one or the other list"
            if command in WRITE_COMMANDS:
                written.add(target)
        assert written == set(script.header.writes)
        assert written <= {p.name for p in script.header.keys}

    def test_raises_what_it_says(self, script: Script) -> None:
        """The codes of its error replies are those under ERRORS, and each stands in the table of errors."""
        raised = set(re.findall(r"error_reply\('([A-Z_]+)", code_of(script)))
        raised |= set(re.findall(r"'(BARRIER_[A-Z]+) '", code_of(script)))
        assert raised == set(script.header.errors)
        assert raised <= set(BY_CODE)

    def test_spells_no_key_and_asks_for_none(self, script: Script) -> None:
        """Keys come in KEYS alone, so that the script stays in its slot."""
        code = code_of(script)
        assert "dtr:" not in code
        assert not re.search(r"redis\.p?call\('(KEYS|SCAN|EVAL|PUBLISH)'", code)

    def test_includes_only_what_it_calls(self, script: Script) -> None:
        """An include that nothing calls costs bytes and misleads."""
        code = code_of(script)
        for part in script.header.include:
            source = (resources.files("dtr.state") / "lua" / "include" / f"{part}.lua").read_text()
            names = re.findall(r"local function (\w+)", source)
            assert any(len(re.findall(rf"\b{name}\(", code)) >= 2 for name in names), part


def test_every_error_code_is_raised_by_some_script() -> None:
    """The table has no entry that nothing raises."""
    raised = {code for script in SCRIPTS for code in script.header.errors}
    assert set(BY_CODE) == raised


def test_a_bad_header_is_refused() -> None:
    """The parser names the line that is wrong, rather than skipping it."""
    with pytest.raises(ValueError, match="expected number 2"):
        parse_header("-- Does.\n-- KEYS\n--   1 a hash x\n--   3 b hash y\n")
    with pytest.raises(ValueError, match="got 'a hash'"):
        parse_header("-- Does.\n-- KEYS\n--   a hash\n")
