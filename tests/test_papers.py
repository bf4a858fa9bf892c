# SPDX-License-Identifier: GPL-2.0-or-later
"""README and packaging's notes: what they offer for pasting is pasted as printed, and works.

Each machine is this one's files seen through an overlay, with processes, a network and a name of its
own; upsd and upsc are real. What a machine cannot have is a stand-in: scp copies a file that the test
has brought over, and programs of other systems (opkg, docker, launchctl ...) only note their words.
"""

import contextlib
import os
import re
import subprocess

import pytest

from conftest import missing
from harness import NUTSHIM, ROOT, TESTS, Process, clean_env, folder, poll, run
from test_boxes import DEVICES, OVERLAY, PATH, Container, Network, cable, namespaces, upsd_in   # noqa: F401 (a fixture)
from test_packaging import RC_COMMON, read

TREE = "/srv/nutshim"                               # in each machine; /usr/src and the like may be links

# $1 a folder for the machine, $2 the tree, $3 its name.
MACHINE = OVERLAY + DEVICES + r"""
mount -t tmpfs -o mode=755 tmpfs root/run
mkfifo root/run/initctl # so that install takes it for SysV init
rm -rf root/etc/nut root/usr/local/sbin/nutshim.py root/usr/local/sbin/mkNUTcert.py root/etc/init.d/nutshim
mkdir -p root/etc/nut root/srv/nutshim root/usr/local/sbin root/usr/local/bin
tar -C "$2" -c --exclude='./.venv*' --exclude=./.git --exclude=__pycache__ . | tar -C root/srv/nutshim -x --no-same-owner
hostname "$3" 2>/dev/null || echo "$3" >/proc/sys/kernel/hostname
printf '%s\n' '127.0.0.1 localhost' '::1 localhost' '192.0.2.7 upsbox.lan upsbox' '192.0.2.8 backup.lan backup' >root/etc/hosts
printf '#!/bin/sh\n[ "$1" = -O ] && shift\ncp "/srv/${1%%%%:*}/${1#*:}" "$2"\n' >root/usr/local/bin/scp
chmod 755 root/usr/local/bin/scp
exec chroot root sh -c 'echo up; exec sleep 600'
"""


