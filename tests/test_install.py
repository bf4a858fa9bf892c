# SPDX-License-Identifier: GPL-2.0-or-later
"""packaging/install: what it puts where, that it may be cut and run again at any point, and what it refuses.

Most tests give it a folder of its own (DESTDIR), where it starts nothing. Whole machines, with a service
that starts, stops and fails, are tests/install-on-debian's, of which a short form is run here.
"""

import glob
import os
import re
import shutil
import sys
import threading

import pytest

from conftest import missing
from harness import IS_ROOT, ROOT, clean_env, folder, run, run_shim, write
from test_packaging import parsed, path_of

sys.path.insert(0, ROOT)
# pylint: disable=wrong-import-position
import nutshim  # noqa: E402

HOST = os.uname().nodename.lower()
PIN = "sha256//" + "A" * 43 + "="
OTHER_PIN = "sha256//" + "B" * 43 + "="
SERVER_FILE, CLIENTS_FILE = "etc/nut/%s.cert.pem" % HOST, "etc/nut/%s-client.cert.pem" % HOST


def tree(folder):
    """Every path under a folder with its mode, time and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns if path.is_file() else 0,
                                                path.read_bytes() if path.is_file() else b"")
    return found


def files(folder):
    """The names of all files under a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def install(destination, *words, **options):
    """Run packaging/install with DESTDIR; it asks for a user that NUT runs as."""
    if not any(run("id", user).returncode == 0 for user in ("nut", "upsd", "ups", "nutmon")):
        missing("NUT, or its user nut")
    options.setdefault("env", clean_env(DESTDIR=str(destination)))
    return run("sh", path_of("install"), *words, **options)


