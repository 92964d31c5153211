"""Runs docs/walkthrough.md: every command in one shell, every output against what the document shows, and on the live page
what the document says is to be seen there.

Run by `make test-page`; needs the directory of the binaries as argument. With --write it puts the outputs and the picture
into the document instead of comparing them.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile

from browser import Browser

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs/walkthrough.md"
PIECE = re.compile(r"```sh ?(?P<how>\w*)\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?"
                   r"|<!-- page: (?P<seen>.*?) -->\n|<!-- picture: (?P<picture>\w+) -->\n", re.S)
HELPERS = """
globalThis.row = (name) => document.querySelector(`[data-backend=${name}]`);
globalThis.pill = (name) => row(name)?.querySelector('.pill').innerText;
"""
# What differs from one run to the next.
VOLATILE = [(r"\d+(\.\d+)? ms", "N ms"), (r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME"), (r"\b\d+ in progress", "N in progress"),
            (r"N in progress; applied on .*", "N in progress"), (r"\b(gateway-\d|control-plane)\b", "OBSERVER"),
            (r"is (healthy|unknown): .*", "is as the verdict has it by then")]


def normal(text):
    for pattern, replacement in VOLATILE:
        text = re.sub(pattern, replacement, text)
    lines = [re.sub(r" +", " ", line.rstrip()) for line in text.splitlines()]
    return [line for i, line in enumerate(lines) if i == 0 or line != lines[i - 1]]


class Shell:
    """One bash for all blocks, as a reader has one terminal."""

    def __init__(self, directory, path):
        env = {key: value for key, value in os.environ.items() if not key.startswith("WEIR_")}
        env |= {"PATH": f"{path}:{env['PATH']}", "HOME": directory}
        self.process = subprocess.Popen(["bash", "--norc", "--noprofile"], cwd=directory, env=env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        start_new_session=True)

    def run(self, code):
        self.process.stdin.write(f"{code}\necho; echo end-of-block\n")
        self.process.stdin.flush()
        lines = []
        while (line := self.process.stdout.readline()) != "end-of-block\n":
            assert line, f"the shell ended: {''.join(lines)}"
            lines.append(line)
        return "".join(lines[:-1]) if lines and lines[-1] == "\n" else "".join(lines).rstrip("\n") + "\n"

    def close(self):
        # The servers it started are of its process group.
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(timeout=30)
        self.process.stdin.close()
        self.process.stdout.close()


class Walk:
    def __init__(self, binaries, write):
        self.binaries, self.write = binaries, write
        self.ports, self.up, self.browser, self.failures = {}, None, None, []
        held = []
        # All at once, so that no two are the same.
        for port in ("8101", "8102", "8103"):
            free = socket.create_server(("127.0.0.1", 0))
            held.append(free)
            self.ports[port] = str(free.getsockname()[1])
        for free in held:
            free.close()
        self.directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.shell = Shell(self.directory.name, binaries)

    def real(self, text):
        for port, real in self.ports.items():
            text = re.sub(rf"\b{port}\b", real, text)
        return text

    def shown(self, text):
        for port, real in self.ports.items():
            text = re.sub(rf"\b{real}\b", port, text)
        return text

    def start(self, code):
        keys = {"EAST_API_KEY": "sk-east", "WEST_API_KEY": "sk-west", "NORTH_API_KEY": "sk-north"}
        env = {key: value for key, value in os.environ.items() if not key.startswith("WEIR_")} | keys
        # Free ports instead of those that the document names; nothing else differs.
        command = [os.path.join(self.binaries, "weir"), *code.split()[1:], "--listen", "127.0.0.1:0", "-o", "json"]
        self.up = subprocess.Popen(command, cwd=self.directory.name, env=env, text=True, stdout=subprocess.PIPE)
        self.told = json.loads(self.up.stdout.readline())
        self.ports["8080"] = self.told["gateways"][0].rsplit(":", 1)[1]
        self.ports["7070"] = self.told["admin"].rsplit(":", 1)[1]
        self.browser = Browser()
        self.browser.size(1280, 860)
        self.browser.open(self.told["page"])
        self.browser.js(HELPERS)

    def piece(self, match):
        if match["seen"]:
            print("page:", match["seen"])
            self.browser.until(match["seen"])
        elif match["picture"]:
            if self.write:
                self.browser.js("scrollTo(0, 0)")
                self.browser.picture(ROOT / f"docs/images/{match['picture']}.png")
        elif match["how"] == "up":
            self.start(match["code"].strip())
        elif match["how"] == "paste":
            told = self.told
            self.shell.run(f"export WEIR_SERVER={told['admin']} WEIR_TOKEN={told['admin_token']} KEY={told['api_key']}")
        else:
            print(match["code"].rstrip())
            output = self.shown(self.shell.run(self.real(match["code"])))
            print(output, end="")
            if self.write:
                said = f"\n```text\n{output}```\n" if output.strip() else ""
                return f"```sh\n{match['code']}```\n{said}"
            if normal(output) != normal(match["output"] or ""):
                self.failures.append(f"{match['code']}printed\n{output}and not\n{match['output']}")
        return match[0]

    def close(self):
        if self.browser:
            self.failures += [f"in the browser: {problem}" for problem in self.browser.problems]
            self.browser.close()
        if self.up:
            self.up.terminate()
            self.up.wait(timeout=60)
            self.up.stdout.close()
        self.shell.close()
        self.directory.cleanup()


def main():
    write = "--write" in sys.argv
    binaries = os.path.abspath(next(argument for argument in sys.argv[1:] if argument != "--write"))
    walk = Walk(binaries, write)
    try:
        document = PIECE.sub(walk.piece, DOCUMENT.read_text())
    finally:
        walk.close()
    if write:
        DOCUMENT.write_text(document)
    for failure in walk.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    sys.exit(1 if walk.failures else 0)


if __name__ == "__main__":
    main()
