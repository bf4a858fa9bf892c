# SPDX-License-Identifier: GPL-2.0-or-later
"""nutshim at home on other machines: containers, BSDs, macOS, a folder under logrotate.

Real here are nutshim, NUT and logrotate. The container is run from its own files (Containerfile, compose
files, configurations), as process 1 of its own namespaces on this machine's files seen through a read-only
overlay: what an engine does, without an engine. The rc.subr of OpenBSD and NetBSD are stubs with what their
manual pages, rc.subr(8), document; launchd's file is held against launchd.plist(5).
"""

import contextlib
import json
import os
import plistlib
import pwd
import re
import shlex
import shutil
import signal
import sys

import pytest

from conftest import missing
from harness import (IS_ROOT, NUTSHIM, ROOT, TESTS, Process, clean_env, folder, free_port, nut_program, poll, run, run_shim, write)
from test_packaging import PACKAGING, conf, daemon, life, localized, read         # noqa: F401 (fixtures are used by name)


# ---- container ----------------------------------------------------------------------------------


def instructions(text):
    """A Containerfile's instructions: a list of (NAME, arguments as one line)."""
    text = re.sub(r"(?m)^\s*#.*\n", "", text).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def yaml(text):
    """The data of a compose file: mappings, lists of strings and strings, told apart by indentation."""
    text = re.sub(r"(?m)(^|\s+)#.*", "", text)
    lines = [(len(line) - len(line.lstrip()), line.strip()) for line in text.splitlines() if line.strip()]

    def block(indent):
        if lines[0][1].startswith("- "):
            found = []
            while lines and lines[0][0] == indent:
                found.append(lines.pop(0)[1][2:].strip('"'))
            return found
        found = {}
        while lines and lines[0][0] == indent:
            name, _, value = lines.pop(0)[1].partition(":")
            found[name] = value.strip().strip('"') or (block(lines[0][0]) if lines and lines[0][0] > indent else None)
        return found
    data = block(0)
    assert not lines, "not understood: %s" % lines
    return data


IMAGE = instructions(read("container", "Containerfile"))
COMPOSE = {role: yaml(read("container", role, "compose.yaml")) for role in ("client", "server")}


def said(name):
    """The arguments of the one instruction of that name."""
    found = [arguments for each, arguments in IMAGE if each == name]
    assert len(found) == 1, "%s stands %d times in Containerfile" % (name, len(found))
    return found[0]


# A folder, $1, with this machine's files in root, whose changes go with the namespace.
OVERLAY = r"""
set -e
mount -t tmpfs tmpfs "$1"
cd "$1"
mkdir upper work root
mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work overlay root
"""
DEVICES = r"""
mount -t proc proc root/proc
mount -t tmpfs tmpfs root/dev
mknod -m 666 root/dev/null c 1 3
mknod -m 666 root/dev/urandom c 1 9
ln -s /proc/self/fd root/dev/fd
for name in stdin stdout stderr; do ln -s fd/$((number)) root/dev/$name; number=$((number + 1)); done
"""

# What an engine does for a container, in namespaces that unshare has made; then it becomes process 1.
# $1 the folder of the container, $2 the folder to mount at /etc/nut, $3 ro or rw for it and all else, $4 the tmpfs folders.
ENGINE = OVERLAY + r"""
mkdir -p root/etc/nut
%(build)s
echo '127.0.0.1 localhost upsd
192.0.2.1 upsbox.lan' >root/etc/hosts
for folder in $4; do
	mount -t tmpfs -o "mode=$(stat -c %%a "root$folder")" tmpfs "root$folder" # as runc does: the mode, not the owner
done
mount --bind "$2" root/etc/nut
mount -o "remount,bind,$3" root/etc/nut
""" + DEVICES + r"""
mount -o "remount,bind,$3" root # of the mount point, since an overlay itself takes no change
shift 4
exec chroot root "$@"
"""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def unprivileged(*command):
    """The command line of a command as the container's user, without capabilities and with a bare environment."""
    user, _, group = said("USER").partition(":")
    return ["setpriv", "--reuid=" + user, "--regid=" + group, "--clear-groups", "--no-new-privs", "--bounding-set=-all",
            "--inh-caps=-all", "env", "-i", "PATH=" + PATH] + list(command)


