# SPDX-License-Identifier: GPL-2.0-or-later
"""The certificates of the tests, made with the openssl command itself: Pki, Authority, Certificate."""

import base64
import hashlib
import os
import ssl

from harness import NSS_PASSWORD, run, write


def openssl(*args, **options):
    """Run openssl; its standard output."""
    done = run("openssl", *args, **options)
    assert done.returncode == 0, "openssl %s: %s" % (args[0], done.stderr)
    return done.stdout


class Certificate:
    """A certificate: file holds key and certificate (and chain), cert and key the parts alone."""

    def __init__(self, base):
        self.file, self.cert, self.key = base + ".pem", base + ".crt", base + ".key"

    @property
    def der(self):
        """The certificate's DER bytes."""
        with open(self.cert, encoding="ascii") as file:
            return ssl.PEM_cert_to_DER_cert(file.read())

    @property
    def pin(self):
        """The pin of its public key, sha256//BASE64 of the SPKI."""
        pem = openssl("x509", "-in", self.cert, "-noout", "-pubkey")
        public = base64.b64decode("".join(pem.split("-----")[2].split()))
        return "sha256//" + base64.b64encode(hashlib.sha256(public).digest()).decode("ascii")


class Authority(Certificate):
    """A CA that issues certificates with the openssl command. Its own certificate is .cert."""

    CONFIG = """
[ca]
default_ca = this
[this]
database = {0}/index
serial = {0}/serial
crlnumber = {0}/crlnumber
new_certs_dir = {0}
certificate = {0}/ca.crt
private_key = {0}/ca.key
default_md = sha256
default_crl_days = 30
unique_subject = no
policy = any
[any]
commonName = optional
[req]
distinguished_name = none
[none]
"""
    CA_EXTENSIONS = ("basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n"
                     "subjectKeyIdentifier=hash\n")

    def __init__(self, path, name, parent=None):
        os.mkdir(path, 0o700)
        super().__init__(os.path.join(path, "ca"))
        self.path = path
        self.chain = ""                             # what goes behind a certificate, but for the root
        self._config = write(os.path.join(path, "config"), self.CONFIG.format(path))
        for file, text in (("index", ""), ("serial", "1000\n"), ("crlnumber", "1000\n")):
            write(os.path.join(path, file), text)
        if parent:
            parent.sign(self, name, self.CA_EXTENSIONS + "authorityKeyIdentifier=keyid\n")
            with open(self.cert, encoding="ascii") as own:
                self.chain = own.read() + parent.chain
        else:
            self.sign(self, name, self.CA_EXTENSIONS, "-selfsign")

    def sign(self, cert, name, extensions, *options, key_type="ec", start="20200101000000Z",
             end="99991231235959Z"):
        """Make cert's key and its certificate; start and end as YYYYMMDDHHMMSSZ."""
        base = os.path.splitext(cert.key)[0]
        key = {"ec": ("EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-pkeyopt", "ec_param_enc:named_curve"),
               "rsa": ("RSA", "-pkeyopt", "rsa_keygen_bits:2048"),
               "rsa4096": ("RSA", "-pkeyopt", "rsa_keygen_bits:4096"), "ed25519": ("ED25519",)}[key_type]
        openssl("genpkey", "-algorithm", *key, "-out", cert.key)
        openssl("req", "-new", "-config", self._config, "-key", cert.key, "-subj", name, "-out", base + ".csr")
        write(base + ".ext", extensions)
        openssl("ca", "-batch", "-notext", "-config", self._config, "-in", base + ".csr", "-out", cert.cert,
                "-extfile", base + ".ext", "-startdate", start, "-enddate", end, *options)

    def issue(self, name, san=None, cn=None, eku=None, **options):
        """A certificate for SANs such as "DNS:localhost,IP:::1"; options as for sign()."""
        cert = Certificate(os.path.join(self.path, name))
        extensions = "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
        extensions += "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        extensions += "extendedKeyUsage=%s\n" % eku if eku else ""
        extensions += "subjectAltName=%s\n" % san if san else ""
        self.sign(cert, "/CN=" + (cn or name), extensions, **options)
        with open(cert.key, encoding="ascii") as key, open(cert.cert, encoding="ascii") as own:
            write(cert.file, key.read() + own.read() + self.chain)
        return cert

    def revoke(self, cert):
        """Put cert on the revocation list."""
        openssl("ca", "-config", self._config, "-revoke", cert.cert)

    def crl(self):
        """Write the revocation list as it is now; its path."""
        path = os.path.join(self.path, "crl.pem")
        openssl("ca", "-config", self._config, "-gencrl", "-out", path)
        return path


