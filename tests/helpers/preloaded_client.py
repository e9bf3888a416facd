"""What the executables of ``preloaded`` start: asks the server for a process, and ends as that one does.

python -IS preloaded_client.py FOLDER NAME [WORD ...]
"""

import json
import os
import signal
import socket
import sys

folder, name, *words = sys.argv[1:]


def what_to_ask_for() -> "tuple[str | None, list[str]]":
    """A kind of process and its words; no kind of those for which the server is not made."""
    if name != "python":
        return "command", [program(), *words]
    flags = [word for word in words[:2] if word in ("-B", "-u")]
    rest = words[len(flags) :]
    if "--multiprocessing-fork" in rest:
        return "worker", rest
    return ("script" if rest and rest[0].endswith(".py") else None), rest


def program() -> str:
    """The real one."""
    return sys.executable if name == "python" else os.path.join(os.path.dirname(sys.executable), name)


def handed_files() -> "list[int]":
    """Numbers of the open files that this process was started with."""
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            if os.get_inheritable(number):
                found.append(number)
        except OSError:
            # The list of them is a file, too.
            continue
    return sorted(found)


def main() -> int:
    """Exit status of the process; what a signal ended ends this process by the same one."""
    kind, asked = what_to_ask_for()
    with open(os.path.join(folder, "server.json")) as file:
        read_at_import = json.load(file)
    if kind is None or any(os.environ.get(variable) != value for variable, value in read_at_import.items()):
        os.execv(program(), [program(), *words])
    files = handed_files()
    request = {
        "kind": kind,
        "words": asked,
        "executable": os.path.join(folder, "python"),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "files": files,
    }
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.path.join(folder, "socket"))
    content = json.dumps(request).encode() + b"\n"
    sent = socket.send_fds(connection, [content], files)
    connection.sendall(content[sent:])
    status = int(connection.recv(16) or -signal.SIGKILL)
    if status < 0:
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main())
