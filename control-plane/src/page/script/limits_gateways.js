// The tables of limits and gateways.

const KINDS = { requests: "requests", tokens: "tokens", input_tokens: "input tokens", output_tokens: "output tokens", spend: "spend", concurrency: "concurrency" };
const SCOPES = { global: "everything", model: "model", tenant: "tenant", api_key: "key", tenant_model: "tenant and model",
  account: "account", account_model: "account and model" };

function limitRow() {
  const name = make("b"), kind = make("span", { class: "sub" });
  const percent = make("span"), fill = meter();
  const used = cell("Used", { class: "number used" }), total = make("span"), burst = make("span", { class: "tag sub" });
  used.append(total, burst);
  const refused = cell("Refused/s", { class: "number refused" });
  const row = make("tr", { role: "row" },
    make("td", { role: "rowheader", class: "name" }, name, kind),
    cell("Fill", { class: "fill" }, percent, fill.box), used, refused);
  return {
    elements: [row],
    update(limit) {
      put(name, limit.scope || SCOPES[limit.scope_kind] || limit.scope_kind);
      const scope = limit.scope_kind === "global" ? "" : `${SCOPES[limit.scope_kind] ?? limit.scope_kind}, `;
      put(kind, `${scope}${KINDS[limit.kind] ?? limit.kind}${limit.shadow ? ", counts only" : ""}`);
      const share = limit.burst > 0 ? limit.fill : 1;
      put(percent, limit.used === null ? "–" : `${Math.round(share * 100)}%`);
      fill.set(share, share >= 1 || (limit.refused > 0 && !limit.shadow) ? "bad" : share >= 0.8 ? "warn" : null);
      const show = (value) => (limit.kind === "spend" ? dollars(value) : compact.format(value));
      const unit = limit.period === "minute" ? "/min" : limit.period ? `/${limit.period}` : "";
      // Of a rate, what the last minute used; its bucket drains meanwhile and says little about use.
      const now = limit.last_minute ?? limit.used;
      const shown = now === null ? "–" : `${show(now)}${limit.last_minute === null ? "" : unit}`;
      put(total, `${shown} of ${show(limit.limit)}${unit}`);
      const left = limit.used === null ? "" : `, ${show(Math.max(0, limit.burst - limit.used))} left`;
      put(burst, limit.period === "minute" ? `burst ${show(limit.burst)}${left}` : "");
      put(refused, rate(limit.refused));
    },
  };
}

const SYNCS = { "in sync": "good", pending: "warn", stale: "bad", error: "bad", disconnected: "off" };

function gatewayRow() {
  const name = make("b"), build = make("span", { class: "sub" });
  const zone = cell("Zone"), pill = make("span", { class: "pill" });
  const revision = make("span"), lag = make("span", { class: "tag sub" });
  const held = cell("Age", { class: "number" }), requests = cell("Req/s", { class: "number" }), flying = cell("In flight", { class: "number" });
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