class Machine(Container):
    """A machine to paste into."""

    def __init__(self, network, base, name):        # pylint: disable=super-init-not-called
        path = os.path.join(base, name)
        os.mkdir(path)
        Process.__init__(self, network.command(
            "unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "sh", "-c", MACHINE, "sh", path, ROOT, name), clean_env())
        self.wait_log("^up$", 20)

    def paste(self, text, *shell, cwd=TREE, **options):
        """Give a text to a shell of root's, as a paste into its terminal does."""
        return run("nsenter", "--target", self.first, "--mount", "--pid", "--net", "--uts", "--root", "--wd", "env", "-i",
                   "PATH=" + PATH, "HOME=/root", "SYSTEMD_OFFLINE=1", "sh", "-c", 'cd "$1" && shift && exec "$@"', "sh",
                   cwd, *(shell or ("dash", "-s")), input=text, timeout=60, **options)

    def works(self, text, *shell, **options):
        """The same, and nothing in it may fail; what it prints."""
        done = self.paste(text, *shell, **options)
        assert (done.returncode, done.stderr) == (0, ""), "%s\n--- printed:\n%s%s" % (text, done.stdout, done.stderr)
        return done.stdout

    def file(self, path):
        """A file's bytes."""
        return subprocess.run(["nsenter", "--target", str(self.first), "--mount", "--root", "cat", path], check=True,
                              stdout=subprocess.PIPE).stdout


@pytest.fixture
def machines(need, namespaces):                     # pylint: disable=unused-argument
    """machines("upsbox", …) starts Machines on one cable, the first at 192.0.2.7, the second at 192.0.2.8."""
    need("openssl", "dash", "tar")
    if run("id", "nut").returncode:
        missing("NUT's user nut")
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(folder("papers"))

        def start(*names):
            networks = [stack.enter_context(Network()) for _ in names]
            if len(names) == 2:
                cable(*networks, "192.0.2.7/24", "192.0.2.8/24")
                upsd_in(networks[0], stack)
            found = [Machine(network, base, name) for network, name in zip(networks, names)]
            for each in found:
                stack.callback(each.end)
            return found
        yield start


with open(os.path.join(ROOT, "README"), encoding="ascii") as README:
    README = README.read()


def blocks(text):
    """What a text offers for pasting at the left margin: paragraphs that begin with a comment."""
    return re.findall(r"(?m)^# .*\n(?:.+\n)+", text)


def block(words, text=README):
    """The one block with these words."""
    found = [each for each in blocks(text) if words in each]
    assert len(found) == 1, "%r stands in %d blocks" % (words, len(found))
    return found[0]


def bring(upsbox, client):
    """What the stand-in for scp finds: the clients' file, and nothing else, of the UPS box."""
    client.works("mkdir -p /srv/root@upsbox.lan/etc/nut\ncat >/srv/root@upsbox.lan/etc/nut/upsbox-client.cert.pem <<'END'\n%sEND\n"
                 % upsbox.file("/etc/nut/upsbox-client.cert.pem").decode())


def asks(client, port=3493):
    """upsc on the client, as its user types it."""
    poll(lambda: client.paste("upsc ups@localhost:%d ups.status 2>/dev/null\n" % port).stdout == "OL\n", 10, "upsc on the client")


# ---- README -------------------------------------------------------------------------------------

# Words that tell a block; each is pasted by a test below.
BLOCKS = ["quickstart --once", "install server", "install client", "role = server", "role = client", "systemctl", "-p upsbox",
          "mkNUTcert.py ca", "install upgrade", "install remove", "tests/run"]


def test_every_block_of_readme_is_known_here():
    """README offers for pasting what the tests below paste, and nothing else; its first command is the quickstart, the
    tests' own is tests/run."""
    assert [[words for words in BLOCKS if words in each] for each in blocks(README)] == [[words] for words in sorted(
        BLOCKS, key=lambda words: README.index(block(words)))]
    assert blocks(README)[0] == "# In this folder\npackaging/quickstart --once\n"
    assert block("tests/run") == "# In this folder\ntests/run\n" and os.access(os.path.join(TESTS, "run"), os.X_OK)


@pytest.mark.usefixtures("nut_installed")
def test_readme_sets_up_two_boxes_in_a_minute(machines, need):
    """README's blocks for two boxes, pasted as printed, lead a plain upsc over TLS to upsd; upgrade brings a new
    version into service; remove takes everything but the file that scp brought."""
    need("hostname")                                # else install does not know upsbox.lan, and asks for --names
    upsbox, client = machines("upsbox", "backup")
    said = upsbox.paste(block("install server"))
    assert said.returncode == 0, said.stdout + said.stderr
    scp = "scp root@upsbox.lan:/etc/nut/upsbox-client.cert.pem /etc/nut/\n"
    assert scp in block("install client") and scp.replace("upsbox.lan:", "upsbox:") in said.stdout
    bring(upsbox, client)
    done = client.paste(block("install client"))
    assert done.returncode == 0, done.stdout + done.stderr
    asks(client)
    assert "name        upsbox.lan OK" in client.works("nutshim.py -p upsbox.lan\n")

    pid = client.works("cat /run/nutshim.pid\n")
    client.works("echo '# a new version' >>nutshim.py\n")
    done = client.paste(block("install upgrade"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert client.file("/usr/local/sbin/nutshim.py").endswith(b"# a new version\n") and client.works("cat /run/nutshim.pid\n") != pid
    asks(client)

    for machine, rest in (upsbox, ""), (client, "upsbox-client.cert.pem\n"):
        done = machine.paste(block("install remove"))
        assert done.returncode == 0, done.stdout + done.stderr
        assert machine.works("ls -A /etc/nut\n") == rest
        assert machine.paste("ls -d /usr/local/sbin/*nutshim* /run/*nutshim* /etc/init.d/nutshim\n").stdout == ""


@pytest.mark.usefixtures("nut_installed")
def test_readme_sets_up_two_boxes_by_hand(machines, need):
    """The quickstart shows TLS and leaves nothing; the same two boxes by README's blocks for doing it by hand; its check
    says that all is well; under systemd the unit that they make is enabled, valid and serves; and each example of a
    configuration passes -t with the files that the blocks have made."""
    need("systemctl", "systemd-analyze")
    upsbox, client = machines("upsbox", "backup")
    assert "TLSv1.3" in upsbox.works(block("quickstart --once")) and upsbox.works("ls -A /etc/nut\n") == ""
    assert "no fault found" in upsbox.works(block("role = server"))
    assert upsbox.works("stat -c '%a %G' /etc/nut/upsbox.cert.pem\n") == "640 nut\n"
    bring(upsbox, client)
    assert "no fault found" in client.works(block("role = client"))
    asks(client)

    said = client.paste(block("-p upsbox")).stdout          # upsc's stderr has a word on SSL
    shown = [line.split()[0] for line in re.search(r"(?m)^    resolve .*\n(?:    .*\n)+", README).group().splitlines()
             if not line.startswith("     ")]
    assert [line.split()[0] for line in said.splitlines()[:len(shown)]] == shown
    assert "name        upsbox.lan OK\n" in said and "\nups\n" in said and "[upsbox] client, listening on " in said

    upsbox.works(block("mkNUTcert.py ca"))
    upsbox.works("cp /etc/nut/upsbox-client.cert.pem /etc/nut/both-clients.cert.pem\n")
    examples = re.findall(r"(?m)^    \[.*\n(?:    \S.*\n)+", README)
    assert len(examples) == 4
    for example in examples:
        upsbox.works("cat >/etc/nut/example.conf <<'END'\n%sEND\nnutshim.py -t -f /etc/nut/example.conf\n" % example)

    client.paste(block("systemctl"))                        # offline, systemctl says what it ignores
    assert client.paste("systemctl is-enabled nutshim.service\n").stdout == "enabled\n"
    done = client.paste("systemd-analyze verify --man=no /etc/systemd/system/nutshim.service 2>&1 | grep nutshim.service\n")
    assert done.stdout == "", done.stdout
    assert client.paste("upsc ups@localhost ups.status\n").returncode != 0, "the one started by hand is stopped"
    start = re.search(r"(?m)^ExecStart=(.*)$", client.file("/etc/systemd/system/nutshim.service").decode()).group(1)
    client.works("%s >/dev/null 2>&1 &\n" % start)
    asks(client)


def test_readme_tells_what_the_tests_install():
    """README names the packages that tests/run installs, and this version: first of its changes, and in the package's name."""
    with open(os.path.join(TESTS, "run"), encoding="utf-8") as file:
        packages = re.search(r'(?m)^packages="([^"]+)"', file.read()).group(1).split()
    with open(NUTSHIM, encoding="utf-8") as file:
        version = re.search(r'(?m)^VERSION = "(.*)"$', file.read()).group(1)
    told = re.search(r"installs what is missing:([^(]*)\(", README).group(1).replace(",", " ").split()
    assert sorted(told) == sorted(packages)
    assert re.search(r"\nChanges\n-+\n(\S+)\n", README).group(1) == version
    assert set(re.findall(r"nutshim_(.*?)_all\.deb", README)) == {version}


# ---- packaging's notes --------------------------------------------------------------------------


@pytest.mark.usefixtures("nut_installed")
def test_migration_s_blocks(machines, need):
    """MIGRATION's blocks for NUT's own TLS make an NSS database with CA and client certificate, and a hashed folder."""
    need("certutil", "pk12util")
    machine, = machines("upsbox")
    machine.works("cp nutshim.py mkNUTcert.py /usr/local/sbin\n"
                  "mkNUTcert.py -d /etc/nut -c upsbox-client.cert.pem >/dev/null\n"
                  "mkNUTcert.py ca >/dev/null\nmkNUTcert.py client backup.lan >/dev/null\n")
    for text in blocks(read("MIGRATION")):
        done = machine.paste(text, cwd="/etc/nut/nutshim")
        assert done.returncode == 0 and not re.search("(?i)error|fail|not found", done.stderr), done.stderr
    database = machine.works("certutil -L -d /etc/nut/nss; certutil -K -d /etc/nut/nss; stat -c '%a %G' /etc/nut/nss/*\n")
    assert re.search(r"(?m)^nutshim +C,,", database) and re.search(r"(?m)^backup\.lan +u,u,u", database)
    assert re.search(r"rsa|ec ", database) and "640 nut" in database
    found = machine.works("openssl x509 -hash -noout -in /etc/nut/upsbox-client.cert.pem; ls /etc/nut/trust\n").split()
    assert found[0] + ".0" in found[1:]
    machine.works("openssl verify -CApath /etc/nut/trust /etc/nut/upsbox.cert.pem\n")


def indented(text):
    """The groups of lines that a note indents by six or more, without those that belong into a file."""
    groups = re.findall(r"(?m)(?:^ {6,}\S.*\n)+", text)
    return [group for group in groups if not re.match(r" *(\[|[\w]+ = |\*/|/var/log/)", group)]


NOTED = "#!/bin/sh\necho \"${0##*/} $*\" >>/said\n"
SUDO = "#!/bin/sh\nexec \"$@\"\n"
DOCKER = NOTED + """[ "$1" = run ] || exit 0
while [ "$1" != nutshim ]; do [ "$1" != -v ] || from=${2%%:*}; shift; done
shift
mount --bind "$from" /etc/nut || exit
exec mkNUTcert.py "$@" >/dev/null
"""
LAUNCHCTL = NOTED + """[ "$1" != bootstrap ] || exec /opt/homebrew/bin/python3 /usr/local/sbin/nutshim.py -u _nutshim >/dev/null
"""
PROGRAMS = "cp nutshim.py mkNUTcert.py /usr/local/sbin\n"
PAIR = PROGRAMS + "mkNUTcert.py -d %s -s nas.cert.pem -c nas-client.cert.pem >/dev/null\n"
CONF = "printf '%%s\\n' '[nas]' 'role = server' 'listen = 127.0.0.1:4401' 'certificate = nas.cert.pem' >%s/nutshim.conf\n"

# The note: shell, stand-ins, folder to paste in, what its text says is there before, what must hold afterwards,
# and what the stand-ins must have noted.
NOTES = {
    "openwrt": (
        "busybox ash -s", {"opkg": NOTED, "uci": NOTED, TREE + "/scripts/feeds": NOTED, "make": NOTED}, TREE,
        "rm -f /usr/sbin/nutshim.py\necho src-git packages >feeds.conf.default\nmkdir -p /etc/nutshim /tmp\n"
        "sed -i 's/^cp.*/for to; do :; done; for each; do [ \"$each\" = \"$to\" ] || cp \"$each\" \"${to#*:}\"; done/' /usr/local/bin/scp\n",
        "[ \"$(stat -c %a /usr/sbin/nutshim.py /etc/init.d/nutshim | tr '\\n' ' ')\" = '755 755 ' ]\n[ -e /etc/enabled ]\n"
        "[ \"$(stat -c '%a %G' /etc/nut/upsbox.cert.pem /etc/nutshim/upsbox.cert.pem | uniq)\" = '640 nut' ]\n"
        "[ \"$(cut -d ' ' -f 1,2 feeds.conf | tr '\\n' ' ')\" = 'src-git packages src-link nutshim ' ]\n"
        "grep -q procd_set_param.command /record\n",
        ["opkg update", "opkg install python3-light python3-openssl openssl-util", "uci commit nutshim",
         "feeds update -a", "make package/openwrt/compile"]),
    "container": (
        "dash -s", {"docker": DOCKER, "podman": NOTED, "sudo": SUDO}, TREE, PROGRAMS + "cp -r packaging/container/server/etc .\n",
        "[ -s etc/upsbox.cert.pem ]\n[ -s etc/upsbox-client.cert.pem ]\n[ \"$(stat -c '%a %u' etc)\" = '750 3493' ]\n",
        ["docker build -t nutshim -f packaging/container/Containerfile .", "docker compose up -d", "docker compose exec nutshim nutshim.py -c reload"]),
    "synology": (
        "dash -s", {}, "/volume1/nutshim",
        "mkdir -p /volume1/nutshim; useradd -g users nutshim\n"
        "cp nutshim.py mkNUTcert.py packaging/synology/nutshim-boot /volume1/nutshim\n",
        "[ \"$(stat -c '%a %G' nas.cert.pem)\" = '640 users' ]\n"
        "python3 nutshim.py -c status -f nutshim.conf | grep -q 'server, listening'\n", []),
    "qnap": (
        "bash -s", {"crontab": NOTED, "/etc/init.d/crond.sh": NOTED}, "/share/nutshim",
        "mkdir -p /share/nutshim /opt/python3\ngroupadd guest; useradd -g guest guest\n"
        "echo 'PATH=$PATH:/opt/python3' >/etc/profile.d/python3.bash\n"
        "cp nutshim.py mkNUTcert.py packaging/synology/nutshim-boot /share/nutshim\n"
        + PAIR % "/share/nutshim" + CONF % "/share/nutshim" + "sed -i '1i user = guest' /share/nutshim/nutshim.conf\n",
        "[ \"$(stat -c '%a %G' nas.cert.pem)\" = '640 guest' ]\n./nutshim-boot -c reload\n"
        "mkdir /bare; ln -s \"$(command -v dirname)\" /bare; ln -s \"$(command -v python3)\" /opt/python3\n"
        "PATH=/bare ./nutshim-boot -c status | grep -q 'server, listening'\n",      # as from cron
        ["crontab /etc/config/crontab", "crond.sh restart"]),
    "unraid": (
        "dash -s", {}, "/boot/config/nutshim",
        "mkdir -p /boot/config/nutshim\n"
        "cp nutshim.py mkNUTcert.py packaging/synology/nutshim-boot /boot/config/nutshim\n",
        "[ \"$(stat -c '%a %G' /etc/nutshim/tower.cert.pem)\" = '640 nut' ]\nsh /etc/nutshim/nutshim-boot -c reload\n"
        "sh /etc/nutshim/nutshim-boot -c status | grep -q 'server, listening'\n", []),
    "launchd": (
        "dash -s", {"sudo": SUDO, "launchctl": LAUNCHCTL, "sysadminctl": "#!/bin/sh\nexec useradd \"${2}\"\n"}, TREE,
        "mkdir -p /Library/LaunchDaemons /opt/homebrew/bin /usr/local/etc/nut\nln -s \"$(command -v python3)\" /opt/homebrew/bin\n"
        + PAIR % "/usr/local/etc/nut" + CONF % "/usr/local/etc/nut" + "rm /usr/local/sbin/*.py\n",
        "[ -x /usr/local/sbin/nutshim.py ]\n[ -s /Library/LaunchDaemons/local.nutshim.plist ]\n"
        "[ \"$(stat -c '%a %U' /usr/local/etc/nut/nas.cert.pem)\" = '600 _nutshim' ]\n",
        ["launchctl bootstrap system /Library/LaunchDaemons/local.nutshim.plist", "launchctl bootout system/local.nutshim"]),
}


@pytest.mark.parametrize("note", sorted(NOTES))
def test_notes_can_be_pasted(note, machines, need):
    """The blocks of packaging/NOTE/README, pasted as printed into the shell of that system, do what it says."""
    shell, stand_ins, cwd, before, after, words = NOTES[note]
    need(shell.split()[0])
    machine, = machines("router")
    for name, text in stand_ins.items():
        path = os.path.join("/usr/local/bin", name)
        machine.works("mkdir -p %s\ncat >%s <<'END'\n%sEND\nchmod 755 %s\n" % (os.path.dirname(path), path, text, path))
    if note == "openwrt":
        machine.works("cat >/etc/rc.common <<'END'\n[ \"$2\" != enable ] || { touch /etc/enabled; exit; }\n"
                      "RECORD=/record UCI=/none\n%sEND\n" % RC_COMMON)
    machine.works(before)
    texts = indented(read(note, "README"))
    assert len(texts) > (1 if note != "unraid" else 0)
    for text in texts:
        done = machine.paste(text, *shell.split(), cwd=cwd)
        assert not re.search("(?i)syntax|not found|no such file|cannot|usage", done.stderr), text + done.stderr
    machine.works("set -e\n" + after, cwd=cwd)
    said = machine.file("/said").decode() if words else ""
    for line in words:
        assert re.search("(?m)^%s" % re.escape(line), said), said


# ---- the tests' own index -----------------------------------------------------------------------


def test_promises_are_an_index():
    """tests/run --promises has a line for each test of each file, with a sentence that tells it from all others."""
    done = run(os.path.join(TESTS, "run"), "--promises")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [re.match(r"(tests/test_\w+\.py)::(test_\w+): (\S.*\.)$", line).groups() for line in done.stdout.splitlines()]
    expected = set()
    for name in os.listdir(TESTS):
        if re.match(r"test_\w+\.py$", name):
            with open(os.path.join(TESTS, name), encoding="utf-8") as file:
                expected |= {("tests/" + name, test) for test in re.findall(r"(?m)^ *def (test_\w+)\(", file.read())}
    assert {line[:2] for line in lines} == expected and len(lines) == len(expected)
    assert len({line[2] for line in lines}) == len(lines)


def test_a_mistyped_test_file_is_named():
    """tests/run with a test file that does not exist says so and runs nothing."""
    for argument in ("tests/test_nosuch.py", "tests/test_nosuch.py::test_it"):
        done = run(os.path.join(TESTS, "run"), argument)
        assert (done.returncode, done.stdout, done.stderr) == (4, "", "tests/run: no such file: tests/test_nosuch.py\n")


# ---- nutshim.py's docstring ---------------------------------------------------------------------


def test_the_docstring_lists_the_sections():
    """The list of sections at the top of nutshim.py has them as they stand in the file, and the names it tells exist."""
    text = read(NUTSHIM)
    top, rest = text.split('"""', 2)[1:]
    listed = re.search(r'(?s)\nSections, .*?: (.*)', top).group(1)
    found = re.findall(r"(?m)^# --- (.*?)(?::.*)? -+$", rest)
    assert " ".join(listed.split()).split(" - ") == [each[0].lower() + each[1:] for each in found]
    for name in re.findall(r"\b[A-Z]\w+\.(\w+)|\b(_[A-Z]+)\b", top):
        assert re.search(r"\b%s\b" % "".join(name), rest), name
