// The live page. Reads one stream of server-sent events with fetch, so that the token travels in a header, and writes
// every text with textContent: no name or message can become markup.
"use strict";

const TOKEN = "weir-token";
const SILENCE_MS = 10_000;
const BUFFER_MAX = 32 << 20;
const LIMITS_FIRST = 10;
const BACKOFF_MS = [1_000, 30_000];
const $ = (id) => document.getElementById(id);

// ---- small helpers -------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(options)) {
    if (key === "class") element.className = value;
    else if (key === "text") element.textContent = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

// Writes only what differs: an unchanged page costs no layout, and a screen reader is not disturbed.
function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function mark(element, name, value) {
  if (value === null || value === undefined || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const money = new Intl.NumberFormat("en", { style: "currency", currency: "USD", maximumFractionDigits: 2 });

function rate(value) {
  if (value === null || value === undefined) return "–";
  return value > 0 && value < 100 ? tenth.format(value) : whole.format(value);
}

function latency(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms >= 10_000) return `${tenth.format(ms / 1000)} s`;
  if (ms >= 1_000) return `${(ms / 1000).toFixed(2)} s`;
  return ms < 10 ? `${tenth.format(ms)} ms` : `${whole.format(ms)} ms`;
}

function age(ms) {
  const s = Math.max(0, Math.round(ms / 1000));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86_400) return `${Math.floor(s / 3600)} h`;
  return `${Math.floor(s / 86_400)} d`;
}

function clock(ms) {
  const time = new Date(ms);
  const old = Date.now() - ms > 86_400_000;
  return old ? time.toLocaleDateString("en", { month: "short", day: "numeric" }) : time.toLocaleTimeString("en-GB");
}

// ---- pieces --------------------------------------------------------------------------------------------------------

// A line over the last five minutes. The newest point is at the right edge, gaps stay gaps.
class Spark {
  constructor(label, tone) {
    this.label = label;
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("class", "spark");
    this.svg.setAttribute("viewBox", "0 0 100 30");
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    if (tone) this.svg.dataset.tone = tone;
    this.area = document.createElementNS(SVG, "path");
    this.area.setAttribute("class", "area");
    this.line = document.createElementNS(SVG, "path");
    this.line.setAttribute("class", "line");
    this.svg.append(this.area, this.line);
  }

  draw(values, points, format, floor = 0) {
    const known = values.filter((value) => value !== null);
    const most = Math.max(floor, ...known, 1e-9);
    const x = (i) => (100 * (points - values.length + i)) / (points - 1);
    const y = (value) => 28 - (26 * value) / most;
    let line = "", area = "", run = [];
    const flush = () => {
      if (run.length === 0) return;
      const path = run.map(([px, py], i) => `${i ? "L" : "M"}${px.toFixed(2)} ${py.toFixed(2)}`).join("");
      line += run.length === 1 ? `${path}h.01` : path;
      area += `${path}L${run.at(-1)[0].toFixed(2)} 30L${run[0][0].toFixed(2)} 30Z`;
      run = [];
    };
    values.forEach((value, i) => {
      if (value === null) flush();
      else run.push([x(i), y(value)]);
    });
    flush();
    mark(this.svg, "data-idle", known.every((value) => value === 0) ? "" : null);
    this.area.setAttribute("d", area);
    this.line.setAttribute("d", line);
    const now = values.length ? values.at(-1) : null;
    const text = known.length
      ? `${this.label} over five minutes: now ${format(now)}, at most ${format(Math.max(...known))}`
      : `${this.label} over five minutes: nothing known`;
    mark(this.svg, "aria-label", text);
  }
}

function meter() {
  const bar = make("i");
  const box = make("span", { class: "meter", "aria-hidden": "true" }, bar);
  return {
    box,
    set(share, tone) {
      const width = `${Math.round(1000 * Math.min(1, Math.max(0, share))) / 10}%`;
      if (bar.style.width !== width) bar.style.width = width;
      mark(box, "data-tone", tone);
    },
  };
}

function cell(label, options = {}, ...children) {
  return make("td", { role: "cell", "data-label": label, ...options }, ...children);
}

// Keeps one element per key, in the order of the items; elements stay, so focus and open details do too.
class Rows {
  constructor(parent, create) {
    this.parent = parent;
    this.create = create;
    this.rows = new Map();
  }