def installed(destination, *words, **options):
    """The same, and it must work."""
    done = install(destination, *words, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def refused(destination, *words):
    """The same, and it must say why not, in one go, and change nothing; what it says."""
    before = tree(destination)
    done = install(destination, *words)
    assert done.returncode == 1 and tree(destination) == before, done.stdout + done.stderr
    return done.stderr


def conf_of(destination):
    """nutshim.conf as {section: {option: value}}."""
    return parsed((destination / "etc/nut/nutshim.conf").read_text())


# ---- What it puts where -------------------------------------------------------------------------

SERVICE_FILES = {
    "systemd": ["etc/systemd/system/nutshim.service"], "openrc": ["etc/init.d/nutshim"], "sysv": ["etc/init.d/nutshim"],
    "procd": ["etc/init.d/nutshim"], "rc.d": ["usr/local/etc/rc.d/nutshim"], "none": []}


def test_install_server_twice_then_remove(need, tmp_path):
    """install server puts everything in place, run again it touches nothing, and remove leaves nothing behind."""
    need("openssl")
    words = ("--init", "systemd", "--names", "ups.example 192.0.2.7", "--upsd", "localhost:13493", "server")
    installed(tmp_path, *words)
    first = tree(tmp_path)
    modes = {name: first[name][0] & 0o777 for name in first}
    assert modes["usr/local/sbin/nutshim.py"] == modes["usr/local/sbin/mkNUTcert.py"] == 0o755
    assert modes["etc/nut/nutshim.conf"] == modes[SERVER_FILE] == 0o640
    assert modes[CLIENTS_FILE] == 0o644
    assert conf_of(tmp_path)["upsd"] == {"role": "server", "certificate": "/" + SERVER_FILE, "upstream": "localhost:13493"}
    names = run("openssl", "x509", "-noout", "-text", "-in", str(tmp_path / SERVER_FILE)).stdout
    assert "DNS:ups.example" in names and "IP Address:192.0.2.7" in names

    for again in words, ("--init", "systemd", "server"), ("--init", "systemd", "upgrade"):
        installed(tmp_path, *again)
        assert tree(tmp_path) == first, again
    installed(tmp_path, "--init", "systemd", "remove")
    assert not list(tmp_path.rglob("*"))
    assert "nothing to remove" in installed(tmp_path, "remove").stdout


@pytest.mark.parametrize("init", sorted(SERVICE_FILES))
def test_install_puts_the_service_where_init_looks(init, tmp_path):
    """Each init system gets its own files, with the paths of this machine in them, and remove takes them."""
    installed(tmp_path, "--init", init, "--pin", PIN, "client", "upsbox")
    assert {name for name in files(tmp_path) if not re.match("usr/local/(sbin|share)|etc/nut/", name)} == set(SERVICE_FILES[init])
    for name in SERVICE_FILES[init]:
        text = (tmp_path / name).read_text()
        if init != "procd":
            assert not re.search(r"(?<!/local)/usr/sbin/|(?<!/local)/usr/local/usr", text) and "/usr/local/sbin/nutshim.py" in text
    assert "pidfile" not in conf_of(tmp_path)[""], "every service takes every configuration as it is"
    assert "in upsmon.conf put the UPS box in the place of localhost" in installed(tmp_path, "--init", init, "remove").stdout
    assert not list(tmp_path.rglob("*"))


def test_usage_has_the_name_that_it_was_called_by(tmp_path):
    """As nutshim-setup, its name in the Debian package, it says so in its usage."""
    name = shutil.copy(path_of("install"), tmp_path / "nutshim-setup")
    assert run("sh", name, "--help").stdout.startswith("usage: nutshim-setup [OPTION...] server ")


def test_install_takes_nut_s_folder(tmp_path, pki):
    """An existing /etc/ups is used, the unit follows it, and it stays where remove takes the rest."""
    (tmp_path / "etc/ups").mkdir(parents=True)
    (tmp_path / "etc/ups/upsd.conf").write_text("")
    before = tree(tmp_path)
    installed(tmp_path, "--init", "systemd", "--trust", pki.ca.cert, "client", "upsbox")
    unit = (tmp_path / "etc/systemd/system/nutshim.service").read_text()
    assert "-F -f /etc/ups/nutshim.conf\n" in unit and "/etc/nut" not in unit
    installed(tmp_path, "--init", "systemd", "remove")
    assert tree(tmp_path) == before


def test_install_dry_run_tells_what_is_done(need, tmp_path):
    """--dry-run names every file that is then written, the command that makes the certificates, and does nothing."""
    need("openssl")
    for words in ("server",), ("--pin", PIN, "client", "upsbox"), ("remove",):
        before = tree(tmp_path)
        said = installed(tmp_path, "--dry-run", "--init", "systemd", *words).stdout
        assert tree(tmp_path) == before and not re.search(r"(?m)^nutshim: (made|wrote|removed)", said), said
        would = set(re.findall(r"would write (\S+)", said)) | set(re.findall(r"would run: rm -f %s(\S+)" % tmp_path, said))
        if words == ("server",):
            made = re.search(r'would run: \S*mkNUTcert.py -SAN "([^"]*)" -s (\S+) -c (\S+)\n', said)
            assert HOST in made.group(1).split()
            would |= set(made.groups()[1:])
            assert "would run: systemctl enable nutshim.service" in said and "  scp root@" in said
        installed(tmp_path, "--init", "systemd", *words)
        after = tree(tmp_path)
        changed = {"/" + name for name in (files(tmp_path) if words != ("remove",) else before)
                   if after.get(name) != before.get(name) and not (before.get(name, after.get(name))[0] & 0o40000)}
        assert would == changed - {"/etc/nut/nutshim.installed"}, words
    said = run("sh", path_of("install"), "--dry-run", "--init", "systemd", "client", "upsbox", "--pin", PIN)
    assert "would run: systemctl start nutshim.service" in said.stdout, said.stdout + said.stderr
    assert not os.path.exists("/etc/systemd/system/nutshim.service")


# ---- What it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    (), ("client",), ("server", "extra"), ("--nonsense", "server"), ("client", "a", "b"), ("--init", "nonsense", "server"),
    ("--upsd",), ("--upsd", "", "server"), ("--names", "a", "client", "b"), ("--pin", PIN, "server"), ("--replace", "server"),
    ("--pin", PIN, "--trust", "file", "client", "upsbox")])
def test_install_refuses_wrong_usage(words, tmp_path):
    """A wrong use shows the usage, exits 2 and does nothing."""
    done = install(tmp_path, *words)
    assert done.returncode == 2 and "usage:" in done.stderr
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("words, expected", [
    (("client", "ups@upsbox"), "expected the UPS box alone, upsbox"),
    (("--pin", PIN, "client", "ups box"), "expected a host name"),
    (("--pin", PIN, "client", "upsbox:0"), "expected a host name"),
    (("--pin", PIN, "client", "upsbox:65536"), "expected a host name"),
    (("--pin", PIN, "client", "upsbox:x"), "expected a host name"),
    (("--pin", PIN, "client", "[::1"), "expected a host name"),
    (("--pin", PIN + "," + PIN[:-1], "client", "upsbox"), "expected sha256//"),
    (("--upsd", "local host", "server"), "expected HOST"),
    (("--names", "a;b", "server"), "names: 'a;b': no host name"), (("--names", "ups.lan -x a..b", "server"), "'-x': no host name"),
    (("--names", "192.0.2.300", "server"), "no valid IPv4"),
    (("--trust", "/nowhere.pem", "client", "upsbox"), "No such file"),
])
def test_install_checks_its_arguments_first(words, expected, tmp_path):
    """A mistyped argument is named before anything is written."""
    assert expected in refused(tmp_path, *words)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("given, upstream, section", [
    ("::1", "[::1]", "1"), ("[fe80::1%eth0]:402", "[fe80::1%eth0]:402", "fe80--1-eth0"), ("upsd", "upsd", "upsd"),
    ("192.0.2.1:402", "192.0.2.1:402", "192.0.2.1")])
