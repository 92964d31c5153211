// The table of backends: rows, details, and changes by operators.

const STATES = {
  healthy: ["Healthy", "good"], degraded: ["Degraded", "warn"], unhealthy: ["Unhealthy", "bad"],
  recovering: ["Recovering", "warn"], unknown: ["Unknown", "off"],
};

function stateLabel(backend) {
  if (backend.admin === "disabled") return ["Disabled", "off"];
  if (backend.admin === "draining") return ["Draining", "warn"];
  return STATES[backend.state] ?? [backend.state, "off"];
}

function remarks(backend) {
  const out = [];
  if (backend.suspect) out.push("suspect");
  if (backend.stale) out.push("stale");
  if (backend.overridden) out.push("overridden");
  if (backend.slow_start !== null && backend.slow_start < 1) out.push(`slow start ${Math.round(backend.slow_start * 100)}%`);
  if (backend.ejected_by.length) out.push(`ejected by ${backend.ejected_by.length}`);
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
      const [label, tone] = stateLabel(backend);
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
      put(effective, `effective ${tenth.format(backend.effective)} · ${Math.round(part * 100)}%`);
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

// The details of a backend: the reason of its state, and for operators the changes.
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
    this.fact("Verdict", `${(STATES[backend.state] ?? [backend.state])[0]}: ${backend.reason || "no reason given"}`);
    this.fact("Since", backend.since ? `${clock(backend.since)} (${age(now - backend.since)})` : "");
    this.fact("Declared", `${backend.admin}, weight ${whole.format(backend.weight)}, ${whole.format(backend.max)} slots`);
    this.fact("Ejected by", backend.ejected_by.join(", "));
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
