"""The golden tables of the gateway, read as its own tests read them: each row is in one place and tried by both.

`gateway/src/api/response/golden`: streams of many providers, with their facts in `streams.jsonl`.
`gateway/src/api/upstream_error/refusals.jsonl`: refusals of many providers, and what each means.
"""

import dataclasses
import json
import pathlib
import re

API = pathlib.Path(__file__).resolve().parents[2] / "gateway/src/api"


@dataclasses.dataclass(frozen=True)
class Stream:
    """A row of `streams.jsonl`."""

    name: str
    endpoint: str
    dialect: str
    events: int
    usage: list | None
    deltas: int
    bytes: int
    seen: str
    error: str | None = None

    @property
    def text(self):
        return (API / f"response/golden/{self.name}.sse").read_bytes()

    @property
    def holds_error(self):
        return "e" in self.seen

    @property
    def is_cut(self):
        return not self.seen

    @property
    def is_good(self):
        return not self.holds_error and not self.is_cut


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A row of `refusals.jsonl`."""

    number: int
    status: int
    meaning: str
    body: object

    @property
    def bytes(self):
        return (self.body if isinstance(self.body, str) else json.dumps(self.body)).encode()

    @property
    def texts(self):
        """What the provider says, as texts of which each has to be in what it told; none without an error body."""
        body = self.body[0] if isinstance(self.body, list) else self.body
        if not isinstance(body, dict):
            return []
        error = body.get("error")
        said = error.get("message") if isinstance(error, dict) else error
        said = said or body.get("message") or body.get("detail") or ""
        if isinstance(said, str):
            return [said] if said else []
        return [finding["msg"] for finding in said]


def streams():
    lines = (API / "response/golden/streams.jsonl").read_text().splitlines()
    return [Stream(**json.loads(line)) for line in lines]


def refusals():
    lines = (API / "upstream_error/refusals.jsonl").read_text().splitlines()
    return [Refusal(number, **json.loads(line)) for number, line in enumerate(lines, 1)]


def payloads(text):
    """The JSON payloads of the events that are whole in these bytes, by the rules of event streams."""
    text = text.decode(errors="replace").removeprefix("\ufeff")
    blocks = re.split(r"\r\n\r\n|\n\n|\r\r", text)
    found = []
    for block in blocks[:-1]:
        lines = [line.removeprefix("data:").strip() for line in re.split(r"\r\n|\n|\r", block) if line.startswith("data:")]
        data = "\n".join(lines)
        if data and data != "[DONE]":
            found.append(json.loads(data))
    return found


def content(text):
    """What a delta says: a text, or parts of which some are text."""
    if isinstance(text, list):
        return "".join(part.get("text", "") for part in text)
    return text or ""


def summary(payloads):
    """Per choice its text, the arguments of its tool calls and its finish reason; for the Responses API one for all."""
    texts, arguments, finishes = {}, {}, {}
    for payload in payloads:
        if payload.get("type", "").endswith("output_text.delta"):
            texts[0] = texts.get(0, "") + payload["delta"]
        for choice in payload.get("choices") or []:
            index, delta = choice.get("index", 0), choice.get("delta") or {}
            texts[index] = texts.get(index, "") + content(choice.get("text") or delta.get("content"))
            for call in delta.get("tool_calls") or []:
                arguments[index] = arguments.get(index, "") + call["function"]["arguments"]
            if choice.get("finish_reason") not in (None, "", "null"):
                finishes[index] = choice["finish_reason"]
    return texts, arguments, finishes


def counted(stream):
    """Prompt and completion tokens that a client which asked for usage has to read; `None` is any number."""
    shown = [payload["usage"] for payload in payloads(stream.text) if payload.get("usage")]
    shown = [usage for usage in shown if usage.get("prompt_tokens") and usage.get("completion_tokens")]
    if shown:
        return shown[-1]["prompt_tokens"], shown[-1]["completion_tokens"]
    if stream.usage:
        return stream.usage[0], stream.usage[3]
    return None, max(stream.deltas, -(-stream.bytes // 4))