def test_install_takes_every_form_of_a_box(given, upstream, section, tmp_path):
    """A name, an address of either family, with and without a port: nutshim accepts what is made of it."""
    installed(tmp_path, "--pin", PIN, "client", given)
    assert conf_of(tmp_path)[section]["upstream"] == upstream
    assert run_shim("-t", "-f", str(tmp_path / "etc/nut/nutshim.conf")).returncode == 0


def test_install_takes_no_secret_for_trust(tmp_path, pki):
    """A file with a private key, or with anything but certificates, is refused as --trust and when it lies in the folder."""
    secret = refused(tmp_path, "--trust", pki.server.file, "client", "upsbox")
    assert "private key" in secret and "HOST-client.cert.pem" in secret
    text = open(pki.ca.cert, encoding="ascii").read()
    for content in "", "words\n", text + open(pki.crl, encoding="ascii").read(), text.replace("M", "?", 3):
        assert "certificate" in refused(tmp_path, "--trust", write(str(tmp_path.parent / "f.pem"), content), "client", "upsbox")
    (tmp_path / "etc/nut").mkdir(parents=True)
    shutil.copy(pki.server.file, str(tmp_path / "etc/nut/upsbox-client.cert.pem"))
    assert "private key" in refused(tmp_path, "client", "upsbox")
    for name in "nutshim.conf", "a b.pem", "#.pem":
        shutil.copy(pki.ca.cert, str(tmp_path.parent / name))
        assert "rename" in refused(tmp_path, "--trust", str(tmp_path.parent / name), "client", "upsbox")


def test_install_client_wants_to_know_whom_to_trust(tmp_path, pki):
    """install client without trust changes nothing and says how to get it; the clients' file, under the name it has
    on the UPS box, is found beside nutshim.conf, or copied there from --trust."""
    said = refused(tmp_path, "client", "upsbox.lan:4401")
    assert "scp root@upsbox.lan:/etc/nut/HOST-client.cert.pem /etc/nut/" in said
    assert not list(tmp_path.rglob("*"))

    (tmp_path / "etc/nut").mkdir(parents=True)
    for name in "upsbox", "another":
        shutil.copy(pki.ca.cert, str(tmp_path / ("etc/nut/%s-client.cert.pem" % name)))
    assert "several" in refused(tmp_path, "client", "192.0.2.1")
    installed(tmp_path, "client", "upsbox.lan:4401")
    section = conf_of(tmp_path)["upsbox.lan"]
    assert section == {"role": "client", "upstream": "upsbox.lan:4401", "trust": "/etc/nut/upsbox-client.cert.pem"}
    installed(tmp_path, "remove")
    assert len(files(tmp_path)) == 2, "the administrator's own copies"

    other = tmp_path / "other"
    installed(other, "--trust", pki.ca.cert, "client", "upsbox")
    name = os.path.basename(pki.ca.cert)
    assert conf_of(other)["upsbox"]["trust"] == "/etc/nut/" + name
    assert (other / "etc/nut" / name).read_bytes() == open(pki.ca.cert, "rb").read()
    assert (other / "etc/nut" / name).stat().st_mode & 0o777 == 0o644


def test_install_does_not_take_the_box_s_own_file_for_another_s(need, tmp_path):
    """On a UPS box its own clients' file is for itself alone: another box's has to be given."""
    need("openssl")
    installed(tmp_path, "server")
    assert "which UPS box to trust" in refused(tmp_path, "client", "elsewhere")
    installed(tmp_path, "client", "localhost")
    assert conf_of(tmp_path)["localhost"]["trust"] == "/" + CLIENTS_FILE


# ---- Other arguments, other ports ---------------------------------------------------------------


