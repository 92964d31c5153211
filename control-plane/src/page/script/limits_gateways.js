// The tables of limits and gateways.

const KINDS = { requests: "requests", tokens: "tokens", input_tokens: "input tokens", output_tokens: "output tokens", spend: "spend", concurrency: "concurrency" };
const SCOPES = { global: "everything", model: "model", tenant: "tenant", api_key: "key", tenant_model: "tenant and model",
  account: "account", account_model: "account and model" };

function limitRow() {
  const name = make("b"), kind = make("span", { class: "sub" });
  const percent = make("span"), fill = meter();
  const used = cell("Used", { class: "number used" }), refused = cell("Refused/s", { class: "number refused" });
  const row = make("tr", { role: "row" },
    make("td", { role: "rowheader", class: "name" }, name, kind),
    cell("Fill", { class: "fill" }, percent, fill.box), used, refused);
  return {
    elements: [row],
    update(limit) {
      put(name, limit.scope || SCOPES[limit.scope_kind] || limit.scope_kind);
      const scope = limit.scope_kind === "global" ? "" : `${SCOPES[limit.scope_kind] ?? limit.scope_kind}, `;
      put(kind, `${scope}${KINDS[limit.kind] ?? limit.kind}${limit.shadow ? ", counts only" : ""}`);
      const share = limit.limit > 0 ? (limit.used ?? 0) / limit.limit : 1;
      put(percent, limit.used === null ? "–" : `${Math.round(share * 100)}%`);
      fill.set(share, share >= 1 || (limit.refused > 0 && !limit.shadow) ? "bad" : share >= 0.8 ? "warn" : null);
      const show = (value) => (limit.kind === "spend" ? money.format(value / 1e6) : compact.format(value));
      put(used, `${limit.used === null ? "–" : show(limit.used)} of ${show(limit.limit)}`);
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
