"""The official OpenAI SDK, unchanged, against `weir up`.

Run by `make test-sdk`. Needs the packages of requirements.txt and the path of the `weir` binary as argument.
"""

import unittest

import openai

from weir_up import WeirUp

MODEL = "gpt-4.1"
HELLO = [{"role": "user", "content": "hello"}]

# A tenant whose second request in an hour is too many, and a model that nobody can serve.
RESOURCES = """
kind: tenant
name: small
spec: { limits: { requests_per_minute: 1, burst_multiplier: 1 } }
---
kind: pool
name: away
spec: {}
---
kind: backend
name: away
spec: { pool: away, url: "http://127.0.0.1:9", admin_state: disabled, models: { nobody: "" } }
---
kind: model
name: nobody
spec: { pool: away }
"""


class Sdk(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.up = WeirUp()
        cls.addClassCleanup(cls.up.stop)
        cls.up.apply(RESOURCES)
        cls.small_key = cls.up.weir("key", "create", "small-key", "--tenant", "small").strip()

    def client(self, key=None):
        client = self.up.client(key)
        self.addCleanup(client.close)
        return client

    def chat(self, client, **options):
        options = {"model": MODEL, "messages": HELLO, "max_tokens": 5} | options
        return client.chat.completions.create(**options)

    def test_chat(self):
        answer = self.chat(self.client())
        self.assertEqual(answer.model, MODEL)
        self.assertTrue(answer.choices[0].message.content)
        self.assertEqual(answer.usage.completion_tokens, 5)

    def test_stream(self):
        chunks = list(self.chat(self.client(), stream=True))
        self.assertGreater(len(chunks), 3)
        self.assertEqual([c.choices[0].finish_reason for c in chunks if c.choices][-1], "length")
        self.assertTrue(all(chunk.usage is None for chunk in chunks), "nobody asked for usage")

    def test_stream_with_usage(self):
        *_, last = self.chat(self.client(), stream=True, stream_options={"include_usage": True})
        self.assertEqual((last.choices, last.usage.completion_tokens), ([], 5))

    def test_embeddings(self):
        answer = self.client().embeddings.create(model=MODEL, input=["one", "two"])
        self.assertEqual(len(answer.data), 2)

    def test_responses(self):
        answer = self.client().responses.create(model=MODEL, input="hello", max_output_tokens=5)
        self.assertTrue(answer.output_text)

    def test_completions(self):
        answer = self.client().completions.create(model=MODEL, prompt="hello", max_tokens=5)
        self.assertTrue(answer.choices[0].text)

    def test_models(self):
        self.assertIn(MODEL, [model.id for model in self.client().models.list()])

    def test_400(self):
        with self.assertRaises(openai.BadRequestError):
            self.chat(self.client(), max_tokens="many")

    def test_401(self):
        with self.assertRaises(openai.AuthenticationError) as raised:
            self.chat(self.client("weir_wrong"))
        self.assertTrue(raised.exception.request_id)

    def test_404(self):
        with self.assertRaises(openai.NotFoundError) as raised:
            self.chat(self.client(), model="unknown")
        self.assertEqual(raised.exception.code, "model_not_found")

    def test_429(self):
        client = self.client(self.small_key)
        self.chat(client)
        with self.assertRaises(openai.RateLimitError) as raised:
            self.chat(client)
        self.assertGreater(int(raised.exception.response.headers["retry-after"]), 0)
        self.assertGreater(int(raised.exception.response.headers["retry-after-ms"]), 0)

    def test_503(self):
        with self.assertRaises(openai.InternalServerError) as raised:
            self.chat(self.client(), model="nobody")
        self.assertEqual(raised.exception.status_code, 503)


if __name__ == "__main__":
    unittest.main()
