# SPDX-License-Identifier: GPL-2.0-or-later
"""mkNUTcert.py is whole at every cut: killed at any step, out of room anywhere, stopped, two at once, on a stick
without hard links, after an old backup. Whatever happened, the CA's index, its copies, its revocation list and the files with keys
agree, and `openssl verify -crl_check_all` says of every certificate what is true.

NUTSHIM_EVERY_CUT=1 tests/run tests/test_ca_cuts.py
kills it at every system call on files, and not at those alone that change what another run would see, and fills disks page by page.
That takes some two minutes.
"""

import contextlib
import glob
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from harness import clean_env, poll, run, write
from test_mknutcert import (IS_ROOT, MKNUTCERT, Ca, Pair, blocks, content, field, forked, hook, mk, mode,
                            mounted, ossl, refused, tool, verify, wait)

LEFT = re.compile(r"\.mkNUTcert-[0-9a-f]{16}\.tmp")
PAGE = 4096
EVERY_CUT = bool(os.environ.get("NUTSHIM_EVERY_CUT"))
PAGES = 1 if EVERY_CUT else 6


# ---- what must agree ----------------------------------------------------------------------------

def read(path):
    with open(path, encoding="ascii") as file:
        return file.read()


class Records:
    """What a CA's folder says, read with openssl and without the tool."""

    def __init__(self, folder):
        self.folder = str(folder)
        lines = [line.split("\t") for line in read(self.folder + "/private/index.txt").splitlines()]
        assert all(len(line) == 6 and line[0] in "VR" and bool(line[2]) == (line[0] == "R") for line in lines), lines
        self.index = {line[3]: line[0] for line in lines}
        assert len(self.index) == len(lines), "a serial twice"
        self.copies = {name.split(".")[-2]: os.path.join(self.folder, "issued", name)
                       for name in os.listdir(self.folder + "/issued") if not name.startswith(".")}
        text = ossl("crl", "-in", self.folder + "/crl.pem", "-noout", "-text", "-CAfile", self.folder + "/ca.pem")
        self.listed = set(re.findall("Serial Number: ([0-9A-F]+)", text))
        self.number = int(re.search(r"X509v3 CRL Number: \n\s+(\d+)", text).group(1))

    def leftovers(self):
        return [name for _, folders, files in os.walk(self.folder) for name in folders + files if LEFT.fullmatch(name)]

    def agree(self, *outputs, killed=False):
        """killed: no run has followed yet that could put the list right and tidy up."""
        revoked = {serial for serial, state in self.index.items() if state == "R"}
        assert set(self.copies) <= set(self.index), "a copy that the index does not know"
        assert self.listed <= revoked if killed else self.listed == revoked
        assert killed or not self.leftovers()
        certs = {copy: serial for serial, copy in self.copies.items()}
        texts = {read(copy): serial for copy, serial in certs.items()}
        for path in outputs + tuple(glob.glob(self.folder + "/*.pem")):
            key, certificate = read(path).partition("-----BEGIN CERTIFICATE-----\n")[::2]
            if key.startswith("-----BEGIN PRIVATE KEY-----\n"):
                parts = ("-----BEGIN CERTIFICATE-----\n" + certificate).partition("-----END CERTIFICATE-----\n")
                assert parts[0] + parts[1] in texts, "%s has a certificate that the CA does not know" % path
                certs[path] = texts[parts[0] + parts[1]]
        done = run("openssl", "verify", "-crl_check_all", "-CAfile", self.folder + "/ca.pem", "-CRLfile",
                   self.folder + "/crl.pem", *certs)
        for path, serial in certs.items():
            assert ("%s: OK" % path in done.stdout) == (serial not in self.listed), done.stdout + done.stderr
        return self


@pytest.fixture(scope="module")
def issued(tmp_path_factory):
    """A CA with bad.lan, which is revoked, and c1.lan and c2.lan."""
    ca = Ca(tmp_path_factory.mktemp("issued") / "ca")
    for name in ("bad.lan", "c1.lan", "c2.lan"):
        ca.make("client", name)
    mk("revoke", ca.folder + "/bad.lan.client.pem", "-d", ca.folder)
    Records(ca.folder).agree()
    return ca.folder