def test_install_again_with_other_arguments(need, tmp_path, pki):
    """What is asked for on a second run is done, in a file that is as the script made it; what is not asked stays."""
    need("openssl")
    installed(tmp_path, "server")
    installed(tmp_path, "--upsd", "localhost:13493", "server")
    installed(tmp_path, "--pin", PIN, "client", "upsbocks")
    assert "--replace" in refused(tmp_path, "--pin", PIN, "client", "upsbox")
    installed(tmp_path, "--pin", PIN, "--replace", "client", "upsbox")
    installed(tmp_path, "--pin", OTHER_PIN, "client", "upsbox:402")
    listen = conf_of(tmp_path)["upsbox"].get("listen")
    assert conf_of(tmp_path) == {
        "": {}, "upsd": {"role": "server", "certificate": "/" + SERVER_FILE, "upstream": "localhost:13493"},
        "upsbox": dict({"role": "client", "upstream": "upsbox:402", "verify": "pin", "pin": OTHER_PIN},
                       **({"listen": listen} if listen else {}))}
    installed(tmp_path, "--trust", pki.ca.cert, "client", "upsbox:402")
    section = conf_of(tmp_path)["upsbox"]
    assert "pin" not in section and "verify" not in section and section["trust"].endswith(os.path.basename(pki.ca.cert))
    before = tree(tmp_path)
    installed(tmp_path, "client", "upsbox:402")
    installed(tmp_path, "server")
    assert tree(tmp_path) == before
    assert "lacks another.name" in refused(tmp_path, "--names", "another.name", "server")


def test_install_takes_a_new_clients_file_in_place(tmp_path, pki):
    """--trust with a new file of the same name replaces the copy that the script made."""
    new = tmp_path / "new" / "upsbox-client.cert.pem"
    new.parent.mkdir()
    shutil.copy(pki.ca.cert, str(new))
    there = tmp_path / "there"
    installed(there, "--trust", new, "client", "upsbox")
    shutil.copy(pki.other_ca.cert, str(new))
    installed(there, "--trust", new, "client", "upsbox")
    assert (there / "etc/nut" / new.name).read_bytes() == new.read_bytes()
    (there / "etc/nut" / new.name).write_text("mine")
    assert "another file of that name" in refused(there, "--trust", str(new), "client", "upsbox")


def test_install_respects_what_was_edited(need, tmp_path):
    """An edited or foreign file is neither replaced nor removed, nor what a kept configuration names; what to
    change by hand is shown before anything is written, and taken once it is there."""
    need("openssl")
    (tmp_path / "usr/local/sbin").mkdir(parents=True)
    foreign = tmp_path / "usr/local/sbin/mkNUTcert.py"
    foreign.write_text("#!/bin/sh\nexec '%s' '%s' \"$@\"\n" % (sys.executable, os.path.join(ROOT, "mkNUTcert.py")))
    foreign.chmod(0o755)
    assert "kept /usr/local/sbin/mkNUTcert.py" in installed(tmp_path, "server").stdout
    conf = tmp_path / "etc/nut/nutshim.conf"
    conf.write_text(conf.read_text() + "# mine\n")
    said = refused(tmp_path, "--pin", PIN, "client", "upsbox")
    assert "add this to it yourself" in said
    conf.write_text(conf.read_text() + said[said.index("\n[upsbox]"):])
    assert "kept" in installed(tmp_path, "--pin", PIN, "client", "upsbox").stdout
    assert "change its section [upsbox]" in refused(tmp_path, "--pin", OTHER_PIN, "client", "upsbox")
    assert "change its section [upsd]" in refused(tmp_path, "--upsd", "localhost:13493", "server")
    done = installed(tmp_path, "remove")
    assert "kept /etc/nut/nutshim.conf" in done.stdout and "kept /%s" % SERVER_FILE in done.stdout
    assert files(tmp_path) == {"usr/local/sbin/mkNUTcert.py", "etc/nut/nutshim.conf", SERVER_FILE}


@pytest.mark.parametrize("nut, port", [
    ({}, 3493), ({"nut.conf": "MODE=netclient\n", "ups.conf": "[a]\n"}, 3493), ({"nut.conf": "MODE=none\n"}, 3493),
    ({"nut.conf": "MODE=netserver\n"}, 3494), ({"nut.conf": 'MODE="standalone"\n'}, 3494), ({"ups.conf": "[a]\n"}, 3494),
    ({"nut.conf": "MODE=netserver\n", "upsd.conf": "LISTEN ::1\n"}, 3494),
    ({"nut.conf": "MODE=netserver\n", "upsd.conf": "LISTEN 127.0.0.1 3494\n"}, 3493),
    ({"nut.conf": "MODE=netserver\n", "upsd.conf": "LISTEN ::1 3493 # x\nLISTEN 127.0.0.1 3494\n"}, 3495)])