  update(items, key, context) {
    const seen = new Set();
    let at = this.parent.firstElementChild;
    for (const item of items) {
      const id = key(item);
      seen.add(id);
      let row = this.rows.get(id);
      if (!row) {
        row = this.create(item);
        this.rows.set(id, row);
      }
      for (const element of row.elements) {
        if (element === at) at = at.nextElementSibling;
        else this.parent.insertBefore(element, at);
      }
      row.update(item, context);
    }
    for (const [id, row] of this.rows) {
      if (seen.has(id)) continue;
      row.elements.forEach((element) => element.remove());
      this.rows.delete(id);
    }
    const empty = this.parent.closest("section").querySelector(".empty");
    empty.hidden = seen.size > 0;
    const table = this.parent.closest("table");
    if (table) table.hidden = seen.size === 0;
  }
}

// ---- backends ------------------------------------------------------------------------------------------------------

const STATES = {
  healthy: ["Healthy", "good"], degraded: ["Degraded", "warn"], unhealthy: ["Unhealthy", "bad"],
  recovering: ["Recovering", "warn"], unknown: ["Unknown", "off"],
};

function standing(backend) {
  if (backend.admin === "disabled") return ["Disabled", "off"];
  if (backend.admin === "draining") return ["Draining", "warn"];
  return STATES[backend.state] ?? [backend.state, "off"];
}

function remarks(backend) {
  const out = [];
  if (backend.suspect) out.push("being looked into");
  if (backend.stale) out.push("last known");
  if (backend.overridden) out.push("used all the same");
  if (backend.ramp !== null && backend.ramp < 1) out.push(`${Math.round(backend.ramp * 100)}% of its return`);
  if (backend.ejected_by.length) out.push(`avoided by ${backend.ejected_by.length}`);
  return out;
}

let rowNumber = 0;

function backendRow(first) {
  const id = `backend-${(rowNumber += 1)}`;
  const name = make("b", { text: first.name });
  const place = make("span", { class: "sub" });
  const pill = make("span", { class: "pill" });
  const said = make("span", { class: "sub" });
  const weight = make("b"), effective = make("span", { class: "sub" }), share = meter();
  const flying = make("b"), slots = make("span", { class: "sub" }), used = meter();
  const load = new Spark(`Load of ${first.name}`), speed = new Spark(`First byte of ${first.name}`, "info");
  const bytes = make("b"), slow = make("span", { class: "sub" });
  const tokens = cell("Tokens/s", { class: "number tokens" });
  const more = make("button", { class: "more", type: "button", "aria-expanded": "false", "aria-controls": id, "aria-label": `Details of ${first.name}` });
  const row = make("tr", { role: "row", "data-backend": first.name },
    make("td", { role: "rowheader", class: "name" }, name, place),
    make("td", { role: "cell", class: "state", "data-label": "State" }, pill, said),
    cell("Weight", { class: "third weight" }, weight, " ", effective, share.box),
    cell("In flight", { class: "third" }, flying, " ", slots, used.box),
    cell("Load, 5 min", { class: "draws" }, load.svg),
    cell("First byte", { class: "third bytes" }, bytes, slow),
    cell("Median, 5 min", { class: "draws" }, speed.svg),
    tokens,
    make("td", { role: "cell", class: "fold" }, more));
  const panel = new Details(first.name);
  const details = make("tr", { role: "row", class: "details", id, hidden: "" });
  details.append(make("td", { role: "cell", colspan: "9" }, panel.element));
  more.addEventListener("click", () => {
    const open = more.getAttribute("aria-expanded") !== "true";
    more.setAttribute("aria-expanded", String(open));
    row.classList.toggle("open", open);
    details.hidden = !open;
  });
  return {
    elements: [row, details],
    update(backend, { pools, now, operates, wanted }) {
      const [label, tone] = standing(backend);
      const hidden = wanted !== "" && !`${backend.name} ${backend.pool} ${backend.region}`.toLowerCase().includes(wanted);
      row.hidden = hidden;
      details.hidden = hidden || more.getAttribute("aria-expanded") !== "true";
      put(place, [backend.pool, backend.region].filter(Boolean).join(" · "));
      put(pill, label);
      mark(pill, "data-tone", tone);
      const notes = remarks(backend);
      const since = backend.admin !== "active" ? backend.state : backend.since ? `for ${age(now - backend.since)}` : "";
      put(said, notes.length ? notes.join(", ") : since);
      said.className = notes.length ? "tag sub" : "sub";
      put(weight, whole.format(backend.weight));
      const all = pools.get(backend.pool) || 0;
      const part = all > 0 ? backend.effective / all : 0;
      put(effective, `acts as ${tenth.format(backend.effective)} · ${Math.round(part * 100)}%`);
      share.set(part);
      const full = backend.max > 0 ? backend.in_flight / backend.max : 0;
      put(flying, whole.format(backend.in_flight));
      put(slots, `of ${whole.format(backend.max)}`);
      used.set(full, full >= 1 ? "bad" : full >= 0.8 ? "warn" : null);
      put(bytes, latency(backend.p50));
      put(slow, backend.p99 === null ? "" : `p99 ${latency(backend.p99)}`);
      put(tokens, backend.tokens === null ? "–" : whole.format(backend.tokens));
      panel.update(backend, now, operates);
    },
    draw(lines, points) {
      load.draw(lines?.load ?? [], points, (value) => (value === null ? "nothing" : tenth.format(value)), 1);
      speed.draw(lines?.p50 ?? [], points, latency, 1);
    },
  };
}

