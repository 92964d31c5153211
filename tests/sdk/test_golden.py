"""The official OpenAI SDK reads what providers send, through `weir up`: every good stream of the golden tables to its end, and
of every error the class that the SDK has for it. The contract is docs/answers.md.

Run by `make test-sdk`. Each row has a pool, a backend and a model of its own, so that what one does to its backend is
nothing to another.
"""

import functools
import unittest

import openai

import golden
from upstream import Answer, Upstream
from weir_up import WeirUp

HELLO = [{"role": "user", "content": "hello"}]
STREAMS = golden.streams()
REFUSALS = golden.refusals()

#: In which parts the bytes of a stream are written.
CUTS = {"whole": lambda text: [text], "sevens": lambda text: [text[at : at + 7] for at in range(0, len(text), 7)]}

POOL = """
kind: pool
name: {name}
spec: {{ health: {{ paid_probes_per_hour: 0, liveness_interval: 60s }} }}
---
kind: backend
name: {name}
spec: {{ pool: {name}, url: "{url}", dialect: {dialect}, models: {{ {name}: {name} }} }}
---
kind: model
name: {name}
spec: {{ pool: {name} }}
---"""

#: What a refusal becomes: the status (`None` is its own), the code, and whether the provider's text is for the client.
MEANINGS = {
    "request": (None, None, True),
    "credential_refused": (502, "upstream_credential_refused", False),
    "quota_used_up": (503, "upstream_quota_used_up", False),
    "busy": (503, "upstream_busy", False),
    "no_model": (502, "upstream_no_model", False),
    "server_error": (None, "upstream_error", True),
    "not_the_api": (502, "upstream_error", False),
}

CLASSES = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
}


def class_of(status):
    """As the SDK maps a status."""
    return openai.InternalServerError if status >= 500 else CLASSES.get(status, openai.APIStatusError)


def model_of(stream, way):
    return f"{stream.name}-{way}".replace("_", "-")


