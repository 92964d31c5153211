"""The live page in a real browser, against `weir up` under traffic.

Run by `make test-page`. Needs the packages of requirements.txt, chromium, and the path of the `weir` binary as argument;
with --pictures DIR it also writes the pictures of README.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request

from browser import Browser

PICTURES = sys.argv.pop() if len(sys.argv) > 2 and sys.argv[-2] == "--pictures" else None
if PICTURES:
    sys.argv.pop()
WEIR = os.path.abspath(sys.argv.pop())

# A limit that the traffic meets, and a name that would be markup if anything took it for that.
RESOURCES = """
kind: limit
name: demo-gpt
spec:
  selector: { tenant: demo, model: gpt-4.1 }
  rates: { requests_per_minute: 30, concurrency: 20, burst_multiplier: 1 }
---
kind: tenant
name: marked
spec: { display_name: "<img src=x onerror=alert(1)>" }
"""


class Traffic(threading.Thread):
    """Requests to all gateways in turn until it is told to stop."""

    def __init__(self, told, workers=6):
        super().__init__(daemon=True)
        self.told, self.workers, self.ended = told, workers, threading.Event()

    def run(self):
        workers = [threading.Thread(target=self.ask, args=(i,), daemon=True) for i in range(self.workers)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def ask(self, i):
        models = ["gpt-4.1", "claude-sonnet-4.5", "gemini-2.5-flash", "deepseek-v3.2"]
        turn = i
        while not self.ended.is_set():
            turn += 1
            body = {"model": models[turn % len(models)], "stream": turn % 3 > 0, "max_tokens": 5 + 17 * turn % 90,
                    "messages": [{"role": "user", "content": "hello " * (turn % 50 + 1)}]}
            gateway = self.told["gateways"][turn % len(self.told["gateways"])]
            request = urllib.request.Request(
                f"{gateway}/v1/chat/completions", json.dumps(body).encode(),
                {"authorization": f"Bearer {self.told['api_key']}", "content-type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    answer.read()
            except urllib.error.HTTPError as error:
                error.read()
            self.ended.wait(0.1 + turn % 3 * 0.05)

    def stop(self):
        self.ended.set()
        self.join(timeout=60)


class Page(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.up = subprocess.Popen([WEIR, "up", "--listen", "127.0.0.1:0", "--gateways", "3", "--output", "json"],
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        cls.addClassCleanup(cls.stop)
        cls.told = json.loads(cls.up.stdout.readline())
        cls.base = cls.told["control_plane"]
        cls.weir("apply", "-f", "-", stdin=RESOURCES)
        cls.viewer = cls.weir("token", "create", "looker", "--role", "viewer").split()[-1]
        cls.operator = cls.weir("token", "create", "olga", "--role", "operator").split()[-1]
        traffic = Traffic(cls.told)
        traffic.start()
        cls.addClassCleanup(traffic.stop)
        cls.browser = Browser()
        cls.addClassCleanup(cls.browser.close)

    @classmethod
    def stop(cls):
        cls.up.terminate()
        cls.up.wait(timeout=60)
        cls.up.stdout.close()

    @classmethod
    def weir(cls, *args, stdin=None):
        env = os.environ | {"WEIR_SERVER": cls.told["admin"], "WEIR_TOKEN": cls.told["admin_token"]}
        done = subprocess.run([WEIR, *args], env=env, input=stdin, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def setUp(self):
        self.browser.size(1280, 900)
        self.browser.open("about:blank")
        self.browser.requests.clear()
        self.browser.problems.clear()

    def tearDown(self):
        b = self.browser
        b.js("0")
        self.assertEqual([url for url, _ in b.requests if not url.startswith((self.base + "/", "about:"))], [],
                         "the page asks nobody else")
        for url, headers in b.requests:
            self.assertNotIn(self.told["admin_token"], url.split("#")[0])
            self.assertNotIn("Cookie", headers)
        self.assertEqual(b.problems, [])

    def open(self, token):
        b = self.browser
        b.open(f"{self.base}/")
        # A page that is still starting would write back the token that it has read.
        b.until("!document.querySelector('#gate').hidden || !document.querySelector('#board').hidden")
        b.js("sessionStorage.clear()")
        b.open("about:blank")
        b.open(f"{self.base}/#token={token}")
        b.until("!document.querySelector('#board').hidden")
        b.until("document.querySelector('#live').dataset.is === 'live'")

    def text(self, selector):
        return self.browser.js(f"document.querySelector({json.dumps(selector)}).innerText")

    def row(self, backend):
        return f"document.querySelector('[data-backend={backend}]')"

    def focused(self):
        return self.browser.js("document.activeElement.getAttribute('aria-label') || document.activeElement.innerText "
                               "|| document.activeElement.id")

    def tab_to(self, label):
        """By keyboard alone, as somebody without a mouse."""
        seen = []
        for _ in range(60):
            self.browser.key("Tab")
            seen.append(self.focused())
            if seen[-1] == label:
                return
        self.fail(f"{label} is not reached by Tab: {seen}")

    def test_without_a_token_nothing_is_shown_and_a_wrong_one_is_refused(self):
        b = self.browser
        b.open(f"{self.base}/")
        b.js("sessionStorage.clear()")
        b.open("about:blank")
        b.open(f"{self.base}/")
        b.until("!document.querySelector('#gate').hidden")
        self.assertEqual(b.js("document.activeElement.id"), "token", "ready to type")
        self.assertTrue(b.js("document.querySelector('#board').hidden"))
        b.type("nobody-has-this-one")
        b.key("Enter")
        b.until("document.querySelector('#token-error').textContent.startsWith('Refused: ')")
        self.assertTrue(b.js("document.querySelector('#board').hidden"))
        self.assertNotIn("sgp", b.js("document.documentElement.innerHTML"))
        # The browser itself notes the refused request; that is no fault of the page.
        self.assertTrue(all("401" in problem for problem in b.problems), b.problems)
        b.problems.clear()
        b.type(self.viewer)
        b.key("Enter")
        b.until("!document.querySelector('#board').hidden")
        self.assertEqual(self.text("#who"), "looker, viewer: reads only")

    def test_what_happens_is_seen_as_it_happens(self):
        b = self.browser
        self.open(self.told["admin_token"])
        self.assertEqual(b.js("location.hash"), "", "the token does not stay in the address")
        self.assertEqual(b.js("document.querySelectorAll('#backends tbody tr[data-backend]').length"), 3)
        # One that has left is shown for an hour.
        here = "[...document.querySelectorAll('#gateways tbody tr')].filter((row) => row.querySelector('.pill').innerText !== 'disconnected')"
        b.until(f"{here}.length === 3")
        b.until("Number(document.querySelector('#tile-requests b').textContent) > 0")
        b.until(f"/\\d ms/.test({self.row('sgp')}.querySelector('.bytes').innerText)")
        b.until("document.querySelector('#tile-requests .line').getAttribute('d').split('L').length > 3")
        b.until("document.querySelector('#limits').innerText.includes('demo/gpt-4.1')")
        b.until("document.querySelector('#tile-refused').innerText.match(/[1-9]/)", 90)
        # A change from elsewhere.
        self.weir("weight", "vir", "33", "--no-wait")
        b.until(f"{self.row('vir')}.querySelector('.weight b').innerText === '33'")
        b.until("document.querySelector('#changes').innerText.includes('weight 70 → 33')")
        b.until("document.querySelector('#summary').innerText.includes('3 of 3 gateways in sync')")
        # What is said of a new backend that is dead is read out, politely: from a second after the first report on,
        # since a screen reader would otherwise read the whole history out.
        b.until("document.querySelector('#events').getAttribute('aria-live') === 'polite'")
        dead = 'kind: backend\nname: dead\nspec: { pool: chat, url: "http://127.0.0.1:9", models: { gpt-4.1: "" } }'
        self.weir("apply", "-f", "-", stdin=dead)
        b.until("document.querySelector('#events').innerText.includes('unhealthy')")
        b.until(f"{self.row('dead')}?.querySelector('.pill').innerText === 'Unhealthy'")
        self.assertIn("1 not healthy", b.js("document.title"))
        self.weir("delete", "backend", "dead", "--allow-mass-removal")
        b.until(f"{self.row('dead')} === null")
        self.weir("weight", "vir", "70")

    def test_names_and_texts_are_never_markup(self):
        self.open(self.told["admin_token"])
        self.assertEqual(self.browser.js("document.querySelectorAll('main img, main script').length"), 0)
        kept = self.browser.js("""(() => {
            board.take("log", { events: [{ number: 1e9, time: Date.now(), subject: "<img src=x>", kind: "state",
              message: "<script>alert(1)</script>" }], changes: [] });
            return document.querySelector("#events").innerText;
        })()""")
        self.assertIn("<img src=x> <script>alert(1)</script>", kept)
        self.assertEqual(self.browser.js("document.querySelectorAll('main img, main script').length"), 0)

    def assert_no_script_ran(self):
        b = self.browser
        self.assertIsNone(b.js("window.__xss ?? null"), "no script of a text ran")
        self.assertEqual(b.js("document.querySelectorAll('main img, main script, main iframe, main object, main a[href^=\"javascript\"]').length"), 0)
        self.assertEqual(b.js("[...document.querySelectorAll('*')].filter((x) => [...x.attributes].some((a) => a.name.startsWith('on'))).length"), 0)

    def test_names_that_a_rogue_gateway_gives_itself_are_shown_as_they_are(self):
        b = self.browser
        name, region = "<img/src=x/onerror=window.__xss=1>", "<svg onload=window.__xss=2>"
        with tempfile.TemporaryDirectory() as data:
            env = os.environ | {"WEIR_GATEWAY_TOKEN": self.told["admin_token"]}
            rogue = subprocess.Popen(
                [os.path.join(os.path.dirname(WEIR), "weir-gateway"), "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0",
                 "--control-plane", self.told["admin"], "--id", name, "--region", region, "--pre-stop", "0s", "--data-dir", data],
                env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                self.open(self.told["admin_token"])
                b.until(f"document.querySelector('#gateways').innerText.includes({json.dumps(name)})")
                self.assertIn(region, self.text("#gateways"))
                # What it sees of a backend is told with its name, whether the others see it too or not.
                dead = 'kind: backend\nname: dead\nspec: { pool: chat, region: "<b onclick=window.__xss=3>r</b>", ' \
                       'url: "http://127.0.0.1:9/%3Cimg%20src=x%3E", models: { gpt-4.1: "" } }'
                self.weir("apply", "-f", "-", stdin=dead)
                b.until(f"{self.row('dead')}?.querySelector('.pill').innerText === 'Unhealthy'")
                self.assertIn("<b onclick=window.__xss=3>r</b>", b.js(f"{self.row('dead')}.innerText"))
                b.js(f"{self.row('dead')}.querySelector('.more').click()")
                b.until("document.querySelector('.details:not([hidden])').innerText.includes('Verdict')")
                self.assert_no_script_ran()
                self.weir("delete", "backend", "dead", "--allow-mass-removal")
            finally:
                rogue.terminate()
                rogue.wait(timeout=60)
        b.until(f"[...document.querySelectorAll('#gateways tr')].some((row) => row.innerText.includes({json.dumps(name)}) && row.innerText.includes('disconnected'))")
        self.assert_no_script_ran()

    def test_every_text_that_the_page_is_sent_is_shown_as_it_is(self):
        b = self.browser
        dead = 'kind: backend\nname: dead\nspec: { pool: chat, url: "http://127.0.0.1:9", models: { gpt-4.1: "" } }'
        self.weir("apply", "-f", "-", stdin=dead)
        self.open(self.told["admin_token"])
        b.until(f"{self.row('dead')}?.querySelector('.pill').innerText === 'Unhealthy'")
        b.until("board.state && board.log && board.lines && board.log.events.length > 0 && board.log.changes.length > 0")
        # The real pictures, with each of their texts turned into markup that would run.
        shown = b.js("""(() => {
            feed.abort.abort();
            let n = 0;
            const marked = (value) => {
              if (typeof value === "string") return `"'><img src=x onerror="window.__xss=${n += 1}">` + value;
              if (Array.isArray(value)) return value.map(marked);
              if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, marked(v)]));
              return value;
            };
            const log = structuredClone(board.log);
            for (const kind of ["events", "changes"]) log[kind].forEach((entry, i) => { entry.number = entry.sequence = 1e9 + i; });
            const pieces = { state: marked(board.state), log: marked(log), lines: board.lines, hello: marked({ name: "n", role: "r" }) };
            for (const [name, value] of Object.entries(pieces)) board.take(name, value);
            document.querySelectorAll(".more").forEach((button) => button.click());
            feed.refuse("<img src=x onerror=window.__xss=1>");
            feed.gate("<img src=x onerror=window.__xss=1>");
            say("<img src=x onerror=window.__xss=1>", true);
            return n;
        })()""")
        self.assertGreater(shown, 50, "texts of every kind were tried")
        text = b.js("document.body.textContent")
        self.assertGreater(text.count("<img src=x onerror="), 30, "they are shown")
        self.assert_no_script_ran()
        self.weir("delete", "backend", "dead", "--allow-mass-removal")

    def test_a_page_of_another_name_is_refused(self):
        address = self.base.removeprefix("http://")
        for host, expected in ((address, 200), ("evil.example", 421), ("", 400)):
            request = urllib.request.Request(f"{self.base}/", headers={"host": host})
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    status = answer.status
            except urllib.error.HTTPError as error:
                status = error.code
                error.read()
            self.assertEqual(status, expected, host)

    def test_a_viewer_sees_and_cannot_change(self):
        self.open(self.viewer)
        b = self.browser
        b.js(f"{self.row('sgp')}.querySelector('.more').click()")
        b.until("document.querySelector('.details:not([hidden])').innerText.includes('Verdict')")
        self.assertTrue(b.js("document.querySelector('.details:not([hidden]) .acts').hidden"))

    def test_an_operator_changes_a_backend_by_keyboard_alone(self):
        self.open(self.operator)
        b = self.browser
        b.js("document.querySelector('#main').focus()")
        self.tab_to("Details of sgp")
        b.key("Enter")
        self.tab_to("Weight of sgp")
        for _ in range(4):
            b.key("Backspace")
        b.type("41")
        b.key("Enter")
        b.until("document.querySelector('#said').innerText.includes('sgp: weight 41, applied on 3 of 3 gateways')")
        b.until(f"{self.row('sgp')}.querySelector('.weight b').innerText === '41'")
        b.until("document.querySelector('#changes').innerText.includes('olga · UpdateResource')")
        self.assertIn('"actor": "olga"', self.weir("history", "backend", "sgp", "-o", "json"))
        self.tab_to("Drain")
        b.key("Enter")
        b.until(f"{self.row('sgp')}.querySelector('.pill').innerText === 'Draining'")
        b.until(f"{self.row('sgp')}.innerText.includes('effective 0')")
        b.until("[...document.querySelectorAll('.details:not([hidden]) button')].some((x) => x.innerText === 'Undrain' && !x.disabled)")
        b.js("[...document.querySelectorAll('.details:not([hidden]) button')].find((x) => x.innerText === 'Undrain').click()")
        b.until(f"{self.row('sgp')}.querySelector('.pill').innerText !== 'Draining'")
        # Disabling asks once more.
        b.until("[...document.querySelectorAll('.details:not([hidden]) button')].some((x) => x.innerText === 'Disable' && !x.disabled)")
        b.js("[...document.querySelectorAll('.details:not([hidden]) button')].find((x) => x.innerText === 'Disable').click()")
        self.assertEqual(b.js("document.querySelector('.details:not([hidden]) .danger').innerText"), "Disable now?")
        b.js("document.querySelector('.details:not([hidden]) .danger').click()")
        b.until(f"{self.row('sgp')}.querySelector('.pill').innerText === 'Disabled'")
        self.weir("enable", "sgp")
        self.weir("weight", "sgp", "100")
        b.until(f"{self.row('sgp')}.querySelector('.weight b').innerText === '100'")
        # What the control plane refuses is said.
        b.js("document.querySelector('.details:not([hidden]) input').removeAttribute('max')")
        b.until("document.querySelector('.details:not([hidden]) button').disabled === false")
        b.js("document.querySelector('.details:not([hidden]) input').value = '10001'")
        b.js("document.querySelector('.details:not([hidden]) form').requestSubmit()")
        b.until("document.querySelector('#said.wrong') && document.querySelector('#said').innerText.includes('weight')")
        self.assertTrue(all("400" in problem for problem in b.problems), b.problems)
        b.problems.clear()

    def test_it_fits_a_phone_and_a_laptop(self):
        b = self.browser
        self.open(self.operator)
        b.js("[...document.querySelectorAll('.more')].forEach((button) => button.click())")
        for width, height, phone in ((390, 844, True), (320, 640, True), (768, 1024, False), (1280, 800, False)):
            b.size(width, height, phone)
            b.until(f"innerWidth === {width}")
            self.assertLessEqual(b.js("document.documentElement.scrollWidth"), width, f"at {width}")
            wide = b.js(f"""[...document.querySelectorAll('main *')].filter((x) => x.getBoundingClientRect().right > {width} + 1
                && getComputedStyle(x).clipPath === 'none' && !x.closest('thead')).map((x) => x.tagName + '.' + x.className).slice(0, 5)""")
            self.assertEqual(wide, [], f"at {width}")

    def test_it_can_be_read_by_machine(self):
        self.open(self.operator)
        tree = self.browser.call("Accessibility.getFullAXTree")["nodes"]
        by_role = {}
        for node in tree:
            if not node.get("ignored"):
                by_role.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
        for role in ("banner", "main", "contentinfo", "table", "columnheader", "rowheader", "status", "heading"):
            self.assertIn(role, by_role, role)
        self.assertLessEqual({"Backends", "Limits", "Gateways"}, set(by_role["table"]))
        for role in ("button", "table", "link", "textbox", "spinbutton", "image", "region"):
            self.assertTrue(all(by_role.get(role, [])), f"every {role} has a name: {by_role.get(role)}")
        self.assertTrue(any(name.startswith("Load of sgp over five minutes: now") for name in by_role["image"]))
        # On a phone rows are laid out as cards, and are rows all the same.
        self.browser.size(390, 844, phone=True)
        tree = self.browser.call("Accessibility.getFullAXTree")["nodes"]
        roles = {node["role"]["value"] for node in tree if not node.get("ignored")}
        self.assertLessEqual({"table", "row", "rowheader", "cell"}, roles)

    def test_a_page_that_loses_its_server_says_so_and_comes_back(self):
        self.open(self.told["admin_token"])
        b = self.browser
        offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        b.js("feed.abort.abort()")
        b.call("Network.emulateNetworkConditions", offline=True, **offline)
        b.until("document.querySelector('#live').dataset.is === 'away'")
        self.assertTrue(b.js("document.querySelector('#board').classList.contains('stale')"))
        b.call("Network.emulateNetworkConditions", offline=False, **offline)
        b.until("document.querySelector('#live').dataset.is === 'live'", 60)
        b.js("0")
        self.assertTrue(all("ERR_INTERNET_DISCONNECTED" in problem for problem in b.problems), b.problems)
        b.problems.clear()

    @unittest.skipUnless(PICTURES, "no pictures are asked for")
    def test_z_pictures(self):
        b = self.browser
        self.open(self.operator)
        time.sleep(300 if os.environ.get("WEIR_PICTURES_FULL") else 5)
        b.size(1280, 860)
        b.picture(os.path.join(PICTURES, "page.png"))
        b.size(390, 844, phone=True)
        b.js("0")
        time.sleep(1)
        b.picture(os.path.join(PICTURES, "page-phone.png"), whole=False)


if __name__ == "__main__":
    unittest.main(verbosity=2)
