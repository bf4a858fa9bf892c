# SPDX-License-Identifier: GPL-2.0-or-later
"""The pure protocol core of nutshim.py: every case whole, byte by byte, and with bytes trailing.

What upsd makes of a line is known from parseconf's rules, written down here as a table and once
more in standin.Parser (by another hand), and from the real upsd, which has the last word.

The tests without arguments need neither pytest nor NUT: `python3 tests/test_core.py` runs them.
"""

import base64
import calendar
import contextlib
import hashlib
import os
import random
import re
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# pylint: disable=wrong-import-position
import nutshim  # noqa: E402
from certs import openssl  # noqa: E402
from harness import PlainClient, write  # noqa: E402
from nutshim import Commands, Conversation, Greeting, ProtocolError, Questions, Reason, Replies  # noqa: E402
from nutshim import question, read_certificate, starttls_reply  # noqa: E402
from standin import Parser, Session, StandIn  # noqa: E402

OK = b"OK\n"
DENIED = b"ERR ACCESS-DENIED\n"
ALREADY = b"ERR ALREADY-SSL-MODE\n"
GOODBYE = b"OK Goodbye\n"


def ways(data):
    """The same bytes whole, in every two pieces, and byte by byte."""
    yield [data]
    for cut in range(1, len(data)):
        yield [data[:cut], data[cut:]]
    yield [data[at:at + 1] for at in range(len(data))]


def torn(data, chance, most=40):
    """The same bytes in pieces of random size."""
    pieces = []
    while data:
        size = chance.randint(1, most)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


@contextlib.contextmanager
def refuses(reason, words=""):
    """What is inside must end in a ProtocolError with this reason and these words."""
    try:
        yield
    except ProtocolError as error:
        assert error.reason is reason, error.reason
        assert words in str(error), str(error)
    else:
        raise AssertionError("not refused with %s" % reason)


# ---- commands -----------------------------------------------------------------------------------

# What parseconf.c of upsd 2.8 makes of lines: bytes, words of each command, which of them are odd
# (versions of upsd, or the segments they come in, make different things of them).
LINES = [
    (b"VER\n", [[b"VER"]], []),
    (b"  ver  \n", [[b"ver"]], []),
    (b"GET VAR ups ups.status\n", [[b"GET", b"VAR", b"ups", b"ups.status"]], []),
    (b"VER\nNETVER\nHELP\n", [[b"VER"], [b"NETVER"], [b"HELP"]], []),
    (b"\n", [[]], []),
    (b" \t\v\f\r\n", [[]], []),
    (b"\r\n\n", [[], []], []),
    (b"\rVER\r\n", [[b"VER"]], []),
    (b"V\rER\n", [[b"V", b"ER"]], []),
    (b"GET\tVAR\vups\fx\n", [[b"GET", b"VAR", b"ups", b"x"]], []),
    (b"# VER\n", [[]], []),
    (b"VER # \"c\\\n", [[b"VER"]], []),
    (b"VER#c\nVER\n", [[b"VER"], [b"VER"]], []),
    (b"# \\\nVER\n", [[], [b"VER"]], []),
    (b"VER=1\n", [[b"VER", b"=", b"1"]], []),
    (b"GET VAR=ups ==\n", [[b"GET", b"VAR", b"=", b"ups", b"=", b"="]], []),
    (b'"VER"\n', [[b"VER"]], []),
    (b'"VER"x\n', [[b"VER", b"x"]], []),
    (b'V"ER"\n', [[b'V"ER"']], []),
    (b'""\n', [[b""]], []),
    (b'SET VAR ups x "a b=c"\n', [[b"SET", b"VAR", b"ups", b"x", b"a b=c"]], []),
    (b'"a\\"b" "a\\\\" "a\\#"\n', [[b'a"b', b"a\\", b"a#"]], []),
    (b"\\VER VE\\R\n", [[b"VER", b"VER"]], []),
    (b'a\\ b \\#x \\= \\" \\\\\n', [[b"a b", b"#x", b"=", b'"', b"\\"]], []),
    (b"V\0ER V\x01ER V\xc3\xa9ER\n", [[b"VER", b"VER", b"VER"]], []),
    (b"\0\n\xff\n\x1b\n", [[b""], [b""], [b""]], []),
    (b"V\x7fER\n", [[b"V\x7fER"]], []),
    (b'"\xe9\x01"\n', [[b""]], []),
    (b"VE\\\nR\n", [[b"VER"]], [0]),
    (b"VER\\\nVER\nVER\n", [[b"VERVER"], [b"VER"]], [0]),
    (b'"VE\\\nR"\n', [[b"VER"]], [0]),
    (b'GET VAR "a\nb"\nVER\n', [[b"GET", b"VAR", b"ab"], [b"VER"]], [0]),
    (b'GET VAR "a\nVER\nVER"\nVER\n', [[b"GET", b"VAR", b"aVERVER"], [b"VER"]], [0]),
    (b'VER\nGET VAR ups "a#"\n', [[b"VER"], [b"GET", b"VAR", b"ups", b"a#"]], [1]),
]


def parse(pieces, limit=None):
    """Commands over pieces: ([(raw, words, odd)], pending)."""
    core, commands = Commands(limit) if limit else Commands(), []
    for piece in pieces:
        commands += core.feed(piece)
    return [(raw, list(words), bool(odd)) for raw, words, odd in commands], core.pending


def test_commands_are_cut_as_upsd_cuts_them():
    """Each odd line gives the same commands however it is cut, and not a byte is lost."""
    for data, words, odd in LINES:
        for trailing in (b"", b"NETV", b'"open', b"#"):
            for pieces in ways(data + trailing):
                commands, pending = parse(pieces)
                assert [command[1] for command in commands] == words, pieces
                assert [at for at, command in enumerate(commands) if command[2]] == odd, pieces
                assert b"".join(command[0] for command in commands) == data, pieces
                assert pending == trailing, pieces


def test_commands_go_on_after_an_odd_line():
    """A line behind an odd one is read as if it stood alone."""
    for data, words, _ in LINES:
        for pieces in ([data, b"GET VAR a b\n"], [data + b"GET VAR", b" a b\n"], [data + b"GET VAR a b\n"]):
            commands, pending = parse(pieces)
            assert [command[1] for command in commands] == words + [[b"GET", b"VAR", b"a", b"b"]]
            assert commands[-1][0] == b"GET VAR a b\n" and not commands[-1][2] and not pending


def test_command_length_is_limited_alike_however_it_comes():
    """A command over the limit is refused and one under it passes, whole or in pieces, odd or not."""
    for first in (b"", b'"', b"#", b"="):
        short, long = (first + b"x" * (size - 2 * len(first)) + first + b"\n" for size in (18, 21))
        for pieces in ways(short):
            assert parse(pieces, limit=20)[0][0][0] == short
        for pieces in ways(long + b"VER\n"):
            with refuses(Reason.BAD_LINE, "more than 20 bytes"):
                parse(pieces, limit=20)
    with refuses(Reason.BAD_LINE):
        parse([b"x" * 1000] * 1000)


def quoted(word):
    """A word as any upsd reads it back, for canonical()."""
    return b'"' + re.sub(rb'(["\\#])', rb"\\\1", word) + b'"'


def canonical(words):
    """The plainest line with these words."""
    return b" ".join(map(quoted, words)) + b"\n"


ALPHABET = [b"VER", b"GET VAR ups ups.status", b"GET CMDDESC ups ", b"x", b"y", b" ", b"\t", b"\r", b"\v", b"\f",
            b"\n", b"\n", b'"', b'"', b"\\", b"\\", b"#", b"=", b"\0", b"\x01", b"\x7f", b"\x80", b"\xff"]


WORDY = ALPHABET + [b"=" * 20, b" x" * 20, b"a\\ b=" * 12, b'"a b" ' * 12, b'"a\\#" ', b'"#" ', b'"\n" ']


def odd_bytes(chance, size, alphabet=()):
    """Random bytes that are hard on a parser."""
    return b"".join(chance.choice(alphabet or ALPHABET) for _ in range(size))


def agree(chance, rounds, size, alphabet=ALPHABET):
    """One stream of so many random pieces: the commands are the other parser's, however it is cut."""
    core, whole, model = Commands(), b"", Parser()
    for _ in range(rounds):
        piece = odd_bytes(chance, chance.randint(1, size), alphabet)
        commands, many = core.feed(piece), parse([whole + piece])[0]
        assert [odd for _, _, odd in commands] == [odd for _, _, odd in many]
        whole += piece
        wanted = [[word.encode("ascii") for word in words] for words in model.feed(piece)]
        assert [words for _, words, _ in commands] == wanted, whole
        for raw, words, _ in commands:
            assert whole.startswith(raw) and parse([canonical(words)])[0][0][1] == words, raw
            whole = whole[len(raw):]
        assert core.pending == whole
        if len(whole) > 900:                        # a quote that does not end: before it is refused
            core, whole, model = Commands(), b"", Parser()


def test_commands_agree_with_a_second_parser():
    """Whatever bytes come and however they are cut, the commands are those of another hand's parser.

    Run once with 40 times as many.
    """
    chance = random.Random(1)
    for size in (1, 3, 12):
        agree(chance, 4000, size)
        agree(chance, 1000, size, WORDY)
    for _ in range(1000):
        data = odd_bytes(chance, chance.randint(1, 60))
        assert parse(torn(data, chance, 8)) == parse([data]), data


def test_words_too_many_are_dropped():
    """A command keeps its first 32 words, as upsd does, and all of its bytes."""
    for word in (b"w", b'"w"', b"\\w", b"w#"[:1] + b"\x01"):
        for count in (31, 32, 33, 2000):
            line = (word + b" ") * count + b"\n"
            for pieces in ([line], [line[:50], line[50:]], torn(line, random.Random(count))):
                assert parse(pieces) == ([(line, [b"w"] * min(count, 32), False)], b""), (word, count)