// What is folded away: why a backend is in its state, and for operators what can be done about it.
class Details {
  constructor(name) {
    this.name = name;
    this.facts = new Map();
    this.list = make("dl");
    this.weight = make("input", { type: "number", min: "0", max: "10000", step: "1", required: "", inputmode: "numeric", "aria-label": `Weight of ${name}` });
    this.form = make("form", {}, make("span", { text: "Weight", "aria-hidden": "true" }), this.weight, make("button", { type: "submit", text: "Set" }));
    this.drain = make("button", { type: "button" });
    this.disable = make("button", { type: "button" });
    this.acts = make("div", { class: "acts", role: "group", "aria-label": `Change ${name}` }, this.form, this.drain, this.disable);
    this.element = make("div", { class: "panel" }, this.list, this.acts);
    this.touched = false;
    this.weight.addEventListener("input", () => { this.touched = true; });
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.touched = false;
      this.change({ action: "weight", weight: Number(this.weight.value), etag: this.etag });
    });
    this.drain.addEventListener("click", () => this.change({ action: this.drain.dataset.action }));
    this.disable.addEventListener("click", () => {
      const action = this.disable.dataset.action;
      if (action === "disable" && !this.disable.classList.contains("sure")) {
        this.disable.classList.add("sure");
        put(this.disable, "Disable now?");
        this.asked = setTimeout(() => this.unsure(), 4_000);
        return;
      }
      this.unsure();
      this.change({ action });
    });
  }

  unsure() {
    clearTimeout(this.asked);
    this.disable.classList.remove("sure");
    put(this.disable, this.disable.dataset.action === "disable" ? "Disable" : "Enable");
  }

  fact(label, text) {
    let fact = this.facts.get(label);
    if (!fact) {
      fact = [make("dt", { text: label }), make("dd")];
      this.facts.set(label, fact);
      this.list.append(...fact);
    }
    fact.forEach((element) => { element.hidden = text === ""; });
    put(fact[1], text);
  }

  update(backend, now, operates) {
    this.etag = backend.etag;
    this.fact("Verdict", `${(STATES[backend.state] ?? [backend.state])[0]}: ${backend.reason || "nothing to say"}`);
    this.fact("Since", backend.since ? `${clock(backend.since)} (${age(now - backend.since)})` : "");
    this.fact("Declared", `${backend.admin}, weight ${whole.format(backend.weight)}, at most ${whole.format(backend.max)} at once`);
    this.fact("Avoided by", backend.ejected_by.join(", "));
    this.acts.hidden = !operates;
    if (!this.touched && document.activeElement !== this.weight) this.weight.value = backend.weight;
    const active = backend.admin === "active";
    this.drain.dataset.action = active ? "drain" : "undrain";
    this.drain.hidden = backend.admin === "disabled";
    put(this.drain, active ? "Drain" : "Undrain");
    this.disable.dataset.action = backend.admin === "disabled" ? "enable" : "disable";
    this.disable.classList.toggle("danger", backend.admin !== "disabled");
    if (!this.disable.classList.contains("sure")) put(this.disable, backend.admin === "disabled" ? "Enable" : "Disable");
  }

  async change(body) {
    const buttons = this.acts.querySelectorAll("button");
    buttons.forEach((button) => { button.disabled = true; });
    say(`${this.name}: ${body.action} …`);
    try {
      const answer = await fetch(`/page/backends/${encodeURIComponent(this.name)}`, {
        method: "POST",
        headers: { authorization: `Bearer ${feed.token}`, "content-type": "application/json" },
        body: JSON.stringify(body),
        credentials: "omit",
        redirect: "error",
      });
      const value = await answer.json();
      if (!answer.ok) throw new Error(value.error);
      const what = body.action === "weight" ? `weight ${body.weight}` : body.action;
      let text = `${this.name}: ${what}, applied on ${value.applied} of ${value.connected} gateways at revision ${value.revision} in ${value.elapsed_ms} ms`;
      if (value.pending.length) text += `; not yet: ${value.pending.join(", ")}`;
      if (value.refused.length) text += `; refused: ${value.refused.join("; ")}`;
      say(text, value.refused.length > 0);
    } catch (error) {
      this.touched = false;
      say(`${this.name}: ${error.message}`, true);
    } finally {
      buttons.forEach((button) => { button.disabled = false; });
    }
  }
}