def half_of(stream):
    """The first half, which ends inside an event: one that lacks but its empty line is whole."""
    return stream.text[: len(stream.text) // 2].rstrip(b"\r\n}")


def setUpModule():
    global up, client
    upstream = Upstream()
    unittest.addModuleCleanup(upstream.stop)
    resources = ["kind: tenant\nname: sdk\nspec: {}\n---"]

    def add(name, dialect, answer):
        upstream.answers[name] = answer
        resources.append(POOL.format(name=name, url=upstream.url, dialect=dialect))

    def events(parts, ends=True):
        return Answer(200, "text/event-stream", parts, ends)

    for stream in STREAMS:
        for way, cut in CUTS.items():
            add(model_of(stream, way), stream.dialect, events(cut(stream.text)))
        add(model_of(stream, "broken"), stream.dialect, events([half_of(stream)], ends=False))
        add(model_of(stream, "ended"), stream.dialect, events([half_of(stream)]))
    for refusal in REFUSALS:
        kind = "application/json" if not isinstance(refusal.body, str) else "text/html"
        for way in ("unary", "stream"):
            name = f"refusal-{refusal.number}-{way}"
            add(name, "openai", Answer(refusal.status, kind, [refusal.bytes]))
    up = WeirUp("\n".join(resources))
    unittest.addModuleCleanup(up.stop)
    client = up.client()
    unittest.addModuleCleanup(client.close)


def begin(endpoint, model, **options):
    """Asks for a stream."""
    if endpoint == "responses":
        return client.responses.create(model=model, input="hello", stream=True, **options)
    if endpoint == "completions":
        return client.completions.create(model=model, prompt="hello", stream=True, **options)
    return client.chat.completions.create(model=model, messages=HELLO, stream=True, **options)


class Read:
    """A stream, read to its end or to an error, by the SDK."""

    def __init__(self, stream, way, **options):
        self.items, self.error = [], None
        try:
            for item in begin(stream.endpoint, model_of(stream, way), **options):
                self.items.append(item)
        except openai.APIError as error:
            self.error = error

    @property
    def summary(self):
        return golden.summary([item.to_dict(warnings=False) for item in self.items])


def each(wanted, ways=tuple(CUTS)):
    """Runs a test for each of these streams, in each of these ways."""

    def decorate(test):
        @functools.wraps(test)
        def run(self):
            rows = [row for row in STREAMS if wanted(row)]
            self.assertTrue(rows, "there is a row to try")
            for stream in rows:
                for way in ways:
                    with self.subTest(stream=stream.name, way=way):
                        test(self, stream, way)

        return run

    return decorate


class Streams(unittest.TestCase):
    def assert_named(self, stream, way, read):
        """The model is the one that was asked for, wherever one is named."""
        for item in read.items:
            named = getattr(item, "model", None) or getattr(getattr(item, "response", None), "model", None)
            # A payload over several lines passes as it is.
            if named and stream.name != "split_payload":
                self.assertEqual(named, model_of(stream, way))

    @each(lambda row: row.is_good)
    def test_good_streams_are_read_to_their_end(self, stream, way):
        read = Read(stream, way)
        self.assertIsNone(read.error)
        payloads = golden.payloads(stream.text)
        self.assertEqual(read.summary, golden.summary(payloads))
        self.assert_named(stream, way, read)
        if stream.endpoint == "responses":
            last, sent = read.items[-1], payloads[-1]
            self.assertEqual(last.type, sent["type"])
            self.assertEqual(last.response.usage.output_tokens, sent["response"]["usage"]["output_tokens"])
        else:
            own = [item for item in read.items if getattr(item, "usage", None) and not item.choices]
            self.assertEqual(own, [], "nobody asked for usage")

    @each(lambda row: row.is_good and "f" in row.seen and row.endpoint != "responses")
    def test_who_asks_for_usage_reads_it_last(self, stream, way):
        read = Read(stream, way, stream_options={"include_usage": True})
        self.assertIsNone(read.error)
        self.assertEqual(read.summary, golden.summary(golden.payloads(stream.text)))
        usage = [item.usage for item in read.items if getattr(item, "usage", None)][-1]
        prompt, completion = golden.counted(stream)
        self.assertEqual(usage.completion_tokens, completion)
        self.assertTrue(usage.prompt_tokens == prompt if prompt else usage.prompt_tokens > 0, usage)

    @each(lambda row: row.holds_error and row.events > 1 and row.endpoint != "responses")
    def test_an_error_in_a_stream_is_raised_with_the_providers_words(self, stream, way):
        read = Read(stream, way)
        self.assertIs(type(read.error), openai.APIError)
        self.assertIn(stream.error, read.error.message)
        self.assertEqual(read.error.body["message"], read.error.message)
        good = [payload for payload in golden.payloads(stream.text) if "error" not in str(payload)]
        self.assertEqual(read.summary[0], golden.summary(good)[0], "what came before it is read")

    @each(lambda row: row.holds_error and row.events == 1)
    def test_an_error_in_place_of_a_stream_is_a_status(self, stream, way):
        read = Read(stream, way)
        self.assertIs(type(read.error), openai.InternalServerError)
        self.assertEqual((read.error.status_code, read.error.code), (503, "upstream_busy"))

    @each(lambda row: row.holds_error and row.endpoint == "responses")
    def test_the_responses_api_has_events_for_its_errors(self, stream, way):
        read = Read(stream, way)
        told = read.error or read.items[-1]
        told = getattr(told, "message", None) or told.response.error.message
        self.assertIn(stream.error, told)

    @each(lambda row: row.is_cut)
    def test_a_cut_stream_is_an_error(self, stream, way):
        read = Read(stream, way)
        self.assertIs(type(read.error), openai.APIError)
        self.assertEqual(read.error.code, "upstream_disconnected")
        self.assertEqual(read.summary, golden.summary(golden.payloads(stream.text)))

    @each(lambda row: row.is_good, ("broken", "ended"))
    def test_a_good_stream_that_breaks_off_or_ends_in_the_middle_is_an_error(self, stream, way):
        sent = golden.payloads(half_of(stream))
        texts, _, finishes = golden.summary(sent)
        read = Read(stream, way)
        if way == "ended" and texts and texts.keys() == finishes.keys():
            # Each choice had its finish reason, and so it was an end.
            self.assertIsNone(read.error)
        else:
            self.assertIsInstance(read.error, openai.APIError)
        self.assertEqual(read.summary, golden.summary(sent))


class Refusals(unittest.TestCase):
    def ask(self, refusal, way):
        with self.assertRaises(openai.APIStatusError) as raised:
            model, stream = f"refusal-{refusal.number}-{way}", way == "stream"
            client.chat.completions.create(model=model, messages=HELLO, stream=stream)
        return raised.exception

    def test_every_refusal_raises_the_class_of_what_it_means(self):
        for refusal in REFUSALS:
            for way in ("unary", "stream"):
                with self.subTest(status=refusal.status, body=refusal.body, way=way):
                    self.assert_told(refusal, self.ask(refusal, way))

    def assert_told(self, refusal, error):
        status, code, is_for_client = MEANINGS[refusal.meaning]
        texts = refusal.texts if is_for_client else []
        if status is None:
            # A failure of the provider's without its words is a wrong gateway to the client.
            is_failure = refusal.meaning == "server_error"
            status = 502 if is_failure and (refusal.status < 500 or not texts) else refusal.status
        self.assertIs(type(error), class_of(status))
        self.assertEqual(error.status_code, status)
        self.assertTrue(error.request_id)
        self.assertTrue(error.body["message"])
        for text in texts:
            self.assertIn(text, error.body["message"])
        if code is not None:
            self.assertEqual((error.code, error.type), (code, "server_error"))
        if not is_for_client:
            for text in refusal.texts:
                self.assertNotIn(text, error.message)
        if refusal.meaning in ("credential_refused", "quota_used_up"):
            self.assertEqual(error.response.headers["x-should-retry"], "false")
        elif refusal.meaning != "request":
            self.assertGreater(int(error.response.headers["retry-after"]), 0)


if __name__ == "__main__":
    unittest.main()
