# SPDX-License-Identifier: GPL-2.0-or-later
"""What is in packaging/: scripts, units, manual pages. The installer and the .deb are in test_install.py.

Real here are nutshim itself, the shells, systemd-analyze and mandoc. OpenWrt's, OpenRC's and
FreeBSD's frameworks cannot run on this machine: stubs with the parts that our scripts use stand
in for them. Fresh Debian machines and the .deb are tests/install-on-debian's, of which a short form is run here;
foreign CPUs are tests/quickstart-on-arm's.
"""

import configparser
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
import xml.dom.minidom

import pytest

from harness import IS_ROOT, NUTSHIM, ROOT, clean_env, poll, run, run_shim, write

PACKAGING = os.path.join(ROOT, "packaging")
MAX_BYTES = 220 * 1024      # of nutshim.py, which is compiled at every start: it must not grow.


def path_of(*parts):
    """A path in packaging/."""
    return os.path.join(PACKAGING, *parts)


def read(*parts):
    """A text file in packaging/."""
    with open(path_of(*parts), encoding="utf-8") as file:
        return file.read()


def load(name):
    """A program of the project as a module."""
    spec = importlib.util.spec_from_file_location(name, os.path.join(ROOT, name + ".py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


OPTIONS = load("nutshim").OPTIONS


def shell_scripts():
    """Every shell script of the project, by its first line."""
    found = []
    for top in ("packaging", "tests", ".ci"):
        for folder, _, names in os.walk(os.path.join(ROOT, top)):
            for name in names:
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    if re.match(rb"#!(/bin/sh|/sbin/openrc-run)\b", file.readline()):
                        found.append(os.path.relpath(path, PACKAGING))
    return sorted(found)


@pytest.fixture
def daemon(tmp_path):
    """nutshim.py as an executable of its own, run by the Python that runs the tests."""
    return write(str(tmp_path / "daemon"), '#!/bin/sh\nexec "%s" "%s" "$@"\n' % (sys.executable, NUTSHIM), 0o755)


@pytest.fixture
def conf(tmp_path, pki):
    """A configuration that starts at once and disturbs nobody; what it starts is stopped."""
    path = write(str(tmp_path / "nutshim.conf"), "pidfile = %s\nlog = %s\n%s[box]\nrole = client\nlisten = 127.0.0.1:0\n"
                 "upstream = localhost\ntrust = %s\n" % (
                     tmp_path / "nutshim.pid", tmp_path / "log", "user = root\n" if IS_ROOT else "", pki.ca.cert))
    good = open(path, encoding="utf-8").read()
    yield path
    write(path, good)
    run_shim("-c", "stop", "-f", path)


def localized(tmp_path, name, *parts, **places):
    """A copy of a script in packaging/ with other paths in it."""
    text = read(*parts)
    for old, new in places.items():
        assert old in text, "%s is not in %s" % (old, parts)
        text = text.replace(old, str(new))
    return write(str(tmp_path / name), text, 0o755)


# ---- Every script -------------------------------------------------------------------------------


def test_shell_scripts_pass_shellcheck(need):
    """Every shell script passes shellcheck, with no finding of any severity."""
    need("shellcheck")
    names = shell_scripts() + ["openwrt/files/nutshim.init"]
    assert len(names) >= 10 and "install" in names
    done = run("shellcheck", *map(path_of, shell_scripts()), path_of("openwrt/files/nutshim.init"))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("shell", ["dash", "busybox ash"])
def test_shell_scripts_parse_in_small_shells(shell, need):
    """Every shell script is read without an error by dash and by busybox's ash."""
    need(shell.split()[0])
    for name in shell_scripts() + ["openwrt/files/nutshim.init"]:
        done = run(*shell.split(), "-n", path_of(name))
        assert (done.returncode, done.stderr) == (0, ""), name


# ---- systemd ------------------------------------------------------------------------------------


def test_unit_passes_systemd_analyze(need, tmp_path, daemon):
    """The unit is valid, and exposed less than 3.0 by systemd's own measure, which counts that it starts as root."""
    need("systemd-analyze")
    unit = write(str(tmp_path / "nutshim.service"), read("systemd", "nutshim.service").replace("/usr/sbin/nutshim.py", daemon))
    done = run("systemd-analyze", "verify", "--man=no", unit)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    done = run("systemd-analyze", "security", "--offline=true", "--threshold=30", unit)
    level = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert done.returncode == 0 and float(level.group(1)) < 3.0, done.stdout[-200:]


# ---- SysV, FreeBSD, OpenRC: a whole life of the real daemon -------------------------------------


def life(service, conf):
    """start, start, reload, restart, a faulty file, stop, stop: what each must do. service(VERB) runs one."""
    def process():
        done = run_shim("-c", "status", "--json", "-f", conf)
        found = re.search(r'"pid": (\d+)', done.stdout) or re.search(r'"process": (\d+)', done.stdout)
        return int(found.group(1)) if found else None

    def does(verb, works=True):
        done = service(verb)
        assert (done.returncode == 0) == works, "%s: %s\n%s%s" % (verb, done.returncode, done.stdout, done.stderr)
        return done
    does("check")
    does("start")
    first = poll(process, 5, "the daemon")
    does("status")
    does("start")
    does("reload")
    assert process() == first
    does("restart")
    second = poll(lambda: process() not in (first, None) and process(), 5, "another daemon")
    good = open(conf, encoding="utf-8").read()
    write(conf, good + "nonsense = 1\n")
    for verb in "check", "reload", "restart":
        does(verb, works=False)
    assert process() == second, "a faulty configuration cost the running daemon"
    does("stop")
    write(conf, good)
    poll(lambda: process() is None, 5, "its end")
    does("status", works=False)


def test_sysv_script_runs_the_daemon(tmp_path, daemon, conf):
    """The SysV script starts once, reloads, restarts and stops; a faulty file costs it nothing."""
    script = localized(tmp_path, "sysv", "sysv", "nutshim", **{"/usr/sbin/nutshim.py": daemon, "/etc/nut/nutshim.conf": conf})
    life(lambda verb: run("sh", script, verb), conf)
    assert run("sh", script, "stop").returncode == 0, "a stop of what is stopped is no error (LSB)"
    assert run("sh", script, "nonsense").returncode == 2
    header = re.search(r"### BEGIN INIT INFO\n(.*)### END INIT INFO", read("sysv", "nutshim"), re.S).group(1)
    for keyword in "Provides", "Required-Start", "Required-Stop", "Default-Start", "Default-Stop", "Short-Description":
        assert re.search(r"^# %s: +\S" % keyword, header, re.M), keyword


# What run_rc_command() of FreeBSD's rc.subr(8) does with the variables that our script sets.
RC_SUBR = r"""
load_rc_config() { nutshim_enable=$TEST_ENABLE nutshim_config=$TEST_CONFIG; }
_do() {
	case $1 in start|restart|reload)
		eval "value=\$$rcvar"
		[ "$value" = YES ] || { echo "Cannot '$1' $name. Set $rcvar to YES"; return 0; }
	esac
	if [ "$1" = start ]; then
		for file in $required_files; do
			[ -r "$file" ] || { echo "$file is not readable." >&2; return 1; }
		done
	fi
	eval "command=\${${1}_cmd:-} precmd=\${${1}_precmd:-}"
	if [ -n "$precmd" ]; then eval "$precmd" || return 1; fi
	if [ -n "$command" ]; then eval "$command"; return; fi
	[ "$1" = restart ] && { (_do stop); (_do start); }
}
run_rc_command() {
	for word in start stop restart rcvar enable disable delete enabled describe extracommands $extra_commands; do
		[ "$word" != "$1" ] || { _do "$1"; exit; }
	done
	echo "unknown directive '$1'." >&2
	exit 1
}
"""


def test_freebsd_script_runs_the_daemon(tmp_path, daemon, conf):
    """The rc.d script does the same on a stub of rc.subr, and nothing at all unless it is enabled."""
    subr = write(str(tmp_path / "rc.subr"), RC_SUBR)
    script = localized(tmp_path, "rcd", "freebsd", "nutshim", **{"/etc/rc.subr": subr, "/usr/local/sbin/nutshim.py": daemon})

    def service(verb, enable="YES"):
        return run("sh", script, verb, env=clean_env(TEST_ENABLE=enable, TEST_CONFIG=conf))
    assert "Set nutshim_enable to YES" in service("start", enable="NO").stdout
    assert service("status").returncode != 0
    life(service, conf)
    for keyword in "PROVIDE: nutshim", "REQUIRE: .*NETWORKING", "BEFORE: nut_upsmon", "KEYWORD: shutdown":
        assert re.search("^# " + keyword, read("freebsd", "nutshim"), re.M), keyword


# What openrc-run(8) does with the variables and functions that our script sets.
OPENRC_RUN = r"""
RC_CMD=$2
ebegin() { echo "* $*"; }
eend() { return $1; }
is_function() { command -v "$1" >/dev/null; }
. "$1"
started() { [ -e "$TEST_PID" ] && kill -0 "$(cat "$TEST_PID")" 2>/dev/null; }
start() {
	! started || return 0
	[ -r "$required_files" ] && start_pre || return 1
	[ "$supervisor" = supervise-daemon ] || return 1
	$command $command_args >/dev/null 2>&1 &
	echo $! >"$TEST_PID"
}
stop() {
	stop_pre || return 1
	pid=$(cat "$TEST_PID")
	kill "$pid"
	while kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
	rm "$TEST_PID"
}
status() { started; }
restart() { stop && start; }
case " start stop restart status $extra_commands $extra_started_commands " in
*" $2 "*) "$2" ;;
*) exit 2 ;;
esac
"""


def test_openrc_script_runs_the_daemon(tmp_path, daemon, conf):
    """The OpenRC script does the same on a stub of openrc-run, supervised without an end."""
    stub = write(str(tmp_path / "openrc-run"), OPENRC_RUN)
    script = localized(tmp_path, "openrc", "openrc", "nutshim", **{"/usr/sbin/nutshim.py": daemon})
    env = clean_env(NUTSHIM_CONF=conf, TEST_PID=str(tmp_path / "openrc.pid"))

    def service(verb):
        done = run("sh", stub, script, verb, env=env)
        if verb in ("start", "restart") and done.returncode == 0:
            poll(lambda: run_shim("-c", "status", "-f", conf).returncode == 0, 5, "the daemon")
        return done
    life(service, conf)
    depend = run("sh", "-c", '. "$1"; for word in need use after before; do eval "$word() { echo $word \\$*; }"; done; depend',
                 "sh", script, env=env).stdout
    assert "need net\n" in depend and re.search(r"before .*\bupsmon\b", depend)
    assert re.search(r"^respawn_max=0$", read("openrc", "nutshim"), re.M)


def test_synology_task_starts_once_and_stops(tmp_path, conf):
    """The DSM boot task starts nutshim from its own folder, run again it does nothing; it knows nutshim.py's options and stop."""
    os.mkdir(str(tmp_path / "nas"))
    script = str(tmp_path / "nas" / "nutshim-boot")
    for link, target in (("nutshim-boot", path_of("synology", "nutshim-boot")), ("nutshim.py", NUTSHIM), ("nutshim.conf", conf)):
        os.symlink(target, str(tmp_path / "nas" / link))

    def status():
        return run("sh", script, "status").stdout.partition(",")[2].split(",")[0]
    assert run("sh", script).returncode == 0
    first = status()
    assert "process" in first
    assert run("sh", script).returncode == 0
    assert status() == first
    assert run("sh", script, "-t").stdout.endswith("no fault found\n")
    assert run("sh", script, "stop").returncode == 0
    assert status() == ""


# ---- OpenWrt ------------------------------------------------------------------------------------

# What OpenWrt's rc.common, functions.sh and procd.sh do, as far as our script uses them. A UCI file
# happens to be readable as shell commands. Every call of procd's is written to $RECORD.
RC_COMMON = r"""
initscript=$1 action=$2
for call in procd_open_instance procd_set_param procd_append_param procd_close_instance \
	procd_add_reload_trigger procd_kill logger; do
	eval "$call() { { printf '%s' $call; printf '|%s' \"\$@\"; echo; } >>\"\$RECORD\"; }"
done
procd_add_validation() { "$1" >>"$RECORD"; }
config() { section=${2:-cfg$((count = count + 1))}; sections="$sections $1:$section"; }
option() { eval "CONFIG_${section}_$1=\$2"; }
list() {
	eval "length=\$((\${CONFIG_${section}_$1_LENGTH:-0} + 1))"
	eval "CONFIG_${section}_$1_LENGTH=$length CONFIG_${section}_$1_ITEM$length=\$2"
	eval "CONFIG_${section}_$1=\"\${CONFIG_${section}_$1:+\$CONFIG_${section}_$1 }\$2\""
}
config_load() {
	sections='' count=0
	for variable in $(set | sed -n 's/^\(CONFIG_[A-Za-z0-9_]*\)=.*/\1/p'); do unset "$variable"; done
	. "$UCI"
}
config_get() { eval "$1=\"\${CONFIG_$2_$3:-\$4}\""; }
config_get_bool() { config_get "$@"; }
config_foreach() {
	local each_function=$1 each_type=$2 each
	shift 2
	for each in $sections; do
		[ "${each%%:*}" != "$each_type" ] || "$each_function" "${each#*:}" "$@"
	done
}
config_list_foreach() {
	local len val c=1
	config_get len "$1" "$2_LENGTH"
	while [ $c -le "${len:-0}" ]; do
		config_get val "$1" "$2_ITEM$c"
		"$3" "$val"
		c=$((c + 1))
	done
}
uci_load_validate() {
	local _type=$2 _name=$3 _function=$4 _result=0 _spec _value
	shift 4
	[ -n "$_name" ] || { printf 'rule|%s' "$_type"; printf '|%s' "$@"; echo; return; }
	for _spec in "$@"; do
		eval "local ${_spec%%:*}"
		case $_spec in *:*:*) config_get _value "$_name" "${_spec%%:*}" "${_spec##*:}" ;;
		*) config_get _value "$_name" "${_spec%%:*}" ;; esac
		eval "${_spec%%:*}=\$_value"
		[ -n "$_value" ] || continue
		case $_spec in
		*:uinteger) case $_value in *[!0-9]*) _result=1 ;; esac ;;
		*:or\(*) case $_spec in *"\"$_value\""*) ;; *) _result=1 ;; esac ;;
		esac
	done
	"$_function" "$_name" $_result
}
. "$initscript"
start() { start_service; echo procd_close_service >>"$RECORD"; service_triggers; }
stop() { stop_service; procd_kill nutshim; }
reload() { start; }
restart() { stop; start; }
case " start stop reload restart $EXTRA_COMMANDS " in *" $action "*) "$action" ;; *) exit 2 ;; esac
"""


class OpenWrt:
    """The init script on the stub, with its files in one folder."""

    def __init__(self, tmp_path, daemon):
        self.folder = tmp_path
        self.uci, self.conf, self.flag, self.record = (str(tmp_path / name) for name in ("uci", "var/nutshim.conf", "flag", "record"))
        self.rc_common = write(str(tmp_path / "rc.common"), RC_COMMON)
        self.plain = str(tmp_path / "plain.conf")
        self.script = localized(tmp_path, "init", "openwrt", "files", "nutshim.init", **{
            "/usr/sbin/nutshim.py": daemon, "/etc/config/nutshim": self.uci, "/var/etc/nutshim.conf": self.conf,
            "/etc/nut/nutshim.conf": self.plain, "/var/run/killpower": self.flag})

    def run(self, action):
        """Run an action; the CompletedProcess, with the recorded calls as .calls, each a list of words."""
        open(self.record, "w").close()
        done = run("busybox", "ash", self.rc_common, self.script, action, env=clean_env(RECORD=self.record, UCI=self.uci))
        with open(self.record, encoding="utf-8") as file:
            done.calls = [line.rstrip("\n").split("|") for line in file]
        return done

    def written(self):
        """The generated file's sections: {name: {option: value}}, global options under ""."""
        with open(self.conf, encoding="utf-8") as file:
            return parsed(file.read())


def parsed(text):
    """A nutshim.conf as {section: {option: value}}."""
    found = {"": {}}
    section = ""
    for line in text.splitlines():
        name, equals, value = map(str.strip, line.partition("="))
        if line.startswith("["):
            section = line.strip("[]")
            found[section] = {}
        elif equals and not line.startswith("#"):
            found[section][name] = value
    return found


@pytest.fixture
def openwrt(tmp_path, daemon, need):
    """An OpenWrt stub."""
    need("busybox")
    return OpenWrt(tmp_path, daemon)


def every_option(pki, tmp_path):
    """A value for every option there is: {section: {option: value or list}}."""
    values = {
        "user": "root" if IS_ROOT else "nobody", "chroot": "/", "pidfile": str(tmp_path / "pid"), "log": "stderr",
        "handshake_threads": "3", "max_sessions": "300", "listen": ["127.0.0.1:0", "[::1]:0"],
        "upstream": ["localhost:3493", "192.0.2.1:3493"], "certificate": pki.server.cert, "key": pki.server.key,
        "trust": pki.ca.cert, "verify": "chain", "server_name": "localhost", "pin": [pki.server.pin, pki.client.pin],
        "crl": [pki.crl], "client_certificate": "request", "permit": ["CN=client.example: monitor", "*: read"],
        "allow_from": ["127.0.0.0/8", "::1"], "plaintext": "localhost", "min_tls": "1.2", "max_sessions_per_address": "9",
        "handshake_timeout": "7", "idle_timeout": "99", "reuse": "5"}
    assert set(values) == {option.name for option in OPTIONS} - {"role"}, "a new option needs a value here"
    sections = {"": {o.name: values[o.name] for o in OPTIONS if o.where == "global"}}
    for role in "server", "client":
        sections["the_" + role] = dict(role=role, **{
            o.name: values[o.name] for o in OPTIONS if o.where in ("shim", role) and o.name != "role"})
    return sections


def uci_text(sections):
    """sections as a UCI file."""
    text = ""
    for name, options in sections.items():
        text += "\nconfig %s '%s'\n" % ("shim" if name else "nutshim", name or "global")
        for option, value in options.items():
            for item in value if isinstance(value, list) else [value]:
                text += "\t%s %s '%s'\n" % ("list" if isinstance(value, list) else "option", option, item)
    return text


def test_openwrt_makes_its_configuration_from_every_uci_option(openwrt, pki, tmp_path):
    """Each option of the table, given in UCI, arrives in the generated file, which nutshim accepts."""
    sections = every_option(pki, tmp_path)
    write(openwrt.uci, uci_text(sections))
    done = openwrt.run("start")
    assert done.returncode == 0, done.stderr
    expected = {name: {option: ", ".join(value) if isinstance(value, list) else value for option, value in options.items()}
                for name, options in sections.items()}
    assert openwrt.written() == expected, done.stderr
    assert run_shim("-t", "-f", openwrt.conf).returncode == 0
    assert os.stat(openwrt.conf).st_mode & 0o777 == 0o640


def test_openwrt_tells_procd_how_to_run_it(openwrt, daemon, pki, tmp_path):
    """procd gets a named instance in the foreground, respawned for ever, with HUP when one of its files changes."""
    write(openwrt.uci, uci_text(every_option(pki, tmp_path)))
    calls = openwrt.run("start").calls
    instance = calls[calls.index(["procd_open_instance", "nutshim"]):calls.index(["procd_close_instance", ""])]
    params = {call[1]: call[2:] for call in instance if call[0] == "procd_set_param"}
    assert params == {"command": [daemon, "-F", "-f", openwrt.conf], "respawn": ["3600", "5", "0"], "file": [openwrt.conf],
                      "reload_signal": ["HUP"], "stdout": ["1"], "stderr": ["1"]}
    files = {call[2] for call in instance if call[:2] == ["procd_append_param", "file"]}
    assert files == {pki.server.cert, pki.server.key, pki.ca.cert, pki.crl}
    assert ["procd_add_reload_trigger", "nutshim"] in calls
    rules = {rule.split(":")[0] for call in calls if call[0] == "rule" for rule in call[2:]}
    assert rules == {option.name for option in OPTIONS} | {"enabled"}, "its rules and the options table differ"


def test_openwrt_reload_keeps_what_works(openwrt, pki, tmp_path):
    """A wrong UCI file starts nothing, says why, and at a reload leaves file and instance as they were."""
    sections = every_option(pki, tmp_path)
    good = uci_text(sections)
    sections["the_server"]["min_tls"] = "1.0"
    sections["the_client"]["trust"] = "/nowhere"
    wrong = uci_text(sections)

    write(openwrt.uci, wrong)
    done = openwrt.run("start")
    assert not os.path.exists(openwrt.conf) and ["procd_open_instance", "nutshim"] not in done.calls
    said = " ".join(word for call in done.calls if call[0] == "logger" for word in call)
    assert "daemon.err" in said and "the_server" in said, done.calls
    assert openwrt.run("check").returncode != 0

    write(openwrt.uci, good)
    assert openwrt.run("check").returncode == 0
    assert openwrt.run("start").returncode == 0
    before = openwrt.written()
    write(openwrt.uci, wrong)
    done = openwrt.run("reload")
    assert ["procd_open_instance", "nutshim"] in done.calls, "procd would take it for removed, and stop it"
    assert openwrt.written() == before

    write(openwrt.uci, good.replace("config nutshim 'global'", "config nutshim 'global'\n\toption enabled '0'"))
    assert ["procd_open_instance", "nutshim"] not in openwrt.run("reload").calls


def test_openwrt_leaves_it_alone_while_the_power_is_cut(openwrt, pki, tmp_path):
    """While killpower's flag stands nothing is stopped, restarted or configured anew."""
    sections = every_option(pki, tmp_path)
    write(openwrt.uci, uci_text(sections))
    assert ["procd_kill", "nutshim"] in openwrt.run("restart").calls
    before = openwrt.written()
    write(openwrt.flag, "")
    sections["the_server"]["idle_timeout"] = "77"
    write(openwrt.uci, uci_text(sections))
    for action in "stop", "restart":
        done = openwrt.run(action)
        assert done.returncode != 0 and ["procd_kill", "nutshim"] not in done.calls
        assert ["procd_open_instance", "nutshim"] not in done.calls
    done = openwrt.run("reload")
    assert ["procd_open_instance", "nutshim"] in done.calls and openwrt.written() == before


def test_openwrt_without_uci_takes_a_plain_file(openwrt, conf):
    """Who only copies the files gets the same instance with /etc/nut/nutshim.conf as it is."""
    os.rename(conf, openwrt.plain)
    os.symlink(openwrt.plain, conf)
    calls = openwrt.run("start").calls
    assert [call for call in calls if call[:2] == ["procd_set_param", "command"]][0][-1] == openwrt.plain
    assert openwrt.run("check").returncode == 0
    write(openwrt.plain, "nonsense\n")
    assert openwrt.run("check").returncode != 0


def test_openwrt_watches_files_with_relative_names(openwrt, tmp_path):
    """A PEM file that nutshim.conf names relative to its own folder, in quotes too, is told to procd by its full name."""
    write(openwrt.plain, "[a]\nrole = server\ncertificate = own.pem\ncrl = %s, sub/b.pem # both\n[b]\ntrust = \"ca.pem\"\n"
          % (tmp_path / "a.pem"))
    names = [str(tmp_path / name) for name in ("own.pem", "a.pem", "sub/b.pem", "ca.pem")]
    os.mkdir(str(tmp_path / "sub"))
    for name in names:
        write(name, "")
    assert [call[2] for call in openwrt.run("start").calls if call[:2] == ["procd_append_param", "file"]] == names


def test_openwrt_says_why_it_does_not_start(openwrt):
    """A start without nutshim.conf, and one that UCI has switched off, tell so in the log and on the terminal."""
    for uci, expected in (None, openwrt.plain), ("config nutshim 'global'\n\toption enabled '0'\n", "enabled is 0"):
        if uci:
            write(openwrt.uci, uci)
        calls = openwrt.run("start").calls
        assert ["procd_open_instance", "nutshim"] not in calls
        call, = [" ".join(call) for call in calls if call[0] == "logger"]
        assert "-s" in call and "not started" in call and expected in call, call


def test_openwrt_sample_configuration_is_off_and_right(openwrt, pki):
    """The UCI file of the package starts nothing; switched on, with its PEM files, nutshim accepts it."""
    sample = read("openwrt", "files", "nutshim.config")
    write(openwrt.uci, sample)
    assert ["procd_open_instance", "nutshim"] not in openwrt.run("start").calls
    write(openwrt.uci, sample.replace("option enabled '0'", "option enabled '1'")
          .replace("/etc/nutshim/upsbox.cert.pem", pki.server.file).replace("/etc/nutshim/upsbox-client.cert.pem", pki.ca.cert))
    done = openwrt.run("start")
    assert set(openwrt.written()) == {"", "upsd", "upsbox"}, done.stderr


MAKE_RULES = """
INSTALL_DIR=install -d -m0755
INSTALL_BIN=install -m0755
INSTALL_CONF=install -m0600
CP=cp -fpR
PKG_BUILD_DIR=$(OUT)/build
define BuildPackage
all:
	$(call Build/Prepare)
	$(call Build/Configure)
	$(call Build/Compile)
	$(call Package/$(1)/install,$(OUT)/root)
endef
"""


def test_openwrt_package_has_its_files(need, tmp_path):
    """The feed package, built with a stub of OpenWrt's rules, holds the programs, the init script and its configuration."""
    need("make")
    write(str(tmp_path / "rules.mk"), MAKE_RULES)
    write(str(tmp_path / "package.mk"), "")
    done = run("make", "-C", path_of("openwrt"), "TOPDIR=%s" % tmp_path, "INCLUDE_DIR=%s" % tmp_path, "OUT=%s" % tmp_path)
    assert done.returncode == 0, done.stderr
    modes = {str(path.relative_to(tmp_path / "root")): path.stat().st_mode & 0o777
             for path in (tmp_path / "root").rglob("*") if path.is_file()}
    assert modes == {"usr/sbin/nutshim.py": 0o755, "usr/sbin/mkNUTcert.py": 0o755,
                     "etc/init.d/nutshim": 0o755, "etc/config/nutshim": 0o600}


# ---- Manual pages -------------------------------------------------------------------------------

PAGES = ["nutshim.8", "nutshim.conf.5", "mkNUTcert.8"]


@pytest.mark.parametrize("page", PAGES)
def test_manual_pages_pass_mandoc(page, need):
    """mandoc -T lint finds nothing, but for pages of other packages that this machine may lack."""
    need("mandoc")
    done = run("mandoc", "-T", "lint", path_of("man", page))
    found = [line for line in done.stdout.splitlines() if "referenced manual not found" not in line]
    assert found == []


def test_options_page_is_in_step_with_the_table():
    """nutshim.conf(5) has every option of nutshim.py's table, in its order, with where and default as there."""
    expected = []
    for option in OPTIONS:
        defaults = option.default if isinstance(option.default, dict) else {"": option.default}
        head = [option.where] + [(role + " default " + value).strip() for role, value in defaults.items() if value is not None]
        expected.append((option.name, "; ".join(head)))
    assert re.findall(r"^\.It Ic (\w+) Pq (.*)$", read("man", "nutshim.conf.5"), re.M) == expected


@pytest.mark.parametrize("program, page", [("nutshim.py", "nutshim.8"), ("mkNUTcert.py", "mkNUTcert.8")])
def test_pages_name_every_option_of_the_command_line(program, page):
    """Every option that -h lists, of the program and of each subcommand, is in the manual page."""
    def options_of(*words):
        helped = run(sys.executable, os.path.join(ROOT, program), *words, "-h").stdout.partition("Options in nutshim.conf")[0]
        return set(re.findall(r"(?<![\w-])-{1,2}[A-Za-z][A-Za-z-]*", helped)) - {"-h", "--help"}
    text = read("man", page)
    found = options_of()
    for subcommand in re.findall(r"^\.It Cm (\w+) ?(?:Ar|Op|$)", text, re.M) if program == "mkNUTcert.py" else ():
        found |= options_of(subcommand)
    assert len(found) > 8
    lines = [line for line in text.splitlines() if line.startswith((".It Fl ", ".Fl -"))]
    in_page = {"-" + part.split()[0].rstrip(",") for line in lines for part in line.split("Fl ")[1:]}
    assert found <= in_page


# ---- The small files ----------------------------------------------------------------------------


def test_version_is_the_same_everywhere():
    """The packages have nutshim.py's version."""
    version = re.escape(load("nutshim").VERSION)
    assert re.match(r"nutshim \(%s\) " % version, read("debian", "changelog"))
    assert re.search(r"^PKG_VERSION:=%s$" % version, read("openwrt", "Makefile"), re.M)


def test_firewall_profiles_open_port_401():
    """The ufw and firewalld profiles are well-formed and open 401/tcp, nothing else."""
    port = xml.dom.minidom.parseString(read("firewalld", "nutshim.xml")).getElementsByTagName("port")
    assert [(each.getAttribute("port"), each.getAttribute("protocol")) for each in port] == [("401", "tcp")]
    ufw = configparser.ConfigParser()
    ufw.read_string(read("ufw", "nutshim"))
    assert ufw["nutshim"]["ports"] == "401/tcp"


def test_ansible_role_is_valid(tmp_path):
    """The Ansible role passes ansible-playbook's syntax check; skipped where there is none."""
    if not run("sh", "-c", "command -v ansible-playbook").stdout:
        pytest.skip("not installed: ansible-playbook")
    os.mkdir(str(tmp_path / "roles"))
    os.symlink(path_of("ansible"), str(tmp_path / "roles" / "nutshim"))
    play = write(str(tmp_path / "play.json"), json.dumps([{"hosts": "localhost", "roles": [{"role": "nutshim"}]}]))
    done = run("ansible-playbook", "--syntax-check", "-i", "localhost,", play, cwd=str(tmp_path),
               env=clean_env(LC_ALL="C.UTF-8"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_ansible_changes_the_right_monitor_lines():
    """The role's expression leads MONITOR lines of the UPS box to the local shim, and no others."""
    task = read("ansible", "tasks", "main.yml")
    pattern = re.search(r"regexp: '(.*)'", task).group(1)
    pattern = re.sub(r"\{\{.*?\}\}", lambda match: re.escape("ups.lan") if "regex_escape" in match.group() else "ups.lan", pattern)
    replacement = re.search(r"replace: '(.*)'", task).group(1).replace("{{ nutshim_local }}", "localhost:3493")

    def after(line):
        return re.sub("(?m)" + pattern, replacement, line)
    assert after("MONITOR apc@ups.lan 1 u p secondary") == "MONITOR apc@localhost:3493 1 u p secondary"
    assert after('MONITOR "apc@ups.lan:3493" 1 u p primary') == 'MONITOR "apc@localhost:3493" 1 u p primary'
    for line in "MONITOR apc@upsXlan 1 u p secondary", "MONITOR apc@ups.lan.org 1 u p secondary", "# MONITOR apc@ups.lan 1 u p secondary":
        assert after(line) == line
    done = after("MONITOR apc@ups.lan 1 u p secondary")
    assert after(done) == done


# ---- Footprint ----------------------------------------------------------------------------------


def test_footprint(shim, pki, capsys):
    """nutshim.py does not grow past its bound; its size, memory and start-up time are measured and shown."""
    started = shim({"box": {"role": "server", "listen": "127.0.0.1:0", "certificate": pki.server.file}})
    pss = started.pss()

    def seconds(*args):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run([sys.executable] + list(args), stdout=subprocess.DEVNULL, check=True, env=clean_env())
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    python = seconds("-c", "import ssl")
    check = seconds(NUTSHIM, "-t", "-f", started.config)
    size = os.path.getsize(NUTSHIM)
    with capsys.disabled():
        print("\nnutshim.py: %d bytes; PSS %d kB idle; start to a checked configuration %.0f ms, python3 -c 'import ssl' %.0f ms"
              % (size, pss, check * 1000, python * 1000))
    assert size < MAX_BYTES