def test_words_too_many_are_still_told_as_odd():
    """What versions of upsd read in different ways is told behind the 32nd word too, and nothing else is."""
    for word, odd in ((b'"a#"', True), (b'"a\nb"', True), (b"a\\\nb", True), (b'"a\\#b"', False), (b"a\\#b", False), (b'"#', True)):
        line = b"w=" * 40 + word + b" w" * 3 + (b'"\n' if word == b'"#' else b"\n")
        for pieces in ways(line + b"VER\n"):
            commands, pending = parse(pieces)
            assert [(raw, odd) for raw, _, odd in commands] == [(line, odd), (b"VER\n", False)] and not pending, pieces


def test_newlines_in_quotes_are_limited():
    """A command with more than 32 newlines in it that is not over yet is refused, and 32 are borne."""
    for start, newline in ((b'SET "', b"\n"), (b"SET ", b"a\\\n")):
        line = start + newline * 32
        for pieces in ([line], torn(line, random.Random(5), 3), [line[at:at + 1] for at in range(len(line))]):
            assert parse(pieces) == ([], line)
            with refuses(Reason.BAD_LINE, "more than 32 lines"):
                parse(pieces + [newline])
    assert len(parse([b'"' + b"\n" * 32 + b'"\n'])[0]) == 1


def cost(feed, size):
    """Seconds of CPU that feed(size) takes, the least of five."""
    def once():
        start = time.process_time()
        feed(size)
        return time.process_time() - start
    return min(once() for _ in range(5))


def slowly(start, more):
    """A feed of start(size) followed by many pieces."""
    def feed(size):
        core = Commands()
        core.feed(start(size))
        for piece in more(size):
            core.feed(piece)
    return feed