function say(text, wrong = false) {
  $("said").classList.toggle("wrong", wrong);
  put($("said"), text);
}

// ---- limits, gateways ----------------------------------------------------------------------------------------------

const WHATS = { requests: "requests", tokens: "tokens", input_tokens: "input tokens", output_tokens: "output tokens", spend: "spend", concurrency: "at once" };
const SCOPES = { global: "everything", model: "model", tenant: "tenant", api_key: "key", tenant_model: "tenant and model",
  account: "account", account_model: "account and model" };

function limitRow() {
  const name = make("b"), what = make("span", { class: "sub" });
  const percent = make("span"), fill = meter();
  const used = cell("Used", { class: "number used" }), refused = cell("Refused/s", { class: "number refused" });
  const row = make("tr", { role: "row" },
    make("td", { role: "rowheader", class: "name" }, name, what),
    cell("Fill", { class: "fill" }, percent, fill.box), used, refused);
  return {
    elements: [row],
    update(limit) {
      put(name, limit.name || SCOPES[limit.kind] || limit.kind);
      const scope = limit.kind === "global" ? "" : `${SCOPES[limit.kind] ?? limit.kind}, `;
      put(what, `${scope}${WHATS[limit.what] ?? limit.what}${limit.shadow ? ", counts only" : ""}`);
      const share = limit.limit > 0 ? (limit.used ?? 0) / limit.limit : 1;
      put(percent, limit.used === null ? "–" : `${Math.round(share * 100)}%`);
      fill.set(share, share >= 1 || (limit.refused > 0 && !limit.shadow) ? "bad" : share >= 0.8 ? "warn" : null);
      const show = (value) => (limit.what === "spend" ? money.format(value / 1e6) : compact.format(value));
      put(used, `${limit.used === null ? "–" : show(limit.used)} of ${show(limit.limit)}`);
      put(refused, rate(limit.refused));
    },
  };
}

const SYNCS = { "in sync": "good", pending: "warn", stale: "bad", refuses: "bad", gone: "off" };

function gatewayRow() {
  const name = make("b"), build = make("span", { class: "sub" });
  const zone = cell("Zone"), pill = make("span", { class: "pill" });
  const revision = make("span"), lag = make("span", { class: "tag sub" });
  const held = cell("Held for", { class: "number" }), requests = cell("Req/s", { class: "number" }), flying = cell("In flight", { class: "number" });
  const row = make("tr", { role: "row" },
    make("td", { role: "rowheader", class: "name" }, name, build), zone,
    make("td", { role: "cell", class: "state", "data-label": "Sync" }, pill),
    cell("Revision", { class: "number" }, revision, lag), held, requests, flying);
  return {
    elements: [row],
    update(gateway, { now }) {
      put(name, gateway.id);
      put(build, gateway.role === "gateway" ? gateway.build : `${gateway.role}, ${gateway.build}`);
      put(zone, gateway.zone || "–");
      put(pill, gateway.sync);
      mark(pill, "data-tone", SYNCS[gateway.sync] ?? "off");
      mark(pill, "title", gateway.refuses.join("\n") || null);
      put(revision, String(gateway.revision));
      put(lag, gateway.lag > 0 ? `${gateway.lag} behind` : "");
      put(held, gateway.seen ? age(now - gateway.seen) : "–");
      put(requests, rate(gateway.requests));
      put(flying, gateway.in_flight === null ? "–" : whole.format(gateway.in_flight));
    },
  };
}

// ---- logs ----------------------------------------------------------------------------------------------------------