def test_install_client_leaves_upsd_its_port(nut, port, tmp_path):
    """The client shim takes 3493 only where NUT is not set up to run a upsd there, whether that runs now or not."""
    (tmp_path / "etc/nut").mkdir(parents=True)
    for name, text in nut.items():
        (tmp_path / "etc/nut" / name).write_text(text)
    installed(tmp_path, "--pin", PIN, "client", "upsbox")
    assert conf_of(tmp_path)["upsbox"].get("listen", "localhost:3493") == "localhost:%d" % port


def test_install_of_both_roles_makes_one_file(need, tmp_path):
    """On a box with both roles the client shim leaves upsd's port to it; a UPS box called upsd gets a section of its own."""
    need("openssl")
    installed(tmp_path, "--pin", PIN, "client", "upsd")
    installed(tmp_path, "server")
    assert conf_of(tmp_path)["upsd"]["role"] == "client" and conf_of(tmp_path)["upsd-server"]["role"] == "server"
    other = tmp_path / "other"
    installed(other, "server")
    installed(other, "--pin", PIN, "client", "upsd")
    conf = conf_of(other)
    assert conf["upsd"]["role"] == "server" and conf["upsd-client"] == {
        "role": "client", "upstream": "upsd", "verify": "pin", "pin": PIN, "listen": "localhost:3494"}
    said = refused(other, "--pin", PIN, "client", "second")
    assert "\n[second]\n" in said and re.search(r"listen = localhost:349[5-9]\n", said)


def test_install_brings_a_new_version(need, tmp_path):
    """Run again from a newer tree, install replaces the programs that it put there, and nothing else."""
    need("openssl")
    installed(tmp_path, "server")
    program = tmp_path / "usr/local/sbin/nutshim.py"
    old = program.read_text() + "# an older version\n"
    program.write_text(old)
    notes = tmp_path / "etc/nut/nutshim.installed"
    crc = run("cksum", str(program)).stdout.split()
    notes.write_text(re.sub(r"(?m)^.* /usr/local/sbin/nutshim.py$", "%s %s /usr/local/sbin/nutshim.py" % (crc[0], crc[1]), notes.read_text()))
    before = tree(tmp_path)
    installed(tmp_path, "upgrade")
    after = tree(tmp_path)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"usr/local/sbin/nutshim.py", "etc/nut/nutshim.installed"} and program.read_text() != old
    assert "nothing to upgrade" in refused(tmp_path / "usr", "upgrade")


# ---- Cut at any point ---------------------------------------------------------------------------

# tests/install-on-debian asks for every step; in the suite every seventh must do.
EVERY_STEP = os.environ.get("EVERY_STEP")

# Stands before each command that changes files, and keeps the folder as each of them leaves it: what a kill -9 there leaves.
STEP = """#!/bin/sh
PATH=%s
"${0##*/}" "$@"
status=$?
read -r number <"$STEPS/number"
echo $((number + 1)) >"$STEPS/number"
cp -a "$DESTDIR" "$STEPS/$number"
exit $status
"""
COUNTED = ("chgrp", "chmod", "cmp", "cp", "mkdir", "mv", "rm", "rmdir")     # none of them in a pipeline


def states(tmp_path, folder, *words):
    """Run install in folder; copies of the folder as every step of it left it, each different one once."""
    steps = tmp_path / "steps"
    shutil.rmtree(str(steps), ignore_errors=True)
    (steps / "bin").mkdir(parents=True)
    write(str(steps / "number"), "100\n")
    env = clean_env(DESTDIR=str(folder), STEPS=str(steps))
    for name in COUNTED:
        write(str(steps / "bin" / name), STEP % env["PATH"], 0o755)
    installed(folder, *words, env=dict(env, PATH="%s:%s" % (steps / "bin", env["PATH"])))
    found, seen = [], []
    for path in sorted(steps.glob("[0-9]*")):
        state = {name: (each[0], each[2]) for name, each in tree(path).items()}
        if state not in seen:
            seen.append(state)
            found.append(path)
    return found


def summary(folder):
    """What must be the same after a cut run and another: paths, modes, contents, but for keys, which differ each time."""
    found = {}
    for name, (mode, _, content) in tree(folder).items():
        if name.endswith(".installed"):
            content = sorted(line.split()[-1] for line in content.decode().splitlines())
        found[name] = (mode, None if name.endswith(".cert.pem") else content)
    return found


