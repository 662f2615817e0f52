"""DeepSpeed's and MPI's host file: a host a line, ``name slots=N``, comments after ``#``."""

import re
import socket
from dataclasses import dataclass
from pathlib import Path

from fastft.errors import UserError


@dataclass(frozen=True)
class Host:
    name: str
    slots: int  # ranks


def read(path: Path) -> list[Host]:
    """The hosts of a file, in order.

    Raises
    ------
    UserError
        No such file, no host in it, a line of another form (with its number), a host that appears twice.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such host file.", "A line for each host: name slots=8")
    hosts: dict[str, Host] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        found = re.fullmatch(r"([A-Za-z0-9_.:-]+)\s+slots\s*=\s*([0-9]+)", text)
        if not found or int(found[2]) < 1:
            raise UserError(f"{path}:{number}: expected `name slots=N`, found {text!r}.", "For example: node1 slots=8")
        if found[1].startswith("-"):
            raise UserError(f"{path}:{number}: {found[1]!r} is no host name.")
        if found[1] in hosts:
            raise UserError(f"{path}:{number}: {found[1]} appears twice.", "Give a host once, with all its slots.")
        hosts[found[1]] = Host(found[1], int(found[2]))
    if not hosts:
        raise UserError(f"{path}: names no host.", "A line for each host: name slots=8")
    return list(hosts.values())


def address(name: str) -> str:
    """The host's IPv4 address. UserError when the name means nothing here."""
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as e:
        raise UserError(
            f"host {name}: {e.strerror or e}.", "Correct the host file, or make the name known (DNS, /etc/hosts)."
        ) from None


def is_here(name: str) -> bool:
    """Whether this is the machine (or network namespace) that we run in: its address can be bound."""
    with socket.socket() as s:
        try:
            s.bind((address(name), 0))
        except OSError:
            return False
    return True


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as s:
        s.bind((host, 0))
        return s.getsockname()[1]


def port_free(host: str, port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a closed connection left is no process
        try:
            s.bind((host, port))
        except OSError:
            return False
    return True
