"""Addresses of boards, and what ssh prints turned into one line."""

import pytest

from device_tests.devices.ssh_address import Address, parse
from device_tests.devices.ssh_faults import why_not
from device_tests.errors import DeviceTestError


@pytest.mark.parametrize(
    ("text", "address", "name", "by_hand"),
    [
        ("ssh://pi@raspberrypi.local", Address("raspberrypi.local", "pi"), "ssh://pi@raspberrypi.local", "ssh pi@raspberrypi.local"),
        ("ssh://Pi-5", Address("Pi-5"), "ssh://Pi-5", "ssh Pi-5"),  # a name of ssh's configuration, which knows upper case
        ("ssh://pi@h:2222?threads=4", Address("h", "pi", 2222, 4), "ssh://pi@h:2222", "ssh -p 2222 pi@h"),
        ("ssh://pi@[fe80::1%eth0]:22/?clean=1", Address("fe80::1%eth0", "pi", 22, None, True), "ssh://pi@[fe80::1%eth0]:22", None),
        ("ssh://10.0.0.7?threads=2&clean=0", Address("10.0.0.7", threads=2), "ssh://10.0.0.7", "ssh 10.0.0.7"),
    ],
)
def test_addresses(text, address, name, by_hand):
    assert parse(text) == address and address.name == name and by_hand in (None, address.by_hand)


def test_options_before_the_host_and_nothing_that_could_be_an_option():
    assert Address("h", "pi", 2222).login == ["-p", "2222", "-l", "pi", "--", "h"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ssh://", "no address of a board"),
        ("ssh://-oProxyCommand=x", "no address of a board"),
        ("ssh://-l@host", "no address of a board"),
        ("ssh://pi:secret@host", "no address of a board"),
        ("ssh://pi@host/etc", "no address of a board"),
        ("ssh://pi@host:99999", "99999 is no port"),
        ("ssh://pi@host?thread=4", "no such setting as thread"),
        ("ssh://pi@host?threads=0", "threads=0 is no number from 1 to 1024"),
        ("ssh://pi@host?threads=four", "threads=four is no number"),
        ("ssh://pi@host?clean=yes", "clean=yes is neither 0 nor 1"),
    ],
)
def test_what_is_no_address_is_said_with_the_form(text, words):
    with pytest.raises(DeviceTestError, match=words) as raised:
        parse(text)
    assert str(raised.value).endswith("; give ssh://user@host[:port][?threads=4][&clean=1]")


@pytest.mark.parametrize(
    ("code", "words", "expected"),
    [
        (
            255,
            "pi@h: Permission denied (publickey,password).\n",
            "give the board your key (ssh-copy-id pi@h)",
        ),
        (255, "ssh: connect to host h port 22: Connection timed out\n", "check that it is on and in this network"),
        (255, "ssh: connect to host h port 22: No route to host\n", "check that it is on and in this network"),
        (127, "sh: 1: exec: python3: not found\n", "there is no python3; install Python 3.9 or newer there"),
        (1, "POCKETLM-OLD-PYTHON 3.7\n", "Python there is 3.7; install Python 3.9 or newer"),
        (255, "kex_exchange_identification: read: Connection reset by peer\r\n", "Connection reset by peer; try ssh pi@h"),
        (3, "", "exit code 3; try ssh pi@h"),
    ],
)
def test_what_ssh_says_becomes_one_line_with_what_to_do(code, words, expected):
    line = why_not(Address("h", "pi"), code, words)
    assert line.startswith("ssh://pi@h: ") and expected in line and "\n" not in line