def in_two_threads(work, items):
    """work(item) for all of them, most of which is waiting for other processes."""
    faults = []

    def lane(mine):
        for item in mine:
            try:
                work(item)
            except BaseException as error:              # pylint: disable=broad-except  # told below
                faults.append("%s: %r" % (item, error))
    lanes = [threading.Thread(target=lane, args=(items[start::2],)) for start in (0, 1)]
    for each in lanes:
        each.start()
    for each in lanes:
        each.join()
    assert not faults, "\n".join(faults)


@pytest.mark.seconds(240)
@pytest.mark.parametrize("what", ["server", "client", "upgrade", "remove"])
def test_install_may_be_cut_anywhere(what, need, tmp_path, pki):
    """Killed after any step and run again, install ends as an undisturbed run does, with keys that belong together;
    remove then, or at once, leaves what was there before."""
    need("openssl")
    folder = tmp_path / "machine"
    (folder / "etc").mkdir(parents=True)
    (folder / "etc/openwrt_release").write_text("")     # Fewer files, so fewer steps: no manual pages.
    fresh = summary(folder)
    trust = os.path.join(str(tmp_path), "upsbox-client.cert.pem")
    shutil.copy(pki.ca.cert, trust)
    setup = [("server",), ("--trust", trust, "client", "upsbox")]
    words = {"server": setup[0], "client": setup[1]}.get(what, (what,))
    for each in {"server": [], "client": setup[:1]}.get(what, setup):
        installed(folder, *each)
    if what == "upgrade":
        for name in "usr/sbin/nutshim.py", "usr/sbin/mkNUTcert.py", "etc/init.d/nutshim":
            old = (folder / name).read_text() + "# old\n"
            (folder / name).write_text(old)
            crc, size = run("cksum", str(folder / name)).stdout.split()[:2]
            notes = folder / "etc/nut/nutshim.installed"
            notes.write_text(re.sub(r"(?m)^.* /%s$" % name, "%s %s /%s" % (crc, size, name), notes.read_text()))
    found = states(tmp_path, folder, *words)
    assert len(found) >= 7, found
    undisturbed = summary(folder)

    def again(path):
        other = str(path) + ".remove"
        shutil.copytree(str(path), other, symlinks=True)
        installed(path, *words)
        assert summary(path) == undisturbed
        if what == "server":
            done = run("openssl", "verify", "-CAfile", str(path / CLIENTS_FILE), str(path / SERVER_FILE))
            assert done.returncode == 0, done.stderr
        for each in path, type(path)(other):
            installed(each, "remove")
            assert summary(each) == fresh, each
    in_two_threads(again, found if EVERY_STEP else found[2::7])


@pytest.mark.parametrize("where", ["etc", "usr"])
def test_install_on_a_full_or_read_only_disk(where, need, tmp_path):
    """Where /etc or /usr is read-only or full, install fails with a word, leaves no half a file in place and, once there
    is room, goes on; with a read-only /etc nothing at all is written."""
    need("openssl")
    if not IS_ROOT or run("unshare", "--mount", "true").returncode:
        pytest.skip("no mount namespaces here")
    for name in "etc", "usr":
        (tmp_path / name).mkdir()
    room = {"etc": "8k", "usr": "64k"}[where]
    for kind, less, more in (("read-only", "mount --bind {0} {0} && mount -o remount,bind,ro {0}", "mount -o remount,bind,rw {0}"),
                             ("full", "mount -t tmpfs -o size=%s tmpfs {0}" % room, "mount -o remount,size=1m {0}")):
        script = """set -e; cd {1}; %s
            if {2} server; then exit 9; fi
            find . -type f ! -name nutshim.installed
            %s
            {2} server >said; {2} remove >said; rm said; echo then; find . -type f""" % (less, more)
        done = run("unshare", "--mount", "sh", "-c", script.format(tmp_path / where, tmp_path, path_of("install")),
                   env=clean_env(DESTDIR=str(tmp_path)))
        assert done.returncode == 0 and done.stderr, done.stdout + done.stderr
        left, _, then = done.stdout.partition("then\n")
        left = [line for line in left.splitlines() if line.startswith("./")]
        # On a full /etc the programs are there before the certificates find no room.
        assert all(line.startswith("./usr/local/") for line in left) if (where, kind) == ("etc", "full") else not left, left
        assert not then and sorted(os.listdir(str(tmp_path))) == ["etc", "usr"]


def test_install_mends_modes(need, tmp_path):
    """Modes of the script's own files that do not let the daemon read them, or let others, are mended by the next run."""
    need("openssl")
    installed(tmp_path, "server")
    before = {name: each[0] for name, each in tree(tmp_path).items()}
    for name, mode in ("etc/nut/nutshim.conf", 0o600), (SERVER_FILE, 0o644), (CLIENTS_FILE, 0o600), ("usr/local/sbin/nutshim.py", 0o644):
        (tmp_path / name).chmod(mode)
    installed(tmp_path, "server")
    assert {name: each[0] for name, each in tree(tmp_path).items()} == before


