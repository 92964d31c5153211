// The stream of frames, the token, and the page as a whole.

const feed = {
  token: null,
  abort: null,
  attempts: 0,
  run: 0,

  status(is, text) {
    $("live").dataset.is = is;
    put($("live"), text);
    $("board").classList.toggle("stale", is !== "live");
  },

  gate(message = "") {
    this.token = null;
    this.run += 1;
    this.abort?.abort();
    sessionStorage.removeItem(TOKEN);
    $("board").hidden = true;
    $("who").hidden = true;
    $("leave").hidden = true;
    $("gate").hidden = false;
    put($("token-error"), message);
    put($("summary"), "");
    this.status("idle", "not connected");
    $("token").focus();
  },

  refuse(message) {
    this.gate(`Refused: ${message}`);
  },

  open(token) {
    this.token = token;
    this.attempts = 0;
    this.follow((this.run += 1));
  },

  async follow(run) {
    while (run === this.run) {
      const refused = await this.read(run).catch(() => null);
      if (run !== this.run) return;
      if (refused) {
        this.refuse(refused);
        return;
      }
      // With jitter, so that many open pages do not reconnect at the same time.
      const limit = Math.min(BACKOFF_MS[0] * 2 ** this.attempts, BACKOFF_MS[1]);
      const pause = limit * (0.5 + Math.random() / 2);
      this.attempts += 1;
      this.status("away", `reconnecting in ${Math.ceil(pause / 1000)} s`);
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  },

  // Reads one stream until it ends. Returns the reason if the token is refused, and null if another attempt makes sense.
  async read(run) {
    const abort = (this.abort = new AbortController());
    let silence = setTimeout(() => abort.abort(), SILENCE_MS);
    try {
      const answer = await fetch("/page/stream", {
        headers: { authorization: `Bearer ${this.token}` },
        cache: "no-store",
        credentials: "omit",
        redirect: "error",
        signal: abort.signal,
      });
      if (answer.status === 401 || answer.status === 403) return (await answer.json()).error;
      if (!answer.ok || !answer.body) return null;
      sessionStorage.setItem(TOKEN, this.token);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let buffer = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done || run !== this.run) return null;
        clearTimeout(silence);
        silence = setTimeout(() => abort.abort(), SILENCE_MS);
        buffer += value;
        let end;
        while ((end = buffer.indexOf("\n\n")) >= 0) {
          this.piece(buffer.slice(0, end));
          buffer = buffer.slice(end + 2);
          if (run !== this.run) return null;
        }
        if (buffer.length > BUFFER_MAX) abort.abort();
      }
    } finally {
      clearTimeout(silence);
      abort.abort();
    }
  },

  piece(text) {
    let event = "message", data = "";
    for (const line of text.split("\n")) {
      if (line.startsWith("event: ")) event = line.slice(7);
      else if (line.startsWith("data: ")) data += line.slice(6);
    }
    board.take(event, JSON.parse(data));
    if (event === "state" && this.token) {
      this.attempts = 0;
      $("gate").hidden = true;
      $("board").hidden = false;
      $("leave").hidden = false;
      this.status("live", "live");
    }
  },
};

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = $("token").value.trim();
  $("token").value = "";
  put($("token-error"), "");
  // A header value is printable ASCII, so anything else is not a token.
  if (!/^[\x21-\x7e]+$/.test(token)) put($("token-error"), "That is not a token.");
  else feed.open(token);
});
$("leave").addEventListener("click", () => feed.gate());
$("all-limits").addEventListener("click", () => {
  board.allLimits = !board.allLimits;
  $("all-limits").setAttribute("aria-expanded", String(board.allLimits));
  board.showState();
});
$("filter").addEventListener("input", () => {
  board.wanted = $("filter").value.trim().toLowerCase();
  board.showState();
});
document.addEventListener("visibilitychange", () => {
  board.showState();
  board.showLines();
  board.showLog();
});

// A link of `weir up` has the token in the fragment, which browsers never send; it is removed from the address.
const fragmentToken = /^#token=([\x21-\x7e]+)$/.exec(location.hash);
if (fragmentToken) history.replaceState(null, "", location.pathname);
const known = fragmentToken?.[1] ?? sessionStorage.getItem(TOKEN);
if (known) feed.open(known);
else feed.gate();