const TONES = { state: null, alarm: "bad", alarm_over: "good", isolated: "warn", suspect: "warn", acquitted: "good", stale: "warn" };

function eventRow(event) {
  let tone = TONES[event.kind] ?? null;
  if (event.kind === "state") tone = /unhealthy/i.test(event.message) ? "bad" : /degraded|recovering/i.test(event.message) ? "warn" : "good";
  const item = make("li", {}, make("time", { text: clock(event.time), datetime: new Date(event.time).toISOString() }),
    make("span", {}, make("b", { text: event.subject || "the cluster" }), ` ${event.message.replace(" -> ", " → ")}`));
  mark(item, "data-tone", tone);
  return { elements: [item], update() {} };
}

function shown(text) {
  if (text === "") return "default";
  try {
    const value = JSON.parse(text);
    return typeof value === "string" ? value.toLowerCase().replace(/^admin_state_/, "") : JSON.stringify(value);
  } catch {
    return text;
  }
}

function changeRow(entry) {
  const lines = entry.changes.flatMap((change) => {
    const fields = change.fields.map((field) => `${field.path} ${shown(field.before)} → ${shown(field.after)}`);
    return [`${change.what} ${change.action}${fields.length ? `: ${fields.join(", ")}` : ""}`];
  });
  if (entry.more > 0) lines.push(`and ${entry.more} more`);
  const text = make("span", {}, ...lines.map((line, i) => make(i ? "span" : "b", { text: line, class: i ? "sub" : "" })),
    make("span", { class: "sub", text: `${entry.actor} · ${entry.method} · revision ${entry.revision}` }));
  const item = make("li", {}, make("time", { text: clock(entry.time), datetime: new Date(entry.time).toISOString() }), text);
  return { elements: [item], update() {} };
}

// ---- the whole -----------------------------------------------------------------------------------------------------