def test_install_without_a_hostname_command(need, tmp_path):
    """Where there is no hostname command the box's name still is in the certificate and in what to do next."""
    need("openssl")
    write(str(tmp_path / "hostname"), "#!/bin/sh\nexit 127\n", 0o755)
    env = clean_env(DESTDIR=str(tmp_path / "there"))
    done = installed(tmp_path / "there", "server", env=dict(env, PATH="%s:%s" % (tmp_path, env["PATH"])))
    assert "for %s localhost 127.0.0.1 ::1 " % HOST in done.stdout
    assert HOST in run("openssl", "x509", "-noout", "-text", "-in", str(tmp_path / "there" / SERVER_FILE)).stdout


def test_install_speaks_openwrt_on_openwrt(need, tmp_path):
    """On OpenWrt it names the packages to install, the router's name in its domain, scp -O and what a sysupgrade keeps, and
    leaves a router alone that has the feed's package."""
    need("busybox", "openssl")
    there, commands = tmp_path / "there", tmp_path / "bin"
    (there / "etc/config").mkdir(parents=True)
    (there / "etc/openwrt_release").write_text("")
    commands.mkdir()
    run("busybox", "--install", "-s", str(commands))
    write(str(commands / "uci"), "#!/bin/sh\n[ \"$*\" = '-q get dhcp.@dnsmasq[0].domain' ] && echo lan\n", 0o755)
    write(str(commands / "python3"), '#!/bin/sh\nexec "%s" "$@"\n' % sys.executable, 0o755)
    env = clean_env(DESTDIR=str(there), PATH=str(commands))

    def said(status, *words):
        done = run(shutil.which("busybox"), "ash", path_of("install"), "--dry-run", *words, env=env)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "(apk add openssl-util)" in said(1, "server")
    write(str(commands / "opkg"), "#!/bin/sh\n", 0o755)
    assert "(opkg install openssl-util)" in said(1, "server")
    os.rename(str(commands / "python3"), str(commands / "python"))
    assert "(opkg install python3-light python3-openssl openssl-util)" in said(1, "server")
    assert "(opkg install python3-light python3-openssl)" in said(1, "--pin", PIN, "client", "upsbox")
    os.rename(str(commands / "python"), str(commands / "python3"))
    write(str(commands / "openssl"), '#!/bin/sh\nexec "%s" "$@"\n' % shutil.which("openssl"), 0o755)
    text = said(0, "server")
    assert '-SAN "%s %s.lan localhost' % (HOST, HOST) in text and "  scp -O root@%s:/etc/nut/" % HOST in text
    assert "ufw" not in text and "firewall-cmd" not in text
    assert "echo /etc/nut/ >>/etc/sysupgrade.conf" in text
    (there / "etc/sysupgrade.conf").write_text("# kept\n/etc/nut/\n")
    assert "sysupgrade" not in said(0, "server")
    (there / "etc/config/nutshim").write_text("")
    assert "/etc/config/nutshim" in said(1, "server")


def test_install_server_with_more_addresses_than_fit(need, tmp_path):
    """A box with more addresses than a certificate has room for gets one with its names, those asked for, and the first of them."""
    need("openssl")
    write(str(tmp_path / "hostname"), "#!/bin/sh\n[ $1 != -I ] || seq -f 192.0.2.%g 150\n", 0o755)
    env = clean_env()
    done = installed(tmp_path / "there", "--names", "ups.lan", "server", env=dict(env, DESTDIR=str(tmp_path / "there"), PATH="%s:%s" % (
        tmp_path, env["PATH"])))
    assert "for %s localhost 127.0.0.1 ::1 ups.lan 192.0.2.1 " % HOST in done.stdout and " 192.0.2.150" not in done.stdout


