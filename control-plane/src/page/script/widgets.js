// Widgets: sparklines, bars, table cells, and rows that follow a list of items.

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

// Keeps one element per key, in the order of the items. Elements are reused, so focus and open details stay.
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