COSTS = {
    "byte by byte": slowly(lambda size: b"V", lambda size: [b"x"] * size + [b"\n"]),
    "equals": slowly(lambda size: b"=" * size + b"\n", lambda size: ()),
    "escapes": slowly(lambda size: b"\\a" * (size // 2) + b"\n", lambda size: ()),
    "quoted escapes": slowly(lambda size: b'"' + b"\\a" * (size // 2) + b'"\n', lambda size: ()),
    "an open quote": slowly(lambda size: b'"' + b"a" * size + b"\n", lambda size: [b"\n"] * 31),
    "blanks": slowly(lambda size: b"\t " * (size // 2), lambda size: [b" "] * 100 + [b"\n"]),
    "no stateless line": slowly(lambda size: b"GET " + b"a" * size + b"\x01\n", lambda size: ()),
    "words, then newlines in a quote": slowly(lambda size: b"=" * size + b'"\n', lambda size: [b"\n"] * 31),
}


def test_commands_cost_is_linear():
    """Sixteen times the bytes cost nothing like 256 times as much, whatever they are and however cut."""
    for name, feed in COSTS.items():
        assert cost(feed, 32768) < 80 * cost(feed, 2048), name


def test_newlines_in_a_quote_do_not_cost_all_words_again():
    """33 KiB with newlines in a last quote cost about what the same bytes cost in one piece."""
    whole = cost(COSTS["equals"], 32768)
    assert cost(COSTS["words, then newlines in a quote"], 32768) < 8 * whole


# ---- replies ------------------------------------------------------------------------------------

LIST_VAR = b'BEGIN LIST VAR ups\nVAR ups a "BEGIN LIST VAR ups"\nVAR ups b "END LIST VAR ups"\nEND LIST VAR ups\n'
LIST_EMPTY = b"BEGIN LIST RW ups\nEND LIST RW ups\n"
CUT = b"CMDDESC ups " + b"A" * 500
CUT_UPS = b'UPS long "' + b"d" * 502
FULL = b"VAR ups x " + b"v" * 501 + b"\n"           # 512 bytes with its newline: whole

# Each case is a list of replies; lines of 512 bytes without a newline are cut.
REPLIES = [
    [OK],
    [b"\n"],
    [b"ERR UNKNOWN-UPS\n", OK],
    [LIST_VAR],
    [LIST_EMPTY, LIST_VAR, OK, LIST_EMPTY],
    [b"ERR DRIVER-NOT-CONNECTED\n", LIST_EMPTY],
    [FULL, OK],
    [CUT, b"Network UPS Tools upsd 2.8.0\n"],
    [CUT, CUT, LIST_EMPTY],
    [b"BEGIN LIST UPS\n" + CUT_UPS + b'UPS ups "x"\nEND LIST UPS\n', OK],
    [b"BEGIN LIST UPS\n" + b'UPS ups "x"\n' + CUT_UPS + b"END LIST UPS\n", OK],
]


def frame(pieces):
    """Replies over pieces: (where each reply ends in the whole, the Replies)."""
    core, ends, at = Replies(), [], 0
    whole = b"".join(pieces)
    for piece in pieces:
        for end, head in core.feed(piece):
            start = whole.rfind(b"\n", 0, at + end - 1) + 1
            assert at + end - start > 512 or head == whole[start:at + end][:10], (pieces, head)
            ends.append(at + end)
        at += len(piece)
    return ends, core


def test_replies_are_framed_as_upsd_sends_them():
    """A reply ends at its newline, its 512th byte or the end of its LIST, however it is cut."""
    for replies in REPLIES:
        data = b"".join(replies)
        wanted = [sum(map(len, replies[:count + 1])) for count in range(len(replies))]
        for pieces in ways(data):
            ends, core = frame(pieces)
            assert ends == wanted and core.whole, (pieces, ends)
        for trailing in (b"V", b"BEGIN LIST VAR ups\n", b"BEGIN LIST VAR ups\nVAR ups a", b"x" * 511):
            for pieces in ([data + trailing], [data, trailing], [data[:1], data[1:] + trailing]):
                ends, core = frame(pieces)
                assert ends == wanted and not core.whole, pieces


def test_replies_in_random_pieces():
    """Random replies, lists with cut lines and lines like END LIST among them, are framed in any pieces."""
    chance = random.Random(7)
    for _ in range(300):
        replies = [b"".join(chance.choice(REPLIES)) for _ in range(chance.randint(1, 4))]
        data = b"".join(replies)
        lengths, core, at = frame([data])[0], Replies(), 0
        assert lengths[-1] == len(data)
        for piece in torn(data, chance, chance.choice((3, 40, 700))):
            ended = [at + end for end, _ in core.feed(piece)]
            at += len(piece)
            assert ended == [end for end in lengths if at - len(piece) < end <= at]
            assert core.whole == (at in lengths)


# ---- conversations ------------------------------------------------------------------------------

READ = "GET LIST VER NETVER PROTVER HELP LOGOUT DETACH".split()
MONITOR = READ + "USERNAME PASSWORD LOGIN ATTACH".split()
PRIMARY = MONITOR + "PRIMARY MASTER FSD".split()
OTHERS = "SET INSTCMD NONSENSE".split()


def converse(pieces, talk=None):
    """Give pieces to a Conversation: (it, bytes for upsd, bytes for the client)."""
    talk = talk or Conversation(ALREADY)
    up = back = b""
    for piece in pieces:
        more = talk.from_client(piece)
        up, back = up + more[0], back + more[1]
    return talk, up, back


def test_every_command_passes_byte_for_byte():
    """Without access classes every command but STARTTLS goes to upsd as it came."""
    for data, words, _ in LINES:
        for pieces in ways(data):
            talk, up, back = converse(pieces)
            assert (up, back, talk.sent) == (data, b"", len(words))


def test_own_replies_come_in_their_turn():
    """A reply of the shim's own comes behind all that upsd still owes, and at once if it owes nothing."""
    commands = b"VER\nSTARTTLS\nLIST VAR ups\nSTARTTLS\nSTARTTLS\nNETVER\n"
    replies = b"upsd\n" + LIST_VAR + b"1.3\n"
    wanted = b"upsd\n" + ALREADY + LIST_VAR + ALREADY + ALREADY + b"1.3\n"
    for pieces in ways(commands):
        talk, up, back = converse(pieces)
        assert (up, back) == (b"VER\nLIST VAR ups\nNETVER\n", b"")
        assert talk.sent == 3 and talk.busy and len(talk.due) == 3
        assert talk.from_upstream(replies) == wanted
        assert talk.got == 3 and not talk.busy and not talk.due and talk.counted
    for pieces in ways(replies):
        talk, _, _ = converse([commands])
        assert b"".join(talk.from_upstream(piece) for piece in pieces) == wanted, pieces
    talk, up, back = converse([b"STARTTLS\nVER\n"])
    assert (up, back) == (b"VER\n", ALREADY)
    assert talk.from_upstream(b"up") == b"up" and converse([b"STARTTLS\n"], talk)[2] == b""
    assert talk.from_upstream(b"sd\n") == b"sd\n" + ALREADY


def test_half_a_reply_is_owed():
    """busy lasts until the last reply is whole: not half a line, not a list without its end."""
    for replies in (LIST_VAR, OK, LIST_EMPTY):
        for cut in range(len(replies)):
            talk, _, _ = converse([b"LIST VAR ups\n"])
            talk.from_upstream(replies[:cut])
            assert talk.busy, cut
            talk.from_upstream(replies[cut:])
            assert not talk.busy, cut


def test_starttls_inside_is_never_passed_on():
    """STARTTLS is answered by the shim however it is written, and upsd never sees it."""
    for line in (b"STARTTLS\n", b"starttls\r\n", b" StartTLS \t\n", b'"STARTTLS"\n', b"START\\TLS\n", b"START\0TLS\n",
                 b"STARTTLS # x\n", b"STARTTLS now\n", b"START\\\nTLS\n"):
        for pieces in ways(line):
            assert converse(pieces)[1:] == (b"", ALREADY), pieces


def test_access_classes_let_pass_what_they_name():
    """Of every class exactly the commands of the contract pass; the others get ACCESS-DENIED and go nowhere."""
    allowed = {"read": READ, "monitor": MONITOR, "primary": PRIMARY}
    assert set(nutshim.CLASSES) == set(allowed) | {"admin"}
    for name, verbs in nutshim.CLASSES.items():
        for verb in PRIMARY + OTHERS:
            line = b"%s a b\n" % verb.encode("ascii")
            for raw in (line, line.lower(), b" " + line, line.replace(b"E", b"\\E", 1)):
                talk, up, back = converse([raw], Conversation(ALREADY, verbs))
                passes = name == "admin" or verb in allowed[name]
                assert (up, back) == ((raw, b"") if passes else (b"", DENIED)), (name, raw)
                assert talk.refused == (not passes) and talk.sent == passes


def test_access_classes_are_not_fooled():
    """What upsd would read as a refused command is refused however it is written, pipelined or cut."""
    for raw in (b"SET VAR ups a b\n", b'"SET" VAR ups a b\n', b"S\\ET VAR\n", b"S\0ET VAR\n", b"\xffSET VAR\n", b"\rSET\rVAR\n",
                b"SET=x\n", b"SE\\\nT VAR\n", b'GET VAR "a\nSET VAR ups a b\n"\n', b'GET "#"\n'):
        for pieces in ways(b"VER\n" + raw + b"NETVER\n"):
            talk, up, _ = converse(pieces, Conversation(ALREADY, nutshim.CLASSES["read"]))
            assert up == b"VER\nNETVER\n", pieces
            assert talk.from_upstream(b"upsd\n1.3\n") == b"upsd\n" + DENIED + b"1.3\n"


def test_more_replies_than_commands_end_the_count():
    """After an upstream has answered VER in two lines nothing is reordered, and own replies come at once."""
    two = b"Network UPS Tools\nupsd of another kind\n"
    for pieces in ways(two):
        talk, _, _ = converse([b"VER\n"])
        assert b"".join(talk.from_upstream(piece) for piece in pieces) == two, pieces
        assert not talk.counted and talk.busy, pieces
        assert talk.from_client(b"GET VAR ups a\nSTARTTLS\nUSERNAME bob\n") == (b"GET VAR ups a\nUSERNAME bob\n", ALREADY)
        assert talk.from_upstream(b"VAR ups a") == b"VAR ups a" and talk.from_client(b"STARTTLS\n") == (b"", ALREADY)
        assert talk.from_upstream(b' "1"\nOK\n') == b' "1"\nOK\n' and talk.from_upstream(OK) == OK
        assert not talk.counted and not talk.facts and not talk.due
    talk = Conversation(ALREADY)
    talk.from_upstream(OK)
    assert not talk.counted, "a reply that nobody asked for"
    talk, _, back = converse([b"VER\nSTARTTLS\nVER\nSTARTTLS\nSTARTTLS\n"])
    assert not back
    got = talk.from_upstream(two + two)
    assert got.count(ALREADY) == 3 and got.replace(ALREADY, b"") == two + two, "none is lost"


def test_an_odd_command_ends_the_count():
    """From an odd command on upsd's replies are not counted: nothing is a fact, and own replies do not wait."""
    for line in (b'GET VAR ups "a#"\n', b'GET VAR "a\nb"\n', b"VE\\\nR\n"):
        talk, up, _ = converse([line])
        assert up == line and not talk.counted and talk.busy
        assert talk.from_client(b"STARTTLS\nUSERNAME bob\n") == (b"USERNAME bob\n", ALREADY)
        assert talk.from_upstream(b"ERR UNKNOWN-COMMAND\nOK\n").endswith(OK) and not talk.facts
        assert talk.busy and not talk.counted
        talk, _, _ = converse([b"PASSWORD p\n" + line + b"LOGIN ups\n"])
        assert talk.from_upstream(OK * 3) == OK * 3 and not talk.facts


def test_what_came_before_an_odd_command_is_still_counted():
    """Own replies and identities before an odd command keep their turn and their reply."""
    for line in (b'GET VAR ups "a#"\n', b'GET VAR "a\nb"\n', b"VE\\\nR\n"):
        for replies in ways(b"OK\n1.3\nERR ACCESS-DENIED\nOK\n"):
            talk, _, back = converse([b"PASSWORD p\nNETVER\nSTARTTLS\nUSERNAME eve\nLOGIN ups\nSTARTTLS\n" + line])
            assert back == b"" and len(talk.due) == 4
            got = b"".join(talk.from_upstream(piece) for piece in replies)
            assert got == b"OK\n1.3\n" + ALREADY + DENIED + OK + ALREADY, replies
            assert talk.facts == [(b"LOGIN", b"ups")] and not talk.due


IDENTITIES = [          # commands, the reply to each, what is known afterwards
    (b"USERNAME bob\n", [OK], [(b"USERNAME", b"bob")]),
    (b"USERNAME bob\n", [DENIED], []),
    (b"USERNAME bob\nPASSWORD p\nLOGIN ups\n", [OK, OK, DENIED], [(b"USERNAME", b"bob")]),
    (b'username "b b"\nPASSWORD p\nlogin ups\nATTACH x\n', [OK] * 4,
     [(b"USERNAME", b"b b"), (b"LOGIN", b"ups"), (b"ATTACH", b"x")]),
    (b"USERNAME bob\nUSERNAME eve\n", [OK, b"ERR ALREADY-SET-USERNAME\n"], [(b"USERNAME", b"bob")]),
    (b"USERNAME eve\nUSERNAME bob\n", [b"ERR INVALID-ARGUMENT\n", OK], [(b"USERNAME", b"bob")]),
    (b"LIST VAR ups\nSTARTTLS\nUSERNAME bob\nVER\nLOGIN ups\n", [LIST_VAR, OK, b"upsd\n", OK],
     [(b"USERNAME", b"bob"), (b"LOGIN", b"ups")]),
    (b"VER\nUSERNAME bob\nVER\n", [OK, b"OKAY\n", OK], []),
    (b"USERNAME bob\nSTARTTLS\n", [b"OK TRACKING 1\n"], []),
    (b"USERNAME\nUSERNAME a b\nLOGIN\nSET VAR ups a OK\n", [OK] * 4, []),
]


def test_only_what_upsd_said_ok_to_is_a_fact():
    """A user or UPS is a fact once the reply to its own command is OK, pipelined or not, cut anywhere."""
    for commands, replies, facts in IDENTITIES:
        lines, data = commands.splitlines(True), b"".join(replies)
        assert len(lines) == len(replies) + commands.count(b"STARTTLS")
        for pieces in ways(data):
            talk, up, _ = converse([commands])
            assert not talk.facts and up == commands.replace(b"STARTTLS\n", b"")
            got = b"".join(talk.from_upstream(piece) for piece in pieces)
            assert talk.facts == facts and got.replace(ALREADY, b"") == data, (commands, pieces)
            assert not talk.due and talk.counted
        for pieces in ways(commands):
            talk, _, _ = converse(pieces)
            talk.from_upstream(data)
            assert talk.facts == facts
        talk = Conversation(ALREADY)                # one by one
        for line, reply in zip([line for line in lines if line != b"STARTTLS\n"], replies):
            talk.from_client(line)
            talk.from_upstream(reply)
        assert talk.facts == facts


def test_a_refused_identity_is_no_fact():
    """What an access class does not let through never becomes a fact, whatever upsd says next."""
    talk, up, back = converse([b"USERNAME bob\nVER\nLOGIN ups\n"], Conversation(ALREADY, nutshim.CLASSES["read"]))
    assert (up, back) == (b"VER\n", DENIED) and talk.from_upstream(OK) == OK + DENIED and not talk.facts


def test_what_waits_is_told():
    """waiting counts all that is kept for replies to come, so that whoever reads the client can bound it."""
    talk, _, _ = converse([b"VER\n" + b"USERNAME a\nSTARTTLS\n" * 500])
    assert len(talk.due) == 1000
    talk.from_upstream(b"upsd\n" + OK * 500)
    assert len(talk.due) == 0 and len(talk.facts) == 500


def test_the_log_gets_commands_only_when_traced():
    """With trace the words of every command are noted, refused ones and the shim's own too; without none is."""
    data = b"username u\nPASSWORD p\nGET VAR ups a\nSTARTTLS\n\nFSD \"ups\"\n"
    noted = [line.replace(b'"', b"").split() for line in data.splitlines()]
    for access in nutshim.CLASSES.values():
        for pieces in ways(data):
            assert converse(pieces, Conversation(ALREADY, access, trace=True))[0].seen == noted
            assert converse(pieces, Conversation(ALREADY, access))[0].seen == []


FUZZED = ["VER", "NETVER", "HELP", "LIST VAR ups", "LIST RW ups", "LIST UPS", "LIST VAR nobody", "GET VAR ups ups.status",
          "GET VAR ups ups.model", "GET VAR ups none", "GET CMDDESC ups " + "A" * 520, "USERNAME secondary", "USERNAME eve",
          "PASSWORD secondarypass", "LOGIN ups", "LOGIN nobody", "USERNAME a b",
          "SET VAR ups ups.mfr x", "INSTCMD ups load.off", "FSD ups", "STARTTLS", "starttls", '"GET" VAR ups "ups.status"',
          "NONSENSE", "", "# comment", "VER # c", "GET VAR=ups", 'GET VAR ups "a\\#b"', "V\x01ER", "G\\ET VAR ups ups.mfr"]


def test_fuzz_each_command_gets_its_reply_in_order():
    """Whatever a client pipelines and wherever both streams are cut, it gets each command's reply, in order."""
    for seed in range(600):
        chance = random.Random(seed)
        one, real = Session(StandIn()), Session(StandIn())      # never started: they lend their replies
        access = chance.choice(list(nutshim.CLASSES))
        talk = Conversation(ALREADY, nutshim.CLASSES[access], trace=chance.random() < 0.5)
        lines = [chance.choice(FUZZED) for _ in range(chance.randint(1, 25))]
        wanted = owed = passed = b""
        facts = []
        for line in lines:
            line = line.encode("ascii") + b"\n"
            words = Parser().feed(line)[0]
            verb = words[0].upper() if words else ""
            if verb == "STARTTLS":
                wanted += ALREADY
            elif access != "admin" and verb not in {"read": READ, "monitor": MONITOR, "primary": PRIMARY}[access]:
                wanted += DENIED
            else:
                passed += line
                reply = one.feed(line)
                wanted += reply
                if verb in ("USERNAME", "LOGIN") and reply == OK:
                    facts.append((verb.encode("ascii"), words[1].encode("ascii")))
        got = sent = b""
        for piece in torn(("\n".join(lines) + "\n").encode("ascii"), chance, chance.choice((1, 5, 40, 400))):
            up, back = talk.from_client(piece)
            got, sent, owed = got + back, sent + up, owed + real.feed(up)
            while owed and chance.random() < 0.6:
                size = chance.randint(1, chance.choice((3, 600)))
                got, owed = got + talk.from_upstream(owed[:size]), owed[size:]
        for piece in torn(owed, chance, 600):
            got += talk.from_upstream(piece)
        assert got == wanted, "seed %d: %r" % (seed, lines)
        assert sent == passed and not talk.busy and talk.sent == len(Parser().feed(passed)), seed
        assert talk.facts == facts, seed


# ---- questions over a shared session ------------------------------------------------------------

NAMED = {                                           # a question and how its reply begins
    b"GET VAR ups ups.status\n": b"VAR ups ups.status ", b"GET TYPE ups a\n": b"TYPE ups a ",
    b"GET DESC ups a\n": b"DESC ups a ", b"GET CMDDESC ups load.off\n": b"CMDDESC ups load.off ",
    b"GET UPSDESC ups\n": b"UPSDESC ups ", b"GET NUMLOGINS ups\n": b"NUMLOGINS ups ",
    b"get  var   Ups Ups.Status\r\n": b"VAR Ups Ups.Status ", b"Get UpsDesc a'b;c\n": b"UPSDESC a'b;c "}
LISTED = {                                          # a question and what its list is of
    b"LIST UPS\n": b"UPS", b"LIST VAR ups\n": b"VAR ups", b"LIST RW ups\n": b"RW ups", b"LIST CMD ups\n": b"CMD ups",
    b"LIST CLIENT ups\n": b"CLIENT ups", b"LIST ENUM ups a.b\n": b"ENUM ups a.b", b"LIST RANGE ups a.b\n": b"RANGE ups a.b",
    b"list  var Ups\r\n": b"VAR Ups"}
ALONE = [b"VER\n", b"NETVER\n", b"protver\n", b"HELP\r\n"]
NO_QUESTIONS = [
    b"", b"\n", b"\r\n", b" \n", b"VER", b"VER\nVER\n", b"VER\n\n", b" VER\n", b"VER \n", b"VER\r\r\n", b"VER x\n", b"HELP x\n",
    b"GET\n", b"LIST\n", b"GET VAR\n", b"GET VAR ups\n", b"GET VAR ups a b\n", b"GET TYPE ups\n", b"GET DESC ups\n",
    b"GET CMDDESC ups\n", b"GET UPSDESC\n", b"GET UPSDESC ups a\n", b"GET NUMLOGINS\n", b"GET NUMLOGINS ups a\n",
    b"GET TRACKING\n", b"GET TRACKING 1\n", b"GET UPS\n", b"GET CLIENT ups\n", b"GET NONSENSE ups a\n", b"LIST UPS ups\n",
    b"LIST VAR\n", b"LIST VAR ups a\n", b"LIST RW\n", b"LIST CMD ups a\n", b"LIST CLIENT\n", b"LIST ENUM ups\n",
    b"LIST ENUM ups a b\n", b"LIST RANGE ups\n", b"LIST TYPE ups a\n", b"LIST NONSENSE ups\n", b"GETVAR ups a\n",
    b"USERNAME a\n", b"PASSWORD a\n", b"LOGIN ups\n", b"ATTACH ups\n", b"LOGOUT\n", b"DETACH\n", b"STARTTLS\n", b"FSD ups\n",
    b"SET VAR ups a b\n", b"SET TRACKING ON\n", b"INSTCMD ups a\n", b"PRIMARY ups\n", b"MASTER ups\n", b"NONSENSE\n"]


def test_questions_are_exactly_these_forms():
    """Only the forms whose reply repeats the question, and VER, NETVER, PROTVER, HELP, are questions."""
    def parts(raw):
        found = question(raw)
        return found.raw, found.head, found.item, found.tail
    for raw, head in NAMED.items():
        assert parts(raw) == (raw, head.lower(), b"", b""), raw
    for raw, what in LISTED.items():
        assert parts(raw) == (raw, b"begin list " + what.lower() + b"\n", what + b" ", b"END LIST " + what + b"\n")
    for raw in ALONE:
        assert parts(raw) == (raw, b"", b"", b""), raw
    for raw in NO_QUESTIONS:
        assert question(raw) is None, raw
    for raw in list(NAMED) + list(LISTED) + ALONE:
        for cut in range(len(raw)):
            assert question(raw[:cut]) is None
        assert question(raw + raw) is None and question(raw + b"V") is None
    assert question(b"GET VAR ups %s\n" % (b"a" * 240)) and not question(b"GET VAR ups %s\n" % (b"a" * 250))


def test_nothing_odd_is_a_question():
    """One odd byte anywhere (quote, escape, #, =, control, 8-bit) and the line is no question."""
    for raw in (b"GET VAR ups a\n", b"LIST UPS\n", b"VER\n"):
        for odd in b'"\\#=' + bytes(range(32)) + bytes(range(127, 256)):
            for at in range(len(raw)):
                line = raw[:at] + bytes([odd]) + raw[at:]
                assert question(line) is None or odd == 13 and at == len(raw) - 1, line
                if at < len(raw) - 1:
                    assert question(raw[:at] + bytes([odd]) + raw[at + 1:]) is None, (raw, at, odd)


def asked(*raws):
    """Questions with these asked and sent, by askers 0, 1, ..."""
    core = Questions()
    for asker, raw in enumerate(raws):
        core.ask(asker, question(raw))
    assert core.to_send() == b"".join(raws)
    return core


def answers(core, pieces):
    """What each asker gets of these pieces: {asker: [replies]}."""
    got = {}
    for piece in pieces:
        for asker, data, _ in core.feed(piece):
            got.setdefault(asker, []).append(data)
    return got


STATUS = b'VAR ups ups.status "OL"\n'
TYPE = b"TYPE ups a NUMBER\n"
UNKNOWN = b"ERR UNKNOWN-UPS\n"
LISTED_UPS = b'BEGIN LIST UPS\nUPS ups "a"\nEND LIST UPS\n'


def test_every_reply_goes_to_its_asker():
    """Replies, lists and errors are handed out whole, each to its asker, however they are cut."""
    raws = [b"GET VAR ups ups.status\n", b"LIST VAR ups\n", b"GET TYPE ups a\n", b"LIST RW ups\n", b"LIST UPS\n",
            b"GET UPSDESC no\n"]
    replies = [STATUS, LIST_VAR, TYPE, LIST_EMPTY, UNKNOWN, UNKNOWN]
    for pieces in ways(b"".join(replies)):
        core = asked(*raws)
        assert answers(core, pieces) == {at: [reply] for at, reply in enumerate(replies)}, pieces
        assert not core.fault and not core.sent and not core.waiting and not core.unanswered()
    for raw, reply in zip(raws, replies):
        for cut in range(len(reply)):
            core = asked(raw)
            assert core.feed(reply[:cut]) == [] and not core.fault
            assert [each for each, _ in core.unanswered()] == [0]
            assert core.feed(reply[cut:]) == [(0, reply, True)]


def test_free_lines_travel_alone():
    """VER, NETVER, PROTVER and HELP are sent when nothing is owed, and nothing is sent until they are answered."""
    core = Questions([(0, question(b"LIST UPS\n"))])
    for asker, raw in enumerate([b"GET TYPE ups a\n", b"VER\n", b"LIST UPS\n", b"HELP\r\n", b"GET TYPE ups a\n",
                                 b"LIST RW ups\n", b"netver\n"], 1):
        core.ask(asker, question(raw))
    for sent, replies in [([b"LIST UPS\n", b"GET TYPE ups a\n"], [UNKNOWN, TYPE]), ([b"VER\n"], [b"upsd 2.8\n"]),
                          ([b"LIST UPS\n"], [LISTED_UPS]), ([b"HELP\r\n"], [b"Commands: HELP\n"]), ([b"GET TYPE ups a\n", b"LIST RW ups\n"], [TYPE, LIST_EMPTY]),
                          ([b"netver\n"], [UNKNOWN])]:
        assert core.to_send() == b"".join(sent) and core.to_send() == b""
        got = []
        for at, reply in enumerate(replies):
            assert core.to_send() == b"" or at and core.sent[0][1].head
            got += core.feed(reply)
        assert [data for _, data, _ in got] == replies and not core.fault
    assert not core.waiting and not core.sent


def test_a_free_line_behind_another_waits_for_a_list():
    """VER behind VER is sent once a LIST of our own has come between, so that the first one's late lines end the session."""
    for late in (b"", b"via a shim\n"):
        core = asked(b"VER\n")
        core.ask(1, question(b"HELP\n"))
        assert core.to_send() == b"" and core.feed(b"upsd 2.8.0,\n") == [(0, b"upsd 2.8.0,\n", True)]
        assert core.to_send() == b"LIST UPS\n" and core.to_send() == b""
        assert [each.raw for _, each in core.unanswered()] == [b"HELP\n"], "ours is not asked again elsewhere"
        assert core.feed(late + LISTED_UPS) == []
        assert bool(core.fault) == bool(late)
        if not late:
            assert core.to_send() == b"HELP\n" and core.feed(b"Commands: HELP\n") == [(1, b"Commands: HELP\n", True)]
            assert core.to_send() == b"" and not core.sent and not core.waiting, "nobody asks, so there is no LIST"
            core.ask(2, question(b"GET TYPE ups a\n"))             # whose reply does as well
            assert core.to_send() == b"GET TYPE ups a\n" and core.feed(TYPE) == [(2, TYPE, True)]
            core.ask(3, question(b"VER\n"))
            assert core.to_send() == b"VER\n"


FAULTS = [              # a question, what comes, words of the fault, what may be handed out before
    (b"GET VAR ups ups.status\n", b'VAR ups ups.statu "OL"\n', "another answer", b""),
    (b"GET VAR ups ups.status\n", b'VAR ups ups.status\n', "another answer", b""),
    (b"GET VAR ups ups.status\n", b'VAR ups2 ups.status "OL"\n', "another answer", b""),
    (b"GET VAR ups ups.status\n", b'TYPE ups ups.status "OL"\n', "another answer", b""),
    (b"GET VAR ups ups.status\n", LIST_VAR, "another answer", b""),
    (b"GET VAR ups ups.status\n", b"ERRATIC\n", "another answer", b""),
    (b"GET VAR ups ups.status\n", b"OK\n", "another answer", b""),
    (b"GET VAR ups ups.status\n", b"\n", "another answer", b""),
    (b"GET VAR ups ups.status\n", b"\0\n", "another answer", b""),
    (b"GET VAR ups ups.status\n", b'VAR ups\0ups.status "OL"\n', "another answer", b""),
    (b"GET VAR ups ups.status\n", STATUS + STATUS, "nobody asked", STATUS),
    (b"GET VAR ups ups.status\n", STATUS + b"\0", "nobody asked", STATUS),
    (b"GET VAR ups ups.status\n", b"VAR ups ups.status \"" + b"x" * 492, "cut at 512", b""),
    (b"GET VAR ups ups.status\n", b"x" * 512, "cut at 512", b""),
    (b"LIST VAR ups\n", STATUS, "another answer", b""),
    (b"LIST VAR ups\n", b"BEGIN LIST VAR ups2\n", "another answer", b""),
    (b"LIST VAR ups\n", b"BEGIN LIST VAR ups x\n", "another answer", b""),
    (b"LIST VAR ups\n", b"BEGIN LIST RW ups\n", "another answer", b""),
    (b"LIST VAR ups\n", b"END LIST VAR ups\n", "another answer", b""),
    (b"LIST VAR ups\n", b'BEGIN LIST VAR ups\nVAR ups2 a "1"\n', "another list", b""),
    (b"LIST VAR ups\n", b'BEGIN LIST VAR ups\nRW ups a "1"\n', "another list", b""),
    (b"LIST VAR ups\n", b"BEGIN LIST VAR ups\nERR DATA-STALE\n", "another list", b""),
    (b"LIST VAR ups\n", b"BEGIN LIST VAR ups\nBEGIN LIST VAR ups\n", "another list", b""),
    (b"LIST VAR ups\n", b"BEGIN LIST VAR ups\nEND LIST RW ups\n", "another list", b""),
    (b"LIST VAR ups\n", b"BEGIN LIST VAR ups\nEND LIST VAR ups2\n", "another list", b""),
    (b"LIST VAR ups\n", b"BEGIN LIST VAR ups\nEND LIST\n", "another list", b""),
    (b"LIST VAR ups\n", b'BEGIN LIST VAR ups\nVAR ups a "1"\n\0\n', "another list", b""),
    (b"LIST VAR ups\n", b"BEGIN LIST VAR ups\nVAR ups a " + b"x" * 502, "cut at 512", b""),
    (b"LIST VAR ups\n", LIST_VAR + b"END LIST VAR ups\n", "nobody asked", LIST_VAR),
    (b"LIST UPS\n", b"BEGIN LIST UPS\nVAR ups a \"1\"\n", "another list", b""),
    (b"VER\n", STATUS, "another answer", b""),
    (b"VER\n", b"BEGIN LIST VAR ups\n", "another answer", b""),
    (b"VER\n", b"END LIST VAR ups\n", "another answer", b""),
    (b"VER\n", b"x" * 512, "cut at 512", b""),
]


def test_replies_that_do_not_match_are_faults():
    """Another's reply, a second line, a cut line, a strange item or end: a fault, and no byte of it is handed out."""
    for raw, data, words, before in FAULTS:
        for pieces in list(ways(data)) if len(data) < 200 else [[data], [data[:300], data[300:]], [data[:511], data[511:]]]:
            core = asked(raw)
            assert answers(core, pieces) == ({0: [before]} if before else {}), pieces
            assert words in core.fault, (pieces, core.fault)
            assert "\n" not in core.fault and "\0" not in core.fault
            assert core.feed(data) == [], "after a fault nothing is handed out"
            assert len(core.unanswered()) == (not before)
        core = asked(b"GET TYPE ups a\n", raw, b"LIST RW ups\n") if question(raw).head else asked(raw)
        if question(raw).head and not before:
            assert core.feed(TYPE + data) == [(0, TYPE, True)] and core.fault
            assert [each for each, _ in core.unanswered()] == [1, 2]
    core = Questions()
    assert core.feed(b"O") == [] and "nobody asked" in core.fault
    core = asked(b"VER\n")
    assert core.feed(b"two\nlines\n") == [] and "more than one line" in core.fault and "lines" in core.fault
    core = asked(b"VER\n")
    assert core.feed(UNKNOWN + b"V") == [] and "more than one line" in core.fault


def test_a_line_of_512_bytes_is_whole():
    """A reply of exactly 512 bytes with its newline, the most that upsd sends, is no cut one."""
    line = b"VAR ups ups.status \"" + b"x" * 490 + b"\"\n"
    assert len(line) == 512
    for pieces in ([line], [line[:511], line[511:]], torn(line, random.Random(6))):
        core = asked(b"GET VAR ups ups.status\n")
        assert answers(core, pieces) == {0: [line]} and not core.fault


def test_names_that_upsd_knows_itself_come_in_its_own_case():
    """The names of a reply are matched without regard to case; the bytes stay upsd's."""
    reply = b'VAR ups server.info "upsd"\n'
    for raw in (b"GET VAR ups SERVER.INFO\n", b"get var UPS Server.Info\n"):
        core = asked(raw)
        assert core.feed(reply) == [(0, reply, True)] and not core.fault


def long_list(name, size):
    """The lines of a LIST VAR of more than so many bytes."""
    lines = [b"BEGIN LIST VAR %s\n" % name]
    while sum(map(len, lines)) <= size:
        lines += [b'VAR %s outlet.%d.desc "%s"\n' % (name, len(lines), b"v" * 200)] * 20
    return lines + [b"END LIST VAR %s\n" % name]


def test_long_lists_come_in_parts():
    """A list of more than 64 KiB is handed out in parts of whole lines; then it cannot be asked again."""
    data = b"".join(long_list(b"ups", 200000))
    for size in (1000, 16384, 70000, len(data)):
        core, got, begun = asked(b"LIST VAR ups\n", b"GET TYPE ups a\n", b"LIST RW ups\n"), b"", 0
        for at in range(0, len(data), size):
            for asker, part, whole in core.feed(data[at:at + size]):
                got += part
                assert asker == 0 and part.endswith(b"\n") and whole == (at + size >= len(data))
            assert len(core._data) <= nutshim.HIGH_WATER + max(size, 512), "memory is bounded"
            if core.sent[0][0] == 0:
                assert core.begun == bool(got) and [each for each, _ in core.unanswered()] == ([1, 2] if got else [0, 1, 2])
                begun += core.begun
        assert got == data and not core.begun and not core.fault
        assert bool(begun) == (size < len(data))
        assert answers(core, [TYPE, LIST_EMPTY]) == {1: [TYPE], 2: [LIST_EMPTY]} and not core.fault
    core = asked(b"LIST VAR ups\n", b"GET TYPE ups a\n")
    part = core.feed(data[:100000])
    assert [(asker, whole) for asker, _, whole in part] == [(0, False)] and data.startswith(part[0][1])
    core.feed(data[100000:150000] + b"\nx\n")                       # a fault further on
    assert core.fault and core.begun and core.feed(data[150000:]) == [] and [each for each, _ in core.unanswered()] == [1]


def test_who_has_left_gets_nothing():
    """forget(): what is not sent is not asked, what is sent is dropped when it comes, and nobody else notices."""
    one, two, raws = object(), object(), [b"LIST VAR ups\n", b"GET TYPE ups a\n", b"LIST RW ups\n", b"VER\n"]
    for gone in (one, two):
        for pieces in ways(LIST_VAR + TYPE + LIST_EMPTY):
            core = Questions()
            for asker, raw in zip((one, two, one, gone), raws):
                core.ask(asker, question(raw))
            assert core.to_send() == b"".join(raws[:3])
            core.forget(gone)
            assert [asker for asker, _ in core.unanswered()] == [asker for asker in (one, two, one) if asker is not gone]
            assert answers(core, pieces) == ({one: [LIST_VAR, LIST_EMPTY]} if gone is two else {two: [TYPE]})
            assert not core.fault and not core.waiting and core.to_send() == b""
    core = asked(b"LIST VAR ups\n", b"GET TYPE ups a\n")            # in the middle of a long list
    data = b"".join(long_list(b"ups", 200000))
    assert core.feed(data[:70000])
    core.forget(0)
    assert answers(core, torn(data[70000:] + TYPE, random.Random(8), 16384)) == {1: [TYPE]} and not core.fault
    core = asked(b"VER\n")                                          # its line is still owed
    core.forget(0)
    core.ask(1, question(b"GET TYPE ups a\n"))
    assert core.to_send() == b"" and core.feed(b"upsd\n") == [] and core.to_send() == b"GET TYPE ups a\n"


class Model:
    """An upsd that puts the words of the question into every line of its reply but ERR, and goes wrong once."""
    UPSES = [b"ups", b"Ups2", b"u"]

    def __init__(self, chance, faulty):
        self.chance, self.countdown = chance, chance.randint(0, 60) if faulty else -1
        self.owed = []                              # lines not delivered yet
        self.wrong = False

    def question(self):
        """A random question."""
        chance = self.chance
        ups, name = chance.choice(self.UPSES), chance.choice([b"a", b"ups.status", b"b.c"])
        form = chance.random()
        if form < 0.1:
            return chance.choice([b"VER\n", b"NETVER\n", b"HELP\n"])
        if form < 0.5:
            return b"GET %s %s %s\n" % (chance.choice([b"VAR", b"CMDDESC", b"DESC"]), ups, name)
        if form < 0.6:
            return chance.choice([b"LIST UPS\n", b"GET UPSDESC %s\n" % ups, b"LIST ENUM %s %s\n" % (ups, name)])
        return b"LIST %s %s\n" % (chance.choice([b"VAR", b"RW", b"CMD"]), ups)

    def reply(self, raw, size):
        """The lines of the reply to one question; size: of a list, in items."""
        words, tag = raw.split(), b"<%s>" % raw.strip()
        if words[0] == b"GET":
            return [b"ERR VAR-NOT-SUPPORTED\n"] if size == 3 else [b'%s "%s"\n' % (b" ".join(words[1:]), tag)]
        if words[0] == b"LIST":
            what = b" ".join(words[1:])
            items = [b'%s %d "%s"\n' % (what, number, tag) for number in range(size)]
            return [b"ERR UNKNOWN-UPS\n"] if size == 3 else [b"BEGIN LIST %s\n" % what] + items + [b"END LIST %s\n" % what]
        return [b"Network UPS Tools %s\n" % tag]

    def take(self, commands):
        """The replies to commands, with a fault in one of them perhaps."""
        for raw in commands.splitlines(True):
            self.owed += self.reply(raw, self.chance.choice([0, 1, 3, 4, 9]))
            self.countdown -= 1
            if self.countdown == 0 and self.owed:
                self.go_wrong()

    def go_wrong(self):
        """Mutate, drop, double, swap, move or cut a line, or put one in."""
        chance, owed, self.wrong = self.chance, self.owed, True
        at = chance.randrange(len(owed))
        kind = chance.randrange(9)
        if kind == 0:
            line = bytearray(owed[at])
            line[chance.randrange(min(6, len(line) - 1))] = chance.choice(b"\0\nxU E")
            owed[at] = bytes(line)
        elif kind == 1:
            del owed[at]
        elif kind == 2:
            owed.insert(at, owed[at])
        elif kind == 3:
            other = chance.randrange(len(owed))
            owed[at], owed[other] = owed[other], owed[at]
        elif kind == 4:
            owed.append(owed.pop(at))
        elif kind == 5:
            owed[at] = owed[at][:-1] + b"x" * (512 - len(owed[at]))     # cut, without its newline
        elif kind == 7:
            owed[at] = owed[at][:-1]                        # its newline is lost
        elif kind == 6:
            owed.insert(at, chance.choice([b"\0\n", b"\n", b"OK\n", b"END LIST\n", b"\0" * 600]))
        else:
            owed.insert(at, chance.choice(self.reply(self.question(), 2)))


def is_own(raw, reply):
    """Whether a reply is made of the question's own lines only."""
    lines, what = reply.splitlines(True), b" ".join(raw.split()[1:])
    if reply.startswith(b"ERR "):
        return len(lines) == 1
    if raw.startswith(b"LIST"):
        start, end = b"BEGIN LIST %s\n" % what, b"END LIST %s\n" % what
        tags = b"<%s>" % raw.strip(), b"<GET %s " % what       # a GET's line is true in that list too
        return (lines[0], lines[-1]) == (start, end) and all(
            line.startswith(what + b" ") and (tags[0] in line or tags[1] in line) for line in lines[1:-1])
    return len(lines) == 1 and (b"<%s>" % raw.strip() in reply or len(raw.split()) == 1 and b"<" not in reply)


GLUED = [
    (b"GET VAR ups a\n", b'VAR ups a "1"'), (b"GET DESC ups a\n", b'DESC ups a "it is \\"so\\""'),
    (b"GET TYPE ups a\n", b"TYPE ups a RW STRING:32"), (b"GET NUMLOGINS ups\n", b"NUMLOGINS ups 3"),
    (b"GET VAR ups a\n", b"ERR VAR-NOT-SUPPORTED")]


def test_a_reply_that_has_lost_its_newline_takes_no_other_with_it():
    """What stands behind a reply in its line is a fault, and nobody gets it; the reply alone is right."""
    for raw, reply in GLUED:
        for behind, right in ((b"\n", True), (b'VAR ups b "2"\n', False), (b"NUMLOGINS ups 1\n", False),
                              (b"\r\n", False), (b' "2"\n', False), (b"ERR UNKNOWN-UPS\n", False)):
            for pieces in ways(reply + behind):
                core = Questions()
                core.ask("one", question(raw))
                core.ask("other", question(b"GET VAR ups b\n"))
                core.to_send()
                got = [each for piece in pieces for each in core.feed(piece)]
                assert got == ([("one", reply + behind, True)] if right else []), (raw, behind)
                assert bool(core.fault) != right


def ask_and_answer(chance, faulty, rounds):
    """Many askers over one session with an upsd that may go wrong: (the Questions, whether it went wrong)."""
    upsd, core, due, stream = Model(chance, faulty), Questions(), {}, b""
    for count in range(rounds + 300):
        if count < rounds:
            for _ in range(chance.choice([0, 1, 1, 5])):
                asker, raw = chance.randrange(8), upsd.question()
                core.ask(asker, question(raw))
                due.setdefault(asker, []).append(raw)
            if chance.random() < 0.05:
                gone = chance.choice(list(due) or [0])
                core.forget(gone)
                due.pop(gone, None)
        if chance.random() < 0.7 or count >= rounds:
            upsd.take(core.to_send())
        size = chance.randint(1, chance.choice([4, 60, 4000]))
        while upsd.owed and len(stream) < size:
            stream += upsd.owed.pop(0)
        for asker, data, whole in core.feed(stream[:size]) if stream else ():
            raw = due[asker].pop(0)
            assert whole and is_own(raw, data), (raw, data)
        stream = stream[size:]
        left = {asker: raws for asker, raws in due.items() if raws}
        again = {}
        for asker, each in core.unanswered():
            again.setdefault(asker, []).append(each.raw)
        assert again == left, "all that was not answered, in each one's order"
        if core.fault:
            break
    return core, upsd.wrong


def test_nobody_ever_gets_anothers_answer():
    """Whatever goes wrong wherever, no asker gets a byte that is not of a reply to its own question.

    An ERR names no question: one that has lost its place goes to whoever's turn it is. So does a
    free line, to the next VER. And a reply to GET VAR ups a may stand in a list of ups's variables.
    """
    faults = wrong = 0
    for seed in range(400):
        chance = random.Random(seed)
        faulty = seed % 4 != 0
        core, went_wrong = ask_and_answer(chance, faulty, 40)
        assert not core.fault or went_wrong, (seed, core.fault)
        if not went_wrong:
            assert not core.sent and not core.waiting, "all is answered"
        wrong, faults = wrong + went_wrong, faults + bool(core.fault)
    assert faults > 0.6 * wrong > 100, (faults, wrong)


# ---- before TLS ---------------------------------------------------------------------------------

NOT_ENABLED = b"ERR TLS-NOT-ENABLED\n"


def greet(pieces, plaintext=False):
    """Greeting over pieces: (all replies, the verdict, the bytes behind it)."""
    core, replies = Greeting(), b""
    for at, piece in enumerate(pieces):
        reply, verdict, rest = core.feed(piece, plaintext)
        replies += reply
        if verdict:
            return replies, verdict, rest + b"".join(pieces[at + 1:])
    return replies, None, b""


def test_starttls_is_taken_in_every_form_of_upsds():
    """STARTTLS in any case, with CR and blanks, is answered with OK STARTTLS, however it is cut."""
    for line in (b"STARTTLS\n", b"starttls\n", b"StartTls\r\n", b" \tSTARTTLS \t\r\n"):
        for pieces in ways(line):
            assert greet(pieces) == (b"OK STARTTLS\n", "tls", b""), pieces
        for pieces in ways(b"VER\n" + line):
            assert greet(pieces) == (NOT_ENABLED + b"OK STARTTLS\n", "tls", b""), pieces


def test_bytes_behind_starttls_are_an_injection():
    """One byte or more behind STARTTLS's newline in what was read ends the session, and no reply goes out."""
    for behind in (b"V", b"VER\n", b"\n", b"\x16\x03\x01", b"STARTTLS\n", b'"', b"#",
                   b"\0", b"\x16\x03\x01\0", b"x" * 2000):
        line = b"STARTTLS\n"
        data = line + behind
        for cut in range(len(line)):
            with refuses(Reason.INJECTION):
                greet([data[:cut], data[cut:]] if cut else [data])
        for cut in range(len(line), min(len(data), 20)):     # cut right behind it: TLS begins, the rest is no hello
            core = Greeting()
            if cut == len(line):
                assert core.feed(data[:cut]) == (b"OK STARTTLS\n", "tls", b"")
            else:
                with refuses(Reason.INJECTION):
                    core.feed(data[:cut])


def test_other_lines_before_tls_are_refused_seven_times():
    """Any other line gets ERR TLS-NOT-ENABLED, and the eighth is the last."""
    lines = [b"VER\n", b"\n", b"USERNAME x\n", b"# c\n", b"LIST UPS\r\n", b"STARTTLSX\n", b"S TARTTLS\n"]
    for pieces in ways(b"".join(lines)):
        assert greet(pieces) == (NOT_ENABLED * 7, None, b"")
    for pieces in ways(b"".join(lines) + b"x\n"):
        assert greet(pieces)[:2] == (NOT_ENABLED * 8, "refused")
    for pieces in ways(b"".join(lines) + b"STARTTLS\n"):
        assert greet(pieces) == (NOT_ENABLED * 7 + b"OK STARTTLS\n", "tls", b"")


def test_logout_before_tls():
    """LOGOUT or DETACH before TLS gets OK Goodbye."""
    for line in (b"LOGOUT\n", b"logout\r\n", b"DETACH\n"):
        for pieces in ways(b"VER\n" + line):
            assert greet(pieces)[:2] == (NOT_ENABLED + GOODBYE, "goodbye"), pieces


def test_what_is_no_nut_client_is_refused():
    """A NUL, an over-long line and a TLS hello end the session, each with its reason."""
    for pieces in ways(b"VER\nV\0ER\n"):
        with refuses(Reason.BAD_LINE, "NUL"):
            greet(pieces)
    for hello in (b"\x16\x03\x01\x02\x00\x01\x00\x01", b"\x16"):
        for pieces in ways(hello):
            with refuses(Reason.TLS_FIRST):
                greet(pieces)
    for size in (nutshim.MAX_GREETING + 1, 5000, 16000):
        for pieces in ([b"x" * size + b"\n"], [b"x" * size], [b"x"] * size, [b"VER\n" + b"x" * size + b"\nVER\n"],
                       [b'"' + b"x" * size], [b"x" * 1000, b"x" * (size - 1000), b"\n"]):
            with refuses(Reason.BAD_LINE, "more than"):
                greet(pieces)


def test_plaintext_client_goes_on_with_its_first_line():
    """Where plaintext is allowed, the first line that is not STARTTLS begins a session, and no byte of it is lost."""
    for pieces in ways(b"GET VAR ups a\nVER\nNE"):
        assert greet(pieces, True) == (b"", "plain", b"GET VAR ups a\nVER\nNE"), pieces
    for pieces in ways(b"LOGOUT\n"):
        assert greet(pieces, True) == (b"", "plain", b"LOGOUT\n")
    for pieces in ways(b"STARTTLS\n"):
        assert greet(pieces, True) == (b"OK STARTTLS\n", "tls", b"")


def test_upstreams_answer_to_starttls():
    """Only OK STARTTLS or a bare OK lets TLS begin; a byte behind it is an injection, all else is no TLS."""
    for line in (b"OK STARTTLS\n", b"OK\n", b"OK STARTTLS\r\n", b"OK\r\n"):
        for cut in range(len(line)):
            assert starttls_reply(line[:cut]) is False
        assert starttls_reply(line) is True
        for behind in (b"\n", b"\x16", b"OK\n"):
            with refuses(Reason.UPSTREAM, "injection"):
                starttls_reply(line + behind)
    for line in (b"ERR FEATURE-NOT-CONFIGURED\n", b"ok starttls\n", b"OKSTARTTLS\n", b"OK GOODBYE\n", b"\n", b"\0\n",
                 b"OK STARTTLS x\n", b"x" * 512):
        with refuses(Reason.UPSTREAM, "no TLS there"):
            starttls_reply(line)
    assert starttls_reply(b"x" * 511) is False


def test_fuzz_greeting_never_lets_a_stranger_in():
    """Whatever comes before TLS, the outcome is TLS, a goodbye, a refusal or a ProtocolError, and never a traceback."""
    chance = random.Random(2)
    words = [b"STARTTLS", b"starttls", b"LOGOUT", b"DETACH", b"VER", b"\n", b"\n", b"\r\n",
             b" ", b'"', b"#", b"\\", b"=", b"\0", b"\x16", b"\xff"]
    seen = set()
    for _ in range(4000):
        data = b"".join(chance.choice(words) for _ in range(chance.randint(1, 24)))
        try:
            reply, verdict, rest = greet(torn(data, chance, chance.choice((1, 8, 99))))
        except ProtocolError as error:
            assert error.reason in (Reason.BAD_LINE, Reason.INJECTION, Reason.TLS_FIRST)
            seen.add(error.reason)
            continue
        seen.add(verdict)
        assert verdict in ("tls", "goodbye", "refused", None)
        lines = reply.splitlines(True)
        assert len(lines) <= 8 and all(line == NOT_ENABLED for line in lines[:-1])
        last = {"tls": b"OK STARTTLS\n", "goodbye": GOODBYE, "refused": NOT_ENABLED}.get(verdict)
        assert lines[-1:] == [last] if last else set(lines) <= {NOT_ENABLED}
        if verdict == "tls":
            before = data[:len(data) - len(rest)]
            assert re.search(rb'starttls', re.sub(rb'[\\"\xff]', b"", before), re.I)
    assert len(seen) == 7, seen


# ---- certificates -------------------------------------------------------------------------------

def der(tag, *content):
    """One DER element."""
    body = b"".join(content)
    size = len(body)
    if size < 128:
        return bytes([tag, size]) + body
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + body


def time_der(text):
    """A UTCTime or GeneralizedTime, by its length."""
    return der(0x18 if len(text) == 15 else 0x17, text.encode("ascii"))


SPKI = der(0x30, der(0x30, der(0x06, b"\x2b\x65\x70")), der(0x03, b"\0" + bytes(range(32))))


def make_certificate(end="99991231235959Z", names=(), san=(), spki=SPKI, version=True):
    """A certificate by hand, unsigned, for what openssl does not make."""
    algorithm = der(0x30, der(0x06, b"\x2b\x65\x70"))
    subject = der(0x30, *[der(0x31, der(0x30, der(0x06, oid), der(tag, text))) for oid, tag, text in names])
    extension = der(0x30, der(0x06, b"\x55\x1d\x11"), der(0x04, der(0x30, *[der(tag, text) for tag, text in san])))
    critical = der(0x30, der(0x06, b"\x55\x1d\x13"), der(0x01, b"\xff"), der(0x04, der(0x30)))
    body = [der(0x02, b"\x01"), algorithm, der(0x30), der(0x30, time_der("200101000000Z"), time_der(end)), subject, spki]
    if version:
        body = [der(0xa0, der(0x02, b"\x02"))] + body + [der(0xa3, der(0x30, critical, extension))]
    return der(0x30, der(0x30, *body), algorithm, der(0x03, b"\0" * 65))


CN, ORGANISATION = b"\x55\x04\x03", b"\x55\x04\x0a"
SAMPLE = dict(names=[(ORGANISATION, 0x0c, b"CN=fake"), (CN, 0x0c, "Zo\u00eb".encode("utf-8")), (CN, 0x13, b"plain")],
              san=[(0x82, b"NAS.Lan"), (0x87, bytes([127, 0, 0, 1])), (0x87, bytes(15) + b"\1"), (0x86, b"urn:X:y"),
                   (0x81, b"Ups@Lan"), (0xa4, der(0x30)), (0x87, b"\1\2\3")])


def test_certificate_names_and_pin():
    """A certificate gives its common names and SANs as permit writes them, and the pin of its key."""
    found = read_certificate(make_certificate(**SAMPLE))
    assert found.names == ["CN=Zo\u00eb", "CN=plain", "DNS:nas.lan", "IP:127.0.0.1", "IP:::1", "URI:urn:X:y", "email:ups@lan"]
    assert found.pin == "sha256//" + base64.b64encode(hashlib.sha256(SPKI).digest()).decode("ascii")
    for size in (100, 200, 70000):                  # DER lengths of one, two and three bytes
        spki = der(0x30, der(0x30, der(0x06, b"\x2b\x65\x70")), der(0x03, bytes(size)))
        found = read_certificate(make_certificate(spki=spki))
        assert found.pin == "sha256//" + base64.b64encode(hashlib.sha256(spki).digest()).decode("ascii")
    assert read_certificate(make_certificate(version=False)).names == [], "version 1 has no extensions"
    assert read_certificate(make_certificate(names=[(CN, 0x1e, "Zo\u00eb".encode("utf-16-be"))])).names == ["CN=Zo\u00eb"]


def test_certificate_end():
    """notAfter is read from UTCTime (RFC 5280's fifty years) and GeneralizedTime, up to the year 9999."""
    for text, seconds in (("99991231235959Z", 253402300799), ("20500101000000Z", 2524608000), ("491231235959Z", 2524607999),
                          ("500101000000Z", -631152000), ("700101000000Z", 0), ("240229120000Z", 1709208000)):
        assert read_certificate(make_certificate(end=text)).not_after == seconds, text
    for text in ("251301000000Z", "250230000000Z", "2501010000", "xxxxxxxxxxxxZ", "20251301000000Z", "", "00000101000000Z"):
        assert not readable(make_certificate(end=text)), text


def readable(data):
    """True if read_certificate() takes it, False if it raises ValueError; nothing else may happen."""
    try:
        found = read_certificate(data)
    except ValueError:
        return False
    assert all(isinstance(name, str) for name in found.names) and isinstance(found.not_after, int)
    assert re.match(r"sha256//[A-Za-z0-9+/]{43}=$", found.pin)
    return True


def test_truncated_certificates_are_refused():
    """A certificate cut at any byte is a ValueError, as is what never was one."""
    whole = make_certificate(**SAMPLE)
    assert readable(whole)
    for cut in range(len(whole)):
        assert not readable(whole[:cut]), cut
    for data in (b"\x30\x00", b"\x30\x02\x30\x00", b"\x30\x80\x00\x00", b"hello", b"\x30" * 50, b"\xff" * 50, bytes(50)):
        assert not readable(data), data
    body = whole[4:]
    for count in range(9):                          # each field of the body missing, with all lengths right
        fields = [b""] * count
        assert not readable(der(0x30, der(0x30, *fields))), body


def test_fuzz_certificates_are_read_or_refused():
    """Whatever bytes a peer's certificate has, it is read or it is a ValueError."""
    chance = random.Random(3)
    whole, taken = make_certificate(**SAMPLE), 0
    rounds = 20000
    for _ in range(rounds):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 5))):
            at = chance.randrange(len(data))
            kind = chance.random()
            if kind < 0.6:
                data[at] = chance.choice((0, 1, 0x7f, 0x80, 0x84, 0xff, chance.randrange(256)))
            elif kind < 0.8:
                del data[at:at + chance.randint(1, 4)]
            else:
                data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 4)))
        taken += readable(bytes(data))
    assert 0 < taken < rounds


