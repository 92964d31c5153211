"""`weir up` as a process, and the official OpenAI SDK as its client. The path of the `weir` binary is the last argument."""

import json
import os
import subprocess
import sys
import tempfile

import openai

WEIR = os.path.abspath(sys.argv.pop())


class WeirUp:
    """A whole Weir on free ports: with the built-in example, or with these resources."""

    def __init__(self, resources=None):
        args = [WEIR, "up", "--listen", "127.0.0.1:0", "--output", "json"]
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            if resources is not None:
                file.write(resources)
                file.flush()
                args += ["--config", file.name]
            self.process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"weir up ended with {self.process.wait()} before it was up")
        self.told = json.loads(line)
        self.key = self.told["api_key"]

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=30)
        self.process.stdout.close()

    def weir(self, *args):
        """Runs a command of `weir` against it; what it printed."""
        env = os.environ | {"WEIR_SERVER": self.told["admin"], "WEIR_TOKEN": self.told["admin_token"]}
        done = subprocess.run([WEIR, *args], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def apply(self, resources):
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(resources)
            file.flush()
            self.weir("apply", "-f", file.name)

    def client(self, key=None):
        """A client that tries nothing twice, so that each answer is seen."""
        base = self.told["gateways"][0] + "/v1"
        return openai.OpenAI(base_url=base, api_key=key or self.key, max_retries=0, timeout=60)