def commands(folder, out):
    """{command: its arguments} for a CA in `folder`; files that they name go to `out`."""
    return {"server": ("server", "s.lan", "127.0.0.1", "-d", folder, "-o", out + "/s.pem"),
            "client": ("client", "c3.lan", "-d", folder, "-o", out + "/c3.pem", "--bundle", out + "/c3.tar"),
            "renew": ("renew", folder + "/c1.lan.client.pem", "-d", folder, "-y"),
            "revoke": ("revoke", folder + "/c2.lan.client.pem", "-d", folder)}


# ---- killed -------------------------------------------------------------------------------------

def killed_everywhere(args, prepare, check):
    """Kill a run while it writes, before each file takes its place and at its end, in turn, and check after each; how often.
    With EVERY_CUT, before every system call on files and every openssl."""
    for number in range(1, 300):
        prepare()

        def child(number=number):
            seen = []

            def step(name, _=None):
                seen.append(name)
                steps = len(seen) if EVERY_CUT else (seen.count("open") > 1) + seen.count("replace") + seen.count("link")
                if steps == number and (EVERY_CUT or name in ("open", "replace", "link")):
                    os.kill(os.getpid(), signal.SIGKILL)

            class Popen(subprocess.Popen):
                def __init__(self, *args, **options):
                    step("Popen")
                    super().__init__(*args, **options)
            tool.subprocess.Popen = Popen
            hook(step)
            code = tool.main([str(arg) for arg in args])
            step("replace")
            return code
        code = wait(forked(child))
        assert code in (0, 128 + signal.SIGKILL)
        check(code != 0)
        if code == 0:
            return number - 1
    raise AssertionError("no end")


@pytest.mark.seconds(300 if EVERY_CUT else 60)
def test_killed_while_it_makes_a_ca(tmp_path):
    """Killed at any moment, `ca` leaves either a whole CA or none, and run again makes one; nothing is left behind."""
    folder = str(tmp_path / "ca")

    def check(killed):
        if os.path.exists(folder + "/ca.pem"):
            Records(folder).agree(killed=killed)
        else:
            mk("ca", "-d", folder)
        mk("client", "x.lan", "-d", folder)
        Records(folder).agree()
    assert killed_everywhere(("ca", "-d", folder), lambda: shutil.rmtree(folder, ignore_errors=True), check) >= 7


@pytest.mark.seconds(300 if EVERY_CUT else 60)
@pytest.mark.parametrize("command", ["server", "client", "renew", "revoke"])
def test_killed_in_a_ca(tmp_path, issued, command):
    """Killed at any moment, a run leaves index, copies, list and key files that agree, a file of before as it was or whole and new;
    the same command run again ends as it would have, and what was left behind is gone."""
    folder, out = str(tmp_path / "ca"), str(tmp_path / "out")
    args = commands(folder, out)[command]

    def prepare():
        for path in (folder, out):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(issued, folder)
        os.mkdir(out)

    def check(killed):
        outputs = glob.glob(out + "/*.pem")
        now = Records(folder).agree(*outputs, killed=killed)
        assert len(now.index) in (3, 4)
        left = now.leftovers() + [name for name in os.listdir(out) if name.startswith(".")]
        assert killed or not left
        for name in left:
            assert LEFT.fullmatch(name)
        if command == "revoke":  # another one tidies up and completes the list just as well
            mk("client", "z.lan", "-d", folder)
            Records(folder).agree()
        mk(*args, *(() if command == "revoke" else ("-y",)))
        assert not [name for name in os.listdir(out) if name.startswith(".")]
        now = Records(folder).agree(*glob.glob(out + "/*.pem"))
        if command == "revoke":
            assert len(now.listed) == 2 and len(now.index) == 4
    assert killed_everywhere(args, prepare, check) >= 5