def openssl_names(path):
    """Names of a certificate as openssl prints them, in permit's words."""
    text = openssl("x509", "-in", path, "-noout", "-subject", "-nameopt", "multiline,utf8,-esc_msb")
    names = ["CN=" + name for name in re.findall(r"commonName\s*= (.*)", text)]
    text = openssl("x509", "-in", path, "-noout", "-ext", "subjectAltName")
    for name in re.findall(r"(?:(?:DNS|IP Address|URI|email):[^,\n]+)", text):
        names.append(nutshim.normal_name(name.replace("IP Address:", "IP:")))
    return names


def check_against_openssl(cert):
    """What the core reads of a certificate is what openssl prints of it."""
    found = read_certificate(cert.der)
    assert found.names == openssl_names(cert.cert)
    assert found.pin == cert.pin
    end = openssl("x509", "-in", cert.cert, "-noout", "-enddate").strip().replace("notAfter=", "")
    assert found.not_after == calendar.timegm(time.strptime(end, "%b %d %H:%M:%S %Y GMT")), end
    for cut in range(0, len(cert.der), 7):
        assert not readable(cert.der[:cut])


def test_certificates_agree_with_openssl(pki, tmp_path):
    """Names, pin and end are what the openssl command says, for every kind of key and both kinds of time."""
    many = ",".join("DNS:host%d.example" % number for number in range(60)) + ",IP:192.0.2.1,IP:2001:db8::1:0:0:1"
    own = [pki.ca, pki.server, pki.client, pki.chained, pki.expired, pki.self_signed,
           pki.ca.issue("core_many", many, cn="Many Names", key_type="rsa"),
           pki.ca.issue("core_ed", "DNS:*.Upper.Example", key_type="ed25519", end="20491231235959Z"),
           pki.ca.issue("core_none", end="20500101000000Z")]
    for cert in own:
        check_against_openssl(cert)
    for mask, name in (("utf8only", "Zo\u00eb \u2014 UPS"), ("MASK:0x800", "Zo\u00eb \u2014 UPS"), ("default", "printable")):
        config = write(str(tmp_path / "config"), "[req]\ndistinguished_name=dn\nprompt=no\nutf8=yes\nstring_mask=%s\n"
                       "[dn]\nO=CN=fake\nCN=%s\n" % (mask, name))
        cert = type(pki.server)(str(tmp_path / mask.replace(":", "")))
        openssl("req", "-x509", "-config", config, "-utf8", "-newkey", "rsa:2048", "-nodes", "-keyout", cert.key, "-out", cert.cert,
                "-days", "10", "-addext", "subjectAltName=DNS:a.example", env=dict(os.environ, LC_ALL="C.UTF-8"))
        check_against_openssl(cert)
        assert read_certificate(cert.der).names == ["CN=" + name, "DNS:a.example"]