@pytest.mark.skipif(not IS_ROOT or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_install_dry_run_needs_to_read_nutshim_conf():
    """Where only root may read nutshim.conf, --dry-run by somebody else says so, and makes no guess."""
    with folder("dry") as path:
        os.makedirs(path + "/etc/nut")
        for each in (path, path + "/etc", path + "/etc/nut"):
            os.chmod(each, 0o755)
        write(path + "/etc/nut/nutshim.conf", "[upsd]\nrole = server\n")
        for words in (("client", "upsbox"), ("server",), ("remove",)):
            done = run("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", path_of("install"), "--dry-run", *words,
                       env=clean_env(DESTDIR=path), cwd="/")
            assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("nutshim: /etc/nut/nutshim.conf cannot be read"), done


ODD_CONF = """\
\ufeff; role = client
 user\t=  "nut" # not root\r
[ a ] # role = client
role=server # of the client\r
certificate = "/x/a #1; b.pem" # c
listen = "127.0.0.1:1", [::1]:2 ; c
#upstream = x
[b-c.d]
\trole = "client"\t#"server"
upstream = "h","i:402" ;"
trust = /x/"a = b".pem
"""


@pytest.mark.parametrize("shell", ["sh", "busybox ash"])
def test_install_reads_nutshim_conf_as_nutshim_does(shell, need, tmp_path):
    """Comments, quotes, blanks, CRLF and a byte order mark mean to install what they mean to nutshim.py."""
    need(shell.split()[0])
    (tmp_path / "awk").symlink_to(shutil.which("busybox" if "busybox" in shell else "awk"))
    path, env = write(str(tmp_path / "nutshim.conf"), ODD_CONF), clean_env()
    with open(path_of("install"), encoding="utf-8") as file:
        function = re.search(r"(?ms)^settings_of\(\).*?^}$", file.read()).group()
    done = run(*shell.split(), "-c", function + '\nsettings_of "$0"', path, env=dict(env, PATH="%s:%s" % (tmp_path, env["PATH"])))
    assert done.stdout.splitlines() == [
        "- user nut", "a role server", "a certificate /x/a #1; b.pem", "a listen 127.0.0.1:1, [::1]:2", "b-c.d role client",
        "b-c.d upstream h,i:402", "b-c.d trust /x/a = b.pem"], done
    conf, faults = nutshim.read_config(path)
    first, second = conf.shims
    assert not faults and (conf.user, first.name, first.role, first.certificate) == ("nut", "a", "server", "/x/a #1; b.pem"), faults
    assert first.listen == [("127.0.0.1", 1), ("::1", 2)] and second.upstream == [("h", 401), ("i", 402)]
    assert (second.name, second.role, second.trust) == ("b-c.d", "client", "/x/a = b.pem")


def test_install_with_busybox_alone(need, tmp_path):
    """busybox's shell and commands do all of it: server, client, other arguments, upgrade, remove."""
    need("busybox", "openssl")
    commands = tmp_path / "bin"
    commands.mkdir()
    run("busybox", "--install", "-s", str(commands))
    for name, program in ("python3", sys.executable), ("openssl", shutil.which("openssl")):
        write(str(commands / name), '#!/bin/sh\nexec "%s" "$@"\n' % program, 0o755)
    there = tmp_path / "there"
    env = clean_env(DESTDIR=str(there), PATH=str(commands))
    for words in (("server",), ("client", "localhost"), ("--pin", PIN, "client", "localhost"), ("--upsd", "localhost:13493", "server"),
                  ("upgrade",), ("remove",)):
        done = run(shutil.which("busybox"), "ash", path_of("install"), "--init", "procd", *words, env=env)
        assert (done.returncode, done.stderr) == (0, ""), (words, done.stdout, done.stderr)
        if words == ("upgrade",):
            conf = conf_of(there)
            assert conf["upsd"]["upstream"] == "localhost:13493" and conf["localhost"]["pin"] == PIN
    assert not list(there.rglob("*"))


# ---- Whole machines -----------------------------------------------------------------------------


@pytest.mark.usefixtures("nut_installed")
@pytest.mark.seconds(180)
def test_install_on_two_debian_machines(need):
    """From nothing to a working upsc over the network by install server and install client, as a service: run again
    they change nothing, faults cost nothing that works, and remove leaves nothing behind: on this machine's own files,
    seen through overlays."""
    need("ip", "openssl")
    overlays = "cd /mnt && mount -t tmpfs tmpfs . && cd /mnt && mkdir a b c && mount -t overlay -o lowerdir=/,upperdir=a,workdir=b overlay c"
    if not IS_ROOT or run("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "sh", "-c", overlays).returncode:
        pytest.skip("no namespaces with overlays here")
    if os.path.exists("/etc/nut/nutshim.conf") or glob.glob("/usr/*/sbin/nutshim.py") + glob.glob("/usr/sbin/nutshim.py"):
        pytest.skip("nutshim is installed here")
    done = run(os.path.join(ROOT, "tests/install-on-debian"), "--here", timeout=170)
    assert done.returncode == 0 and done.stdout.endswith("\n== All passed\n"), done.stdout + done.stderr