def test_killed_while_it_replaces_a_pair(tmp_path):
    """Killed at any moment, a run leaves each file as it was or whole and new; what else it leaves is private and goes with the next run."""
    pair = Pair(tmp_path / "pair")
    old = content(pair.folder)
    states = set()

    def prepare():
        for name, (data, _) in old.items():
            with open(os.path.join(pair.folder, name), "wb") as file:
                file.write(data)

    def check(killed):
        now = content(pair.folder)
        assert blocks(pair.server) == ["PRIVATE KEY", "CERTIFICATE", "CERTIFICATE"] and blocks(pair.client) == ["CERTIFICATE"]
        assert [now[name][1] for name in sorted(old)] == [old[name][1] for name in sorted(old)]
        states.add(tuple(now[name] == old[name] for name in ("server.pem", "clients.pem")))
        for name in set(os.listdir(pair.folder)) - set(old):
            assert killed and LEFT.fullmatch(name) and mode(os.path.join(pair.folder, name)) == 0o700
    assert killed_everywhere(pair.args + ("-y",), prepare, check) >= 4
    assert {(True, True), (False, False)} <= states and sorted(os.listdir(pair.folder)) == sorted(old)


def test_what_others_left_stays(tmp_path, issued):
    """What goes are leftovers by name alone: those of version 1.0 in the CA's folders too; other hidden files stay, and so does
    what a run that lives has there."""
    folder = str(tmp_path / "ca")
    shutil.copytree(issued, folder)
    old = ["/private/.0123456789abcdef.tmp", "/issued/.0123456789abcdef.tmp", "/private/.mkNUTcert-0123456789abcdef.tmp"]
    kept = ["/private/.index.swp", "/.0123456789abcdeg.tmp", "/private/mkNUTcert-0123456789abcdef.tmp"]
    for name in old + kept:
        write(folder + name, "-----BEGIN PRIVATE KEY-----\n")
    out = str(tmp_path)
    write(out + "/.0123456789abcdef.tmp", "not ours")
    with tool.scratch(folder) as busy:
        mk("server", "a.lan", "-d", folder, "-o", out + "/a.pem")
        assert [os.path.exists(folder + name) for name in old + kept] == [False] * 3 + [True] * 3
        assert os.path.exists(out + "/.0123456789abcdef.tmp") and os.path.isdir(busy)
    assert not os.path.exists(busy)


SLEEPING = """#!/bin/sh
echo $$ > {pid}
exec sleep 60
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_stopped_by_a_signal(tmp_path, issued, number):
    """TERM, HUP and INT end openssl too, and nothing is left behind or changed. (The openssl is a stand-in that takes its time.)"""
    folder, pid = str(tmp_path / "ca"), str(tmp_path / "pid")
    shutil.copytree(issued, folder)
    before = content(folder)
    (tmp_path / "bin").mkdir()
    write(str(tmp_path / "bin/openssl"), SLEEPING.format(pid=pid), 0o755)
    with subprocess.Popen([sys.executable, MKNUTCERT, "server", "a.lan", "-d", folder], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=clean_env(PATH=str(tmp_path / "bin") + ":" + os.environ["PATH"])) as process:
        try:
            poll(lambda: os.path.exists(pid) and read(pid).strip(), 20, "openssl's start")
            process.send_signal(number)
            assert process.wait(20) == 1 and process.stdout.read() == b"mkNUTcert.py: stopped\n"
        finally:
            process.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int(read(pid)), 0)
    assert content(folder) == before and not Records(folder).leftovers()


# ---- out of room --------------------------------------------------------------------------------

def leave(folder, pages):
    """Fill a tmpfs up to so many pages."""
    room = os.statvfs(folder)
    write(folder + "/ballast", "x" * (room.f_bavail * room.f_frsize - pages * PAGE))


@pytest.mark.seconds(300 if EVERY_CUT else 60)
@pytest.mark.parametrize("command", ["server", "client", "renew", "revoke"])
def test_the_cas_disk_is_full(tmp_path, issued, command):
    """With ever more room on the CA's disk a run fails, says so and has changed nothing, until it does all that it says."""
    out = str(tmp_path / "out")
    os.mkdir(out)
    for pages in range(2, 60, PAGES):
        with mounted(str(tmp_path / "small"), "400k") as small:
            folder = small + "/ca"
            shutil.copytree(issued, folder)
            leave(small, pages)
            before = content(folder)
            text = mk_either(*commands(folder, out)[command])
            if text is None:
                Records(folder).agree(*glob.glob(out + "/*.pem"))
                assert pages > 2
                return
            assert "make room: nothing was changed" in text and content(folder) == before and os.listdir(out) == []
            Records(folder).agree()
    raise AssertionError("never enough")