class Network:
    """A network namespace with the loopback up, for as long as it is open."""

    def __enter__(self):
        self._process = Process(["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec sleep 600"])
        self._process.wait_log("^up$")
        self.pid = self._process.pid
        return self

    def __exit__(self, *_):
        self._process.kill()

    def command(self, *args):
        """The command line of a command in this namespace."""
        return ["nsenter", "--net=/proc/%d/ns/net" % self.pid] + [str(arg) for arg in args]


class Container(Process):
    """A container of the image in a Network, as compose's service nutshim describes it."""

    def __init__(self, network, base, role, etc, command=None, mode="ro"):
        service = COMPOSE[role]["services"]["nutshim"]
        assert service["image"] == "nutshim" and service["pull_policy"] == "never"     # never a stranger's of that name
        assert service["read_only"] == "true" and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"] and service["volumes"] == ["./etc:/etc/nut:ro"]
        copied = said("COPY").split()
        assert {"python3", "openssl", "ca-certificates"} < set(said("RUN").split())
        build = ["cp -p %s root%s" % (" ".join(os.path.join(ROOT, name) for name in copied[:-1]), copied[-1])]
        build += re.findall(r"chmod \d+ /\S+", said("RUN"))
        build = "\n".join(line.replace(" /", " root/", 1) if line.startswith("chmod") else line for line in build)
        command = command or json.loads(said("ENTRYPOINT")) + json.loads(said("CMD"))
        os.mkdir(base)
        super().__init__(network.command(
            "unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child",
            "sh", "-c", ENGINE % {"build": build}, "sh", base, etc, mode, " ".join(service["tmpfs"]),
            *unprivileged(*command)), clean_env())

    @property
    def first(self):
        """The pid, seen from here, of the container's process 1, once it is in its own root folder."""
        def find():
            assert self.alive, "ended with %s:\n%s" % (self.returncode, self.log)
            with open("/proc/%d/task/%d/children" % (self.pid, self.pid), encoding="ascii") as file:
                pid = file.read().strip()
            with contextlib.suppress(FileNotFoundError):
                return pid and os.readlink("/proc/%s/root" % pid) != "/" and int(pid)
            return None
        return poll(find, 5, lambda: "the container's process 1:\n" + self.log)

    def end(self):
        """End it; its process 1 goes with unshare, which leaves TERM to it."""
        if self.alive:
            self.kill()
        super().end()

    def run(self, *command):
        """Run a command in it, as `docker exec` does."""
        return run("nsenter", "--target", self.first, "--mount", "--pid", "--net", "--root", "--wd", *unprivileged(*command))

    def health(self):
        """Run the health check; the CompletedProcess."""
        return self.run(*json.loads(said("HEALTHCHECK").partition(" CMD ")[2]))

    def healthy(self, seconds=10):
        """Wait until the health check is content."""
        poll(lambda: self.health().returncode == 0, seconds, lambda: "a healthy container:\n" + self.log)

    def kill_with(self, number):
        """A signal to its process 1 from outside, as `docker kill` sends it."""
        os.kill(self.first, number)

    def status(self, name):
        """A line of /proc/1/status."""
        with open("/proc/%d/status" % self.first, encoding="ascii") as file:
            return re.search(r"(?m)^%s:[ \t]*(.*?)[ \t]*$" % name, file.read()).group(1)


