"""Why a login failed, in one line that says what to do: from what ssh and the board's shell print."""

from __future__ import annotations

from device_tests.devices.ssh_address import Address

OLD_PYTHON = "POCKETLM-OLD-PYTHON"
NO_PROGRAM = (126, 127)  # exit codes of a shell that finds no such program, or may not start it
# words of OpenSSH's client, the first that is found counts -> what it means and what to do; {hand}: a login by hand, {host}: the host
CAUSES = (
    ("REVOKED HOST KEY", "its host key is marked as revoked in known_hosts; ask whoever marked it"),
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the one in known_hosts; if the board was set up anew, forget the old key (ssh-keygen -R {known}) and log in "
        "once by hand ({hand}), else do not trust it",
    ),
    ("Host key verification failed", "its host key is not known here; log in once by hand ({hand}), compare the key and say yes"),
    ("Permission denied", "the login was refused; no password is asked here, so give the board your key (ssh-copy-id {to}) and try {hand}"),
    ("Too many authentication failures", "the login was refused; name one key for it in ~/.ssh/config (IdentityFile, IdentitiesOnly)"),
    ("Could not resolve hostname", "no such host; check the name, or give the board's address in numbers"),
    ("Connection refused", "nothing answers on that port; switch ssh on there (raspi-config) or give the port"),
    ("timed out", "it does not answer; check that it is on and in this network"),
    ("No route to host", "it cannot be reached; check that it is on and in this network"),
    ("Network is unreachable", "it cannot be reached; check this machine's network"),
    ("Bad configuration option", "ssh does not take its configuration; mend that"),
)


def why_not(address: Address, code: int, words: str) -> str:
    """One line for a connection that never came to be; ``words`` are all that was printed on stderr."""
    if OLD_PYTHON in words:
        version = words.split(OLD_PYTHON, 1)[1].split()[0]
        return f"{address.name}: Python there is {version}; install Python 3.9 or newer (3.11 has wheels of every runtime)"
    for sign, meaning in CAUSES:
        if sign in words:
            port = address.port or 22
            known = address.host if port == 22 else f"'[{address.host}]:{port}'"
            to = address.by_hand.removeprefix("ssh ")
            return f"{address.name}: {meaning.format(hand=address.by_hand, known=known, to=to)}"
    if code in NO_PROGRAM:
        return f"{address.name}: there is no python3; install Python 3.9 or newer there (3.11 has wheels of every runtime)"
    return f"{address.name}: ssh ended with {last_line(words) or f'exit code {code}'}; try {address.by_hand}"


def last_line(words: str) -> str:
    """The last line that says something."""
    lines = [" ".join(line.split()) for line in words.splitlines() if line.strip()]
    return lines[-1] if lines else ""