# ---- the real upsd ------------------------------------------------------------------------------

SENTINEL = b"GET CMDDESC ups the-end-of-it\n"
END = b'CMDDESC ups the-end-of-it "Description unavailable"\n'


def upsd_says(client, lines):
    """What upsd answers to each of many pieces of input, told apart by a command of known reply."""
    answers = []
    for start in range(0, len(lines), 200):         # few enough that it never has to wait for us to read
        client.send(b"".join(line + SENTINEL for line in lines[start:start + 200]))
        answers += [client.recv_until(END)[:-len(END)] for _ in lines[start:start + 200]]
    return answers


def countable(data):
    """True for whole commands whose replies by upsd 2.8 can be counted: no # stands inside quotes."""
    commands, pending = parse([data])
    return not pending and not any(odd and b"#" in raw for raw, _, odd in commands)


def test_upsd_reads_odd_lines_as_the_core_does(nut):
    """The real upsd gives as many replies to odd lines as the core counts, and each is the one that
    the same words get when they are written plainly.

    Left out is # inside quotes: upsd 2.8.0 does not answer such a line at all, later ones do.
    """
    chance = random.Random(4)
    cases = [data for data, _, _ in LINES]
    for odd in (rb"a\ b", rb'a\"b', rb'"a b"', rb'"a\"b"', rb'"a\\b"', rb'"a\#b"', rb"a\#b", rb"a\=b", b"a\x01b", b"a\xe9b", b"a\x7fb",
                b"a#b", b"a # b", b"a=b", b'"a\nb"', b"a\\\nb", b"a\rb", b'a"b"', b'"a"b', b'""', b"a" * 480, b"a" * 520,
                b"x " * 40):
        cases.append(b"GET CMDDESC ups " + odd + b"\n")
    cases += [odd_bytes(chance, 12) + b"\n" for _ in range(600)]
    cases += [b"GET CMDDESC ups " + odd_bytes(chance, 6) + b"\nVER\n" for _ in range(600)]
    cases = [data for data in cases if countable(data)]
    assert len(cases) > 500
    with PlainClient(nut.port) as client:
        replies, plain = [], []
        for data, answer in zip(cases, upsd_says(client, cases)):
            start = len(replies)
            for end, _ in Replies().feed(answer):
                replies.append(answer[sum(map(len, replies[start:])):end])
            words = [words for _, words, _ in parse([data])[0]]
            assert b"".join(replies[start:]) == answer and len(replies) - start == len(words), (data, answer)
            plain += map(canonical, words)
        for line, reply, answer in zip(plain, replies, upsd_says(client, plain)):
            assert answer == reply, line