def mk_either(*args, **options):
    """None if a run says that all went well, else its fault."""
    try:
        mk(*args, **options)
    except AssertionError as fault:
        assert "exit code 1, expected 0" in str(fault), fault
        return str(fault)
    return None


def test_the_disk_is_full_while_a_ca_is_made(tmp_path):
    """With ever more room `ca` fails and says so, until it makes a CA that is whole."""
    for pages in range(0, 60, PAGES):
        with mounted(str(tmp_path / "small"), "400k") as small:
            leave(small, pages)
            text = mk_either("ca", "-d", small + "/ca")
            if text is None:
                assert pages
                mk("show", small + "/ca/ca.pem", small + "/ca/crl.pem")
                Records(small + "/ca").agree()
                return
            assert "make room" in text and not os.path.exists(small + "/ca/ca.pem")
    raise AssertionError("never enough")


@pytest.mark.parametrize("pages", [0, 2, 8])
def test_tmp_is_full(tmp_path, issued, pages):
    """A full /tmp is no matter: each command and the default action do what they say beside their own files."""
    folder, out = str(tmp_path / "ca"), str(tmp_path / "out")
    shutil.copytree(issued, folder)
    os.mkdir(out)
    with mounted(str(tmp_path / "tmp"), "64k") as small:
        leave(small, pages)
        for args in commands(folder, out).values():
            mk(*args, TMPDIR=small)
        pair = Pair(out + "/pair", TMPDIR=small)
        assert os.listdir(small) == ["ballast"]
    now = Records(folder).agree(*glob.glob(out + "/*.pem"))
    assert len(now.index) == 6 and len(now.listed) == 2
    verify(pair.client, pair.server)
    assert sorted(os.listdir(pair.folder)) == ["clients.pem", "server.pem"]


@pytest.mark.parametrize("command", ["server", "client", "renew", "pair"])
def test_the_outputs_disk_is_full(tmp_path, issued, command):
    """Where there is no room for the file with the key, nothing is recorded as issued, and the fault names the place."""
    folder = str(tmp_path / "ca")
    shutil.copytree(issued, folder)
    before = content(folder)
    for pages in range(0, 6):
        with mounted(str(tmp_path / "small"), "64k") as small:
            leave(small, pages)
            args = {"pair": ("-d", small), "renew": ("renew", folder + "/c1.lan.client.pem", "-d", folder, "-o", small + "/r.pem")}
            text = mk_either(*dict(commands(folder, small), **args)[command])
            if text is None:
                assert pages
                Records(folder).agree(*[path for path in glob.glob(small + "/*.pem") if command != "pair"])
                return
            assert small in text and "make room: nothing was changed" in text
            assert os.listdir(small) == ["ballast"] and content(folder) == before
    raise AssertionError("never enough")


def test_a_file_name_that_the_file_system_does_not_take(tmp_path, issued):
    """Where the file with the key cannot have its name, nothing is recorded as issued, and nothing is made."""
    folder, long = str(tmp_path / "ca"), str(tmp_path / ("n" * 256))
    shutil.copytree(issued, folder)
    before = content(folder)
    for args in (("server", "s.lan", "-d", folder, "-o", long), ("client", "c3.lan", "-d", folder, "--bundle", long),
                 ("renew", folder + "/c1.lan.client.pem", "-d", folder, "-o", long), ("-d", folder, "-s", "s.pem", "-c", long)):
        text = mk_either(*args)
        assert long + ": File name too long" in text and "written before" not in text, text
        assert content(folder) == before and os.listdir(str(tmp_path)) == ["ca"], args