LOCAL = "DNS:localhost,IP:127.0.0.1,IP:::1"


class Pki:
    """The certificates of a test session, each made when first asked for: pki.server, pki.expired …"""

    MAKERS = {
        "ca": lambda pki: Authority(pki.path + "/ca", "/CN=Test CA"),
        "other_ca": lambda pki: Authority(pki.path + "/other", "/CN=Other CA"),
        "sub_ca": lambda pki: Authority(pki.path + "/sub", "/CN=Test Intermediate CA", parent=pki.ca),
        "server": lambda pki: pki.ca.issue("localhost", LOCAL, eku="serverAuth"),
        "wrong_name": lambda pki: pki.ca.issue("wrong", "DNS:elsewhere.example,IP:192.0.2.9"),
        "expired": lambda pki: pki.ca.issue("expired", LOCAL, end="20210101000000Z"),
        "not_yet": lambda pki: pki.ca.issue("not_yet", LOCAL, start="99980101000000Z"),
        "unknown_ca": lambda pki: pki.other_ca.issue("unknown", LOCAL),
        "chained": lambda pki: pki.sub_ca.issue("chained", LOCAL),
        "rsa4096": lambda pki: pki.ca.issue("rsa4096", LOCAL, key_type="rsa4096"),
        "client": lambda pki: pki.ca.issue(
            "client", "DNS:client.example,IP:127.0.0.1,URI:urn:nutshim:client,email:ups@client.example",
            cn="client.example", eku="clientAuth"),
        "other_client": lambda pki: pki.ca.issue("other_client", "DNS:other.example", eku="clientAuth"),
        "unknown_client": lambda pki: pki.other_ca.issue("unknown_client", "DNS:client.example"),
        "expired_client": lambda pki: pki.ca.issue("expired_client", "DNS:client.example", end="20210101000000Z"),
        "self_signed": lambda pki: pki._self_signed(),
        "revoked": lambda pki: pki._revoked("revoked", LOCAL),
        "revoked_client": lambda pki: pki._revoked("revoked_client", "DNS:client.example"),
    }

    def __init__(self, path):
        self.path = path

    def __getattr__(self, name):
        if name not in self.MAKERS:
            raise AttributeError(name)
        value = self.MAKERS[name](self)
        setattr(self, name, value)
        return value

    @property
    def crl(self):
        """The path of ca's revocation list, pki.revoked and pki.revoked_client in it."""
        self.revoked, self.revoked_client           # pylint: disable=pointless-statement
        return self.ca.crl()

    def _revoked(self, name, san):
        cert = self.ca.issue(name, san)
        self.ca.revoke(cert)
        return cert

    def _self_signed(self):
        cert = Certificate(os.path.join(self.path, "self"))
        self.ca.sign(cert, "/CN=localhost", "subjectAltName=%s\n" % LOCAL, "-selfsign", "-keyfile", cert.key)
        with open(cert.key, encoding="ascii") as key, open(cert.cert, encoding="ascii") as own:
            write(cert.file, key.read() + own.read())
        return cert

    def nss_database(self, name, identity=None, ca=None):
        """A folder with an NSS database that trusts ca; it holds identity as "own"."""
        path = os.path.join(self.path, name)
        os.mkdir(path, 0o700)
        database, password = "sql:" + path, write(os.path.join(path, "password"), NSS_PASSWORD + "\n")
        done = [run("certutil", "-N", "-d", database, "-f", password),
                run("certutil", "-A", "-d", database, "-f", password, "-n", "ca", "-t", "CT,,",
                    "-i", (ca or self.ca).cert)]
        if identity:
            bundle = os.path.join(path, "own.p12")
            openssl("pkcs12", "-export", "-in", identity.file, "-out", bundle, "-name", "own",
                    "-passout", "file:" + password)
            done.append(run("pk12util", "-i", bundle, "-d", database, "-k", password, "-w", password))
        assert not any(each.returncode for each in done), [each.stderr for each in done]
        return path