def cable(first, second, *addresses):
    """A cable between two Networks, each with its address."""
    for command in [first.command("ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second.pid)] + [
            network.command("ip", *words) for network, address in zip((first, second), addresses)
            for words in (("address", "add", address, "dev", "cable"), ("link", "set", "cable", "up"))]:
        done = run(*command)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def namespaces(need, tmp_path):
    """Skips without root, namespaces with overlays, or a python3 that machines in them find."""
    need("ip", "unshare", "nsenter")
    overlay = "mount -t tmpfs tmpfs %s && cd %s && mkdir a b c && mount -t overlay -o lowerdir=/,upperdir=a,workdir=b overlay c"
    if not IS_ROOT or run("unshare", "--net", "--mount", "--pid", "--fork", "sh", "-c", overlay % (tmp_path, tmp_path)).returncode:
        pytest.skip("no namespaces with overlays here")
    if not any(os.path.exists(os.path.join(path, "python3")) for path in PATH.split(":")):
        missing("python3 in one of " + PATH)


@pytest.fixture
def engine(need, namespaces):                                                   # pylint: disable=unused-argument
    """Two networks with a cable between them, and container(NAME, ROLE, …) to start one in each: what it starts is ended."""
    need("setpriv")
    with contextlib.ExitStack() as stack:
        stack.base = stack.enter_context(folder("box"))
        stack.networks = {}
        for role in COMPOSE:
            stack.networks[role] = stack.enter_context(Network())
        cable(stack.networks["server"], stack.networks["client"], "192.0.2.1/24", "192.0.2.2/24")

        def start(name, role, **options):
            etc = os.path.join(stack.base, role)
            if not os.path.exists(etc):
                shutil.copytree(os.path.join(PACKAGING, "container", role, "etc"), etc)
                os.chown(etc, *map(int, said("USER").split(":")))
            box = Container(stack.networks[role], os.path.join(stack.base, name), role, etc, **options)
            stack.callback(box.end)
            return box, etc
        stack.start = start
        yield stack


def upsd_in(network, stack):
    """A real upsd with dummy-ups on 127.0.0.1 port 3493 of a network."""
    path = stack.enter_context(folder("nut"))
    env = clean_env(**{name: path for name in ("NUT_CONFPATH", "NUT_STATEPATH", "NUT_PIDPATH", "NUT_ALTPIDPATH")})
    write(os.path.join(path, "ups.conf"), "[ups]\ndriver = dummy-ups\nport = ups.dev\n")
    write(os.path.join(path, "ups.dev"), "ups.status: OL\nTIMER 300\n")
    write(os.path.join(path, "upsd.conf"), "LISTEN 127.0.0.1 3493\n")
    write(os.path.join(path, "upsd.users"), "")
    for command in ([nut_program("dummy-ups"), "-a", "ups", "-F", "-u", "root"], [nut_program("upsd"), "-F", "-u", "root"]):
        stack.callback(Process(network.command(*command), env).end)
    upsc = network.command(nut_program("upsc"), "ups@127.0.0.1", "ups.status")
    poll(lambda: run(*upsc).stdout == "OL\n", 15, "upsd")


@pytest.mark.usefixtures("nut_installed")
def test_containers_as_their_files_say(engine):
    """The two containers, run from their own files, lead a plain client to upsd, as process 1, without root or a
    writable root folder; the health check tells it; HUP reloads; TERM ends them with 0; no zombie is left."""
    upsd_in(engine.networks["server"], engine)

    # The certificates, as README has them made, in the mounted folder by the container's own user.
    # Typed once more it does not cost the clients their trust.
    words = read("container", "README").split("--entrypoint ", 1)[1].split("docker", 1)[0].replace("\\\n", " ")
    command = [word for word in shlex.split(words) if word != "nutshim"]
    assert command[0] == "mkNUTcert.py" and "-y" not in command
    maker, etc = engine.start("maker", "server", mode="rw", command=command)
    assert maker.wait(20) == 0, maker.log
    again, _ = engine.start("again", "server", mode="rw", command=command)
    assert again.wait(20) == 1 and "exists and is left as it is" in again.log

    server, _ = engine.start("1", "server")
    server.healthy()
    published = COMPOSE["server"]["services"]["nutshim"]["ports"]
    assert published == ["401:4401"] and server.wait_log(r"\[upsd\] listening on \S+:4401")

    client_etc = os.path.join(engine.base, "client")
    shutil.copytree(os.path.join(PACKAGING, "container", "client", "etc"), client_etc)
    conf = os.path.join(client_etc, "nutshim.conf")
    text = read("container", "client", "etc", "nutshim.conf")
    assert "upstream = upsbox.lan\n" in text
    text = text.replace("upstream = upsbox.lan\n", "upstream = upsbox.lan:4401\n")      # what is published as 401
    write(conf, text, 0o644)
    shutil.copy(os.path.join(etc, "upsbox-client.cert.pem"), client_etc)
    client, _ = engine.start("2", "client")
    client.healthy()

    upsc = engine.networks["client"].command(nut_program("upsc"), "ups@127.0.0.1", "ups.status")
    done = run(*upsc)
    assert (done.returncode, done.stdout) == (0, "OL\n"), done.stderr + client.log + server.log

    for box in server, client:
        assert box.status("NSpid").split()[-1] == "1"
        assert box.status("Uid").split() == ["3493"] * 4 and box.status("Groups") == ""
        assert int(box.status("CapEff"), 16) == int(box.status("CapBnd"), 16) == 0 and box.status("NoNewPrivs") == "1"
        for place in "/", "/etc/nut/", "/usr/local/sbin/":
            done = box.run("touch", place + "x")
            assert done.returncode != 0 and "Read-only file system" in done.stderr

    # A reload: a faulty file changes nothing, a good one is taken.
    mark = len(client.lines)
    write(conf, text + "nonsense = 1\n", 0o644)
    client.kill_with(signal.SIGHUP)
    client.wait_log("nonsense", start=mark)
    client.healthy()
    write(conf, text, 0o644)
    client.kill_with(signal.SIGHUP)
    client.wait_log("reloaded /etc/nut/nutshim.conf", start=mark)
    assert run(*upsc).stdout == "OL\n"

    for box in client, server:
        first = box.first
        with open("/proc/%d/task/%d/children" % (first, first), encoding="ascii") as children:
            assert children.read() == "", "process 1 has children, or zombies"
        box.kill_with(signal.SIGTERM)
        assert box.wait(10) == 0, box.log
        assert "Traceback" not in box.log


@pytest.mark.parametrize("role", sorted(COMPOSE))
def test_networks_of_a_compose_file_are_declared(role):
    """Each network that a service names is declared, "default" too: podman-compose of Debian 12 stops with a traceback else."""
    named = {name for service in COMPOSE[role]["services"].values() for name in service["networks"]}
    assert "default" in named and named == set(COMPOSE[role]["networks"])


def test_container_ends_at_once_with_what_is_wrong(engine):
    """A container whose configuration is faulty ends with 1 and the fault on stderr, and its health check never passes."""
    box, _ = engine.start("1", "client")                # without the file of trust
    assert box.wait(10) == 1
    assert re.search(r"/etc/nut/nutshim.conf:\d+: .*upsbox-client.cert.pem", box.log), box.log


# ---- logrotate ----------------------------------------------------------------------------------


@pytest.mark.skipif(not IS_ROOT, reason="needs root")
def test_logrotate_in_a_folder_of_root(need, nut, pki, daemon, tmp_path):
    """With packaging's file alone logrotate rotates a log in a folder of root's, time and again, under a nutshim that
    runs as nut: no line is lost, each is in one file, and the new file has the old one's owner and mode."""
    need("logrotate")
    try:
        account = pwd.getpwnam("nut")
    except KeyError:
        missing("a user nut")
    with folder("log") as path:
        os.chmod(path, 0o755)
        log, conf_file = os.path.join(path, "nutshim.log"), os.path.join(path, "nutshim.conf")
        certificate = shutil.copy(pki.server.file, path)
        write(conf_file, "user = nut\nlog = %s\npidfile = %s/nutshim.pid\n[box]\nrole = server\nlisten = 127.0.0.1:%d\n"
              "upstream = 127.0.0.1:%d\ncertificate = %s\n" % (log, path, free_port(), nut.port, certificate), 0o644)
        for file in (certificate, conf_file):
            os.chown(file, account.pw_uid, account.pw_gid)
        rules = localized(tmp_path, "rules", "logrotate", "nutshim", **{
            "/var/log/nutshim.log": log, "/var/log/nutshim/*.log": path + "/more/*.log",
            "/usr/sbin/nutshim.py": daemon, "/etc/nut/nutshim.conf": conf_file})
        os.chmod(rules, 0o644)                          # else logrotate does not take it
        started = run(daemon, "-f", conf_file)
        assert started.returncode == 0, started.stderr
        try:
            owner = os.stat(log)
            assert (owner.st_uid, owner.st_gid) == (account.pw_uid, account.pw_gid)
            for _ in range(3):
                done = run("/usr/sbin/logrotate", "-f", "-s", os.path.join(path, "state"), rules)
                assert (done.returncode, done.stderr) == (0, "")
                new = os.stat(log)
                assert (new.st_uid, new.st_gid, new.st_mode) == (owner.st_uid, owner.st_gid, owner.st_mode)
                assert new.st_ino != owner.st_ino
                owner = new
                with open(log, encoding="utf-8") as file:
                    assert file.read().count("reloaded %s" % conf_file) == 1
        finally:
            stopped = run(daemon, "-c", "stop", "-f", conf_file)
        assert stopped.returncode == 0, stopped.stderr
        with open(log, encoding="utf-8") as file:
            text = file.read()
        assert text.count("stopped") == 1 and text.count("reloaded") == 1 and "Traceback" not in text


# ---- BSDs ---------------------------------------------------------------------------------------

# What OpenBSD's rc.subr(8) does with the variables and functions that a script sets: the defaults that ours
# replaces match processes by name, which would fail here as it would there.
OPENBSD_RC_SUBR = r"""
rc_start() { ${daemon} ${daemon_flags}; }
rc_check() { return 1; }
rc_reload() { return 1; }
rc_stop() { return 1; }
_rc_do() { "$@" >/dev/null 2>&1; }
_rc_configtest() { ! type rc_configtest >/dev/null 2>&1 || _rc_do rc_configtest; }
_rc_exit() { echo "$name($1)"; [ "$1" = ok ]; exit; }
rc_cmd() {
	case $1 in
	check) _rc_do rc_check && _rc_exit ok; _rc_exit failed ;;
	configtest) _rc_configtest && _rc_exit ok; _rc_exit failed ;;
	start)
		_rc_do rc_check && exit 0
		_rc_configtest || _rc_exit failed
		if type rc_pre >/dev/null 2>&1; then _rc_do rc_pre || _rc_exit failed; fi
		_rc_do rc_start || _rc_exit failed
		_rc_exit ok ;;
	stop)
		_rc_do rc_check || exit 0
		_rc_do rc_stop || _rc_exit failed
		left=30
		while _rc_do rc_check; do
			left=$((left - 1))
			[ $left -gt 0 ] || _rc_exit failed
			sleep 1
		done
		_rc_exit ok ;;
	reload)
		_rc_configtest && _rc_do rc_check && _rc_do rc_reload || _rc_exit failed
		_rc_exit ok ;;
	restart) _rc_configtest || _rc_exit failed; "$SHELL" "$0" stop && "$SHELL" "$0" start ;;
	*) echo "usage: $0 check|configtest|reload|restart|start|stop" >&2; exit 1 ;;
	esac
}
[ -n "$daemon" ] || exit 1
name=${0##*/}
[ -z "$TEST_FLAGS" ] || daemon_flags=$TEST_FLAGS
"""

# What NetBSD's rc.subr(8) does: unlike FreeBSD's it has no status of its own for a script without a command
# variable, checks no required_files before a script's own start, and calls the script again for a restart.
NETBSD_RC_SUBR = r"""
load_rc_config() { nutshim=$TEST_ENABLE nutshim_config=$TEST_CONFIG nutshim_python=$TEST_PYTHON; }
run_rc_command() {
	eval "value=\$$rcvar"
	case $value in
	[Yy][Ee][Ss]) ;;
	*) echo "\$$rcvar is not enabled - see rc.conf(5)." >&2; exit 1 ;;
	esac
	for word in start stop restart rcvar $extra_commands; do
		[ "$word" = "$1" ] || continue
		eval "command=\${${1}_cmd:-} precmd=\${${1}_precmd:-}"
		if [ -n "$command" ]; then
			eval "$precmd" || return 1
			eval "$command" || return 1
			return 0
		fi
		case $1 in
		restart)
			eval "$precmd" || return 1
			( "$SHELL" "$0" stop )
			"$SHELL" "$0" start ;;
		esac
		return
	done
	echo "$0: unknown directive '$1'." >&2
	exit 1
}
"""


def test_openbsd_script_runs_the_daemon(tmp_path, daemon, conf):
    """The rc.d script starts once, reloads, restarts and stops on a stub of OpenBSD's rc.subr; a faulty file costs
    it nothing. OpenBSD's ksh is not here: mksh is its nearest relative, or else any sh."""
    shell = shutil.which("mksh") or "/bin/sh"
    subr = write(str(tmp_path / "rc.subr"), OPENBSD_RC_SUBR)
    script = localized(tmp_path, "nutshim", "openbsd", "nutshim", **{
        "/etc/rc.d/rc.subr": subr, "/usr/local/sbin/nutshim.py": daemon})
    names = {"check": "configtest", "status": "check"}

    def service(verb):
        return run(shell, script, names.get(verb, verb), env=clean_env(TEST_FLAGS="-f " + conf, SHELL=shell))
    life(service, conf)
    assert service("stop").returncode == 0


def test_netbsd_script_runs_the_daemon(tmp_path, conf):
    """The rc.d script does the same on a stub of NetBSD's rc.subr, and nothing at all unless it is enabled."""
    subr = write(str(tmp_path / "rc.subr"), NETBSD_RC_SUBR)
    script = localized(tmp_path, "nutshim", "netbsd", "nutshim", **{"/etc/rc.subr": subr, "/usr/pkg/sbin/nutshim.py": NUTSHIM})

    def service(verb, enable="YES", python=sys.executable):
        return run("sh", script, verb, env=clean_env(TEST_ENABLE=enable, TEST_CONFIG=conf, TEST_PYTHON=python, SHELL="/bin/sh"))
    assert "not enabled" in service("start", enable="NO").stderr
    assert service("status").returncode != 0
    life(service, conf)
    for keyword in "PROVIDE: nutshim", "REQUIRE: .*NETWORKING", "BEFORE: upsmon", "KEYWORD: shutdown":
        assert re.search("(?m)^# " + keyword, read("netbsd", "nutshim")), keyword


def test_netbsd_script_finds_the_newest_python(tmp_path, conf):
    """Without nutshim_python it takes the newest python3.N of pkgsrc, by number and not by letter."""
    subr = write(str(tmp_path / "rc.subr"), NETBSD_RC_SUBR)
    os.mkdir(str(tmp_path / "bin"))
    for name in "python3.9", "python3.12", "python3.12-config", "python3.10":
        write(str(tmp_path / "bin" / name), '#!/bin/sh\necho "%s $*"\n' % name, 0o755)
    script = localized(tmp_path, "nutshim", "netbsd", "nutshim", **{"/etc/rc.subr": subr, "/usr/pkg/bin/": "%s/bin/" % tmp_path})
    done = run("sh", script, "status", env=clean_env(TEST_ENABLE="YES", TEST_CONFIG=conf, TEST_PYTHON=""))
    assert done.stdout == "python3.12 /usr/pkg/sbin/nutshim.py -c status -f %s\n" % conf


def test_scripts_outside_of_packagings_rules_are_clean(need):
    """OpenBSD's script, of ksh, and the tests' own pass shellcheck."""
    need("shellcheck")
    done = run("shellcheck", os.path.join(PACKAGING, "openbsd", "nutshim"),
               *(os.path.join(TESTS, name) for name in ("run", "pythons")))
    assert done.returncode == 0, done.stdout


# ---- macOS --------------------------------------------------------------------------------------

# launchd.plist(5), as far as the file uses it: each key and its type.
LAUNCHD = {"Label": str, "ProgramArguments": list, "RunAtLoad": bool, "KeepAlive": bool, "ThrottleInterval": int,
           "ExitTimeOut": int, "ProcessType": str, "StandardErrorPath": str}


def test_launchd_file_runs_the_daemon(tmp_path, conf):
    """launchd's file has only keys of launchd.plist(5), of their types; its command line stays in the foreground, as
    launchd demands, reloads by HUP and ends by TERM with 0 in less than ExitTimeOut."""
    name = "local.nutshim.plist"
    with open(os.path.join(PACKAGING, "launchd", name), "rb") as file:
        job = plistlib.load(file)
    assert {key: type(value) for key, value in job.items()} == LAUNCHD
    assert name == job["Label"] + ".plist" and job["ProcessType"] in ("Background", "Standard", "Adaptive", "Interactive")
    places = {"/opt/homebrew/bin/python3": sys.executable, "/usr/local/sbin/nutshim.py": NUTSHIM,
              "/usr/local/etc/nut/nutshim.conf": conf}
    text = read("launchd", "README")
    for place in places:
        assert place in job["ProgramArguments"] and os.path.dirname(place) in text
    process = Process([places.get(word, word) for word in job["ProgramArguments"]])
    try:
        poll(lambda: run_shim("-c", "status", "-f", conf).returncode == 0, 5, lambda: "the daemon: " + process.log)
        process.signal(signal.SIGHUP)
        log = str(tmp_path / "log")
        poll(lambda: "reloaded" in open(log, encoding="utf-8").read(), 5, "a reload")
        assert process.alive
        process.signal(signal.SIGTERM)
        assert process.wait(job["ExitTimeOut"]) == 0
    finally:
        process.end()


# ---- notes --------------------------------------------------------------------------------------


def test_index_names_what_is_there():
    """packaging/README has a line for each file and folder in packaging/, and for nothing else."""
    text = read("README")
    table = re.search(r"(?m)^FOR .*\n((?:.+\n)+)", text).group(1).splitlines()
    named = [line[27:].split()[0] for line in table if line[0] != " "] + re.findall(r"(?m)^(test-\S+) ", text)
    assert sorted(named + ["README", "build-deb"]) == sorted(os.listdir(PACKAGING))