const board = {
  lines: null,
  state: null,
  log: null,
  operates: false,
  wanted: "",
  allLimits: false,
  sparks: {
    requests: new Spark("Requests per second"), failed: new Spark("Failures per second", "bad"),
    refused: new Spark("Refusals per second", "warn"), in_flight: new Spark("Requests in flight"),
    p50: new Spark("Median time to the first byte", "info"),
  },
  backends: new Rows($("backends").tBodies[0], backendRow),
  limits: new Rows($("limits").tBodies[0], limitRow),
  gateways: new Rows($("gateways").tBodies[0], gatewayRow),
  events: new Rows($("events"), eventRow),
  changes: new Rows($("changes"), changeRow),

  tile(name, figure, under, alert = false) {
    const tile = $(`tile-${name}`);
    put(tile.querySelector("b"), figure);
    if (under !== null) put(tile.querySelector(".under"), under);
    tile.classList.toggle("alert", alert);
  },

  showState() {
    const { state } = this;
    if (!state || document.hidden) return;
    const { totals, backends, gateways } = state;
    const now = state.time;
    this.tile("requests", rate(totals.requests), `${compact.format(totals.tokens)} tokens/s written`);
    this.tile("failed", rate(totals.failed), null, totals.failed > 0);
    this.tile("refused", rate(totals.refused), null);
    const slots = backends.reduce((sum, backend) => sum + (backend.admin === "active" ? backend.max : 0), 0);
    this.tile("in_flight", whole.format(totals.in_flight), `of ${whole.format(slots)} slots`);
    this.tile("p50", latency(totals.p50), totals.p99 === null ? "" : `p99 ${latency(totals.p99)}`);
    const pools = new Map();
    for (const backend of backends) pools.set(backend.pool, (pools.get(backend.pool) || 0) + backend.effective);
    this.backends.update(backends, (backend) => backend.name, { pools, now, operates: this.operates, wanted: this.wanted });
    $("filter-label").hidden = backends.length < 9;
    const many = state.limits.length - LIMITS_FIRST;
    const limits = this.allLimits ? state.limits : state.limits.slice(0, LIMITS_FIRST);
    $("all-limits").hidden = many <= 0;
    put($("all-limits"), this.allLimits ? `Show the first ${LIMITS_FIRST} only` : `Show ${many} more`);
    this.limits.update(limits, (limit) => `${limit.kind}/${limit.name}/${limit.what}`, {});
    this.gateways.update(gateways, (gateway) => `${gateway.role}/${gateway.id}`, { now });
    const well = backends.filter((backend) => backend.admin === "active" && backend.state === "healthy").length;
    const active = backends.filter((backend) => backend.admin === "active").length;
    const unwell = active - well;
    put($("backends-note"), `${well} of ${active} active ones healthy`);
    const here = gateways.filter((gateway) => gateway.role === "gateway" && gateway.sync !== "gone");
    const synced = here.filter((gateway) => gateway.sync === "in sync").length;
    put($("gateways-note"), `${synced} of ${here.length} in sync at revision ${state.revision}`);
    put($("summary"), `revision ${state.revision} · ${synced} of ${here.length} gateways in sync · ${well} of ${active} backends healthy`);
    put($("build"), `Weir ${state.build} · store ${state.epoch}`);
    const title = unwell > 0 ? `${unwell} not healthy · Weir` : "Weir";
    if (document.title !== title) document.title = title;
  },

  showLines() {
    const { lines } = this;
    if (!lines || document.hidden) return;
    for (const [name, spark] of Object.entries(this.sparks)) {
      spark.draw(lines[name], lines.points, name === "p50" ? latency : rate, name === "p50" ? 1 : 0.5);
    }
    for (const [name, row] of this.backends.rows) row.draw(lines.backends[name], lines.points);
  },

  showLog() {
    if (!this.log || document.hidden) return;
    const first = this.events.rows.size === 0;
    const known = new Set([...this.events.rows.keys(), ...this.changes.rows.keys()]);
    this.events.update(this.log.events, (event) => `e${event.number}`, {});
    this.changes.update(this.log.changes, (entry) => `c${entry.sequence}`, {});
    if (known.size > 0) {
      for (const rows of [this.events.rows, this.changes.rows]) {
        for (const [id, row] of rows) if (!known.has(id)) row.elements[0].classList.add("fresh");
      }
    }
    // What was there before is no news; only what comes from now on is read out.
    if (first) setTimeout(() => $("events").setAttribute("aria-live", "polite"), 1_000);
  },

  take(event, value) {
    switch (event) {
      case "hello":
        this.operates = value.operates;
        put($("who"), `${value.name === value.role ? value.name : `${value.name}, ${value.role}`}${value.operates ? "" : ": reads only"}`);
        $("who").hidden = false;
        break;
      case "state":
        this.state = value;
        this.showState();
        if (this.backends.rows.size !== this.drawn) {
          this.drawn = this.backends.rows.size;
          this.showLines();
        }
        break;
      case "lines":
        this.lines = value;
        this.showLines();
        break;
      case "point":
        if (this.lines) {
          const push = (line, point) => {
            line.push(point ?? null);
            if (line.length > this.lines.points) line.shift();
          };
          for (const name of Object.keys(this.sparks)) push(this.lines[name], value[name]);
          for (const [name, point] of Object.entries(value.backends)) {
            const own = (this.lines.backends[name] ??= { load: [], p50: [] });
            push(own.load, point.load);
            push(own.p50, point.p50);
          }
          for (const name of Object.keys(this.lines.backends)) {
            if (!Object.hasOwn(value.backends, name)) delete this.lines.backends[name];
          }
          this.showLines();
        }
        break;
      case "log":
        this.log = value;
        this.showLog();
        break;
      case "refused":
        feed.refuse(value.error);
        break;
    }
  },
};

for (const [name, spark] of Object.entries(board.sparks)) $(`tile-${name}`).append(spark.svg);

// ---- the stream ----------------------------------------------------------------------------------------------------

const feed = {
  token: null,
  abort: null,
  tries: 0,
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
    this.tries = 0;
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
      // Jittered, so that the pages of a whole team do not come back in the same moment.
      const limit = Math.min(BACKOFF_MS[0] * 2 ** this.tries, BACKOFF_MS[1]);
      const pause = limit * (0.5 + Math.random() / 2);
      this.tries += 1;
      this.status("away", `reconnecting in ${Math.ceil(pause / 1000)} s`);
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  },

  // Reads one stream to its end. Returns why the token is refused, or nothing when it is worth another try.
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
      this.tries = 0;
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
  // A header holds printable ASCII; anything else is no token of ours.
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

// A link from `weir up` brings the token in the fragment, which no server is ever sent; it does not stay there.
const brought = /^#token=([\x21-\x7e]+)$/.exec(location.hash);
if (brought) history.replaceState(null, "", location.pathname);
const known = brought?.[1] ?? sessionStorage.getItem(TOKEN);
if (known) feed.open(known);
else feed.gate();
