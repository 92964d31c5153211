// The lists of health events and of changes.

const TONES = { state: null, alarm: "bad", alarm_cleared: "good", isolated: "warn", suspect: "warn", suspect_cleared: "good", stale: "warn" };

function eventRow(event) {
  let tone = TONES[event.kind] ?? null;
  if (event.kind === "state") tone = /unhealthy/i.test(event.message) ? "bad" : /degraded|recovering/i.test(event.message) ? "warn" : "good";
  const item = make("li", {}, make("time", { text: clock(event.time), datetime: new Date(event.time).toISOString() }),
    make("span", {}, make("b", { text: event.subject || "the cluster" }), ` ${event.message.replace(" -> ", " → ")}${event.count > 1 ? ` (${event.count} times)` : ""}`));
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