def test_upsd_answers_questions_as_the_core_expects(nut):
    """The real upsd's reply to every form of question, known or not, in any case, is taken without a fault.

    Many of them go in one send, and the replies come in the pieces in which they come.
    """
    raws = list(NAMED) + list(LISTED) + ALONE
    for ups in (b"ups", b"UPS", b"nobody", b"x" * 150):
        raws += [b"GET %s %s\n" % (what, ups) for what in (b"UPSDESC", b"NUMLOGINS")]
        raws += [b"LIST %s %s\n" % (what, ups) for what in (b"VAR", b"RW", b"CMD", b"CLIENT")]
        for name in (b"ups.status", b"UPS.Status", b"battery.charge.low", b"ups.model", b"nothing", b"server.info", b"SERVER.Info",
                     b"server.version", b"driver.name", b"load.off", b"%s%n", b"a'b;c", b"-", b"y" * 60):
            raws += [b"%s %s %s\n" % (form, ups, name) for form in (b"GET VAR", b"GET TYPE", b"get  Desc", b"GET CMDDESC",
                                                                    b"LIST ENUM", b"list range")]
    assert all(map(question, raws)) and len(raws) > 300
    core, got = Questions(), {}
    with PlainClient(nut.port) as client:
        for asker, raw in enumerate(raws):
            core.ask(asker, question(raw))
        while core.sent or core.waiting:
            client.send(core.to_send())
            for asker, reply, _ in core.feed(client.sock.recv(65536)):
                got[asker] = reply
            assert not core.fault, core.fault
    assert len(got) == len(raws)
    answered = {raw: got[asker] for asker, raw in enumerate(raws)}
    assert answered[b"GET VAR ups ups.status\n"] == STATUS and answered[b"GET UPSDESC ups\n"] == b'UPSDESC ups "Test UPS"\n'
    assert answered[b"LIST UPS\n"] == b'BEGIN LIST UPS\nUPS ups "Test UPS"\nEND LIST UPS\n'
    assert answered[b"GET VAR nobody ups.status\n"] == UNKNOWN
    assert answered[b"GET VAR ups SERVER.Info\n"].startswith(b"VAR ups server.info")
    with PlainClient(nut.port) as client:           # the same as without the core
        for raw in raws[::7]:
            client.send(raw)
            assert client.recv_until(answered[raw]) == answered[raw]


def test_upsd_confirms_users_and_upses_as_the_core_expects(nut):
    """Of what a client says to the real upsd, exactly what upsd accepted becomes a fact."""
    lines = [b"USERNAME a b\n", b"USERNAME secondary\n", b"USERNAME admin\n", b"LOGIN ups\n", b"PASSWORD secondarypass\n",
             b"LOGIN nobody\n", b"LOGIN ups\n", b"LOGIN ups\n", b"LIST UPS\n"]
    for sends in ([b"".join(lines)], lines):
        talk = Conversation(ALREADY)
        with PlainClient(nut.port) as client:
            for data in sends:
                client.send(talk.from_client(data)[0])
                while talk.busy:
                    talk.from_upstream(client.sock.recv(65536))
        assert talk.facts == [(b"USERNAME", b"secondary"), (b"LOGIN", b"ups")] and talk.counted


if __name__ == "__main__":
    for title, test in sorted(globals().items()):
        if title.startswith("test_") and not test.__code__.co_argcount:
            test()
            print("passed: %s" % title)
