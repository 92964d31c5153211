// The live page. Reads one stream of server-sent events with fetch, so that the token is sent in a header, and writes every
// text with textContent, so that no name or message can become markup.
//
// The files of this directory are one script, in the order of page.rs: format, widgets, backends, limits_gateways, log,
// board, feed.
"use strict";

const TOKEN = "weir-token";
const SILENCE_MS = 10_000;
const BUFFER_MAX = 32 << 20;
const LIMITS_FIRST = 10;
const BACKOFF_MS = [1_000, 30_000];
const $ = (id) => document.getElementById(id);

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

// Writes only differences, so that an unchanged page needs no layout and does not disturb a screen reader.
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

// Micro-dollars; with more digits where two would show nothing of an amount that is not nothing.
function dollars(micro) {
  const amount = micro / 1e6;
  return amount > 0 && amount < 0.01 ? `$${amount.toFixed(6).replace(/0+$/, "")}` : money.format(amount);
}

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