# ---- no hard links, and others at the same time -------------------------------------------------

@contextlib.contextmanager
def stick(folder):
    """A memory stick: exFAT, which knows neither hard links nor owners nor modes. A visible skip where there is none."""
    need = all(map(shutil.which, ("mkfs.exfat", "mount.exfat-fuse", "losetup")))
    if not IS_ROOT or not need:
        pytest.skip("needs root, exfatprogs and exfat-fuse")
    image, place = write(folder + "/image", ""), folder + "/stick"
    os.truncate(image, 4 << 20)
    os.mkdir(place)
    done = run("mkfs.exfat", image), run("losetup", "-f", "--show", image)
    if any(each.returncode for each in done):
        pytest.skip("no loop device here")
    device = done[1].stdout.strip()
    try:
        if run("mount.exfat-fuse", device, place).returncode:
            pytest.skip("no FUSE here")
        try:
            yield place
        finally:
            run("umount", place)
    finally:
        run("losetup", "-d", device)


def test_a_stick(tmp_path, issued):
    """On an exFAT stick pair, client and bundle are made and recorded, an existing file stays without -y, and that everybody can
    read the key is said."""
    folder = str(tmp_path / "ca")
    shutil.copytree(issued, folder)
    with stick(str(tmp_path)) as place:
        text = mk("client", "x.lan", "-d", folder, "--bundle", place + "/x.tar", "-o", place + "/x.pem")
        assert "everybody on this box can read the key" in text
        Records(folder).agree(place + "/x.pem")
        pair = Pair(place + "/pair")
        verify(pair.client, pair.server)
        before = content(place)
        for args in (pair.args, ("client", "y.lan", "-d", folder, "-o", place + "/x.pem")):
            assert "-y" in refused(*args)
        assert "another folder" in refused("ca", "-d", place + "/ca")
        assert content(place) == before and len(Records(folder).agree().index) == 4
        mk(*pair.args, "-y")
        verify(pair.client, pair.server)
        assert sorted(os.listdir(pair.folder)) == ["clients.pem", "server.pem"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("when", ["link", "open"])
def test_never_overwrites_what_came_meanwhile(tmp_path, issued, links, when):
    """A file that comes into being in the last moment is left as it is, with hard links and without them. (That there are none is a
    stand-in: os.link() fails as on FAT.)"""
    folder, out = str(tmp_path / "ca"), str(tmp_path / "out")
    shutil.copytree(issued, folder)
    os.mkdir(out)
    outputs = ("-s", out + "/s.pem", "-c", out + "/c.pem"), ("server", "a.lan", "-d", folder, "-o", out + "/s.pem")

    def child(args):
        def call(name, called):
            late = name == "link" if when == "link" else name == "open" and called[0] == out + "/s.pem"
            if late and not os.path.exists(out + "/s.pem"):
                os.mknod(out + "/s.pem")
        if not links:
            def no_link(*_):
                raise PermissionError(1, "Operation not permitted")
            os.link = no_link
        hook(call)
        return tool.main(list(args))
    for args in outputs:
        text = str(tmp_path / "text")
        code = wait(forked(lambda args=args: child(args), text))
        with open(text, encoding="utf-8") as file:
            said = file.read()
        if when == "open" and links:  # with links no place is held, so the moment never comes
            assert code == 0
            shutil.rmtree(out)
            os.mkdir(out)
            continue
        assert code == 1 and "came into being meanwhile" in said and "Traceback" not in said
        assert "as root" not in said and os.listdir(out) == ["s.pem"] and os.path.getsize(out + "/s.pem") == 0
        assert ("written before it: %s/private/index.txt" % folder in said) == (args[0] == "server")
        os.unlink(out + "/s.pem")
    Records(folder).agree()


def test_two_at_once(tmp_path, issued):
    """Runs at once in one CA, with revocations among them: all succeed, and all that was made and revoked is in index and list."""
    folder = str(tmp_path / "ca")
    shutil.copytree(issued, folder)
    jobs = [("client", "h%d.lan" % i) for i in range(4)] + [("revoke", folder + "/c%d.lan.client.pem" % i) for i in (1, 2)]
    pids = [forked(lambda job=job: tool.main([*job, "-d", folder])) for job in jobs]
    assert list(map(wait, pids)) == [0] * 6
    now = Records(folder).agree()
    assert len(now.index) == len(now.copies) == 7 and len(now.listed) == 3


# ---- an outside tool is not believed ------------------------------------------------------------

LYING = """#!/bin/sh
case "$*" in
*-gencrl*) : > index.txt ;;
*" ca "* | "ca "*) {0} "$@" > out && cat {1} && exit 0 ;;
esac
exec {0} "$@"
"""


def test_what_openssl_makes_is_looked_at(tmp_path, issued):
    """An openssl that says all went well, but lost the index or made another certificate: a fault, and nothing is stored. (A stand-in
    that does what a full disk can make of it.)"""
    folder = str(tmp_path / "ca")
    shutil.copytree(issued, folder)
    (tmp_path / "bin").mkdir()
    other = glob.glob(folder + "/issued/c1.lan*")[0]
    write(str(tmp_path / "bin/openssl"), LYING.format(shutil.which("openssl"), other), 0o755)
    before = content(folder)
    assert "not the index's" in refused("revoke", folder + "/c1.lan.client.pem", "-d", folder, path=str(tmp_path / "bin"))
    assert "another certificate" in refused("server", "a.lan", "-d", folder, path=str(tmp_path / "bin"))
    assert content(folder) == before


# ---- records that are not as they were left -----------------------------------------------------

@pytest.mark.parametrize("name, data, said", [
    ("crlnumber", "", "expected the last revocation list's number"), ("crlnumber", "x1\n", "expected the last"),
    ("crlnumber", None, "No such file"), ("index.txt", None, "No such file"), ("index.txt", "V\t9912", "index.txt:1: is damaged"),
    ("ca-key.pem", "", "no whole PEM file")])
def test_damaged_records(tmp_path, issued, name, data, said):
    """A record that is empty, cut or gone is a clear fault, which names the file and what was expected, and changes nothing."""
    folder = str(tmp_path / "ca")
    shutil.copytree(issued, folder)
    path = folder + "/private/" + name
    os.unlink(path)
    if data is not None:
        write(path, data, 0o600)
    before = content(folder)
    text = refused("revoke", folder + "/c1.lan.client.pem", "-d", folder)
    assert said in text and path in text and content(folder) == before


def test_an_index_that_was_cut(tmp_path, issued):
    """An index whose last line is cut is damaged; one that lost whole lines is put right from the list, and the rest is named."""
    folder = str(tmp_path / "ca")
    shutil.copytree(issued, folder)
    path = folder + "/private/index.txt"
    lines = read(path).splitlines(True)
    write(path, "".join(lines)[:-5], 0o600)
    assert "index.txt:3: is damaged" in refused("server", "a.lan", "-d", folder)
    write(path, lines[1], 0o600)
    text = mk("client", "a.lan", "-d", folder)
    assert "did not know of 1 that crl.pem revokes" in text
    assert re.search(r"does not know c2\.lan\.client\.[0-9A-F]+\.pem in ", text), text
    now = Records(folder)
    assert len(now.listed) == 1 and sorted(now.index.values()) == ["R", "V", "V"]
    mk("revoke", folder + "/c2.lan.client.pem", "-d", folder)
    now = Records(folder).agree()
    assert len(now.index) == 4 and len(now.listed) == 2
    assert "does not know" not in mk("client", "b.lan", "-d", folder)


def test_an_old_backup(tmp_path, issued):
    """After private/ was restored from an older backup the list forgets nothing, and what the index cannot know is named."""
    folder = str(tmp_path / "ca")
    shutil.copytree(issued, folder)
    mk("revoke", folder + "/c1.lan.client.pem", "-d", folder)
    mk("client", "new.lan", "-d", folder)
    mk("client", "young.lan", "-d", folder)
    mk("revoke", folder + "/young.lan.client.pem", "-d", folder)
    number = Records(folder).number
    for name in os.listdir(issued + "/private"):
        shutil.copy2(issued + "/private/" + name, folder + "/private/" + name)
    text = mk("revoke", folder + "/c2.lan.client.pem", "-d", folder)
    assert "new.lan" in text and "did not know of 2" in text and "young" not in text
    now = Records(folder)
    assert len(now.listed) == 4 and now.number >= number
    for name, good in (("bad", False), ("c1", False), ("c2", False), ("young", False), ("new", True)):
        verify(folder + "/ca.pem", "%s/%s.lan.client.pem" % (folder, name), "-crl_check_all", "-CRLfile", folder + "/crl.pem", ok=good)


def test_an_old_backup_of_all(tmp_path, issued):
    """After the whole folder was restored, the latest list, copied back from another box, is enough to forget no revocation."""
    folder = str(tmp_path / "ca")
    shutil.copytree(issued, folder)
    young = mk("client", "young.lan", "-d", folder, "-o", tmp_path / "young.pem") and str(tmp_path / "young.pem")
    for path in (young, folder + "/c1.lan.client.pem"):
        mk("revoke", path, "-d", folder)
    shutil.copy(folder + "/crl.pem", tmp_path / "latest.pem")
    shutil.rmtree(folder)
    shutil.copytree(issued, folder)
    shutil.copy(tmp_path / "latest.pem", folder + "/crl.pem")
    assert "did not know of 2" in mk("client", "a.lan", "-d", folder)
    mk("revoke", folder + "/a.lan.client.pem", "-d", folder)
    assert len(Records(folder).agree().listed) == 4
    for path in (young, folder + "/c1.lan.client.pem"):
        verify(folder + "/ca.pem", path, "-crl_check_all", "-CRLfile", folder + "/crl.pem", ok=False)


def test_a_list_that_is_gone(tmp_path, issued):
    """A revocation list that is gone is made again from the index, one that cannot be read is a fault with its cure."""
    folder = str(tmp_path / "ca")
    shutil.copytree(issued, folder)
    write(folder + "/crl.pem", "-----BEGIN X509 CRL-----\nMIIB\n-----END X509 CRL-----\n")
    text = refused("server", "a.lan", "-d", folder)
    assert "crl.pem: cannot be used (a revocation list that cannot be read" in text and "remove it" in text
    os.unlink(folder + "/crl.pem")
    assert "crl.pem: made again" in mk("server", "a.lan", "-d", folder)
    assert len(Records(folder).agree().listed) == 1


def test_a_ca_key_that_others_can_read(tmp_path, issued):
    """A CA's key that others can read is not used, and the fault has the cure."""
    folder = str(tmp_path / "ca")
    shutil.copytree(issued, folder)
    for bits in (0o640, 0o604):
        os.chmod(folder + "/private/ca-key.pem", bits)
        before = content(folder)
        for args in (("server", "a.lan"), ("revoke", folder + "/c1.lan.client.pem")):
            text = refused(*args, "-d", folder)
            assert "chmod 600 %s/private/ca-key.pem" % folder in text and content(folder) == before
    os.chmod(folder + "/private/ca-key.pem", 0o600)
    mk("server", "a.lan", "-d", folder)


# ---- from 2050 on -------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["the tool's clock", "faketime"])
def test_after_2049(tmp_path, issued, how):
    """From 2050 on, or where the clock says so, certificates are revoked and issued as before."""
    folder = str(tmp_path / "ca")
    shutil.copytree(issued, folder)
    jobs = (("revoke", folder + "/c1.lan.client.pem"), ("server", "a.lan"), ("renew", folder + "/a.lan.server.pem", "-y"),
            ("revoke", folder + "/a.lan.server.pem"))
    if how == "faketime":
        if not shutil.which("faketime"):
            pytest.skip("faketime is not installed")
        for job in jobs:
            done = run("faketime", "2051-03-04 05:06:07", sys.executable, MKNUTCERT, *job, "-d", folder)
            assert done.returncode == 0, done.stderr
    else:
        def child():
            tool.time.time = lambda: 2561512000.25
            return max(tool.main([*job, "-d", folder]) for job in jobs)
        assert wait(forked(child)) == 0
    assert sorted(Records(folder).index.values()) == ["R", "R", "R", "V", "V"]
    assert len(Records(folder).listed) == 3
    assert field(folder + "/a.lan.server.pem", "-startdate").split()[3] == "2051"


def test_check_tells_what_is_dated_in_the_future(tmp_path, issued):
    """check names a revocation list and a certificate that begin in the future, and when; and its cure for a CA that has
    expired is one that works."""
    if ossl("version").startswith("OpenSSL 1."):
        pytest.skip("this openssl cannot date a revocation list")
    folder, late = str(tmp_path / "ca"), str(tmp_path / "late.pem")
    shutil.copytree(issued, folder)
    config = write(str(tmp_path / "ca.cnf"), "[ca]\ndefault_ca=x\n[x]\ndatabase=%s/private/index.txt\ndefault_md=sha256\n" % folder)
    ossl("ca", "-config", config, "-gencrl", "-keyfile", folder + "/private/ca-key.pem", "-cert", folder + "/ca.pem", "-out", late,
         "-crl_lastupdate", "20510304050607Z", "-crl_nextupdate", "99991231235959Z")
    mk("check", "-d", folder, folder + "/crl.pem")
    text = mk("check", "-d", folder, late, expect=1)
    assert "not valid before 2051-03-04 05:06:07 UTC" in text and "clock" in text
    mk("client", "x.lan", "-d", folder, "--notBefore", "864000", "-o", tmp_path / "x.pem")
    assert "not valid before" in mk("check", "-d", folder, tmp_path / "x.pem", expect=1)
    old = Ca(tmp_path / "old", "--notBefore", "-100", "--notAfter", "-50")
    text = mk("check", "-d", old.folder, old.cert, expect=1)
    assert "expired on" in text and "mkNUTcert.py ca -d DIR" in text and "renew" not in text


# ---- what is asked for ---------------------------------------------------------------------------

@pytest.mark.parametrize("host", ["localhost.localdomain", "", "my box"])
def test_a_host_without_a_name(tmp_path, issued, monkeypatch, host):
    """Where the host's name is localhost, none or no host name, the names are asked for, and nothing is made in silence for a name by
    which no client reaches it. (The host's name is a stand-in.)"""
    folder = str(tmp_path / "ca")
    shutil.copytree(issued, folder)
    monkeypatch.setattr(tool.socket, "gethostname", lambda: host)
    before = content(folder)
    text = refused("-d", tmp_path)
    assert ascii(host) in text and '-SAN "NAME' in text
    assert "mkNUTcert.py server NAME" in refused("server", "-d", folder)
    assert content(folder) == before and os.listdir(tmp_path) == ["ca"]
    text = mk("-d", tmp_path, "-SAN", "localhost ups.lan")
    assert text.count("upstream = ups.lan") == 2 and sorted(os.listdir(tmp_path)) == [
        "ca", "localhost-client.cert.pem", "localhost.cert.pem"]
    mk("ca", "-d", tmp_path / "new")


def test_renew_puts_no_key_among_the_copies(tmp_path, issued):
    """A file without a key, such as a copy in issued/, never gets one: renew --new-key wants -o there, with -y too."""
    folder = str(tmp_path / "ca")
    shutil.copytree(issued, folder)
    before = content(folder)
    copy = glob.glob(folder + "/issued/c1.lan*")[0]
    for more in ((), ("-y",)):
        assert "-o FILE" in refused("renew", copy, "--new-key", "-d", folder, *more) and content(folder) == before
    mk("renew", copy, "--new-key", "-d", folder, "-o", tmp_path / "c1.pem")
    Records(folder).agree(str(tmp_path / "c1.pem"))
